"""python tools/plan.py recipe=NAME [world=N] [with=FRAGMENT,…] [key.path=value …]      no GPU, no
weights

Who is where, what each GPU holds in each phase, how a batch is cut, how long an iteration may take,
and whether it all fits. Exit code 0: here is the plan, whatever its verdict; 2: no such recipe, or
one that cannot be cut like that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import fail

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    # a plan is the same wherever it is made, and takes nothing from a GPU that is busy
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gipo_megatron.planning.report import plan_text  # starts Megatron

    print(plan_text(argv, RECIPES), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
