"""One evaluation: recipe -> every policy's responses to every prompt -> verdicts -> results.
Continues whatever run.dir holds.

all ranks: prompts, responses (batch by batch, on disk after each) ─▶ rank 0 alone, no process group
left: judge, count, report
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gipo_megatron.data.tokenizer import check_vocabulary
from gipo_megatron.environment import line as environment_line
from gipo_megatron.evaluation.audit import audit_responses
from gipo_megatron.evaluation.comparison_report import write_comparison
from gipo_megatron.evaluation.evaluation_figures import write_evaluation_figures
from gipo_megatron.evaluation.judges.human import HumanJudge, duels_from_ratings
from gipo_megatron.evaluation.judges.openai import OpenAIJudge
from gipo_megatron.evaluation.recipe import EvaluationRecipe
from gipo_megatron.evaluation.respond import (
    Answering,
    check_origin,
    find_weights,
    origin,
    shared_tokenizer,
)
from gipo_megatron.evaluation.results import build_results, duels_from_verdicts, write_results
from gipo_megatron.evaluation.store import Presentation, ResponseStore, VerdictStore, write_prompts
from gipo_megatron.evaluation.tables import latex_table, markdown_table
from gipo_megatron.evaluation.tasks import LoadedTask, read_task
from gipo_megatron.evaluation.types import (
    FAILED,
    TIE,
    Comparison,
    Duel,
    Judge,
    Response,
    TaskPrompt,
    Verdict,
)
from gipo_megatron.files import write_json, write_text
from gipo_megatron.megatron.mesh import Mesh, mesh_session
from gipo_megatron.recipe import registry
from gipo_megatron.reports.audit_page import audit_document
from gipo_megatron.telemetry.console import Display
from gipo_megatron.training import run_folder

CHUNK = 256  # presentations judged between two writes
ANNOTATION = "annotation"  # folder of the pages that people rate
# A judge's keys that do not change what it says.
TRANSPORT = (
    "base_url",
    "api_key_env",
    "concurrency",
    "timeout",
    "retries",
    "backoff",
    "prompt_price",
    "completion_price",
)
Responses = dict[str, list[Response]]


def evaluate(recipe: EvaluationRecipe) -> None:
    """The whole evaluation a recipe describes. Collective until all prompts are answered. Raises
    UserError for what the user can mend."""
    with mesh_session(recipe.parallel, deterministic=recipe.precision.deterministic) as mesh:
        prompts = answer_on(mesh, recipe)
    if mesh.is_main:  # a judge may take hours, in which nobody waits in a collective
        conclude(recipe, prompts)


def evaluate_on(mesh: Mesh, recipe: EvaluationRecipe) -> None:
    """The same on a mesh that is there; several may follow each other in one world."""
    prompts = answer_on(mesh, recipe)
    if mesh.is_main:
        conclude(recipe, prompts)


def answer_on(mesh: Mesh, recipe: EvaluationRecipe) -> list[TaskPrompt]:
    """Every policy's responses to every prompt, in run.dir/responses. Collective. Returns the
    prompts."""
    directory = Path(recipe.run.dir)
    weights = find_weights(recipe)
    tokenizer, notes = shared_tokenizer(recipe, weights)
    check_vocabulary(
        tokenizer, recipe.model.architecture.vocab_size, where="model.architecture.vocab_size"
    )
    tasks = {
        task.name: read_task(task, recipe.data_root, tokenizer, recipe.generation.max_response)
        for task in recipe.tasks
    }
    prompts = [prompt for task in tasks.values() for prompt in task.prompts]
    answering = Answering(
        recipe,
        mesh,
        tokenizer,
        weights,
        {i: ids for task in tasks.values() for i, ids in task.ids.items()},
    )
    stores: dict[str, ResponseStore] = {}
    if mesh.is_main:
        run_folder.check_writable(directory)
        directory.mkdir(parents=True, exist_ok=True)
        check_origin(directory, origin(recipe, weights, tokenizer))
        # verdicts of another judge are refused now, not after hours
        judge, _ = _judge_and_verdicts(recipe)
        write_text(directory / "recipe.yaml", recipe.to_yaml())
        write_json(directory / "environment.json", run_folder.environment())
        write_prompts(directory / "prompts.jsonl", prompts)
        _announce(recipe, tasks, notes)
        stores = {name: _store(directory, name) for name in recipe.policies}
        if isinstance(judge, OpenAIJudge) and any(
            len(store.done) < len(prompts) for store in stores.values()
        ):
            judge.secret()  # a key that is not there is missed now, too
    done = _from_main(mesh, {name: store.done for name, store in stores.items()})
    left = {name: [p for p in prompts if p.prompt_id not in done[name]] for name in recipe.policies}
    measures = answering.measures() if any(left.values()) else None
    shown = Display(mesh.is_main)
    for name, rest in left.items():
        if not rest or measures is None:
            continue
        with shown.counting(f"{name}: responses", len(prompts), len(prompts) - len(rest)) as more:
            for responses in answering.answers(name, rest, measures):
                if mesh.is_main:
                    stores[name].append(responses)
                more(len(responses))
    mesh.barrier()
    return prompts


def _store(directory: Path, policy: str) -> ResponseStore:
    return ResponseStore(directory / "responses" / f"{policy}.jsonl")


def _from_main(mesh: Mesh, value: Any) -> Any:
    """Rank 0's value on every rank: only its disk counts."""
    box = [value]
    if mesh.world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _announce(
    recipe: EvaluationRecipe, tasks: Mapping[str, LoadedTask], notes: Sequence[str]
) -> None:
    p = recipe.parallel
    shares = (
        f"{recipe.world} processes = tensor {p.tensor} × pipeline {p.pipeline} × data"
        f" {recipe.data_parallel}"
    )
    print(
        f"{recipe.name}: {recipe.subject} against {', '.join(recipe.opponents)}; {shares}; writes"
        f" to {recipe.run.dir}"
    )
    print(f"  {environment_line()}")
    for name, task in tasks.items():
        print("".join(f"  {name}: {line}\n" for line in task.lines), end="")
    for warning in dict.fromkeys((*recipe.warnings, *notes)):
        print(f"  warning: {warning}", flush=True)


# ------------------------------------------------------------------------ verdicts and what follows


def conclude(recipe: EvaluationRecipe, prompts: Sequence[TaskPrompt]) -> None:
    """Judges what is not judged yet, then writes results.json, the tables and the report. One
    process, without models."""
    directory, shown = Path(recipe.run.dir), Display()
    asked = {(p.task, p.prompt_id) for p in prompts}
    responses = {
        name: [r for r in _store(directory, name).read() if (r.task, r.prompt_id) in asked]
        for name in recipe.policies
    }
    judge, store = _judge_and_verdicts(recipe)
    if isinstance(judge, HumanJudge):
        if not judge.ratings:
            _ask_people(recipe, judge, prompts, responses)
            return
        duels = duels_from_ratings(
            recipe.subject, recipe.opponents, prompts, responses, judge.read(directory / ANNOTATION)
        )
    else:
        assert store is not None
        ask(judge, comparisons(recipe, prompts, responses), store, shown)
        duels = duels_from_verdicts(
            recipe.subject, recipe.opponents, prompts, responses, store.read()
        )
    write(recipe, prompts, responses, duels, judge)
    shown.line(f"{recipe.name}: complete; {directory / 'report.html'}, {directory / 'table.md'}")


def _judge_and_verdicts(recipe: EvaluationRecipe) -> tuple[Judge, VerdictStore | None]:
    """The judge, and what it said so far (None of people: their ratings are files of their own).

    UserError where another judge said it, or of another subject: verdicts of two do not mix.
    """
    directory = Path(recipe.run.dir)
    judge: Judge = registry.build("judge", recipe.judge, {"directory": directory})
    if isinstance(judge, HumanJudge):
        return judge, None
    about = judge.about()
    said = {key: value for key, value in recipe.judge.items() if key not in TRANSPORT} | {
        "subject": recipe.subject
    }
    said |= {"prompts": about["prompts"]} if "prompts" in about else {}
    return judge, VerdictStore(directory / "verdicts.jsonl", json.dumps(said, sort_keys=True))


def comparisons(
    recipe: EvaluationRecipe, prompts: Sequence[TaskPrompt], responses: Responses
) -> dict[Presentation, Comparison]:
    """Both presentations of every prompt, for every opponent."""
    answers = {(name, r.task, r.prompt_id): r for name, rows in responses.items() for r in rows}
    found = {}
    for p in prompts:
        for opponent in recipe.opponents:
            for subject_first in (True, False):
                names = (recipe.subject, opponent) if subject_first else (opponent, recipe.subject)
                first, second = (answers[name, p.task, p.prompt_id] for name in names)
                scores = {}
                if "score" in first.figures and "score" in second.figures:
                    scores = {
                        "first_score": first.figures["score"],
                        "second_score": second.figures["score"],
                    }
                key = (p.task, opponent, p.prompt_id, subject_first)
                found[key] = Comparison(
                    p.task, p.kind, p.prompt_id, p.question, first.text, second.text, scores
                )
    return found


def ask(
    judge: Judge, asked: dict[Presentation, Comparison], store: VerdictStore, shown: Display
) -> None:
    """What is not in `store` yet, and what failed: a failure is no answer. A chunk is on disk as
    soon as it is judged.

    Two equal texts are a tie that nobody is asked about.
    """
    before = store.read()
    equal = {
        key: Verdict(TIE, "equal texts")
        for key, pair in asked.items()
        if key not in before and pair.first == pair.second
    }
    store.append(equal)
    left = [
        key
        for key in asked
        if key not in equal and (key not in before or before[key].choice == FAILED)
    ]
    if not left:
        return
    with shown.counting(f"{judge.name}: verdicts", len(asked), len(asked) - len(left)) as more:
        for start in range(0, len(left), CHUNK):
            keys = left[start : start + CHUNK]
            verdicts = judge.judge([asked[key] for key in keys], more)
            store.append(dict(zip(keys, verdicts, strict=True)))


def _ask_people(
    recipe: EvaluationRecipe, judge: HumanJudge, prompts: Sequence[TaskPrompt], responses: Responses
) -> None:
    folder = Path(recipe.run.dir) / ANNOTATION
    pages = judge.write_pages(
        folder, [c for key, c in comparisons(recipe, prompts, responses).items() if key[-1]]
    )
    print(
        f"{recipe.name}: {len(pages)} pages to be rated in {folder}:"
        f" {', '.join(page.name for page in pages)}; key.json stays here"
    )
    print(
        "  give each rater one page; the same command with judge.ratings=[FILE, …] (their exports)"
        " writes the results",
        flush=True,
    )


def write(
    recipe: EvaluationRecipe,
    prompts: Sequence[TaskPrompt],
    responses: Responses,
    duels: Sequence[Duel],
    judge: Judge,
) -> None:
    """results.json, the tables, figures/, report.html and, where groups are inferred,
    audit.html."""
    directory, report = Path(recipe.run.dir), recipe.report
    results = build_results(
        recipe.subject,
        recipe.opponents,
        prompts,
        responses,
        duels,
        judge.about(),
        bootstrap=report.bootstrap,
        seed=report.seed,
    )
    write_results(directory / "results.json", results)
    write_text(directory / "table.md", markdown_table(results))
    write_text(directory / "table.tex", latex_table(results))
    drawn = write_evaluation_figures(results, responses, directory / "figures")
    audits = (
        [audit_responses(prompts, responses[recipe.subject])] if "critic" in recipe.models else []
    )
    write_comparison(
        directory,
        results,
        prompts,
        responses,
        duels,
        {path.stem: path for path in drawn if path.suffix == ".png"},
        audits,
    )
    if audits:
        write_text(directory / "audit.html", audit_document(audits))
