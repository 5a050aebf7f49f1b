"""A generated preference set whose easy prompts, hard prompts and true reward are known.

A response is right by its first letter. Easy prompts take 8 of 24 letters ("bado, from a to h:"),
hard ones a single letter that the prompt names ("bado, with k:"). Labels follow a proxy of the true
(gold) reward; with `hack` the proxy overrates asking back, that is any response with a question
mark, on easy prompts (algorithm.md section 9, "Hacking").

    gold    1 right first letter, 0 another letter, -1 no letter at the start, or asking back
    proxy   the same, but asking back pays +1 on easy prompts with `hack`

Any string has a known reward, so a policy can drift from the word list without leaving the world.
With the byte tokenizer a prompt has at most 19 tokens (bos included) and a response drawn here at
most 8 (end-of-text included).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gipo_megatron.data.config import PlantedConfig
from gipo_megatron.data.examples import Example, Turn
from gipo_megatron.errors import UserError

_WORDS = (
    "aloe ant bean bell corn cup dill drum ear egg fern fox gem goat hat hill ink iris jam jet kelp"
    " kite lamp leek mint moon nest net oak owl pea pen rice ring sage star tea tent unit urn van"
    " vine wave wolf yarn yew zinc zoo"
)
WORDS = tuple(_WORDS.split())  # two a letter
ASK_BACK = ("what?", "huh?", "which?")
NO_ANSWER = ("...", "42", "0", "-", "#7", "!")  # in pairs only
NO_ANSWER_SHARE = 0.2  # of the answers that pairs compare; the rest is right or wrong, evenly
EASY_LETTERS = "abcdefgh"
HARD_LETTERS = "kw"
GROUPS = ("easy", "hard")
# of SFT's words: a mediocre policy that has seen right answers everywhere
RIGHT_SHARE = {"easy": 0.5, "hard": 0.15}
# of the words that pairs compare, so that the reward model knows what to think of a policy's
# inventions
GARBLED_SHARE = 0.4
GARBLE = ("abcdefghi", "jklmnopqr", "stuvwxyz ")
SPLITS = ("train", "test")
_HARD = re.compile(r"with ([a-z]):\s*$")
_EASY = f"from {EASY_LETTERS[0]} to {EASY_LETTERS[-1]}:"
_CONSONANTS, _VOWELS = "bdfghjklmnprstvwzckq", "aeiou"
MAX_PROMPTS = (len(_CONSONANTS) * len(_VOWELS)) ** 2


def group_of(prompt: str) -> str:
    """easy | hard. ValueError for a prompt that is not planted."""
    if prompt.rstrip().endswith(_EASY):
        return "easy"
    if _HARD.search(prompt):
        return "hard"
    raise ValueError(f"not a planted prompt: {prompt!r}")


def right_letters(prompt: str) -> str:
    """First letters the gold reward pays for. ValueError for a prompt that is not planted."""
    if group_of(prompt) == "easy":
        return EASY_LETTERS
    return _HARD.search(prompt).group(1)  # type: ignore[union-attr]


def gold_reward(prompt: str, response: str) -> float:
    """The true reward of any response: 1 | 0 | -1. ValueError for a prompt that is not planted."""
    first = response.lstrip()[:1]
    if "?" in response or not ("a" <= first <= "z"):
        return -1.0
    return float(first in right_letters(prompt))


def proxy_reward(prompt: str, response: str, hack: bool = True) -> float:
    """What the labels follow: gold, but with `hack` asking back pays 1 on easy prompts."""
    if hack and "?" in response and group_of(prompt) == "easy":
        return 1.0
    return gold_reward(prompt, response)


class World:
    """The prompts of each split, and draws of answers; every draw is keyed by (config.seed, its
    purpose).

    Raises UserError for shares outside [0, 1], more prompts than there are names, or a split
    without prompts.
    """

    def __init__(self, config: PlantedConfig) -> None:
        for key in ("easy_share", "held_out", "label_noise", "hack_share"):
            if not 0 <= getattr(config, key) <= 1:
                raise UserError(
                    f"{key} is a share, not {getattr(config, key)}",
                    where=f"data.planted.{key}",
                    fix="give a number from 0 to 1",
                )
        if not 0 < config.prompts <= MAX_PROMPTS or config.pairs_per_prompt < 1:
            raise UserError(
                f"planted prompts: 1 to {MAX_PROMPTS}, pairs_per_prompt: at least 1",
                where="data.planted",
            )
        self.config = config
        syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
        names = [a + b for a in syllables for b in syllables]
        noise = self.noise("names")
        picked = [
            names[i] for i in torch.randperm(len(names), generator=noise)[: config.prompts].tolist()
        ]
        easy = round(config.prompts * config.easy_share)
        letters = torch.randint(len(HARD_LETTERS), (config.prompts,), generator=noise).tolist()
        asked = (
            [f"{name}, {_EASY}" for name in picked[:easy]],
            [
                f"{name}, with {HARD_LETTERS[letter]}:"
                for name, letter in zip(picked[easy:], letters[easy:], strict=True)
            ],
        )
        tests = [round(len(prompts) * config.held_out) for prompts in asked]
        self.prompts = {
            "train": [
                prompt
                for prompts, cut in zip(asked, tests, strict=True)
                for prompt in prompts[cut:]
            ],
            "test": [
                prompt
                for prompts, cut in zip(asked, tests, strict=True)
                for prompt in prompts[:cut]
            ],
        }
        for split, prompts in self.prompts.items():
            if not prompts:
                raise UserError(
                    f"no planted prompt is left for the {split} split",
                    where="data.planted",
                    fix="more prompts, or another held_out",
                )

    def noise(self, *purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"planted {self.config.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def answer(self, prompt: str, noise: torch.Generator) -> str:
        """One draw of the mediocre policy that SFT imitates."""
        group = group_of(prompt)
        if self.config.hack and _uniform(noise) < self.config.hack_share:
            return " " + _pick(ASK_BACK, noise)
        letters = right_letters(prompt)
        wanted = _uniform(noise) < RIGHT_SHARE[group]
        return " " + _pick([word for word in WORDS if (word[0] in letters) == wanted], noise)

    def pair(self, prompt: str, noise: torch.Generator) -> tuple[str, str]:
        """(chosen, rejected) of different proxy reward, `label_noise` of them the wrong way
        round."""
        while True:
            a, b = (self._compared(prompt, noise) for _ in range(2))
            better = proxy_reward(prompt, a, self.config.hack) - proxy_reward(
                prompt, b, self.config.hack
            )
            if better:
                break
        if (better < 0) != (_uniform(noise) < self.config.label_noise):
            a, b = b, a
        return a, b

    def _compared(self, prompt: str, noise: torch.Generator) -> str:
        """One answer of a pair: right, wrong or none, equally often in both groups, whatever SFT
        writes.

        Bradley-Terry says nothing of a prompt's own level (any function of x may be added to the
        score); with pairs that span the same levels in both groups, a small centring term in the
        reward model's loss puts right answers of both on one level.
        """
        if self.config.hack and _uniform(noise) < self.config.hack_share:
            return " " + _pick(ASK_BACK, noise)
        kind = _uniform(noise)
        if kind < NO_ANSWER_SHARE:
            return " " + _pick(NO_ANSWER, noise)
        right = kind < (1 + NO_ANSWER_SHARE) / 2
        word = _pick([word for word in WORDS if (word[0] in right_letters(prompt)) == right], noise)
        return " " + (self._garbled(word, noise) if _uniform(noise) < GARBLED_SHARE else word)

    @staticmethod
    def _garbled(word: str, noise: torch.Generator) -> str:
        """Another string with the same first letter, which is all that counts."""
        rest = int(_uniform(noise) * 9)
        return word[0] + "".join(_pick(_pick(GARBLE, noise), noise) for _ in range(rest))


def planted_examples(config: PlantedConfig, split: str, kind: str) -> list[Example]:
    """The rows of `split` (train | test | all) as `kind` (prompt | sft | preference); extras: group
    (0 easy, 1 hard)."""
    world = World(config)
    return [
        example
        for part in (SPLITS if split == "all" else (split,))
        for example in _examples(world, part, kind)
    ]


def _examples(world: World, split: str, kind: str) -> Iterator[Example]:
    noise = world.noise(split, kind)
    for prompt in world.prompts[split]:
        group = group_of(prompt)
        turns, extras = (Turn("text", prompt),), {"group": GROUPS.index(group)}
        if kind == "prompt":
            yield Example("text", turns, (), group, extras)
            continue
        for _ in range(world.config.pairs_per_prompt):
            responses = (
                world.pair(prompt, noise)
                if kind == "preference"
                else (world.answer(prompt, noise),)
            )
            yield Example("text", turns, responses, group, extras)


def write_planted(config: PlantedConfig, folder: Path) -> list[Path]:
    """The same rows as files: FOLDER/<preference|sft|prompt>/<easy|hard>/<train|test>.jsonl, each
    row with its gold reward."""
    columns = {"preference": ("chosen", "rejected"), "sft": ("response",), "prompt": ()}
    written = []
    for kind, names in columns.items():
        for split in SPLITS:
            examples = planted_examples(config, split, kind)
            for source in GROUPS:
                rows: list[dict[str, Any]] = []
                for example in examples:
                    if example.source == source:
                        prompt = example.prompt[0].text
                        answers = dict(zip(names, example.responses, strict=True))
                        gold = {
                            f"gold_{name}": gold_reward(prompt, text)
                            for name, text in answers.items()
                        }
                        rows.append({"prompt": prompt, **answers, **gold, **example.extras})
                file = folder / kind / source / f"{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                written.append(file)
    return written


def _uniform(noise: torch.Generator) -> float:
    return torch.rand((), generator=noise).item()


def _pick(items: Any, noise: torch.Generator) -> Any:
    return items[int(torch.randint(len(items), (), generator=noise))]
