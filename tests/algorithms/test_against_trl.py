"""SFT, reward model and DPO against TRL's trainers: the same rows as text, the same weights;
tokens, losses and gradients. RLOO and GRPO: advantages of the same rewards."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gipo_megatron.algorithms.dpo import DPO
from gipo_megatron.algorithms.pair_reference import LiveReference
from gipo_megatron.algorithms.reward_model import RewardModelling
from gipo_megatron.algorithms.sft import SFT
from gipo_megatron.components.advantage import GroupNormalised, LeaveOneOut
from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronReference, MegatronRewardModel
from gipo_megatron.roles import SingleReplica
from gipo_megatron.specs import Optimisation, Parallel, Precision
from gipo_megatron.types import Update
from tests.parity import tiny
from tests.small_ppo import rollout_of

pytestmark = [
    pytest.mark.global_rng,
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="needs TRL: pip install -e '.[dev]'"
    ),
]
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocab_size=259, max_positions=128)
ROWS = [
    {
        "prompt": "What is two plus two?",
        "chosen": " Four.",
        "rejected": " Two and two, as everybody knows.",
    },
    {"prompt": "Name a colour.", "chosen": " Red, or a deep blue.", "rejected": " No."},
    {"prompt": "Where does the sun rise?", "chosen": " In the east.", "rejected": " In the west."},
    {"prompt": "Say nothing.", "chosen": " …", "rejected": " I will say a lot about that."},
    {"prompt": "Count: one, two,", "chosen": " three, four, five", "rejected": " one"},
]
DPO_KEYS: dict[str, dict[str, Any]] = {
    "dpo/sigmoid": {"beta": 0.5},
    "dpo/precomputed": {"beta": 0.5},
    "dpo/ipo_mean": {"beta": 0.1, "loss": "ipo", "length_normalise": True},
    "dpo/sigmoid_mean": {"beta": 2.0, "length_normalise": True},
    "dpo/smoothed": {"beta": 0.5, "label_smoothing": 0.2},
}


def config() -> LlamaConfig:
    a = ARCHITECTURE
    return LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        rms_norm_eps=a.norm_eps,
        rope_theta=a.rope_base,
        num_labels=1,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )


def save_models(folder: Path) -> None:
    """policy/, reference/ (the policy, moved a little) and reward/ (the policy's trunk with a score
    head)."""
    with torch.random.fork_rng():
        policy, reward = (
            LlamaForCausalLM(config()),
            AutoModelForSequenceClassification.from_config(config()),
        )
    g = tiny.generator(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
        reward.score.weight.copy_(0.3 * torch.randn(reward.score.weight.shape, generator=g))
    reward.model.load_state_dict(policy.model.state_dict())
    reward.save_pretrained(folder / "reward")
    policy.save_pretrained(folder / "policy")
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=g))
    policy.save_pretrained(folder / "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    save_models(folder)
    byte_tokenizer().save(folder / "tokenizer")
    worker = Path(__file__).with_name("trl_worker.py")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, dict[str, Any]]:
    return torch.load(folder / "trl.pt", weights_only=True)


def rows_as(kind: str, folder: Path) -> Dataset:
    if not (folder / "rows.jsonl").exists():
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = DataConfig(path=str(folder / "rows.jsonl"), max_length=128, max_response=48)
    return load_data(data, byte_tokenizer(), "all", 0, kind)


class Gradients:
    """A role whose update keeps the gradients."""

    def __init__(self, role: Any) -> None:
        self.role = role
        self.found: dict[str, Tensor] = {}

    def update(self, *parts: Any) -> Update:
        metrics, bad = self.role.engine.backward(parts, self.role.readout)
        assert bad == []
        self.found = dict(self.role.engine.gradients())
        return Update(metrics)


def engine(role: str, folder: Path, optimisation: Optimisation | None = None) -> Engine:
    return build_engine(
        role,
        Mesh.create(Parallel()),
        ARCHITECTURE,
        Precision("fp32"),
        micro_batch=2,
        load=str(folder),
        optimisation=optimisation,
    )


def actor(folder: Path) -> Gradients:
    policy = engine("actor", folder / "policy", Optimisation(lr=1e-3))
    return Gradients(MegatronActor(policy, eos_id=258, pad_id=256, decode=str))


def agree(mine: Gradients, loss: float, batch: Any, trl: dict[str, Any]) -> None:
    """The same tokens, the loss within 1e-4, every tensor's gradient within 1e-4."""
    sequences = batch.sequences
    tokens = [
        row[:length].tolist()
        for row, length in zip(sequences.tokens, sequences.lengths.tolist(), strict=True)
    ]
    assert sorted(tokens) == sorted(trl["tokens"]) and len(tokens) >= len(ROWS)
    assert loss == pytest.approx(trl["loss"], abs=1e-4, rel=1e-4)
    errors = tiny.relative_errors(mine.found, trl["gradients"])
    assert len(errors) == 39 and max(errors.values()) < 1e-4, max(
        errors.items(), key=lambda item: item[1]
    )


@pytest.mark.parametrize("case", DPO_KEYS)
def test_dpo(case: str, folder: Path, theirs: dict[str, dict[str, Any]]) -> None:
    policy, reference = (
        actor(folder),
        LiveReference(MegatronReference(engine("reference", folder / "reference"))),
    )
    batch, _ = rows_as("preference", folder).pairs_at(range(len(ROWS)))
    page = DPO(
        **DPO_KEYS[case],
        actor=policy,  # type: ignore[arg-type]
        reference=reference,
        pairs=lambda step: batch,
        timer=lambda name: nullcontext(),
    )
    result = page.step(0)
    agree(policy, result.metrics["dpo/loss"].result(), batch, theirs[case])


def test_sft(folder: Path, theirs: dict[str, dict[str, Any]]) -> None:
    policy = actor(folder)
    batch, _ = rows_as("sft", folder).examples_at(range(len(ROWS)))
    page = SFT(actor=policy, examples=lambda step: batch, timer=lambda name: nullcontext())  # type: ignore[arg-type]
    agree(policy, page.step(0).metrics["sft/loss"].result(), batch, theirs["sft"])


@pytest.mark.parametrize(("case", "centre"), [("rm", 0.0), ("rm/centred", 0.1)])
def test_reward_model(
    case: str, centre: float, folder: Path, theirs: dict[str, dict[str, Any]]
) -> None:
    """TRL's loss holds the centring; our metric is the preference term alone, so the second is
    compared by its gradient."""
    reward = Gradients(
        MegatronRewardModel(engine("reward", folder / "reward", Optimisation(lr=1e-3)))
    )
    batch, _ = rows_as("preference", folder).pairs_at(range(len(ROWS)))
    page = RewardModelling(
        centre=centre, reward=reward, pairs=lambda step: batch, timer=lambda name: nullcontext()
    )  # type: ignore[arg-type]
    loss = page.step(0).metrics["rm/loss"].result()
    if centre:
        scores = reward.role.score(batch)
        loss += centre * float(sum(scores.chunk(2)).square().mean())
    agree(reward, loss, batch, theirs[case])


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_advantages(name: str, theirs: dict[str, dict[str, Any]]) -> None:
    """TRL's rewards, as rewards of our last tokens, give TRL's advantages."""
    trl = theirs[name]
    prompts = sorted(set(trl["prompts"]))
    assert (len(trl["rewards"]), len(prompts)) == (12, 3)
    assert len(set(trl["rewards"])) > 6, "the responses hardly differ"
    rollout = rollout_of(["a"] * 12, [prompts.index(prompt) for prompt in trl["prompts"]])
    rewards = torch.zeros(12, 3)
    rewards[:, 2] = torch.tensor(trl["rewards"])
    component = {"rloo": LeaveOneOut, "grpo": GroupNormalised}[name](dp=SingleReplica())
    advantages, _ = component.estimate(rewards, None, rollout)
    assert advantages[:, 1].tolist() == pytest.approx(trl["advantages"], abs=1e-5)
    assert torch.equal(advantages[:, 1], advantages[:, 2])
