"""The whole chain by adapters on one frozen model: SFT, reward model, PPO with KL, GIPO, DPO, an
evaluation of their policies; one start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gipo_megatron.weights.base import base_at
from gipo_megatron.weights.checkpoints import read_meta
from tests.runs import chain
from tests.runs.test_dpo import same

pytestmark = pytest.mark.multiprocess
ADAPTER = "model.adapter.rank=4"
KEPT = ("run.save_every=1", "run.keep=9", "run.export_hf=true")
STAGES = {"sft": ("actor",), "rm": ("reward",), "dpo": ("actor",)}
STAGES |= dict.fromkeys(("ppo_kl", "gipo"), ("actor", "critic"))
TASK = "{name: short, kind: helpful, data: short.jsonl, template: hh, prompts: 9, max_length: 96}"


def evaluation(folder: Path) -> list[str]:
    """The frozen model, SFT and GIPO, each against SFT's adapters and scored by the reward
    model's."""
    rows = [json.dumps({"prompt": f"Say number {i}."}) + "\n" for i in range(3)]
    (folder / "short.jsonl").write_text("".join(rows))
    loads = {"whole": f"{folder}/whole/hf", **{n: f"{folder}/{n}/final" for n in ("sft", "gipo")}}
    policies = ", ".join(f"{name}: {{load: {load}}}" for name, load in loads.items())
    models = f"reward: {{load: {folder}/rm/final}}, reference: {{load: {folder}/sft/final}}"
    (folder / "small_evaluate.yaml").write_text(
        "defaults: [base/evaluate, hardware/cpu]\nmodel: {tokenizer: bytes}\n"
        f"policies: {{{policies}}}\nmodels: {{{models}}}\ntasks: [{TASK}]\ndata_root: {folder}\n"
        "generation: {max_response: 6, temperature: 0}\njudge: reward_model\n"
        "report: {bootstrap: 50}\n"
    )
    return [f"recipe={folder}/small_evaluate.yaml", f"run.dir={folder}/evaluation"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[chain.Outcome]]:
    """RUNS/whole/hf is the frozen model; a folder beside it for each run by adapters."""
    folder = tmp_path_factory.mktemp("lora")
    model = f"models.actor.load={folder}/whole/hf"
    cases = [
        chain.sft(folder / "whole", "run.export_hf=true"),
        chain.sft(folder / "sft", ADAPTER, model, "run.export_hf=true"),
        chain.reward_model(folder / "rm", folder / "sft", ADAPTER),
        chain.ppo("ppo_kl", folder / "ppo_kl", folder, ADAPTER),
        chain.ppo("gipo", folder / "gipo", folder, ADAPTER, *KEPT),
        chain.ppo("gipo", folder / "resumed", folder, ADAPTER, *KEPT, "run.steps=2"),
        chain.ppo("gipo", folder / "resumed", folder, ADAPTER, *KEPT),
        chain.dpo(folder / "dpo", folder, ADAPTER),
        chain.dpo(folder / "dpo_live", folder, ADAPTER, "algorithm.precompute=false"),
        chain.dpo(folder / "dpo_model", folder, ADAPTER, model),
        chain.sft(folder / "from_peft", ADAPTER, f"models.actor.load={folder}/sft/hf"),
        evaluation(folder),
        chain.ppo("gipo", folder / "refused", folder, "model.adapter.rank=8"),
        chain.ppo("gipo", folder / "refused", folder),
    ]
    outcomes = chain.outcomes(cases, folder)
    errors = [one.error for one in outcomes[:-2] if one.error]
    assert not errors, "\n".join(errors)
    return folder, outcomes[-2:]


def test_every_stage_is_adapters_on_one_model(done: tuple[Path, list[chain.Outcome]]) -> None:
    folder, _ = done
    base = base_at(folder / "whole" / "hf")
    for stage, roles in STAGES.items():
        final = folder / stage / "final"
        saved = read_meta(final).roles
        assert tuple(saved) == roles
        for role, about in saved.items():
            assert about.adapter is not None and about.adapter.rank == 4
            assert (about.base, about.base and about.base.source) == (base, base.source)
            stored = sum(file.stat().st_size for file in (final / role).glob("*.distcp"))
            assert stored < 800_000, (stage, role, stored)


def test_policies_start_from_their_reference(done: tuple[Path, list[chain.Outcome]]) -> None:
    """Its adapters, or none on the frozen model itself: log 2 is the loss of a policy that is its
    reference."""
    folder, _ = done
    for name in ("dpo", "dpo_live", "dpo_model"):
        story = chain.rows(folder / name)
        assert story[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5), name
        assert story[4]["eval/loss"] != story[0]["eval/loss"], name
    for name in ("ppo_kl", "gipo"):
        first, *_, last = [row["kl/mean"] for row in chain.rows(folder / name)[1:]]
        assert first == pytest.approx(0, abs=1e-5) and last and abs(last) > 1e-5, name


def test_a_precomputed_reference(done: tuple[Path, list[chain.Outcome]]) -> None:
    folder, _ = done
    assert same(folder / "dpo", folder / "dpo_live", (0, 1, 2, 3, 4), 1e-4) > 30


def test_a_resumed_run(done: tuple[Path, list[chain.Outcome]]) -> None:
    """The rows and the adapters are those of a run that was not interrupted, bit for bit."""
    folder, _ = done
    chain.same_story(folder / "resumed", folder / "gipo")
    files = [folder / n / "hf" / "adapter_model.safetensors" for n in ("resumed", "gipo", "sft")]
    resumed, alone, start = (file.read_bytes() for file in files)
    assert resumed == alone and alone != start


def test_exported_adapters_continue(done: tuple[Path, list[chain.Outcome]]) -> None:
    """A PEFT folder is a start as its checkpoint is: the first held-out loss is the last one."""
    folder, _ = done
    loss = [chain.rows(folder / name) for name in ("sft", "from_peft")]
    assert loss[1][0]["eval/loss"] == pytest.approx(loss[0][-1]["eval/loss"], abs=1e-6)
    assert loss[0][-1]["eval/loss"] < loss[0][0]["eval/loss"]
    tensors = load_file(folder / "sft" / "hf" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2 and all(x.any() for x in tensors.values())


def test_an_evaluation_of_adapters(done: tuple[Path, list[chain.Outcome]]) -> None:
    folder, _ = done
    kl = {}
    for policy in ("whole", "sft", "gipo"):
        text = (folder / "evaluation" / "responses" / f"{policy}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        kl[policy] = [row["figures"]["kl"] for row in rows if "figures" in row]
        assert len(kl[policy]) == 3
    assert kl["sft"] == [0.0] * 3 and all(kl["whole"]) and all(kl["gipo"])


def test_adapters_of_another_shape_are_refused(done: tuple[Path, list[chain.Outcome]]) -> None:
    folder, refused = done
    for outcome, here in zip(refused, ("here AdapterSpec(rank=8", "here None"), strict=True):
        assert "other adapters: there AdapterSpec(rank=4" in outcome.error, outcome.error
        assert here in outcome.error and "model.adapter" in outcome.error
    assert not (folder / "refused" / "metrics.jsonl").exists()
