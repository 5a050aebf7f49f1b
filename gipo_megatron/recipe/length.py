"""The length of a run: its steps, and the passes over the training rows that they make."""

from __future__ import annotations

from typing import Any

from gipo_megatron import registry
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.examples import Turn
from gipo_megatron.data.planted import World, split_sizes
from gipo_megatron.data.splits import part_of
from gipo_megatron.recipe.schema import Recipe

NOUNS = {"preference": "pairs", "sft": "rows", "prompt": "prompts"}


def kind_of(recipe: Recipe) -> str:
    """Return the kind of rows that the algorithm reads: preference | sft | prompt."""
    page: Any = registry.lookup("algorithm", recipe.algorithm["name"])
    return str(page.data)


def rows_a_step(recipe: Recipe) -> int:
    """Return the data rows that one step reads, on all replicas together."""
    return recipe.batch.prompts if kind_of(recipe) == "prompt" else recipe.batch.minibatch


def expected_rows(config: DataConfig, kind: str) -> int:
    """Return how many training rows there are before any is read: exactly for planted data, about
    as many as `data.rows` states for others; 0: not stated."""
    k, n = config.numbered_part
    if config.format != "planted":
        return config.rows // n
    count = sum(split_sizes(config.planted)["train"])
    if n > 1:
        prompts = [Turn("text", text) for text in World(config.planted).prompts["train"]]
        count = sum(part_of((prompt,), n) == k for prompt in prompts)
    return count * (1 if kind == "prompt" else config.planted.pairs_per_prompt)


def num_steps(recipe: Recipe, rows: int) -> int:
    """Return `run.steps`, or the steps in which `run.epochs` passes over `rows` training rows end;
    0 where both are unknown.

    The last step is as large as all others: it goes on with rows of the next pass.
    """
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None, "the recipe check requires one of the two"
    return -(-recipe.run.epochs * rows // rows_a_step(recipe))


def describe_length(recipe: Recipe, rows: int, stated: bool = False) -> str:
    """Return the steps and epochs over `rows` training rows in words; rows 0: unknown."""
    steps, size, noun = num_steps(recipe, rows), rows_a_step(recipe), NOUNS[kind_of(recipe)]
    if not steps:
        return f"run.epochs {recipe.run.epochs}, {size} {noun} a step (data.rows states no number)"
    words = f"{steps:,} steps × {size} {noun}"
    if not rows:
        return words
    count = f"about {rows:,} (data.rows)" if stated else f"{rows:,}"
    return f"{words} = {steps * size / rows:#.3g} epochs of {count}"


def stated_length(recipe: Recipe) -> tuple[str, int]:
    """Return the same words, and the number of steps, before any data are read: as far as the
    recipe states it."""
    rows = expected_rows(recipe.data, kind_of(recipe))
    stated = recipe.data.format != "planted"
    return describe_length(recipe, rows, stated), num_steps(recipe, rows)
