"""tokens/s of this project over Hugging Face's generate, with the same weights, prompts and end
tokens: lengths all equal, then ragged as in real rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.hf import export_weights
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.specs import Architecture, Parallel, Precision, Sampling
from gipo_megatron.types import Prompts
from tools.benchmark_common import hugging_face, interleave, ratio, show

SHAPES = {
    "small": Architecture(8, 256, 688, 8, 4, 32, 4096, 512),
    "smollm2_135m": Architecture(30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True),
}
PAD = 0


@dataclass(frozen=True)
class Load:
    """Prompts of at most `prompt` tokens, responses of at most `response`.

    Ragged: prompt lengths are uniform from a quarter of the longest to the longest. Each token of
    the vocabulary ends a response with probability 2 / response, so that most responses of a random
    model end early, at many places, and some are cut off.
    """

    rows: int
    prompt: int
    response: int
    ragged: bool

    def prompts(self, vocabulary: int) -> Prompts:
        g, ids = torch.Generator().manual_seed(0), torch.arange(self.rows)
        tokens = torch.randint(1, vocabulary, (self.rows, self.prompt), generator=g)
        shortest = max(1, self.prompt // 4) if self.ragged else self.prompt
        lengths = torch.randint(shortest, self.prompt + 1, (self.rows,), generator=g)
        lengths[0] = self.prompt
        padding = torch.arange(self.prompt) >= lengths[:, None]
        tokens = tokens.masked_fill(padding, PAD)
        return Prompts(tokens, lengths, ids, ids, ("",) * self.rows, ({},) * self.rows)

    def ends(self, vocabulary: int) -> list[int]:
        """Return the end tokens: none, or a random part of the vocabulary without the padding."""
        if not self.ragged:
            return []
        g = torch.Generator().manual_seed(1)
        order = torch.randperm(vocabulary - 1, generator=g) + 1
        return order[: max(1, 2 * vocabulary // self.response)].tolist()


@dataclass
class Sides:
    """Both ways to respond to the prompts of a load. Each returns the response lengths [B]."""

    chunks: list[nn.Module]
    model: LlamaForCausalLM
    architecture: Architecture
    mesh: Mesh
    load: Load

    def __post_init__(self) -> None:
        vocabulary = self.architecture.vocab_size
        self.prompts, self.ends = self.load.prompts(vocabulary), self.load.ends(vocabulary)
        # Hugging Face's side: left-padded
        shift = torch.arange(self.load.prompt) - self.load.prompt + self.prompts.lengths[:, None]
        self.attention = (shift >= 0).long()
        self.padded = self.prompts.tokens.gather(1, shift.clamp(min=0)) * self.attention

    def ours(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return response lengths [B], and the responses [B, N] with padding behind their ends."""
        rollout = generate(
            self.chunks,
            self.architecture,
            self.mesh,
            self.prompts,
            Sampling(self.load.response, temperature=temperature),
            self.ends or [-1],
            PAD,
            lambda ids: "",
        )
        counts = rollout.mask.sum(1)
        index = rollout.prompt_lengths[:, None] + torch.arange(self.load.response)
        tokens = rollout.tokens.gather(1, index.clamp(max=rollout.tokens.shape[1] - 1))
        return counts, tokens.masked_fill(torch.arange(self.load.response) >= counts[:, None], PAD)

    def theirs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the same of Hugging Face's generate, with its default cache."""
        choice: dict[str, Any] = {"do_sample": False}
        if temperature:
            choice = {"do_sample": True, "top_k": 0, "temperature": temperature}
        if self.ends:
            choice["eos_token_id"] = self.ends
        with torch.random.fork_rng(), torch.inference_mode():
            out = self.model.generate(
                self.padded,
                attention_mask=self.attention,
                max_new_tokens=self.load.response,
                pad_token_id=PAD,
                **choice,
            )[:, self.load.prompt :]
        ended = torch.isin(out, torch.tensor(self.ends, dtype=torch.long))
        counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        return counts, nn.functional.pad(out, (0, self.load.response - out.shape[1]), value=PAD)


def restless(chunks: list[nn.Module]) -> list[nn.Module]:
    """Return the chunks with matrices three times as large: greedy responses of random weights then
    do not repeat themselves after a few tokens, and end as sampled ones do."""
    for chunk in chunks:
        for p in chunk.parameters():
            if p.ndim > 1:
                p.data.mul_(3)
    return chunks


def measure(sides: Sides, temperature: float, repeats: int) -> list[object]:
    """Return one line of the table: mean response length, both tokens/s, and their ratio in each
    round. A side's tokens are those of its own responses: sampled ones differ."""
    counts: dict[str, float] = {}

    def side(name: str, respond: Callable[[float], tuple[Tensor, Tensor]]) -> Callable[[], None]:
        return lambda: counts.update({name: float(respond(temperature)[0].sum())})

    seconds = interleave(
        {"ours": side("ours", sides.ours), "hf": side("hf", sides.theirs)}, repeats
    )
    each = {name: [took / counts[name] for took in times] for name, times in seconds.items()}
    speeds = [f"{1 / statistics.median(each[name]):.0f}" for name in ("ours", "hf")]
    mean = counts["ours"] / sides.load.rows
    return [f"{mean:.1f}", *speeds, *(f"{x:.2f}" for x in ratio(each, "hf", "ours"))]


def run_generate(shape: str, rows: int, prompt: int, response: int, repeats: int) -> None:
    architecture, mesh = SHAPES[shape], Mesh.create(Parallel(), seed=0)
    chunks = restless(list(build_chunks(architecture, mesh, Precision("fp32"), seed=0)))
    model = hugging_face(dict(export_weights(chunks, mesh, architecture)), architecture)
    print(
        f"{shape}: {architecture.num_layers} layers, hidden {architecture.hidden_size}, vocabulary"
        f" {architecture.vocab_size}, fp32; batch {rows}, at most {prompt} + {response} tokens;"
        f" {torch.get_num_threads()} threads"
    )
    table: list[list[object]] = [
        ["", "mean length", "tokens/s", "HF tokens/s", "ratio", "lowest", "highest"]
    ]
    for ragged in (False, True):
        sides = Sides(chunks, model, architecture, mesh, Load(rows, prompt, response, ragged))
        lengths = "ragged" if ragged else "equal"
        (_, ours), (_, theirs) = sides.ours(0.0), sides.theirs(0.0)
        same = float((ours == theirs).float().mean())
        print(f"{lengths}: greedy tokens equal to Hugging Face's: {same:.4f}")
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            table.append([f"{lengths}, {name}", *measure(sides, temperature, repeats)])
    show(table)
    mesh.close()
