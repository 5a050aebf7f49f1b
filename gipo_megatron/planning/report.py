"""A plan as text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

from gipo_megatron.planning import compute
from gipo_megatron.planning.compute import Timing
from gipo_megatron.planning.memory import FRAGMENTATION, Phase
from gipo_megatron.planning.planner import Plan, Planner
from gipo_megatron.planning.server import CONTEXT_BYTES, GIB, Server
from gipo_megatron.planning.verdict import Change, Verdict, judge
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.length import stated_length
from gipo_megatron.recipe.schema import Recipe

WIDTH = 100
SHOWN = 3  # groups of a kind
SMALL = GIB // 10  # below this a plan counts in MiB
# column of the table of phases -> bytes
COLUMNS: dict[str, Callable[[Phase], int]] = {
    "weights": lambda phase: phase.state.weights,
    "grads": lambda phase: phase.state.gradients,
    "optim.": lambda phase: phase.state.optimizer,
    "kept": lambda phase: phase.work.activations,
    "KV": lambda phase: phase.work.cache,
    "server": lambda phase: phase.server,
    "layer": lambda phase: phase.work.layer,
    "logits": lambda phase: phase.work.logits,
    "Adam": lambda phase: phase.work.step,
    "peak": lambda phase: phase.peak,
    "moved": lambda phase: phase.moved,
}


def plan_text(argv: Sequence[str], root: Path, world: int | None = None) -> str:
    """Return the plan of the recipe that a command line (`recipe=… [world=…] key=value …`)
    describes.

    Raises UserError where there is none.
    """

    def vary(words: Sequence[str]) -> Recipe:
        return compose([*argv, *words], root, world=world)

    planner = Planner()
    plan = planner.plan(vary(()))
    return render(plan, judge(plan, planner, vary))


def render(plan: Plan, verdict: Verdict) -> str:
    length, steps = stated_length(plan.recipe)
    batch = [part for line in (*plan.iteration.lines(), length) for part in wrapped(line, "  ")]
    sections = [_layout(plan), _models(plan), _phases(plan), ["batch", *batch]]
    if plan.time is not None:
        sections.append(_time(plan, plan.time, steps))
    sections.append(_verdict(plan, verdict))
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def wrapped(text: str, indent: str = "") -> list[str]:
    more = indent + "  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


# ----------------------------------------------------------------------------------------- sections


def _layout(plan: Plan) -> list[str]:
    recipe, parallel = plan.recipe, plan.recipe.parallel
    title = f"{recipe.name}: {recipe.algorithm['name']} on {recipe.world}"
    title += " rank" if recipe.world == 1 else " ranks"
    title += f" = tensor {parallel.tensor} × pipeline {parallel.pipeline}"
    title += f" × data {recipe.data_parallel}"
    if parallel.virtual_pipeline > 1:
        title += f", {parallel.virtual_pipeline} chunks a stage"
    nodes = -(-recipe.world // plan.gpus_per_node)
    if nodes > 1:
        title += f"; {nodes} nodes of {plan.gpus_per_node} ranks, in order"
    lines = wrapped(title)
    for kind, groups in plan.groups.items():
        if len(groups[0]) == 1:
            continue
        spanning = plan.spanning(kind)
        place = f"{spanning} over several nodes" if spanning else "inside a node"
        shown = ", ".join(_ranks(group) for group in groups[:SHOWN])
        more = ", …" if len(groups) > SHOWN else ""
        sizes = f"{len(groups)} of {len(groups[0])} ranks"
        lines.append(f"  {kind:<8} {sizes}, {place}: {shown}{more}")
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
    iteration = plan.iteration
    for role in (*iteration.built, *(call.role for call in iteration.once)):
        shard = found.roles[role]
        sizes = (shard.weights, shard.gradients, shard.optimizer, shard.state)
        shown = [_size(number, unit) for number in sizes]
        rows.append([role, f"{plan.parameters[role]:,}", *shown, plan.recipe.models[role].offload])
    if plan.base_parameters:
        base = _size(found.base, unit)
        rows.append(["base (shared)", f"{plan.base_parameters:,}", base, "-", "-", base, "none"])
    title = (
        f"models: all parameters; {unit[0]} on the heaviest rank, {found.shard.rank} (pipeline"
        f" stage {found.shard.stage})"
    )
    if found.host:
        ranks = min(plan.gpus_per_node, plan.recipe.world)
        title += f"; {_size(found.host * ranks, unit)} on the host a node"
    return [*wrapped(title), *table(rows)]


def _phases(plan: Plan) -> list[str]:
    found, unit = plan.heaviest, _unit(plan)
    columns = {name: number for name, number in COLUMNS.items() if any(map(number, found.phases))}
    rows = [["phase", *columns]]
    for phase in found.phases:
        mark = " *" if phase is found.worst else ""
        rows.append([phase.name + mark, *(_size(f(phase), unit) for f in columns.values())])
    notes = [note for name, note in _meanings(plan).items() if name in columns]
    if plan.server is not None:
        notes.append(_server(plan.server, plan.iteration.rows))
    saving = f"{_size(plan.saving, unit)} {unit[0]} a node"
    notes.append(f"save: a checkpoint; the optimizer is gathered in host memory, {saving}")
    title = f"memory of an iteration on that rank, {unit[0]}; * the largest"
    return [title, *table(rows), *wrapped(". ".join(notes) + ".", "  ")]


def _meanings(plan: Plan) -> dict[str, str]:
    """Return {column of the table of phases: its explanation}."""
    recompute, rows = plan.recipe.memory.recompute, plan.iteration.rows_per_replica
    together = max(phase.work.rows for phase in plan.heaviest.phases)
    copies = "" if plan.recipe.precision.fp8 == "none" else ", FP8 copies of the weights"
    return {
        "kept": f"kept: activations for the backward pass (recompute: {recompute}){copies}",
        "KV": f"KV: keys and values of {together} of a replica's {rows} sequences, as many as fit"
        " at once",
        "layer": "layer: at work in one layer",
        "logits": "logits: of one micro-batch with their gradients; never beside layer, the larger"
        " counts",
        "Adam": "Adam: temporaries of its step, after the activations are freed",
        "moved": "moved: between host and device",
    }


def _server(server: Server, rows: int) -> str:
    gpus, share = server.tensor, f"{server.share / GIB:.1f} GiB"
    where = "shared with training" if server.shared else "of its own"
    text = f"server: vLLM has {share} on {gpus} GPU{'s' if gpus > 1 else ''} {where}: weights"
    text += f" {server.weights / GIB:.1f}"
    if server.fits:
        text += (
            f", keys and values of {min(server.rows, rows)} of {rows} sequences at their longest"
        )
    return text


def _time(plan: Plan, time: Timing, steps: int) -> list[str]:
    recipe, gpu = plan.recipe, time.gpu
    rows = [["", "PFLOP", "again", "seconds"]]
    for work in time.works:
        seconds = f"{work.seconds:.1f}" if work.seconds else "not estimated"
        rows.append([work.name, _peta(work.flops), _peta(work.recomputed), seconds])
    if time.offload:
        rows.append(["offload", "-", "-", f"{time.offload:.1f}"])
    again = sum(work.recomputed for work in time.works)
    partly = "" if all(work.seconds for work in time.works) else ", without the rollout"
    total = _peta(time.flops), _peta(again), f"{time.seconds:.1f}"
    rows.append([f"an iteration{partly}", *total])
    peak = compute.peak_rate(recipe, gpu)
    # a server has the adapters merged
    kernels = compute.decode_kernels(recipe) if plan.server is None else compute.DECODE_KERNELS
    assumed = (
        f"Estimated, not measured, with every sequence at its longest. Rates: {gpu.name} (by its"
        f" {recipe.hardware.gpu_memory_gib} GiB), {peak / 1e12:.0f} TFLOP/s dense,"
        f" {gpu.bandwidth / 1e12:.2f} TB/s. Assumed: {compute.ASSUMED_MFU:.0%} of the peak in"
        f" matrix products; a decoded token waits for memory, or for {kernels}"
        f" launches of {compute.kernel_seconds(recipe.parallel) * 1e6:g} µs a layer;"
        f" {compute.HOST_BANDWIDTH / 1e9:.0f} GB/s to the host, {compute.NODE_BANDWIDTH / 1e9:.0f}"
        " GB/s a GPU between nodes. FLOP: 2 · parameters · tokens a pass, without attention's own"
        " products; again: recomputed activations and logits."
    )
    if recipe.model.adapter.rank:
        assumed += " An update has no pass for the gradients of the frozen weights."
    if plan.server is not None:
        assumed += (
            f" The server launches as many, {compute.GRAPH_SECONDS * 1e6:g} µs each; the push of"
            " weights to it is left out."
        )
    hours = time.seconds * steps / 3600
    return [
        "work and time of an iteration, all GPUs",
        *table(rows),
        *([f"  {steps} iterations{partly}: {hours:.1f} hours"] if steps else []),
        *wrapped(assumed, "  "),
    ]


def _peta(flops: float) -> str:
    return f"{flops / 1e15:.1f}" if flops else "-"


def _verdict(plan: Plan, verdict: Verdict) -> list[str]:
    worst, unit, memory = plan.heaviest.worst, _unit(plan), plan.recipe.hardware.gpu_memory_gib
    lines = [part for warning in verdict.warnings for part in wrapped(f"warning: {warning}")]
    if verdict.fits is None:
        largest = f"{_size(worst.peak, unit)} {unit[0]} a process, in {worst.name!r}"
        cpu = "verdict: none, hardware.gpu_memory_gib is 0 (a CPU)"
        return [*lines, *wrapped(f"{cpu}; largest: {largest}")]
    kept = f"{CONTEXT_BYTES / GIB:.0f} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} for fragmentation"
    answer = "fits" if verdict.fits else "DOES NOT FIT"
    if plan.server is not None and not plan.server.fits:
        answer += f": {_too_small(plan.server)}"
    lines += wrapped(
        f"verdict: {answer}. {worst.peak / GIB:.1f} GiB in {worst.name!r}; usable"
        f" {plan.limit / GIB:.1f} of {memory} GiB (left: {kept})"
    )
    if verdict.fits:
        return lines
    if plan.server is not None and plan.server.fits and plan.server.shared:
        lines += wrapped(_part(plan.server), "  ")
    if verdict.change is not None:
        return [*lines, *_change("cheapest change", verdict.change)]
    if verdict.closest is not None:
        lines += _change("no change tried here fits; closest", verdict.closest)
    others = "a smaller model, shorter sequences (data.max_length), or GPUs with more memory"
    return [*lines, *wrapped(others, "  ")]


def _too_small(server: Server) -> str:
    """Return the reason why the server does not start."""
    return (
        f"the server needs {server.least / GIB:.1f} GiB a GPU for its weights, its work and the"
        f" longest sequence, and serve.gpu_memory {server.serve.gpu_memory:g} gives it"
        f" {server.share / GIB:.1f}"
    )


def _part(server: Server) -> str:
    """Return the server's part of a peak that does not fit."""
    key, least = "algorithm.rollout.serve", ceil(100 * server.least / server.gpu) / 100
    return (
        f"{server.share / GIB:.1f} GiB of it are the server's: lower {key}.gpu_memory ({least:g} at"
        f" least), or give it GPUs of its own ({key}.devices)"
    )


def _change(title: str, change: Change) -> list[str]:
    peak = change.plan.heaviest.worst.peak / GIB
    costs = "; ".join(dict.fromkeys(part.cost for part in change.parts))
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
