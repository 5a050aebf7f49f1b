"""torchrun --nproc-per-node N launch/train.py recipe=NAME [with=FRAGMENT,…] [key.path=value …]
[dry_run=true]

One process needs no torchrun. dry_run=true prints what tools/plan.py prints, and starts nothing.

Exit code 0: complete, or interrupted with a checkpoint; 2: something the user can mend;
130: stopped by a second Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gipo_megatron import environment

environment.set_defaults()  # before torch is imported, below

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.check import missing_loads
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.problems import RecipeErrors, fail

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        argv, dry = split_dry_run(argv)
        if dry:
            show_plan(argv)
            return 0
        recipe = compose(
            argv, RECIPES, world=int(os.environ.get("WORLD_SIZE", "1"))
        )  # before torch and Megatron start up: a typo costs a second, not a minute
        if missing := missing_loads(recipe):
            raise RecipeErrors(recipe.name, missing)
        from gipo_megatron.training.runner import train

        train(recipe)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
    return 0


def split_dry_run(argv: list[str]) -> tuple[list[str], bool]:
    """The words without dry_run=…, which is no recipe key, and whether it was true. Raises
    UserError for another value."""
    values = [word.removeprefix("dry_run=") for word in argv if word.startswith("dry_run=")]
    if wrong := [value for value in values if value not in ("true", "false")]:
        raise UserError(
            f"dry_run is true or false, not {wrong[0]!r}", where="command line", fix="dry_run=true"
        )
    return [word for word in argv if not word.startswith("dry_run=")], bool(values) and values[
        -1
    ] == "true"


def show_plan(argv: list[str]) -> None:
    """For as many processes as torchrun started, else as many as the recipe is for. The first of
    them prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is made on the meta device
    from gipo_megatron.planning.report import plan_text

    print(plan_text(argv, RECIPES), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
