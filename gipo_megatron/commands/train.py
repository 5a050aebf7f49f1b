"""gipo train recipe=NAME [with=FRAGMENT,…] [key.path=value …] [dry_run=true]

One process. For several on this machine: gipo train --nproc N recipe=NAME …
For several machines: launch/multinode.sh; torchrun works, too.
dry_run=true prints what `gipo plan` prints, and starts nothing.

Exit code 0: complete, or interrupted with a checkpoint; 2: a mistake in the command, the recipe or
its files; 130: stopped by a second Ctrl-C.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from gipo_megatron.commands import RECIPES
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import RecipeErrors

STOPPED = "stopped at once; the same command continues from the last checkpoint"


def main(argv: Sequence[str]) -> int:
    words, dry = split_dry_run(argv)
    if dry:
        if os.environ.get("RANK", "0") == "0":
            from gipo_megatron.commands import plan

            plan.main(words)
        return 0
    # The recipe is checked before Megatron starts: a misspelt key costs a second, not a minute.
    from gipo_megatron.recipe.check import missing_loads
    from gipo_megatron.recipe.compose import compose

    recipe = compose(words, RECIPES, world=int(os.environ.get("WORLD_SIZE", "1")))
    if missing := missing_loads(recipe):
        raise RecipeErrors(recipe.name, missing)
    from gipo_megatron.training.runner import train

    train(recipe)
    return 0


def split_dry_run(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without dry_run=…, which is not a recipe key, and whether it was true.
    Raises UserError for another value."""
    values = [word.removeprefix("dry_run=") for word in argv if word.startswith("dry_run=")]
    if wrong := [value for value in values if value not in ("true", "false")]:
        raise UserError(
            f"dry_run is true or false, not {wrong[0]!r}", where="command line", fix="dry_run=true"
        )
    words = [word for word in argv if not word.startswith("dry_run=")]
    return words, values[-1:] == ["true"]
