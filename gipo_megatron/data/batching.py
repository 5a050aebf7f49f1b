"""Batches as a pure function of (seed, step), so that any number of replicas and a resumed run see
the same data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gipo_megatron.data.config import FORMATS, DataConfig
from gipo_megatron.data.encoding import Encoded, Encoder
from gipo_megatron.data.examples import KINDS, Example, Tally
from gipo_megatron.data.planted import gold_reward, planted_examples
from gipo_megatron.data.rows import read_rows
from gipo_megatron.data.sources import open_sources
from gipo_megatron.data.splits import part_of
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.types import Pairs, Prompts, Sequences


class Dataset:
    """Rows in a fixed order, tokenised batch by batch. `gold` is the true reward of (prompt,
    response) where the data are generated, else None.

    Training: position p = step * batch + j is row permutation_e[p mod N] of epoch e = p // N.
    Global row j of a step's prompts is row j // dp_size of replica j mod dp_size; pairs and
    examples are dealt by length. Evaluation (`*_at`): the given rows in their order. The last row
    is repeated until all replicas have equally many, and the returned `valid` (bool [B]) is False
    for the repeats.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: Encoder,
        seed: int,
        kind: str,
        tally: Tally,
        gold: Callable[[str, str], float] | None = None,
    ) -> None:
        # preference -> pairs, sft -> examples, prompt -> prompts (which every kind gives)
        self.kind, self.gold = kind, gold
        self.rows = tuple(examples)
        self.sources = tuple(sorted({example.source for example in self.rows}))
        self._encoder, self._seed, self._tally = encoder, seed, tally
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def report(self) -> list[str]:
        """Files read, rows kept and dropped by reason, rows of each source, and cuts in the batches
        so far."""
        counts = Counter(example.source for example in self.rows)
        return [
            *self._tally.origins(),
            *self._tally.lines(),
            *(f"source {name}: {counts[name]} rows" for name in self.sources),
            *self._encoder.lines(),
        ]

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows, with the columns beside them: a resumed run notices other data."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------- training

    def order(self, step: int, batch: int) -> list[int]:
        """Return the dataset rows of the global batch `step`, [batch]."""
        size = len(self.rows)
        positions = range(step * batch, (step + 1) * batch)
        return [self._permutation(p // size)[p % size] for p in positions]

    def prompts(
        self, step: int, num_prompts: int, responses: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Prompts:
        """Return this replica's share of num_prompts * responses rows. Global row i has prompt
        i // responses."""
        count = num_prompts * responses
        order = self.order(step, num_prompts)
        mine = _share(count, dp_rank, dp_size)
        return self._prompts(
            [order[i // responses] for i in mine], [step * count + i for i in mine]
        )

    def pairs(self, step: int, batch: int, dp_rank: int = 0, dp_size: int = 1) -> Pairs:
        return self._pairs(self._dealt(self.order(step, batch), dp_rank, dp_size))

    def examples(self, step: int, batch: int, dp_rank: int = 0, dp_size: int = 1) -> Sequences:
        return self._examples(self._dealt(self.order(step, batch), dp_rank, dp_size))

    def _dealt(self, order: list[int], dp_rank: int, dp_size: int) -> list[int]:
        """Return one replica's rows of a global batch, in the batch's order: as many as every other
        replica's, and about as long.

        Dealt longest first, each round in the opposite direction (0 1 2, 2 1 0, …). Lengths are in
        characters, so that no replica tokenises the rows of the others.
        """
        places = range(len(order))
        longest = sorted(places, key=lambda place: self._characters(order[place]), reverse=True)
        seats = (dp_rank, dp_size - 1 - dp_rank)
        mine = [
            longest[first + seats[turn % 2]]
            for turn, first in enumerate(_share(len(order), 0, dp_size))
        ]
        return [order[place] for place in sorted(mine)]

    def _characters(self, row: int) -> int:
        example = self.rows[row]
        return sum(len(turn.text) for turn in example.prompt) + max(
            map(len, example.responses), default=0
        )

    # ----------------------------------------------------------------------------------- evaluation

    def prompts_at(
        self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1
    ) -> tuple[Prompts, Tensor]:
        """Return the prompts of rows `indices`. sample_id is the dataset row, so sampling noise
        depends neither on the number of replicas nor on the cut into pieces."""
        rows, valid = _padded(indices, dp_rank, dp_size)
        return self._prompts(rows, rows), valid

    def pairs_at(
        self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1
    ) -> tuple[Pairs, Tensor]:
        rows, valid = _padded(indices, dp_rank, dp_size)
        return self._pairs(rows), valid

    def examples_at(
        self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1
    ) -> tuple[Sequences, Tensor]:
        rows, valid = _padded(indices, dp_rank, dp_size)
        return self._examples(rows), valid

    @property
    def answered(self) -> bool:
        """Check that every row has a response, the chosen one of a pair."""
        return all(row.responses for row in self.rows)

    def answers(self, rows: Sequence[int]) -> Sequences:
        """Return `rows`, in their order, with their first responses."""
        return self._examples(list(rows))

    # ------------------------------------------------------------------------------ rows to tensors

    def _prompts(self, rows: list[int], sample_ids: list[int]) -> Prompts:
        encoded = {row: self._encoder.prompt(self.rows[row], row) for row in dict.fromkeys(rows)}
        ids = [encoded[row][0] for row in rows]
        return Prompts(
            tokens=self._pad(ids),
            lengths=torch.tensor([len(x) for x in ids]),
            prompt_id=torch.tensor(rows),
            sample_id=torch.tensor(sample_ids),
            source=tuple(self.rows[row].source for row in rows),
            extras=tuple({**self.rows[row].extras, "prompt": encoded[row][1]} for row in rows),
        )

    def _pairs(self, rows: list[int]) -> Pairs:
        assert self.kind == "preference", f"{self.kind} rows have no pairs"
        halves = [
            [self._encoder.sequence(self.rows[row], row, half) for row in rows] for half in (0, 1)
        ]
        width = max(len(encoded.tokens) for half in halves for encoded in half)
        chosen, rejected = (self._sequences(rows, half, width) for half in halves)
        return Pairs(chosen, rejected, tuple(self.rows[row].source for row in rows))

    def _examples(self, rows: list[int]) -> Sequences:
        assert all(self.rows[row].responses for row in rows), "prompts without responses"
        encoded = [self._encoder.sequence(self.rows[row], row, 0) for row in rows]
        return self._sequences(rows, encoded, max(len(x.tokens) for x in encoded))

    def _sequences(self, rows: list[int], encoded: list[Encoded], width: int) -> Sequences:
        lengths = torch.tensor([len(x.tokens) for x in encoded])
        prompt_lengths = torch.tensor([x.prompt_length for x in encoded])
        position = torch.arange(width)
        mask = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
        tokens = self._pad([x.tokens for x in encoded], width)
        return Sequences(tokens, mask, prompt_lengths, lengths, torch.tensor(rows))

    def _pad(self, ids: list[list[int]], width: int = 0) -> Tensor:
        width = max(width, max(len(x) for x in ids))
        pad = self._encoder.tokenizer.pad_id
        return torch.tensor([x + [pad] * (width - len(x)) for x in ids])

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            noise = torch.Generator().manual_seed(_seed(self._seed, epoch))
            # a batch spans at most a few epochs
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.rows), generator=noise).tolist()
        return self._orders[epoch]


def load_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    seed: int,
    kind: str,
    needed: bool = True,
) -> Dataset:
    """Read the rows of `split` (train | test | all) as `kind` (prompt | sft | preference).

    A preference source serves all three: each of its prompts once, its chosen responses, its pairs.
    An sft source serves prompts, too. Raises UserError for a format that cannot serve the kind, for
    the errors of sources.py and schemas.py, for a `data.part` without rows, when more than half of
    the rows is dropped and data.allow_drops is false, and when no row of a `needed` split is left.
    """
    if config.format not in FORMATS:
        raise UserError(
            f"unknown data.format {config.format!r}",
            where="data.format",
            fix=f"use {', '.join(FORMATS)}",
        )
    tally, encoder, gold = Tally(), Encoder(config, tokenizer), None
    if config.format == "planted":
        examples, gold = planted_examples(config.planted, split, kind), gold_reward
        tally.kept = len(examples)
    elif KINDS[config.format] < KINDS[kind]:
        raise UserError(
            f"data.format {config.format} has no {kind} rows",
            where="data.format",
            fix="give a source whose rows hold the responses",
        )
    else:
        examples = []
        for source in open_sources(config.path, list(config.source), split, config.format):
            examples += read_rows(source, config, split, kind, encoder, tally)
    too_many = 2 * tally.lost > tally.files.total() and not config.allow_drops
    if examples and too_many:
        raise UserError(
            f"{tally.lost} of {tally.files.total()} rows are dropped, more than half",
            where=config.path,
            fix=f"{tally.reasons()}\n         if that is right: data.allow_drops=true",
        )
    if split == "train":
        examples = _part(examples, config, tally)
    if not examples and (needed or too_many):
        other = "give a test file, or another data.held_out; run.eval_every=0 needs no test rows"
        raise UserError(
            f"no {split} rows left of {tally.read}",
            where=config.path,
            fix=tally.reasons() if tally.dropped else other,
        )
    return Dataset(examples, encoder, seed, kind, tally, gold)


def _part(examples: list[Example], config: DataConfig, tally: Tally) -> list[Example]:
    """Return the rows of `data.part`. Raises UserError where rows are left, but none of them in
    it."""
    k, n = config.numbered_part
    if n == 1:
        return examples
    chosen = [example for example in examples if part_of(example.prompt, n) == k]
    tally.part = f"part {config.part} by the first human turn: {len(chosen)} rows"
    if examples and not chosen:
        raise UserError(
            f"no train rows in part {config.part}: rows with one first human turn are in one part",
            where="data.part",
            fix="use fewer parts, or data.part='' for all rows",
        )
    return chosen


def _seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"data order {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _share(count: int, dp_rank: int, dp_size: int) -> range:
    """Return the global rows of one replica. Raises ValueError when the shares are not equal."""
    if count % dp_size:
        raise ValueError(f"a batch of {count} cannot be shared by {dp_size} replicas")
    return range(dp_rank, count, dp_size)


def _padded(indices: Sequence[int], dp_rank: int, dp_size: int) -> tuple[list[int], Tensor]:
    """Return (dataset rows, valid) of one replica. The last row fills the places past the end."""
    last = len(indices) - 1
    per_replica = -(-len(indices) // dp_size)
    places = [i * dp_size + dp_rank for i in range(per_replica)]
    valid = torch.tensor([place <= last for place in places])
    return [indices[min(place, last)] for place in places], valid
