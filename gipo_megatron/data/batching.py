"""Batches as a pure function of (seed, step): any number of replicas, and a resumed run, see the same data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.types import Pairs, Prompts, Sequences


class Dataset:
    """SIGNATURES FIRST (bodies follow). kind: what its rows can become: preference -> pairs, prompt -> prompts, sft -> examples."""

    kind: str
    sources: tuple[str, ...]  # sorted

    def __len__(self) -> int: ...

    @property
    def report(self) -> list[str]: ...  # lines: rows, drops by reason, truncations so far

    @property
    def fingerprint(self) -> str: ...  # sha256 of the rows: a resumed run can tell that its data changed

    # training: global row i of step k is row i // dp_size of replica i % dp_size
    def prompts(self, step: int, num_prompts: int, responses: int, dp_rank: int = 0, dp_size: int = 1) -> Prompts: ...
    def pairs(self, step: int, batch: int, dp_rank: int = 0, dp_size: int = 1) -> Pairs: ...
    def examples(self, step: int, batch: int, dp_rank: int = 0, dp_size: int = 1) -> Sequences: ...

    # evaluation: the rows named, in order; row counts are made equal over replicas by repeating the last row, valid[i] is False there
    def prompts_at(self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1) -> tuple[Prompts, Tensor]: ...
    def pairs_at(self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1) -> tuple[Pairs, Tensor]: ...
    def examples_at(self, indices: Sequence[int], dp_rank: int = 0, dp_size: int = 1) -> tuple[Sequences, Tensor]: ...


def load_data(config: DataConfig, tokenizer: Tokenizer, split: str, seed: int, kind: str) -> Dataset:
    """split: train | test | all; kind: preference | prompt | sft. Prompts.extras[i]["prompt"] is the prompt's text. UserError otherwise."""
    raise NotImplementedError
