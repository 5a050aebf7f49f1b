"""DPO's reference log-probs: computed for each batch, or once for all pairs, after which the model
is freed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gipo_megatron import ops
from gipo_megatron.roles import DataParallel, Reference, gather_rows
from gipo_megatron.tensors import Tensor, torch
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
    """The frozen policy that DPO compares with. `split` is train | held_out: row ids count within
    a split."""

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs: ...


@dataclass
class LiveReference:
    """A model that stays loaded: one forward pass over each batch."""

    model: Reference

    def refer(self, split: str, pairs: Pairs) -> ReferredPairs:
        return ReferredPairs(pairs, response_sums(self.model.logprobs(pairs), pairs))


@dataclass(frozen=True)
class Split:
    """The rows of a dataset that a run uses, and a function that reads some: (rows, dp rank,
    dp size) -> this replica's pairs, and which of them count."""

    rows: Sequence[int]
    pairs_at: Callable[[Sequence[int], int, int], tuple[Pairs, Tensor]]


@dataclass
class PrecomputedReference:
    """One pass over all pairs before the first of them is used; keep two numbers a pair and free
    the model.

    Every replica has all numbers, and the checkpoint stores them, so a resumed run builds no
    reference unless it uses more rows. `identity` names the reference and the data; numbers of
    another identity are computed again.
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
        """Compute the rows that are missing. Collective: they are the same on all replicas."""
        missing = {
            name: [row for row in split.rows if row not in self.sums.setdefault(name, {})]
            for name, split in self.splits.items()
        }
        if any(missing.values()):
            model = self.make()
            for name, rows in missing.items():
                for start in range(0, len(rows), self.batch):
                    self._compute(model, name, rows[start : start + self.batch])
            del model
            # modules are in reference cycles: without this their memory is freed some time later
            gc.collect()
        self.complete = True

    def _compute(self, model: Reference, name: str, rows: Sequence[int]) -> None:
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
