"""torchrun --nproc-per-node N launch/evaluate.py recipe=NAME [with=FRAGMENT,…] [key.path=value …]

One process needs no torchrun. The same command continues an evaluation that was stopped: no prompt
gets two responses. Exit code 0: complete (or, with judge.name=human, ready for people); 2: an error
that the user can correct; 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gipo_megatron import environment

environment.set_defaults()  # before torch is imported, below

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import compose_evaluation, missing_weights
from gipo_megatron.recipe.problems import RecipeErrors, fail

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        recipe = compose_evaluation(argv, RECIPES, world=int(os.environ.get("WORLD_SIZE", "1")))
        if missing := missing_weights(recipe):
            raise RecipeErrors(recipe.name, missing)
        # Megatron: only now, a typo should not cost its start
        from gipo_megatron.evaluation.run import evaluate

        evaluate(recipe)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                "stopped; what was answered and judged so far stands, the same command continues",
                file=sys.stderr,
            )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
