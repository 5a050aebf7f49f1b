"""A plan as text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from gipo_megatron.planning import compute
from gipo_megatron.planning.compute import Timing
from gipo_megatron.planning.memory import CONTEXT_BYTES, FRAGMENTATION, GIB
from gipo_megatron.planning.planner import Plan, Planner
from gipo_megatron.planning.verdict import Change, Verdict, judge
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.schema import Recipe

COLUMNS = 100
SHOWN = 3  # groups of a kind
SMALL = GIB // 10  # below this a plan counts in MiB


def plan_text(argv: Sequence[str], root: Path, world: int | None = None) -> str:
    """The plan of the recipe that a command line (`recipe=… [world=…] key=value …`) describes.
    Raises UserError where there is none."""

    def vary(words: Sequence[str]) -> Recipe:
        return compose([*argv, *words], root, world=world)

    recipe, planner = vary(()), Planner()
    plan = planner.plan(recipe)
    return render(plan, judge(plan, planner, vary))


def render(plan: Plan, verdict: Verdict) -> str:
    sections = [
        _layout(plan),
        _models(plan),
        _phases(plan),
        ["batch", *indented(plan.batch.lines())],
    ]
    if plan.time is not None:
        sections.append(_time(plan, plan.time))
    sections.append(_verdict(plan, verdict))
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def wrapped(text: str, indent: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(
        COLUMNS, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )
    return wrapper.wrap(text)


def indented(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in wrapped(line, "  ")]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# ----------------------------------------------------------------------------------------- sections


def _layout(plan: Plan) -> list[str]:
    recipe, parallel = plan.recipe, plan.recipe.parallel
    shares = (
        f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × data {recipe.data_parallel}"
    )
    chunks = (
        f", {parallel.virtual_pipeline} chunks a stage" if parallel.virtual_pipeline > 1 else ""
    )
    nodes = -(-recipe.world // plan.gpus_per_node)
    where = f"; {nodes} nodes of {plan.gpus_per_node} ranks, in order" if nodes > 1 else ""
    ranks = f"{recipe.world} rank{'s' if recipe.world > 1 else ''}"
    lines = wrapped(
        f"{recipe.name}: {recipe.algorithm['name']} on {ranks} = {shares}{chunks}{where}"
    )
    for kind, groups in plan.groups.items():
        if len(groups[0]) > 1:
            spanning = plan.spanning(kind)
            place = f"{spanning} over several nodes" if spanning else "inside a node"
            shown = ", ".join(_ranks(group) for group in groups[:SHOWN]) + (
                ", …" if len(groups) > SHOWN else ""
            )
            lines.append(f"  {kind:<8} {len(groups)} of {len(groups[0])} ranks, {place}: {shown}")
    return lines


def _ranks(group: Sequence[int]) -> str:
    """[0, 1] -> 0-1; [0, 8] -> 0+8; [0, 8, 16] -> 0-16 by 8"""
    step = group[1] - group[0]
    if step == 1:
        return f"{group[0]}-{group[-1]}"
    return f"{group[0]}+{group[1]}" if len(group) == 2 else f"{group[0]}-{group[-1]} by {step}"


def _models(plan: Plan) -> list[str]:
    found, unit = plan.heaviest, _unit(plan)
    rows = [["model", "parameters", "weights", "gradients", "optimizer", "together", "offload"]]
    for role, shard in found.roles.items():
        sizes = [
            _size(n, unit) for n in (shard.weights, shard.gradients, shard.optimizer, shard.state)
        ]
        rows.append([role, f"{plan.parameters[role]:,}", *sizes, plan.recipe.models[role].offload])
    host = (
        f"; {_size(found.host * min(plan.gpus_per_node, plan.recipe.world), unit)} on the host a"
        " node"
        if found.host
        else ""
    )
    title = (
        f"models: all parameters; {unit[0]} on the heaviest rank, {found.rank} (pipeline stage"
        f" {found.stage}){host}"
    )
    return [*wrapped(title), *table(rows)]


def _phases(plan: Plan) -> list[str]:
    found, unit = plan.heaviest, _unit(plan)
    rows = [
        [
            "phase",
            "weights",
            "grads",
            "optim.",
            "kept",
            "KV",
            "layer",
            "logits",
            "Adam",
            "peak",
            "moved",
        ]
    ]
    for phase in found.phases:
        state, work = phase.state, phase.work
        numbers = (
            state.weights,
            state.gradients,
            state.optimizer,
            work.activations,
            work.cache,
            work.layer,
            work.logits,
            work.step,
        )
        mark = " *" if phase is found.worst else ""
        rows.append(
            [phase.name + mark, *(_size(n, unit) for n in (*numbers, phase.peak, phase.moved))]
        )
    shown = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows[1:])]
    generated = max(phase.work.rows for phase in found.phases)
    copies = ", FP8 copies of the weights" if plan.recipe.precision.fp8 != "none" else ""
    meanings = {
        "kept": (
            "kept: activations for the backward pass (recompute:"
            f" {plan.recipe.memory.recompute}){copies}"
        ),
        "KV": (
            f"KV: keys and values of {generated} of a replica's {plan.batch.rows_per_replica}"
            " sequences, as many as fit at once"
        ),
        "layer": "layer: at work in one layer",
        "logits": (
            "logits: of one micro-batch with their gradients; never beside layer, the larger counts"
        ),
        "Adam": "Adam: temporaries of its step, when the activations are gone",
        "moved": "moved: between host and device",
    }
    saving = (
        f"save: a checkpoint; the optimizer is gathered in host memory, {_size(plan.saving, unit)}"
        f" {unit[0]} a node"
    )
    note = (
        ". ".join(
            [
                *(
                    meaning
                    for name, meaning in meanings.items()
                    if name in [rows[0][i] for i in shown]
                ),
                saving,
            ]
        )
        + "."
    )
    title = f"memory of an iteration on that rank, {unit[0]}; * the largest"
    return [title, *table([[row[i] for i in shown] for row in rows]), *wrapped(note, "  ")]


def _time(plan: Plan, time: Timing) -> list[str]:
    recipe, gpu = plan.recipe, time.gpu
    rows = [["", "PFLOP", "again", "seconds"]]
    rows += [
        [work.name, _peta(work.flops), _peta(work.recomputed), f"{work.seconds:.1f}"]
        for work in time.works
    ]
    if time.offload:
        rows.append(["offload", "-", "-", f"{time.offload:.1f}"])
    again = sum(work.recomputed for work in time.works)
    rows.append(["an iteration", _peta(time.flops), _peta(again), f"{time.seconds:.1f}"])
    peak = compute.peak_rate(recipe, gpu)
    assumed = (
        f"Estimated, not measured, with every sequence at its longest. Rates: {gpu.name} (by its"
        f" {recipe.hardware.gpu_memory_gib} GiB), {peak / 1e12:.0f} TFLOP/s dense,"
        f" {gpu.bandwidth / 1e12:.2f} TB/s. Assumed: {compute.ASSUMED_MFU:.0%} of the peak in"
        f" matrix products; a decoded token waits for memory, or for {compute.DECODE_KERNELS}"
        f" launches of {compute.LAUNCH_SECONDS * 1e6:.0f} µs a layer;"
        f" {compute.HOST_BANDWIDTH / 1e9:.0f} GB/s to the host, {compute.NODE_BANDWIDTH / 1e9:.0f}"
        " GB/s a GPU between nodes. FLOP: 2 · parameters · tokens a pass, without attention's own"
        " products; again: recomputed activations."
    )
    total = f"  {recipe.run.steps} iterations: {time.seconds * recipe.run.steps / 3600:.1f} hours"
    return ["work and time of an iteration, all GPUs", *table(rows), total, *wrapped(assumed, "  ")]


def _peta(flops: float) -> str:
    return f"{flops / 1e15:.1f}" if flops else "-"


def _verdict(plan: Plan, verdict: Verdict) -> list[str]:
    worst, unit = plan.heaviest.worst, _unit(plan)
    lines = [part for warning in verdict.warnings for part in wrapped(f"warning: {warning}")]
    if verdict.fits is None:
        largest = f"largest: {_size(worst.peak, unit)} {unit[0]} a process, in {worst.name!r}"
        return [*lines, *wrapped(f"verdict: none, hardware.gpu_memory_gib is 0 (a CPU); {largest}")]
    memory = plan.recipe.hardware.gpu_memory_gib
    kept = f"{CONTEXT_BYTES / GIB:.0f} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} for fragmentation"
    sizes = (
        f"{worst.peak / GIB:.1f} GiB in {worst.name!r}; usable {plan.limit / GIB:.1f} of {memory}"
        f" GiB (left: {kept})"
    )
    if verdict.fits:
        return [*lines, *wrapped(f"verdict: fits. {sizes}")]
    lines += wrapped(f"verdict: DOES NOT FIT. {sizes}")
    if verdict.change is not None:
        return [*lines, *_change("cheapest change", verdict.change)]
    lines += (
        []
        if verdict.closest is None
        else _change("no change tried here fits; closest", verdict.closest)
    )
    return [
        *lines,
        *wrapped(
            "a smaller model, shorter sequences (data.max_length), or GPUs with more memory", "  "
        ),
    ]


def _change(title: str, change: Change) -> list[str]:
    peak, costs = (
        change.plan.heaviest.worst.peak / GIB,
        "; ".join(dict.fromkeys(part.cost for part in change.parts)),
    )
    return [
        *wrapped(f"{title}: {' '.join(change.words)}", "  "),
        *wrapped(f"then {peak:.1f} GiB; the price: {costs}", "    "),
    ]


def _unit(plan: Plan) -> tuple[str, int]:
    return ("MiB", 2**20) if plan.heaviest.worst.peak < SMALL else ("GiB", GIB)


def _size(number: int, unit: tuple[str, int]) -> str:
    if not number:
        return "-"
    return f"{number / unit[1]:.2f}" if number / unit[1] < 99.95 else f"{number / unit[1]:.1f}"
