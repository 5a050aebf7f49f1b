"""Adapters in one process: against PEFT on transformers, and what stays as it was."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gipo_megatron.algorithms.dpo import DPO
from gipo_megatron.algorithms.pair_reference import LiveReference
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.adapters import Adapter, _add_adapter
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.hf_adapters import export_adapters, load_adapters, save_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronReference, outputs
from gipo_megatron.specs import AdapterSpec, Precision, Sampling
from gipo_megatron.types import Prompts
from gipo_megatron.weights.peft_config import config_for, spec_of
from tests.parity.ppo_cases import OffPolicy
from tests.parity.roles import engine, fill, new_actor, new_critic, new_reward, parts_of
from tests.parity.tiny import (
    ARCHITECTURE,
    VOCAB,
    generator,
    group_weights,
    hf_gradients,
    hf_model,
    hf_token_stats,
    pairs,
    relative_errors,
)
from tools.gpu.tiny_adapters import SPEC, adapter_tensors, hf_adapted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages' imports print
    import peft

pytestmark = pytest.mark.global_rng
# PEFT's own default for Llama, with its other factor
FEW = AdapterSpec(rank=4, alpha=6.0, targets=("q_proj", "v_proj"), scaling="rslora")


def peft_model(spec: AdapterSpec) -> peft.PeftModel:
    """The tiny model with PEFT's adapters, which have the values of `adapter_tensors`."""
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        use_rslora=spec.scaling == "rslora",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft 0.21 reads it, transformers 5.23 renamed it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.get_peft_model(hf_model(), config)
    values = {f"base_model.model.{k}": v for k, v in adapter_tensors(spec).items()}
    loaded = peft.set_peft_model_state_dict(model, values)
    assert not loaded.unexpected_keys
    return model


def with_peft(spec: AdapterSpec) -> LlamaForCausalLM:
    inner = peft_model(spec).base_model.model
    assert isinstance(inner, LlamaForCausalLM)
    return inner


@pytest.mark.parametrize("spec", [SPEC, FEW], ids=["all", "few"])
def test_logits_and_gradients_are_pefts(mesh: Mesh, spec: AdapterSpec) -> None:
    actor, theirs = new_actor(mesh, adapter=spec), with_peft(spec)
    ids = torch.randint(0, VOCAB, (2, 11), generator=generator(6))
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(actor.engine, ids), theirs(ids).logits, atol=1e-5, rtol=1e-5
        )
    critic, reward = new_critic(mesh, adapter=spec), new_reward(mesh, adapter=spec)
    head = critic.engine.group_head
    assert head is not None
    head.weight.data, head.bias.data = group_weights()
    roles = {"text": actor, "actor": actor, "critic": critic, "reward": reward}
    for kind, role in roles.items():
        parts = parts_of(kind, mesh)[:1]  # of an actor's, the policy loss
        _, bad = role.engine.backward(parts, role.readout)
        found = hf_gradients(kind, model=theirs)
        theirs.zero_grad()
        errors = relative_errors(dict(role.engine.gradients()), ours_of(found))
        assert bad == [] and max(errors.values()) <= 1e-5, (kind, errors)
        assert len(errors) == 4 * len(spec.targets) * 2 + (kind in ("critic", "reward"))


def ours_of(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return PEFT's gradients by the names in its files."""
    return {name.replace(".default", ""): g for name, g in gradients.items()}


def test_the_gradients_of_dpo_are_pefts(mesh: Mesh) -> None:
    """The reference is the base: PEFT's adapters switched off, our second role on one base."""
    base, model, rows = Base(), peft_model(SPEC), pairs()
    actor = new_actor(mesh, adapter=SPEC, base=base)
    reference = MegatronReference(engine("reference", mesh, base=base, optimisation=None))
    role = OffPolicy(actor, [])
    page = DPO(
        beta=1.0,
        precompute=False,
        actor=role,  # type: ignore[arg-type]
        reference=LiveReference(reference),
        pairs=lambda step: rows,
        timer=lambda name: nullcontext(),
    )
    assert not page.step(0).skipped

    def log_ratio() -> Tensor:
        inner = model.base_model.model
        sums = [hf_token_stats(inner, x).logprobs.sum(1) for x in (rows.chosen, rows.rejected)]
        return sums[0] - sums[1]

    with torch.no_grad(), model.disable_adapter():
        start = log_ratio()
    (-F.logsigmoid(log_ratio() - start).mean()).backward()
    found = {n: p.grad for n, p in model.base_model.model.named_parameters() if p.grad is not None}
    errors = relative_errors(role.gradients[0], ours_of(found))
    assert len(errors) == 4 * 7 * 2 and max(errors.values()) <= 1e-5, errors


def test_the_plain_adapters_of_the_parity_tests_are_pefts() -> None:
    ids = torch.randint(0, VOCAB, (2, 11), generator=generator(6))
    with torch.no_grad():
        torch.testing.assert_close(hf_adapted()(ids).logits, with_peft(SPEC)(ids).logits)


def started(mesh: Mesh, spec: AdapterSpec, role: str = "actor", dtype: str = "fp32") -> Any:
    return build_engine(role, mesh, ARCHITECTURE, Precision(dtype), adapter=spec, seed=7)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_new_adapters_change_no_bit(mesh: Mesh, dtype: str) -> None:
    """B is 0."""
    ids = torch.randint(0, VOCAB, (2, 11), generator=generator(6))
    for role in ("actor", "critic"):
        plain, adapted = (started(mesh, x, role, dtype) for x in (AdapterSpec(), SPEC))
        assert torch.equal(outputs(plain, ids), outputs(adapted, ids))
        merged = dict(adapted.export())
        assert all(torch.equal(merged[name], weight) for name, weight in plain.export())
    assert len(merged) == 3 + 4 * 9


def test_initial_values_are_pefts(mesh: Mesh) -> None:
    """A uniform in ±1/√in, which is kaiming_uniform_(a=√5); B 0."""
    spec = AdapterSpec(64)
    found = dict(export_adapters(started(mesh, spec).chunks, mesh, ARCHITECTURE, spec))
    assert len(found) == 4 * 7 * 2
    for name, tensor in found.items():
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        assert 0.99 * bound < float(tensor.abs().max()) <= bound, name
        assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    first = "model.layers.0.self_attn."
    assert not torch.equal(*(found[f"{first}{x}_proj.lora_A.weight"] for x in "qk"))


def test_an_update_moves_the_adapters_alone(mesh: Mesh) -> None:
    reward = new_reward(mesh, adapter=SPEC)
    engine = reward.engine
    chunk = engine.chunks[0]
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    for _ in range(2):  # the first steps of a warm-up
        assert reward.update(*parts_of("reward", mesh)).skipped is None
    moved = {name for name, p in chunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapter." in name} | {"output_layer.weight"}
    # (in + out) · rank of seven layers: 32 → 32, 16, 16; 32 → 32; 32 → 48, 48; 48 → 32
    numbers = 4 * 3 * (64 + 48 + 48 + 64 + 80 + 80 + 80) + 32
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in masters) == numbers
    # the gradients' buffer is padded to a multiple of 64 for each parameter, of 128 in all
    assert numbers <= sum(t.numel() for t in engine._gradients()) <= numbers + 65 * 64 + 128


def test_recompute_in_the_first_layer(mesh: Mesh) -> None:
    """No input of the first layer needs a gradient of its own, in attention or, without adapters
    there, in the MLP."""
    spec, found = AdapterSpec(rank=3, alpha=6.0, targets=("up_proj", "down_proj")), {}
    for recompute in ("none", "selective", "full"):
        role = new_actor(mesh, adapter=spec, recompute=recompute)
        role.engine.backward(parts_of("text", mesh), role.readout)
        found[recompute] = dict(role.engine.gradients())
    assert len(found["none"]) == 4 * 2 * 2 and all(g.any() for g in found["none"].values())
    for recompute in ("selective", "full"):
        assert max(relative_errors(found[recompute], found["none"]).values()) <= 1e-6


def test_generation_uses_the_adapters(mesh: Mesh) -> None:
    """Greedy tokens of the merged model."""
    prompts = Prompts(
        tokens=torch.randint(2, VOCAB, (3, 5), generator=generator(9)),
        lengths=torch.tensor([5, 3, 4]),
        prompt_id=torch.arange(3),
        sample_id=torch.arange(3),
        source=("test",) * 3,
        extras=({},) * 3,
    )
    sampling = Sampling(max_response=6, temperature=0.0)
    adapted, merged = new_actor(mesh, adapter=SPEC), new_actor(mesh)
    model = hf_model()
    model.load_state_dict(dict(adapted.export_weights()))
    fill(merged, model)
    ours, theirs = (x.generate(prompts, sampling) for x in (adapted, merged))
    assert torch.equal(ours.tokens, theirs.tokens)
    plain = new_actor(mesh).generate(prompts, sampling)
    assert not torch.equal(ours.tokens, plain.tokens)


def test_adapters_of_another_shape_are_refused(mesh: Mesh) -> None:
    engine = started(mesh, FEW)
    with pytest.raises(UserError, match="unexpected"):
        load_adapters(adapter_tensors(), engine.chunks, mesh, ARCHITECTURE, FEW)


@pytest.mark.parametrize("kind", ["text", "reward"])
def test_peft_reads_what_is_written(mesh: Mesh, tmp_path: Path, kind: str) -> None:
    """Its outputs are ours, also of a reward model with its head; what PEFT writes is read again,
    bit for bit."""
    engine = (new_actor if kind == "text" else new_reward)(mesh, adapter=SPEC).engine
    hf_model().save_pretrained(tmp_path / "base")
    place = engine.chunks, mesh, ARCHITECTURE, SPEC
    config = config_for(SPEC, str(tmp_path / "base"), engine.head)
    save_adapters(tmp_path, export_adapters(*place, head=engine.head), mesh, config)
    auto = transformers.AutoModelForCausalLM
    if kind == "reward":
        auto = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        labels = {"num_labels": 1} if kind == "reward" else {}
        theirs = auto.from_pretrained(tmp_path / "base", **labels)
        adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    ids = torch.randint(1, VOCAB, (1, 11), generator=generator(6))
    with torch.no_grad():
        expected = adapted(ids).logits
    found = outputs(engine, ids)
    torch.testing.assert_close(found if kind == "text" else found[:, -1], expected)
    adapted.save_pretrained(tmp_path / "again")
    assert spec_of(tmp_path / "again") == SPEC
    new = started(mesh, SPEC, "actor" if kind == "text" else "reward")
    load_adapters(tmp_path / "again", new.chunks, mesh, ARCHITECTURE, SPEC, head=new.head)
    for (name, a), (_, b) in zip(
        export_adapters(*place, head=engine.head),
        export_adapters(new.chunks, *place[1:], head=new.head),
        strict=True,
    ):
        assert torch.equal(a, b), name


class _NormAndLinear(nn.Module):
    """As Transformer Engine's LayerNormLinear: its input is before the norm."""

    def __init__(self, weight: Tensor, norm: Tensor) -> None:
        super().__init__()
        self.weight, self.layer_norm_weight, self.eps = weight, norm, 1e-5

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return F.linear(normed, self.weight), None


def test_a_norm_in_the_linear_layer_comes_before_the_adapter(mesh: Mesh) -> None:
    g = generator(3)
    weight, norm, x = (torch.randn(shape, generator=g) for shape in ((6, 4), (4,), (5, 2, 4)))
    linear = _NormAndLinear(weight, norm)
    linear.adapter = Adapter(weight, torch.ones(6, 1), 0, SPEC, sequence=False)
    a, b = (torch.randn(shape, generator=g) for shape in ((3, 4), (6, 3)))
    linear.adapter.a.data, linear.adapter.b.data = a, b
    linear.register_forward_hook(_add_adapter)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    torch.testing.assert_close(linear(x)[0], normed @ (weight + 2 * b @ a).T)
