"""Prompts, sampling settings and Hugging Face's own responses: shared by the one-process and the
multi-process generation tests."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.kv_budget import Room
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.specs import Architecture, Precision, Sampling
from gipo_megatron.types import Prompts, Rollout
from gipo_megatron.weights.hf_config import architecture_from_config
from tests.parity import families

STEPS = 16
PAD = 0
NEVER = families.VOCAB  # an end-of-text id that no model produces
LENGTHS = {"equal": [7] * 6, "ragged": [3, 9, 1, 12, 5, 12]}
SAMPLINGS = {
    "plain": Sampling(STEPS, seed=5, step=3),
    "truncated": Sampling(
        STEPS, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=5, step=3
    ),
}
GREEDY = Sampling(STEPS, temperature=0.0)
FULL = "llama"  # the family whose every case is run at every layout; of the others two


def cases(family: str) -> list[tuple[str, str]]:
    """(kind of prompts, run) pairs; runs: greedy without end-of-text, stopped (greedy with it), and
    the samplings."""
    if family == FULL:
        return [(kind, run) for kind in LENGTHS for run in ("greedy", "stopped", *SAMPLINGS)]
    return [("ragged", "stopped"), ("ragged", "truncated")]


def sampling_of(run: str) -> Sampling:
    return SAMPLINGS.get(run, GREEDY)


def prompts(kind: str) -> Prompts:
    lengths = torch.tensor(LENGTHS[kind])
    rows, width = len(lengths), int(lengths.max())
    tokens = torch.randint(1, families.VOCAB, (rows, width), generator=families.generator(11))
    tokens = torch.where(torch.arange(width) < lengths[:, None], tokens, PAD)
    ids = torch.arange(rows)
    return Prompts(
        tokens,
        lengths,
        ids + 100,
        ids + 7000,
        tuple(f"s{i}" for i in range(rows)),
        tuple({"row": i} for i in range(rows)),
    )


def spell(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def load(name: str, mesh: Mesh) -> tuple[list[nn.Module], Architecture]:
    """The family's Hugging Face weights at this mesh."""
    reference = families.hf_model(name)
    architecture = architecture_from_config(reference.config.to_dict(), name)
    chunks = build_chunks(architecture, mesh, Precision("fp32"), initialise=False)
    load_hf(
        {
            k: v
            for k, v in reference.state_dict().items()
            if not (architecture.tied_embeddings and k == "lm_head.weight")
        },
        chunks,
        mesh,
        architecture,
    )
    return list(chunks), architecture


def respond(
    chunks: list[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    rows: Prompts,
    sampling: Sampling,
    eos: int,
    cache: int = 2**30,
) -> Rollout:
    return generate(chunks, architecture, mesh, rows, sampling, [eos], PAD, spell, room=Room(cache))


def responses(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


def hf_greedy(
    model: PreTrainedModel, rows: Prompts, eos: int | None, penalty: float = 1.0
) -> list[list[int]]:
    """Hugging Face's responses, each up to and with its end-of-text token. Left-padded, as HF wants
    it."""
    width = rows.tokens.shape[1]
    shift = torch.arange(width) - (width - rows.lengths[:, None])
    mask = (shift >= 0).long()
    tokens: Tensor = rows.tokens.gather(1, shift.clamp(min=0)) * mask
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
        repetition_penalty=penalty,
    )[:, width:]
    rows_out = []
    for row in out.tolist():
        rows_out.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows_out


def frequent(answers: list[list[int]]) -> int:
    """A token to serve as end-of-text: it ends some rows early, at different places, and not all of
    them."""
    best = max(
        {t for row in answers for t in row},
        key=lambda t: (
            0 < sum(t in row for row in answers) < len(answers),
            sum(t in row for row in answers),
            -t,
        ),
    )
    return best


@cache
def end_ids() -> dict[str, int]:
    """{family/kind of prompts: an end-of-text id that stops some greedy responses}."""
    kinds = {(name, kind) for name in families.FAMILIES for kind, _ in cases(name)}
    return {
        f"{name}/{kind}": frequent(hf_greedy(families.hf_model(name), prompts(kind), None))
        for name, kind in sorted(kinds)
    }
