"""torchrun --nproc-per-node N launch/train.py recipe=NAME [with=FRAGMENT,…] [key.path=value …]

One process needs no torchrun. Exit code 0: complete, or interrupted with a checkpoint; 2: something the user can mend;
130: stopped by a second Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
        recipe = compose(
            argv, RECIPES, world=int(os.environ.get("WORLD_SIZE", "1"))
        )  # before torch and Megatron start up: a typo costs a second, not a minute
        if missing := missing_loads(recipe):
            raise RecipeErrors(recipe.name, missing)
        from gipo_megatron.runner import train

        train(recipe)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
