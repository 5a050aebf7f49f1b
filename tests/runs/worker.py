"""Whole runs, one after the other in one world: worker.py CASES.json; a case is the argument list
of launch/train.py or launch/evaluate.py, with "+report" where the run's report is to be written.

CASES.out.json holds, for each case, what it printed and, after an error of the user, the
message.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest.mock import patch

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"


def report(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Leave a training run's figures out: they take longer than its steps."""
    left_out = patch("gipo_megatron.training.run_folder.close_run")
    return contextlib.nullcontext() if wanted else left_out


def main() -> None:
    from gipo_megatron.errors import UserError
    from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation, is_evaluation
    from gipo_megatron.megatron.mesh import Mesh
    from gipo_megatron.recipe.compose import compose
    from gipo_megatron.training.runner import train_on

    mesh, outcomes, cases = None, [], Path(sys.argv[1])
    for case in json.loads(cases.read_text()):
        arguments = [word for word in case if word != "+report"]
        recipe = (
            compose_evaluation(arguments, RECIPES)
            if is_evaluation(arguments, RECIPES)
            else compose(arguments, RECIPES)
        )
        mesh = Mesh.create(
            recipe.parallel, 0 if isinstance(recipe, EvaluationRecipe) else recipe.run.seed
        )
        error, printed = "", io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), report("+report" in case):
                if isinstance(recipe, EvaluationRecipe):
                    # seconds, which training need not wait
                    from gipo_megatron.evaluation.run import conclude, respond

                    prompts = respond(mesh, recipe)
                    if mesh.is_main:
                        conclude(recipe, prompts)
                else:
                    train_on(mesh, recipe)
        except UserError as problem:
            error = str(problem)
        outcomes.append({"printed": printed.getvalue(), "error": error})
        if error and mesh.world > 1:
            sys.exit(error)
    if mesh is not None:
        if mesh.is_main:
            cases.with_suffix(".out.json").write_text(json.dumps(outcomes))
        mesh.close()


if __name__ == "__main__":
    main()
