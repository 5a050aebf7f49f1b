"""What DPO's reference says of the pairs: asked for each batch as it comes, or for all of them once
and then let go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.roles import DataParallel, Reference, gather_rows
from gipo_megatron.types import Pairs, Rows, Sequences, TokenStats


@dataclass(frozen=True)
class ReferredPairs(Rows):
    """Pairs with the reference's log-probs of both responses, summed over their tokens."""

    pairs: Pairs
    reference: Tensor  # [B, 2], chosen and rejected, nats

    @property
    def sequences(self) -> Sequences:
        return self.pairs.sequences

    @property
    def row_ids(self) -> Tensor:
        return self.pairs.row_ids

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B, 2]"""
        return torch.stack([self.pairs.chosen.mask.sum(1), self.pairs.rejected.mask.sum(1)], 1)


def response_sums(output: TokenStats, batch: Rows) -> Tensor:
    """log p(response | prompt) of both halves of each pair, [B, 2]: chosen, rejected."""
    mask = batch.sequences.mask.to(output.logprobs.device)
    return torch.stack(ops.sequence_sum(output.logprobs, mask).chunk(2), 1)


class PairReference(Protocol):
    """The frozen policy, as DPO asks it. `split` is train | held_out: row ids count within a
    split."""

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class LiveReference:
    """A model that stays: one forward pass over each batch."""

    model: Reference

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs:
        return ReferredPairs(pairs, response_sums(self.model.logprobs(pairs), pairs))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Split:
    """The rows of a dataset that a run uses, and how to get some of them: (rows, dp rank, dp size)
    -> this replica's, and which count."""

    rows: Sequence[int]
    pairs_at: Callable[[Sequence[int], int, int], tuple[Pairs, Tensor]]


@dataclass
class PrecomputedReference:
    """One pass over all pairs before the first of them is used, two numbers a pair; then the model
    is freed.

    The numbers are whole on every replica and travel with the checkpoint, so a resumed run builds
    no reference, unless it uses more rows. `identity` says what they follow from: those of another
    reference, or of other data, are not taken over but made anew.
    """

    make: Callable[[], Reference]
    splits: Mapping[str, Split]
    dp: DataParallel
    batch: int  # pairs of all replicas in one forward pass
    identity: str
    # split -> row -> chosen, rejected
    sums: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict, init=False)
    complete: bool = field(default=False, init=False)

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs:
        if not self.complete:
            self._complete()
        known = self.sums[split]
        return ReferredPairs(pairs, torch.tensor([known[row] for row in pairs.row_ids.tolist()]))

    def _complete(self) -> None:
        """Collective: all replicas lack the same rows."""
        lacking = {
            name: [row for row in split.rows if row not in self.sums.setdefault(name, {})]
            for name, split in self.splits.items()
        }
        if any(lacking.values()):
            model = self.make()
            for name, rows in lacking.items():
                for start in range(0, len(rows), self.batch):
                    self._ask(model, name, rows[start : start + self.batch])
            del model
            # modules lie in cycles: without this their memory would come back some time later
            gc.collect()
        self.complete = True

    def _ask(self, model: Reference, name: str, rows: Sequence[int]) -> None:
        pairs, _ = self.splits[name].pairs_at(rows, self.dp.rank, self.dp.size)
        sums = response_sums(model.logprobs(pairs), pairs)
        ids, chosen, rejected = (
            gather_rows(x, self.dp).tolist()
            for x in (pairs.row_ids.to(sums.device), *sums.unbind(1))
        )
        self.sums[name] |= {
            int(row): (c, r) for row, c, r in zip(ids, chosen, rejected, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        tables = {
            name: {
                "rows": torch.tensor(list(known)),
                "sums": torch.tensor(list(known.values()), dtype=torch.float64),
            }
            for name, known in self.sums.items()
        }
        return {"identity": self.identity, "splits": tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and state["identity"] == self.identity:
            tables = state["splits"].items()
            self.sums = {
                name: dict(zip(t["rows"].tolist(), map(tuple, t["sums"].tolist()), strict=True))
                for name, t in tables
            }
