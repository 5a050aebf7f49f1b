"""gipo plan recipe=NAME [world=N] [with=FRAGMENT,…] [key.path=value …]      no GPU, no weights

Prints the rank layout, the memory of each phase on the heaviest rank, the batch arithmetic, the
work and estimated time of an iteration, and whether it fits.

Exit code 0: the plan was made, whether it fits or not; 2: a mistake in the command or the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from gipo_megatron.commands import RECIPES


def main(argv: Sequence[str]) -> int:
    # A plan is the same on every machine, and takes no memory of a GPU that is in use.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gipo_megatron.planning.report import plan_text  # starts Megatron

    print(plan_text(argv, RECIPES), end="", flush=True)
    return 0
