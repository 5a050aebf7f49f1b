"""Show what this machine has, what each missing part means, and whether a recipe can run here.

gipo doctor                                                 the table
gipo doctor recipe=NAME [with=FRAGMENT,…] [key=value …]     and a verdict

Exit code 0: it can run; 2: it cannot (the reasons are printed), or a mistake in the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gipo_megatron.capabilities import (
    BF16_COMPUTE,
    FP8_NEEDS,
    Capabilities,
    broken_transformer_engine,
    check_fp8,
    fp8_obstacle,
    probe,
    transformer_engine_failure,
    version_in,
)
from gipo_megatron.commands import RECIPES
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.check import missing_loads
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.schema import NODE, Recipe
from gipo_megatron.screen import shown
from gipo_megatron.serving.client import CONNECT, Client, ServerLost
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.specs import Serve
from gipo_megatron.training.rollout_server import trained_policy
from gipo_megatron.weights.sources import find_tokenizer

# share of a card's nominal memory: an "80 GB" card reports 79.1 to 79.6 GiB, or 74.5
MEMORY_SHARE = 0.9
NOTHING = "-"


def rows(here: Capabilities) -> list[tuple[str, str, str]]:
    """Return (part, version found, consequence of its absence) for each part."""
    gpus = {
        f"{gpu.name} ({gpu.compute[0]}.{gpu.compute[1]}, {gpu.memory_gib:.0f} GiB)"
        for gpu in here.gpus
    }
    apex = "" if here.apex is None else here.apex.version
    optional = "optional: "
    table = [
        ("python", here.python, ""),
        ("torch", here.torch, ""),
        ("CUDA (torch's)", here.cuda, "torch without CUDA: everything runs on the CPU, over gloo"),
        (
            "GPU",
            f"{len(here.gpus)} × {', '.join(sorted(gpus))}" if gpus else None,
            "only models of millions of parameters; no FP8",
        ),
        ("NCCL", here.nccl, "no communication between GPUs"),
        ("megatron-core", here.megatron, "nothing runs; pip install -e . -c constraints.txt"),
        (
            "transformer-engine",
            here.transformer_engine,
            "no FP8, no fused attention and norms: slower, more activation memory",
        ),
        (
            "apex (NVIDIA's)",
            apex,
            optional + "Transformer Engine or this project's Adam is used instead",
        ),
        ("wandb", here.wandb, optional + "no run.loggers=[wandb]"),
        (
            "vllm (VLLM_PYTHON's)",
            here.vllm,
            optional + "responses come from this project's own decoder; docs/rollout.md",
        ),
    ]
    result = [(part, found or NOTHING, "" if found else costs) for part, found, costs in table]
    if here.apex is not None and not here.apex.nvidia:
        note = "an unrelated package of that name, not used: pip uninstall apex"
        result = [
            (part, found, note if part.startswith("apex") else costs)
            for part, found, costs in result
        ]
    for recipe in FP8_NEEDS:
        result.append(
            (
                f"FP8 {recipe}",
                "can run" if not fp8_obstacle(recipe, here) else NOTHING,
                fp8_obstacle(recipe, here),
            )
        )
    return result


def show(table: Sequence[tuple[str, str, str]]) -> None:
    first, second = (max(len(row[i]) for row in table) for i in (0, 1))
    for part, found, costs in table:
        print(f"{part:<{first}}  {found:<{second}}  {costs}".rstrip())


def obstacles(recipe: Recipe, here: Capabilities) -> list[str]:
    """Return the reasons why `recipe` cannot run on this machine, or on several like it."""
    found = [] if here.megatron is not None else ["megatron-core is not installed"]
    wanted = recipe.hardware.gpus
    if wanted:
        found += _gpus(recipe, here)
    if recipe.precision.fp8 != "none":
        try:
            check_fp8(recipe.precision.fp8, here)
        except UserError as error:
            found.append(f"{error.what}; {error.fix}")
    if "wandb" in recipe.run.loggers and here.wandb is None:
        found.append("run.loggers names wandb, which is not installed")
    missing = [f"{problem.key}: {problem.what}" for problem in missing_loads(recipe)]
    return found + missing + _server(recipe, ready=not missing)


def _server(recipe: Recipe, ready: bool) -> list[str]:
    """Return the reason why the recipe's rollouts have no server. The one at a url is compared with
    the actor where the weights are here (`ready`); of the others vLLM has to be installed."""
    sampler = recipe.algorithm.get("rollout", {})
    if "serve" not in sampler:
        return []
    try:
        if sampler["url"]:
            _check_url(recipe, sampler["url"], ready)
        else:
            _check_program(sampler["serve"])
    except UserError as error:
        return [f"{error.where}: {error.what}; {error.fix}"]
    except ServerLost as error:
        return [f"algorithm.rollout.url: {error}"]
    return []


def _check_url(recipe: Recipe, url: str, ready: bool) -> None:
    client = Client(url, CONNECT)
    if not ready:
        client.get("/v1/models")
        return
    tokenizer = find_tokenizer(recipe.model.tokenizer, recipe.loads)
    client.check(trained_policy(recipe, tokenizer).needed)


def _check_program(serve: Serve) -> None:
    program = ServerProcess(serve, Path(), Path(), "", 0).command(0)[0]
    if not serve.command and version_in(program, "vllm") is None:
        raise UserError(
            f"{program} has no vLLM",
            where="algorithm.rollout.serve.python",
            fix="docs/rollout.md shows how to make an environment with it",
        )


def _gpus(recipe: Recipe, here: Capabilities) -> list[str]:
    found = []
    a_node = min(recipe.world, NODE)
    if len(here.gpus) < a_node:
        return [f"it is for {recipe.world} GPUs, {a_node} a machine; here are {len(here.gpus)}"]
    smallest = min(gpu.memory_gib for gpu in here.gpus)
    if smallest < MEMORY_SHARE * recipe.hardware.gpu_memory_gib:
        found.append(
            f"it is for GPUs of {recipe.hardware.gpu_memory_gib} GiB; the smallest here has"
            f" {smallest:.0f}"
        )
    weakest = min(here.gpus, key=lambda gpu: gpu.compute)
    if recipe.precision.dtype == "bf16" and weakest.compute < BF16_COMPUTE:
        found.append(
            f"precision.dtype bf16 needs compute capability 8.0 (Ampere) or newer; {weakest.name}"
            " is older"
        )
    if recipe.world > 1 and here.nccl is None:
        found.append("torch has no NCCL: GPUs cannot communicate")
    return found


def main(argv: Sequence[str]) -> int:
    here, failure = probe(), transformer_engine_failure()
    show(rows(here))
    if failure is not None:
        print(broken_transformer_engine(failure.reason))
    if not argv:
        return 0
    recipe = compose(list(argv), RECIPES)
    reasons = obstacles(recipe, here)
    # without GPUs no layer is Transformer Engine's
    if failure is not None and (here.gpus or failure.stops_megatron):
        reasons.append(broken_transformer_engine(failure.reason).what)
    machines = -(-recipe.world // NODE) if recipe.hardware.gpus else 1
    print(
        f"\n{recipe.name}: {'cannot run' if reasons else 'can run'}"
        f" {'here' if machines == 1 else f'on {machines} machines like this one'}"
    )
    for reason in reasons:
        print(shown(f"  - {reason}"))
    return 2 if reasons else 0
