"""What ranks find out about adapters at every layout: first values, gradients, export, decoding,
and a base that roles share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.conversion.export import export_run
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.hf_adapters import export_adapters, load_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.specs import Precision, Sampling
from gipo_megatron.telemetry.console import Display
from gipo_megatron.types import Prompts
from gipo_megatron.weights.checkpoints import CheckpointMeta
from gipo_megatron.weights.hf_files import open_weights
from tests.parity.dpo_cases import dpo_cells
from tests.parity.matrix import BF16_CHECKPOINTS, LAYOUTS
from tests.parity.ppo_cases import ppo_cells
from tests.parity.roles import digest_of, engine, mine, new_actor, new_reward, parts_of
from tests.parity.tiny import (
    ARCHITECTURE,
    GROUP,
    VOCAB,
    generator,
    hf_gradients,
    hf_model,
    relative_errors,
    weighted,
)
from tests.parity.train_cases import interrupted, resumed
from tools.gpu.tiny_adapters import FACTOR, SPEC, adapter_tensors, hf_adapted

# variant -> (loss, recompute)
VARIANTS = {"text": ("text", "none"), "full": ("text", "full"), "reward": ("reward", "selective")}


@cache
def plain_gradients(kind: str) -> dict[str, torch.Tensor]:
    return hf_gradients(kind, model=hf_adapted())


def gradients(mesh: Mesh, variant: str) -> dict[str, float]:
    """Relative error per tensor against autograd over the plain adapters."""
    kind, recompute = VARIANTS[variant]
    new = new_reward if kind == "reward" else new_actor
    role = new(mesh, adapter=SPEC, recompute=recompute)
    _, bad = role.engine.backward(parts_of(kind, mesh), role.readout)
    assert bad == []
    return relative_errors(dict(role.engine.gradients()), plain_gradients(kind))


def pages(mesh: Mesh) -> dict[str, dict[str, float]]:
    """Errors of the PPO page's and the DPO page's step against plain adapters, {page: {tensor:
    error}}; old policy and reference have other adapters on the same base."""
    cells = ppo_cells(mesh, "", (2,), adapter=SPEC)
    cells |= dpo_cells(mesh, "", (2,), ("sigmoid",), adapter=SPEC)
    return {name.split("/")[1]: errors for name, errors in cells.items()}


def exported(mesh: Mesh) -> float:
    """The largest error of W + factor · B A."""
    plain, tensors = dict(hf_model().named_parameters()), adapter_tensors()
    errors = []
    for name, found in new_actor(mesh, adapter=SPEC).export_weights():
        layer, expected = name.removesuffix("weight"), plain[name].detach()
        if f"{layer}lora_A.weight" in tensors:
            a, b = (tensors[f"{layer}lora_{x}.weight"] for x in "AB")
            expected = expected + FACTOR * b @ a
        errors.append(float((found - expected).abs().max()))
    assert len(errors) == len(plain)
    return max(errors)


def decoded(mesh: Mesh) -> dict[str, Any]:
    """Greedy tokens, and the largest difference of the decoder's log-probs from the training
    forward pass's."""
    data = mesh.data_parallel
    ids = torch.arange(data.rank, 4, data.size)
    tokens = torch.randint(2, VOCAB, (4, 5), generator=generator(9))[ids]
    names = {"source": ("test",) * len(ids), "extras": ({},) * len(ids)}
    prompts = Prompts(tokens, torch.full((len(ids),), 5), ids, ids, **names)
    actor = new_actor(mesh, adapter=SPEC)
    rollout = actor.generate(prompts, Sampling(max_response=4, temperature=0.0))
    seen, trained = rollout.generation_logprobs, actor.logprobs(rollout).logprobs
    assert seen is not None
    return {
        "tokens": dict(zip(ids.tolist(), rollout.tokens.tolist(), strict=True)),
        "error": float(((seen - trained) * rollout.mask).abs().max()),
    }


def initial(mesh: Mesh) -> str:
    """A digest of new adapters, not those that `fill` writes."""
    new = engine("actor", mesh, adapter=SPEC, seed=4)
    return digest_of(export_adapters(new.chunks, mesh, ARCHITECTURE, SPEC))


def steps(mesh: Mesh) -> list[float]:
    """Gradient norms of two updates."""
    actor = new_actor(mesh, adapter=SPEC)
    updates = [actor.update(*parts_of("actor", mesh)) for _ in range(2)]
    assert all(update.skipped is None for update in updates)
    return [update.metrics["grad_norm"].result() for update in updates]


def shared(mesh: Mesh) -> list[bool]:
    """Whether actor and reference on one base have, after an update, the bits of models with
    weights of their own. Two stages have a copy each of a tied output layer."""
    architecture = replace(ARCHITECTURE, tied_embeddings=mesh.pipeline_size > 1)
    rows, found = mine(mesh, weighted()), []
    for base in (Base(), None):
        common = {"architecture": architecture, "base": base, "seed": 4}
        trained = engine("actor", mesh, adapter=SPEC, **common)
        actor = MegatronActor(trained, eos_id=1, pad_id=0, decode=str)
        reference = MegatronReference(engine("reference", mesh, optimisation=None, **common))
        assert actor.update(*parts_of("actor", mesh)).skipped is None
        found.append([role.logprobs(rows).logprobs for role in (actor, reference)])
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


def untouched(mesh: Mesh) -> dict[str, list[str]]:
    """For each of two trained roles, who has another output after its update, of all roles on one
    base: itself alone. `base`: where a bit of the base has changed."""
    base, rows = Base(), mine(mesh, weighted())
    common = {"base": base, "seed": 4}
    frozen = {**common, "optimisation": None}
    actor = engine("actor", mesh, adapter=SPEC, **common)
    roles = {
        "actor": MegatronActor(actor, eos_id=1, pad_id=0, decode=str),
        "critic": MegatronCritic(engine("critic", mesh, adapter=SPEC, group=GROUP, **common)),
        "reward": MegatronRewardModel(engine("reward", mesh, adapter=SPEC, **frozen)),
        "reference": MegatronReference(engine("reference", mesh, **frozen)),
    }

    def state() -> dict[str, Tensor]:
        critic = roles["critic"].evaluate(rows)
        return {
            **{name: roles[name].logprobs(rows).logprobs for name in ("actor", "reference")},
            "critic": torch.cat([critic.values.flatten(), critic.group_logits.flatten()]),
            "reward": roles["reward"].score(rows.sequences),
            "base": torch.cat([p.flatten().clone() for p in base.held.values()]),
        }

    found = {}
    for trained in ("actor", "critic"):
        before = state()
        assert roles[trained].update(*parts_of(trained, mesh)).skipped is None
        after = state()
        found[trained] = [name for name in before if not torch.equal(before[name], after[name])]
    return found


def on_a_checkpoint(mesh: Mesh, out: Path) -> bool:
    """Whether a policy has the bits of the whole checkpoint that is its base, after a critic took
    all but the output layer, which one stage lacks then; and adapters saved there find it again."""
    whole = engine("actor", mesh, optimisation=None, seed=6)
    saved = str(checkpoint.save(out / "whole", {"actor": whole}, mesh, CheckpointMeta(1)))
    adapted = engine("critic", mesh, adapter=SPEC, load=saved)
    adapters = checkpoint.save(out / "adapters", {"critic": adapted}, mesh, CheckpointMeta(1))
    base, rows = Base(), mine(mesh, weighted())
    engine("critic", mesh, base=base, adapter=SPEC, load=str(adapters))
    policy = engine("actor", mesh, base=base, optimisation=None, load=saved)
    a, b = (MegatronReference(model).logprobs(rows).logprobs for model in (whole, policy))
    return torch.equal(a, b)


def written(mesh: Mesh, out: Path) -> bool:
    """Whether a run's export, which all ranks write together, has the adapters bit for bit."""
    base = out / "base"
    if mesh.is_main:
        hf_model().save_pretrained(base)
    mesh.barrier()
    adapted = engine("actor", mesh, adapter=SPEC, load=str(base))
    load_adapters(adapter_tensors(), adapted.chunks, mesh, ARCHITECTURE, SPEC)
    place, meta = out / "peft", CheckpointMeta(1)
    tokenizer = byte_tokenizer()
    export_run(place, "actor", adapted, tokenizer, meta, Display(shown=False))
    mesh.barrier()
    saved, expected = open_weights(place), adapter_tensors()
    same = [torch.equal(saved.read(name), tensor) for name, tensor in expected.items()]
    return all(same) and saved.shapes.keys() == expected.keys()


def run(world: int, out: Path) -> dict[str, Any]:
    """A checkpoint that the first layout writes in OUT is resumed at every one."""
    found: dict[str, Any] = {}
    whole: dict[str, Any] | None = None
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        whole = whole or interrupted(mesh, out, adapter=SPEC)
        found[name] = {
            "whole": whole,
            "resumed": resumed(mesh, out, adapter=SPEC),
            "gradients": {variant: gradients(mesh, variant) for variant in VARIANTS},
            "pages": pages(mesh),
            "untouched": untouched(mesh),
            "exported": exported(mesh),
            "written": written(mesh, out / name),
            "decoded": decoded(mesh),
            "initial": initial(mesh),
            "steps": steps(mesh),
            "shared": shared(mesh),
            "on_a_checkpoint": on_a_checkpoint(mesh, out / name),
        }
        if name in BF16_CHECKPOINTS:
            changes = {"adapter": SPEC, "precision": Precision("bf16")}
            found[name]["bf16"] = [
                case(mesh, out / f"bf16_{name}", **changes) for case in (interrupted, resumed)
            ]
    return found
