"""One training step of SFT, reward model or DPO: this project's side of tools/benchmark.py peers
and growth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.algorithms.dpo import DPO
from gipo_megatron.algorithms.pair_reference import ReferredPairs
from gipo_megatron.algorithms.reward_model import RewardModelling
from gipo_megatron.algorithms.sft import SFT
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronRewardModel
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.types import Pairs, Sequences
from tools.benchmark_peers_rows import BETA, OPTIMISATION, Cell, Row


class GivenReference:
    """Reference log-probs that come with the rows, as after DPO's one pass over all pairs."""

    def __init__(self) -> None:
        self.sums: Tensor = torch.empty(0)

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs:
        return ReferredPairs(pairs, self.sums)


class Ours:
    """The algorithm's page over one engine; a step is all that training does between two
    batches."""

    def __init__(self, cell: Cell, folder: str) -> None:
        self.task = cell.task
        self.mesh = Mesh.create(Parallel(), seed=0)
        role, weights = ("reward", "reward") if cell.task == "rm" else ("actor", "policy")
        engine = build_engine(
            role,
            self.mesh,
            cell.model.architecture,
            Precision("fp32"),
            load=f"{folder}/{weights}" if folder else "random",
            micro_batch=None,
            micro_tokens=cell.model.micro_tokens,
            optimisation=OPTIMISATION,
        )
        self.reference = GivenReference()
        self.page = self._page(engine)
        self.batch: Any = None
        self.steps = 0

    def _page(self, engine: Any) -> Any:
        runtime: dict[str, Any] = {"timer": lambda name: nullcontext()}
        if self.task == "rm":
            reward = MegatronRewardModel(engine)
            return RewardModelling(
                centre=0.0, reward=reward, pairs=lambda step: self.batch, **runtime
            )
        actor = MegatronActor(engine, eos_id=-1, pad_id=0, decode=str)
        if self.task == "sft":
            return SFT(actor=actor, examples=lambda step: self.batch, **runtime)
        return DPO(
            beta=BETA,
            actor=actor,
            reference=self.reference,
            pairs=lambda step: self.batch,
            **runtime,
        )

    def collate(self, rows: Sequence[Row]) -> None:
        """Put the rows in tensors; not part of a step."""
        width = max(len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows)
        chosen = sequences([(row.prompt, row.chosen) for row in rows], width)
        if self.task == "sft":
            self.batch = chosen
            return
        rejected = sequences([(row.prompt, row.rejected) for row in rows], width)
        self.batch = Pairs(chosen, rejected, ("",) * len(rows))
        self.reference.sums = torch.tensor([row.reference for row in rows])

    def step(self) -> float:
        """Make one optimizer step on the batch and return its loss."""
        result = self.page.step(self.steps)
        self.steps += 1
        assert not result.skipped, "a step was left out: its loss or gradient is not finite"
        return result.metrics[f"{self.task}/loss"].result()

    def close(self) -> None:
        self.mesh.close()


def sequences(rows: Sequence[tuple[list[int], list[int]]], width: int) -> Sequences:
    """Return (prompt, response) rows of token ids, right-padded with 0."""
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (prompt, response) in zip(tokens, rows, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor(prompt + response)
    prompts = torch.tensor([len(prompt) for prompt, _ in rows])
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    places = torch.arange(width)
    mask = (places >= prompts[:, None]) & (places < lengths[:, None])
    return Sequences(tokens, mask, prompts, lengths, torch.arange(len(rows)))
