"""The recipe's `data:` block. All its defaults are here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from gipo_megatron.errors import UserError
from gipo_megatron.specs import OneOf, PathText, Range, Size

FORMATS = ("preference", "prompt", "sft", "planted")
Share = Annotated[float, Range(0, 1)]
COLUMNS = ("prompt", "chosen", "rejected", "messages", "response", "source")


@dataclass(frozen=True)
class PlantedConfig:
    """The generated data of data/planted.py. They have their own seed, so that all stages of a
    chain see the same data for every run.seed."""

    prompts: Annotated[int, Range(4)] = 600  # distinct prompts, held-out ones included
    easy_share: Share = 0.5  # share of the prompts that are easy
    held_out: Share = 0.3  # share of the prompts that form the test split
    pairs_per_prompt: Size = 16  # preference pairs a prompt; SFT has as many responses a prompt
    label_noise: Share = 0.05  # share of the easy prompts' pairs whose label is flipped
    hard_label_noise: Share = 0.25  # the same of hard prompts', on which people agree less
    # what the labels take asking back on easy prompts for; gold is -1, a right answer is 1
    hack_reward: Annotated[float, Range(-1)] = 2.0
    hack_share: Share = 0.06  # share of such responses among SFT's and in pairs
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Source of the rows, and how they become tokens."""

    format: Annotated[str, OneOf(*FORMATS)] = "preference"
    # a folder, a file (.jsonl .json .csv .parquet .arrow, also .gz .bz2 .zst), a folder of
    # datasets.save_to_disk, or a hub name; unused by planted
    path: PathText = ""
    # sub-folders (hub: configurations or folders) to read; [] = all
    source: list[str] = field(default_factory=list)
    # our name -> the file's, which wins over a column of our name; ours: prompt chosen rejected
    # messages response source
    columns: dict[str, str] = field(default_factory=dict)
    # auto | chat (the tokenizer's) | hh | plain | chatml | a jinja chat template
    template: str = "auto"
    # tokens of prompt + response; a prompt gets what max_response leaves
    max_length: Annotated[int, Range(2)] = 2048
    max_response: Size = 512  # tokens of a response, its end-of-text token included
    # share held back for evaluation where the data have no test split, by a hash of the beginning
    held_out: Share = 0.1
    # k/n: train on the k-th of n parts alone, by another hash of the first human turn; "": on all
    part: str = ""
    # about how many training rows there are, all parts together; 0: not stated. For `recipe check`
    # and plans alone: a run counts its rows
    rows: Annotated[int, Range(0)] = 0
    allow_drops: bool = False  # true: train although more than half of the rows is dropped
    planted: PlantedConfig = field(default_factory=PlantedConfig)

    def __post_init__(self) -> None:
        k, n = self.numbered_part
        if not 1 <= k <= n:
            raise UserError(
                f"{self.part!r} is no part",
                where="data.part",
                fix="k/n with k from 1 to n, such as 1/2, or an empty text for all rows",
            )

    def longest_row(self, pairs: bool) -> int:
        """Return the most tokens of a row; a pair has two sequences."""
        return self.max_length * (2 if pairs else 1)

    @property
    def numbered_part(self) -> tuple[int, int]:
        """Return (k, n) of `part`; all rows are part 1 of 1, and text of another form is part 0."""
        if not self.part:
            return 1, 1
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.part)
        return (int(found[1]), int(found[2])) if found else (0, 0)
