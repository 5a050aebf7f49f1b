from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gipo_megatron.recipe.check import missing_loads
from gipo_megatron.recipe.draft import default_world
from gipo_megatron.recipe.schema import Hardware
from gipo_megatron.recipe.validate import WRONG
from gipo_megatron.specs import Parallel
from tests.recipe.helpers import SMALL, problems, small

# words on the command line, processes, key of the one problem, what it must say
CASES = [
    (
        ["parallel.tensor=2", "parallel.pipeline=2"],
        6,
        "parallel",
        "tensor 2 × pipeline 2 × data ? ≠ world 6: 6 is no multiple of 4",
    ),
    (["parallel.sequence=true"], 1, "parallel.sequence", "needs parallel.tensor above 1"),
    (
        ["parallel.virtual_pipeline=2"],
        1,
        "parallel.virtual_pipeline",
        "needs parallel.pipeline above 1",
    ),
    (["parallel.context=2"], 1, "parallel.context", "context parallelism is not built yet"),
    (["parallel.expert=4"], 1, "parallel.expert", "expert parallelism is not built yet"),
    (["parallel.tensor=0"], 1, "parallel.tensor", "0 must be at least 1"),
    (
        [
            "model.architecture.num_heads=6",
            "model.architecture.num_kv_heads=2",
            "parallel.tensor=4",
        ],
        4,
        "model.architecture.num_heads",
        "6",
    ),
    (
        ["model.architecture.num_kv_heads=3"],
        1,
        "model.architecture.num_heads",
        "4 does not divide by num_kv_heads 3",
    ),
    (
        ["parallel.pipeline=3"],
        3,
        "model.architecture.num_layers",
        "4 does not divide by pipeline 3 × virtual_pipeline 1 = 3",
    ),
    (
        ["model.architecture.ffn_hidden_size=383", "parallel.tensor=2"],
        2,
        "model.architecture.ffn_hidden_size",
        "383 does not divide by tensor 2",
    ),
    (
        ["model.architecture.vocab_size=256"],
        1,
        "model.architecture.vocab_size",
        "below the byte tokenizer's 259",
    ),
    (["model.architecture.head_dim=31"], 1, "model.architecture.head_dim", "even"),
    (
        ["batch.prompts=10"],
        1,
        "batch.minibatch",
        "prompts 10 × responses 4 = 40 sequences do not divide by minibatch 64",
    ),
    (
        ["batch.micro_batch=3"],
        1,
        "batch.minibatch",
        "64 does not divide by data 1 × micro_batch 3 = 3",
    ),
    (
        [],
        3,
        "batch.minibatch",
        (
            "64 does not divide by data 3 × micro_batch 4 = 12 (data 3 = world 3 / (tensor 1 ×"
            " pipeline 1))"
        ),
    ),
    (
        [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "batch.minibatch=4",
            "batch.micro_batch=4",
        ],
        2,
        "batch.micro_batch",
        "1 micro-batches do not divide by pipeline 2",
    ),
    (
        ["batch.micro_tokens=256"],
        1,
        "batch.micro_tokens",
        "256, and batch.micro_batch 4: only one of them can be set",
    ),
    (
        ["batch.micro_batch=null"],
        1,
        "batch.micro_tokens",
        "missing, and so is batch.micro_batch",
    ),
    (
        ["batch.micro_batch=null", "batch.micro_tokens=63"],
        1,
        "batch.micro_tokens",
        "63 has no room for a row of data.max_length = 64 tokens",
    ),
    (
        ["batch.micro_batch=null", "batch.micro_tokens=0"],
        1,
        "batch.micro_tokens",
        "0 must be at least 1",
    ),
    (
        ["batch.micro_batch=null", "batch.micro_tokens=64"],
        3,
        "batch.minibatch",
        "64 does not divide by data 3 (data 3 = world 3 / (tensor 1 × pipeline 1))",
    ),
    (["precision.fp8=delayed"], 1, "precision.fp8", ""),
    (["precision.dtype=fp16"], 1, "precision.dtype", "'fp16' is not one of fp32, bf16"),
    (
        ["data.max_length=2048"],
        1,
        "data.max_length",
        "2048 exceeds model.architecture.max_positions 1024",
    ),
    (["data.max_response=64"], 1, "data.max_response", "no room"),
    (["models.reward.lr=1e-6"], 1, "models.reward.lr", "not read"),
    (["models.reference.warmup_steps=5"], 1, "models.reference.warmup_steps", "not read"),
    (["models.actor.lr=null"], 1, "models.actor.lr", "missing"),
    (["models.actor.lr=0"], 1, "models.actor.lr", "above 0"),
    (["models.acter.load=random"], 1, "models.acter", "unknown role"),
    (["algorithm.variance_regulariser.beta=-1"], 1, "algorithm.variance_regulariser.beta", "-1"),
    (["run.dir="], 1, "run.dir", "empty"),
    (
        ["run.eval_every=0", "run.stop.score_patience=3"],
        1,
        "run.stop.score_patience",
        "eval_every is 0",
    ),
    (["run.loggers=[consle]"], 1, "run.loggers", "'consle' is not one of"),
    (["alerts.kl_abov=3"], 1, "alerts.kl_abov", "unknown key"),
    (["model.adapter.rank=-1"], 1, "model.adapter.rank", "-1 must be at least 0"),
    (["model.adapter.alpha=0"], 1, "model.adapter.alpha", "0.0 must be above 0"),
    (["model.adapter.targets=[q_prj]"], 1, "model.adapter.targets", "'q_prj' is not one of q_proj"),
    (
        ["model.adapter.rank=4", "model.adapter.targets=[]"],
        1,
        "model.adapter.targets",
        "is empty: nothing would be trained",
    ),
    (
        ["model.adapter.rank=4", "models.actor.offload=cpu"],
        1,
        "models.actor.offload",
        "cpu, and with model.adapter the roles share their weights",
    ),
]


@pytest.mark.parametrize(
    ("words", "world", "key", "what"),
    CASES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_mistake_names_its_key_and_every_factor(
    tmp_path: Path, words: list[str], world: int, key: str, what: str
) -> None:
    found = problems(tmp_path, *words, world=world)
    assert key in [p.key for p in found]
    assert any(what in p.what for p in found if p.key == key)
    assert len(found) <= 2


def test_fp8_needs_bf16_and_a_gpu(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "precision.fp8=delayed")) == 2
    assert len(problems(tmp_path, "precision.fp8=delayed", "precision.dtype=bf16")) == 1
    assert (
        small(
            tmp_path, "precision.fp8=delayed", "precision.dtype=bf16", "hardware.gpus=1"
        ).precision.fp8
        == "delayed"
    )


def test_good_layouts_pass(tmp_path: Path) -> None:
    for words, world, replicas in (
        (["parallel.tensor=2", "parallel.sequence=true"], 4, 2),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2, 1),
        (["parallel.tensor=2", "parallel.pipeline=2"], 4, 1),
        (["parallel.context=1", "parallel.expert=1"], 2, 2),
    ):
        assert small(tmp_path, *words, world=world).data_parallel == replicas


def test_a_token_budget_needs_no_number_of_micro_batches(tmp_path: Path) -> None:
    """Interleaved stages add idle micro-batches where the budget gives too few; a longest row just
    fits."""
    words = ["batch.micro_batch=null", "batch.micro_tokens=64", "batch.minibatch=1"]
    words += ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    assert small(tmp_path, *words, world=2).batch.micro_batch is None


def test_the_longest_pair_has_both_responses(tmp_path: Path) -> None:
    text = SMALL.replace("base/gipo", "base/reward_model")
    text = text.replace("  actor: {load: random}\n", "")
    words = ["batch.micro_batch=null", "batch.micro_tokens=127"]
    (problem,) = problems(tmp_path, *words, text=text)
    assert problem.what == "127 has no room for a pair of 2 × data.max_length = 128 tokens"
    assert problem.fix == "batch.micro_tokens=128"
    assert small(tmp_path, words[0], problem.fix, text=text).batch.micro_tokens == 128


def test_sft_reads_no_rollout_keys(tmp_path: Path) -> None:
    text = SMALL.replace("base/gipo", "base/sft").replace("  reward: {load: random}\n", "")
    recipe = small(tmp_path, text=text)
    assert recipe.trained == ("actor",) and list(recipe.models) == ["actor"] and not recipe.warnings
    found = problems(
        tmp_path,
        "batch.responses=2",
        "evaluation.top_p=0.5",
        "run.stop.kl_above=3",
        "algorithm.clip=0.1",
        text=text,
    )
    assert sorted(p.key for p in found) == [
        "algorithm.clip",
        "batch.responses",
        "evaluation.top_p",
        "run.stop.kl_above",
    ]
    assert all("does not read it" in p.what for p in found)


def test_a_function_as_reward_needs_no_reward_model(tmp_path: Path) -> None:
    text = SMALL.replace("  reward: {load: random}\n", "  critic: {load: random}\n")
    recipe = small(
        tmp_path,
        "algorithm.reward.name=function",
        "algorithm.reward.function=os.path:basename",
        text=text,
    )
    assert set(recipe.models) == {"actor", "reference", "critic"}
    assert not recipe.warnings
    kept = small(
        tmp_path, "algorithm.reward.name=function", "algorithm.reward.function=os.path:basename"
    )
    assert ["models.reward: not loaded" in warning for warning in kept.warnings] == [True]


def test_an_ensemble_loads_its_members(tmp_path: Path) -> None:
    words = [
        "algorithm.reward.name=ensemble",
        "algorithm.reward.members=[reward_a, reward_b]",
        "models.reward_a.load=random",
    ]
    assert [p.key for p in problems(tmp_path, *words)] == ["models.reward_b.load"]
    recipe = small(tmp_path, *words, "models.reward_b.load=random")
    assert {"reward_a", "reward_b"} < set(recipe.models) and "reward" not in recipe.models


def test_weights_that_are_elsewhere_warn_in_a_check_and_are_listed_for_the_launcher(
    tmp_path: Path,
) -> None:
    about = {
        "format": "gipo_megatron",
        "roles": {"reward": {"architecture": asdict(small(tmp_path).model.architecture)}},
    }
    (tmp_path / "meta.json").write_text(json.dumps(about))
    recipe = small(
        tmp_path,
        "models.actor.load=runs/nowhere/final",
        f"models.reward.load={tmp_path}",
        "models.critic.load=owner/model",
    )
    (warning,) = recipe.warnings
    assert "'runs/nowhere/final' is not on this machine (loaded by actor, reference)" in warning
    assert [p.key for p in missing_loads(recipe)] == ["models.actor.load"]


def test_warnings(tmp_path: Path) -> None:
    cut = small(tmp_path, "algorithm.rollout.top_p=0.9", "algorithm.rollout.top_k=5").warnings
    assert len(cut) == 2 and all("another distribution" in warning for warning in cut)
    groupless = small(tmp_path, "algorithm.group_classifier=none").warnings
    assert len(groupless) == 2 and all("has no effect" in warning for warning in groupless)


def test_without_torchrun_the_world_is_the_hardwares() -> None:
    assert default_world(Hardware(gpus=8), Parallel(2)) == 8
    assert default_world(Hardware(), Parallel(2, 3)) == 6
    assert default_world(WRONG, WRONG) == 1
