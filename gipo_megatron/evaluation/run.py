"""One evaluation: recipe -> responses of every policy to every prompt -> verdicts -> results.

An interrupted evaluation in run.dir is continued.

all ranks: prompts, responses (on disk after each batch) ─▶ rank 0 alone, without a process group:
verdicts, results, report
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gipo_megatron import registry
from gipo_megatron.components.protocols import RolloutServer, Sampler
from gipo_megatron.components.rollout import VLLMRollout
from gipo_megatron.data.tokenizer import Tokenizer, check_vocabulary
from gipo_megatron.environment import line as environment_line
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.audit import audit_responses
from gipo_megatron.evaluation.comparison_report import write_comparison
from gipo_megatron.evaluation.evaluation_figures import write_evaluation_figures
from gipo_megatron.evaluation.origin import (
    check_origin,
    find_weights,
    not_independent,
    origin,
    shared_tokenizer,
)
from gipo_megatron.evaluation.recipe import EvaluationRecipe
from gipo_megatron.evaluation.respond import Responder
from gipo_megatron.evaluation.results import (
    build_results,
    comparisons_from_verdicts,
    pairs_in_both_orders,
    write_results,
)
from gipo_megatron.evaluation.store import ResponseStore, VerdictStore, write_prompts
from gipo_megatron.evaluation.tables import latex_table, markdown_table
from gipo_megatron.evaluation.tasks import LoadedTask, read_task
from gipo_megatron.evaluation.types import (
    FAILED,
    TIE,
    Comparison,
    HeadToHead,
    Judge,
    Pair,
    PairOrder,
    TaskPrompt,
    Verdict,
)
from gipo_megatron.files import write_json, write_text
from gipo_megatron.megatron.mesh import Mesh, mesh_session
from gipo_megatron.megatron.watch import enter
from gipo_megatron.reports.audit_page import audit_document
from gipo_megatron.screen import shown
from gipo_megatron.telemetry.console import Display
from gipo_megatron.training import run_folder
from gipo_megatron.training.run_lock import RunLock
from gipo_megatron.weights.sources import stored_hf_files

CHUNK = 256  # pairs judged between two writes
REASON = 200  # characters of a failed verdict's text in an error


def evaluate(recipe: EvaluationRecipe) -> None:
    """Run the evaluation of a recipe. Collective until all responses are drawn.

    Raises UserError for errors that the user can correct.
    """
    deterministic = recipe.precision.deterministic
    with RunLock(Path(recipe.run.dir)) as lock:
        with mesh_session(recipe.parallel, deterministic=deterministic) as mesh:
            mesh.from_main(lock.take)
            prompts = respond(mesh, recipe)
        if mesh.is_main:  # a judge may take hours: no other rank waits in a collective meanwhile
            conclude(recipe, prompts)


# ---------------------------------------------------------------------------------------- responses


def respond(mesh: Mesh, recipe: EvaluationRecipe) -> list[TaskPrompt]:
    """Write every policy's responses to run.dir/responses. Collective. Returns the prompts."""
    weights = find_weights(recipe)
    tokenizer, notes = shared_tokenizer(recipe, weights)
    check_vocabulary(
        tokenizer, recipe.model.architecture.vocab_size, where="model.architecture.vocab_size"
    )
    length = recipe.generation.max_response
    tasks = [read_task(task, recipe.data_root, tokenizer, length) for task in recipe.tasks]
    prompts = [prompt for task in tasks for prompt in task.prompts]
    ids = {prompt_id: tokens for task in tasks for prompt_id, tokens in task.ids.items()}
    closing = ExitStack()
    sampler = build_sampler(recipe, mesh, tokenizer, weights, closing)
    responder = Responder(recipe, mesh, tokenizer, weights, ids, sampler)
    stores: dict[str, ResponseStore] = {}
    if mesh.is_main:
        stores = open_folder(recipe, prompts, origin(recipe, weights, tokenizer))
        announce(recipe, tasks, [*notes, *not_independent(recipe)])
    # only rank 0's disk counts
    done = mesh.from_main(lambda: {name: store.done for name, store in stores.items()})
    left = {name: [p for p in prompts if p.prompt_id not in done[name]] for name in recipe.policies}
    if any(left.values()):
        with closing:
            sampler.start()
            _draw(responder, left, len(prompts), stores)
    mesh.barrier()
    return prompts


def _draw(
    responder: Responder,
    left: Mapping[str, Sequence[TaskPrompt]],
    total: int,
    stores: Mapping[str, ResponseStore],
) -> None:
    """Draw and store the responses that are left; `stores` are rank 0's. Collective."""
    scores = responder.load_scores()
    shown = Display(responder.mesh.is_main)
    for name, rest in left.items():
        if not rest:
            continue
        enter(f"responses of {name}")
        with shown.counting(f"{name}: responses", total, total - len(rest)) as more:
            for responses in responder.responses(name, rest, scores):
                if responder.mesh.is_main:
                    stores[name].append(responses)
                more(len(responses))


def build_sampler(
    recipe: EvaluationRecipe,
    mesh: Mesh,
    tokenizer: Tokenizer,
    weights: Mapping[str, Path],
    closing: ExitStack,
) -> Sampler:
    """Return what draws the responses, as `generation` describes. `closing` ends what it starts."""
    drawn = recipe.generation

    def connect(sampler: VLLMRollout) -> RolloutServer:
        # imported here: evaluations without a server need no HTTP client
        from gipo_megatron.training import rollout_server

        policy = rollout_server.Policy(
            recipe.model.architecture,
            recipe.precision.dtype,
            tokenizer,
            stored_hf_files(weights[f"policies.{recipe.subject}.load"]),
            max(task.max_length for task in recipe.tasks),
        )
        folder = Path(recipe.run.dir) / "vllm"
        return rollout_server.connect(sampler, policy, mesh, folder, closing)

    runtime = {
        "max_response": drawn.max_response,
        "seed": drawn.seed,
        "connect": connect,
    }
    sampler: Sampler = registry.build("rollout", recipe.rollout, runtime)
    return sampler


def open_folder(
    recipe: EvaluationRecipe, prompts: Sequence[TaskPrompt], source: Mapping[str, str]
) -> dict[str, ResponseStore]:
    """Check run.dir and the judge, before hours of generation; return each policy's responses.

    Rank 0 only. Raises UserError for responses of another origin, verdicts of another judge, or a
    judge that is not ready while responses are missing.
    """
    directory = Path(recipe.run.dir)
    check_origin(directory, source)
    judge = build_judge(recipe)
    verdict_store(recipe, judge)
    write_text(directory / "recipe.yaml", recipe.to_yaml())
    write_json(directory / "environment.json", run_folder.environment())
    write_prompts(directory / "prompts.jsonl", prompts)
    stores = {name: _responses(directory, name) for name in recipe.policies}
    if any(len(store.done) < len(prompts) for store in stores.values()):
        judge.check_ready()
    return stores


def announce(recipe: EvaluationRecipe, tasks: Sequence[LoadedTask], notes: Sequence[str]) -> None:
    p = recipe.parallel
    print(
        f"{recipe.name}: {recipe.subject} against {', '.join(recipe.opponents)};"
        f" {recipe.world} processes = tensor {p.tensor} × pipeline {p.pipeline} × data"
        f" {recipe.data_parallel}; writes to {recipe.run.dir}"
    )
    print(f"  {environment_line()}")
    for task, loaded in zip(recipe.tasks, tasks, strict=True):
        print(shown("".join(f"  {task.name}: {line}\n" for line in loaded.lines)), end="")
    for warning in dict.fromkeys((*recipe.warnings, *notes)):
        print(shown(f"  warning: {warning}"), flush=True)


def _responses(directory: Path, policy: str) -> ResponseStore:
    return ResponseStore(directory / "responses" / f"{policy}.jsonl")


# ----------------------------------------------------------------------------- verdicts and results


def conclude(recipe: EvaluationRecipe, prompts: Sequence[TaskPrompt]) -> None:
    """Get the missing verdicts, then write the results. One process, without models.

    People as judges get pages first; the results follow with their ratings. Raises UserError,
    after the results are written, if most verdicts failed.
    """
    directory, shown = Path(recipe.run.dir), Display()
    wanted = {(p.task, p.prompt_id) for p in prompts}
    responses = {
        name: [r for r in _responses(directory, name).read() if (r.task, r.prompt_id) in wanted]
        for name in recipe.policies
    }
    given = HeadToHead(recipe.subject, recipe.opponents, prompts, responses)
    judge, pairs = build_judge(recipe), pairs_in_both_orders(given)
    if not judge.prepare([pair for order, pair in pairs.items() if order.model_first]):
        return
    store = verdict_store(recipe, judge)
    verdicts = judge_missing(judge, pairs, store, shown)
    comparisons = comparisons_from_verdicts(given, verdicts, sampled=judge.sampled)
    missing = write(recipe, given, comparisons, judge)["incomplete"]
    if missing:
        raise _incomplete(directory, missing, verdicts.values())
    shown.line(f"{recipe.name}: complete; {directory / 'report.html'}, {directory / 'table.md'}")


def _incomplete(directory: Path, missing: Sequence[str], verdicts: Iterable[Verdict]) -> UserError:
    reasons = Counter(v.text[:REASON] for v in verdicts if v.choice == FAILED).most_common(1)
    often = "".join(f"; {count} failed so: {text}" for text, count in reasons)
    return UserError(
        f"more than half of the prompts have no verdict: {', '.join(missing)}{often}",
        where=str(directory / "results.json"),
        fix="correct the judge, then repeat the same command: verdicts are kept, failed ones are"
        " tried again; results and report are written, and marked as incomplete",
    )


def build_judge(recipe: EvaluationRecipe) -> Judge:
    judge: Judge = registry.build("judge", recipe.judge, {"directory": Path(recipe.run.dir)})
    return judge


def verdict_store(recipe: EvaluationRecipe, judge: Judge) -> VerdictStore | None:
    """Open verdicts.jsonl; None for a judge that reads ratings from files.

    Raises UserError if it holds verdicts of another judge or model: they must not be mixed.
    """
    if judge.sampled:
        return None
    settings = {key: value for key, value in recipe.judge.items() if key not in judge.transport}
    about = {key: value for key, value in judge.about().items() if key == "prompts"}
    key = json.dumps({**settings, "subject": recipe.subject, **about}, sort_keys=True)
    return VerdictStore(Path(recipe.run.dir) / "verdicts.jsonl", key)


def judge_missing(
    judge: Judge, pairs: Mapping[PairOrder, Pair], store: VerdictStore | None, shown: Display
) -> dict[PairOrder, Verdict]:
    """Judge every pair without a stored verdict, and retry failed ones. Return all verdicts.

    Each chunk is on disk when it is judged. Two equal texts are a tie without a judge.
    """
    verdicts = store.read() if store else {}
    equal = {
        order: Verdict(TIE, "equal texts")
        for order, pair in pairs.items()
        if order not in verdicts and pair.first == pair.second
    }
    if store:
        store.append(equal)
    verdicts |= equal
    left = [o for o in pairs if o not in verdicts or verdicts[o].choice == FAILED]
    if not left:
        return verdicts
    with shown.counting(f"{judge.name}: verdicts", len(pairs), len(pairs) - len(left)) as more:
        for start in range(0, len(left), CHUNK):
            orders = left[start : start + CHUNK]
            judged = judge.judge([pairs[order] for order in orders], more)
            new = {o: v for o, v in zip(orders, judged, strict=True) if v is not None}
            if store:
                store.append(new)
            verdicts |= new
    return verdicts


def write(
    recipe: EvaluationRecipe, given: HeadToHead, comparisons: Sequence[Comparison], judge: Judge
) -> dict[str, Any]:
    """Write results.json, the tables, figures/, report.html and, with groups, audit.html.

    Returns the results.
    """
    directory, report = Path(recipe.run.dir), recipe.report
    results = build_results(
        given,
        comparisons,
        judge.about(),
        bootstrap=report.bootstrap,
        seed=report.seed,
        warnings=not_independent(recipe),
    )
    write_results(directory / "results.json", results)
    write_text(directory / "table.md", markdown_table(results))
    write_text(directory / "table.tex", latex_table(results))
    drawn = write_evaluation_figures(results, given.responses, directory / "figures")
    figures = {path.stem: path for path in drawn if path.suffix == ".png"}
    audits = []
    if "critic" in recipe.models:
        audits = [audit_responses(given.prompts, given.responses[given.model])]
        write_text(directory / "audit.html", audit_document(audits))
    write_comparison(directory, given, results, comparisons, figures, audits)
    return results
