"""Models, cells and token ids of each batch, on which both sides of tools/benchmark.py peers
train."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from gipo_megatron.specs import Architecture, Optimisation
from gipo_megatron.weights.hf_config import config_for

FIRST_ID = 300  # ids below it are bytes and special tokens of the byte tokenizer
BETA = 0.1  # of DPO
OPTIMISATION = Optimisation(lr=1e-4, weight_decay=0.01)
# Sequence lengths are log-normal: the median and the spread of logarithms are those of Anthropic
# HH's dialogues, at 4.3 characters a token. Of a model with another longest length than LONGEST
# they are in proportion.
MEDIAN, SPREAD, SHORTEST, LONGEST = 130, 0.8, 16, 512


@dataclass(frozen=True)
class Model:
    """A size to compare at."""

    name: str
    architecture: Architecture
    rows: int  # sequences in a batch; a pair has two
    longest: int
    micro_tokens: int  # of ours in one pass; TRL has the whole batch in one
    rounds: int = 3


MODELS = {
    "tiny": Model("tiny", Architecture(2, 32, 64, 4, 2, 8, 512, 128), 8, 48, 192),
    "8M": Model("8M", Architecture(8, 256, 688, 8, 4, 32, 4096, 512), 16, 512, 1024),
    "smollm2": Model(
        "SmolLM2-135M",
        Architecture(
            30, 576, 1536, 9, 3, 64, 49152, 8192, rope_base=100000.0, tied_embeddings=True
        ),
        10,
        256,
        1024,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    model: Model
    task: str  # sft | rm | dpo
    masked: bool = False  # the first half of each row is a prompt, which SFT's loss leaves out
    equal: bool = False  # all sequences have the same length
    accumulate: bool = False  # TRL too has micro-batches: four, in the order of the rows

    @property
    def title(self) -> str:
        words = {"sft": "SFT", "rm": "reward model", "dpo": "DPO"}[self.task]
        if self.masked:
            words += ", half of the tokens masked"
        if self.equal:
            words += ", equal lengths"
        return words + (", TRL in micro-batches too" if self.accumulate else "")

    @property
    def samples(self) -> int:
        """Rows of a batch: sequences, or pairs."""
        return self.model.rows if self.task == "sft" else self.model.rows // 2


def cells(model: Model) -> list[Cell]:
    """Return the lines of a model's table; of a small one the last two show what padding costs
    TRL."""
    sft = Cell(model, "sft")
    found = [sft, replace(sft, masked=True), Cell(model, "rm"), Cell(model, "dpo")]
    if model.architecture.num_layers > 8:
        return found
    return [*found, replace(sft, accumulate=True), replace(sft, equal=True)]


@dataclass(frozen=True)
class Row:
    """Token ids; SFT reads prompt and chosen. `reference`: given log-probs of both responses."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]


def batch_of(cell: Cell, number: int) -> list[Row]:
    """Return batch `number` of a cell, the same in every process.

    A batch's lengths are quantiles of the distribution, one from each of equally likely parts. A
    prompt is half of its first sequence, or one token where SFT masks none.
    """
    model, kind = cell.model, f"{cell.model.name} {cell.title} {number}"
    chance = random.Random(zlib.crc32(kind.encode()))
    lengths = _lengths(model, cell.equal, chance)
    per_row = 1 if cell.task == "sft" else 2
    rows = []
    for start in range(0, len(lengths), per_row):
        whole, other = lengths[start], lengths[start + per_row - 1]
        prompt = whole // 2 if cell.masked or cell.task != "sft" else 1
        sizes = (prompt, whole - prompt, max(other - prompt, other // 2))
        ids = [[chance.randrange(FIRST_ID, model.architecture.vocab_size) for _ in range(size)]
               for size in sizes]  # fmt: skip
        guess = -math.log(model.architecture.vocab_size)
        chosen, rejected = (guess * size + chance.gauss(0, 5) for size in sizes[1:])
        rows.append(Row(*ids, (chosen, rejected)))
    return rows


def _lengths(model: Model, equal: bool, chance: random.Random) -> list[int]:
    if equal:
        return [model.longest // 2] * model.rows
    draws = [(i + chance.random()) / model.rows for i in range(model.rows)]
    shape = NormalDist(math.log(MEDIAN * model.longest / LONGEST), SPREAD)
    lengths = [min(max(round(math.exp(shape.inv_cdf(u))), SHORTEST), model.longest) for u in draws]
    chance.shuffle(lengths)
    return lengths


class Folders:
    """Hugging Face folders of a model's policy and reward model, in fp32."""

    def __init__(self, model: Model, out: str, policy: str | None) -> None:
        torch.manual_seed(0)
        if policy is None:
            config = LlamaConfig(**config_for(model.architecture, "float32"))
            LlamaForCausalLM(config).save_pretrained(f"{out}/policy")
        else:
            Path(out, "policy").symlink_to(Path(policy).resolve())
        reward = LlamaForSequenceClassification.from_pretrained(
            f"{out}/policy", num_labels=1, dtype=torch.float32
        )
        reward.save_pretrained(f"{out}/reward")
