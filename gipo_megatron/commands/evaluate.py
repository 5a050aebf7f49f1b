"""gipo evaluate recipe=NAME [with=FRAGMENT,…] [key.path=value …]

One process. For several: torchrun --nproc-per-node N -m gipo_megatron.cli evaluate recipe=NAME …
The same command continues an evaluation that was stopped: finished responses are kept.

Exit code 0: complete (or, with judge.name=human, the annotation pages are written); 2: a mistake in
the command, the recipe or its files, or a judge that failed for more than half of a task's prompts;
130: stopped by Ctrl-C.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from gipo_megatron.commands import RECIPES
from gipo_megatron.recipe.problems import RecipeErrors

STOPPED = "stopped; finished responses and verdicts are kept, and the same command continues"


def main(argv: Sequence[str]) -> int:
    from gipo_megatron.evaluation.recipe import compose_evaluation, missing_weights

    recipe = compose_evaluation(argv, RECIPES, world=int(os.environ.get("WORLD_SIZE", "1")))
    if missing := missing_weights(recipe):
        raise RecipeErrors(recipe.name, missing)
    # Megatron starts here, after the recipe was checked
    from gipo_megatron.evaluation.run import evaluate

    evaluate(recipe)
    return 0
