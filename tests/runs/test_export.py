"""Runs to Hugging Face and back: what transformers says of an exported model is what ours says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.data.tokenizer import load_tokenizer
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronRewardModel
from gipo_megatron.specs import Architecture, HeadSpec, Parallel, Precision, Sampling
from gipo_megatron.telemetry.console import Display
from gipo_megatron.types import Prompts, Sequences
from gipo_megatron.weights.checkpoints import read_meta
from tests.conversion import families
from tests.runs import chain

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
SILENT = Display(shown=False)
FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Of this file alone: runs in this process have ended the session's."""
    yield Mesh.create(Parallel(), seed=1)


def architecture(run: Path, role: str) -> Architecture:
    return Architecture(
        **json.loads((run / "final" / "meta.json").read_text())["roles"][role]["architecture"]
    )


def engine(mesh: Mesh, run: Path, role: str, **more: Any) -> Engine:
    more = {"load": str(run / "final"), "micro_batch": 4, **more}
    return build_engine(role, mesh, architecture(run, role), Precision("fp32"), **more)


def texts(count: int = 8) -> list[str]:
    """Conversations of unequal lengths."""
    return [f"\n\nHuman: {'word ' * (1 + 3 * i % 7)}{i}?\n\nAssistant:" for i in range(count)]


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """[B, T] right-padded, and lengths [B]."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows]), torch.tensor(
        [len(row) for row in rows]
    )


def test_the_policy_generates_the_same_tokens(base: Path, mesh: Mesh) -> None:
    run = base / "gipo"
    tokenizer = load_tokenizer(str(run / "hf"))
    # plain text: no chat template
    assert {p.name for p in (run / "hf").iterdir()} == FILES | {"generation_config.json"}
    actor = MegatronActor(
        engine(mesh, run, "actor"),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        decode=lambda ids: tokenizer.decode(ids),
    )
    rows = [[tokenizer.bos_id or 0, *tokenizer.encode(text)] for text in texts()]
    ids, lengths = padded(rows, tokenizer.pad_id)
    number = torch.arange(len(rows))
    prompts = Prompts(ids, lengths, number, number, ("",) * len(rows), ({},) * len(rows))
    rollout = actor.generate(prompts, Sampling(24, temperature=0.0))
    model = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    compared = 0
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs = model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=24)[
                0, len(row) :
            ].tolist()
        ours = rollout.tokens[i, len(row) : len(row) + int(rollout.mask[i].sum())].tolist()
        assert ours == theirs, i
        compared += len(ours)
    assert compared >= 8 * 2, "the responses are too short to mean anything"


def test_the_reward_model_gives_the_same_scores(base: Path, mesh: Mesh) -> None:
    """Through transformers' tokenizer and its padding, texts ending in end-of-text as in
    training."""
    run = base / "rm"
    assert {p.name for p in (run / "hf").iterdir()} == FILES
    reward = MegatronRewardModel(engine(mesh, run, "reward"))
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    spoken = [text + " Yes, it is." + tokenizer.eos_token for text in texts()]
    batch = tokenizer(spoken, padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert (
        lengths.min() < lengths.max()
        and tokenizer.padding_side == "right"
        and tokenizer.pad_token != tokenizer.eos_token
    )
    sequences = Sequences(
        batch["input_ids"],
        batch["attention_mask"].bool(),
        torch.ones_like(lengths),
        lengths,
        torch.arange(len(spoken)),
    )
    model = AutoModelForSequenceClassification.from_pretrained(run / "hf").eval()
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0]
    torch.testing.assert_close(reward.score(sequences), theirs, atol=1e-5, rtol=0)
    assert float(theirs.std()) > 1e-3, "all scores are alike: nothing was compared"


def test_the_critic_keeps_its_group_head(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    run = base / "gipo"
    to_hf(run / "final", tmp_path / "critic", mesh, role="critic", verify=True, progress=SILENT)
    card = (tmp_path / "critic" / "README.md").read_text()
    assert (
        "group_head.safetensors" in card
        and "last prompt token" in card
        and "recipe `tiny/gipo`, step 3, commit" in card
    )
    to_megatron(
        str(tmp_path / "critic"), tmp_path / "checkpoint", mesh, verify=True, progress=SILENT
    )
    heads = []
    for load in (run / "final", tmp_path / "critic", tmp_path / "checkpoint"):
        group = HeadSpec(2, "prompt", detach_trunk=True)
        critic = engine(mesh, run, "critic", load=str(load), group=group)
        assert critic.group_head is not None
        heads.append([critic.group_head.weight.detach(), critic.group_head.bias.detach()])
        heads[-1].append(critic.chunks[0].output_layer.weight.detach())
    saved = load_file(tmp_path / "critic" / "group_head.safetensors")
    for w, b, value in heads:
        assert (
            torch.equal(w, saved["weight"])
            and torch.equal(b, saved["bias"])
            and torch.equal(value, heads[0][2])
        )
    assert len(heads) == 3


def test_a_run_from_folders_is_the_run_from_checkpoints(base: Path) -> None:
    chain.same_story(base / "gipo", base / "gipo_from_hf")


def test_every_layout_exports_the_same_folder(two: Path, mesh: Mesh, tmp_path: Path) -> None:
    """hf/ as the ranks wrote it together is what one process makes of the checkpoint, bit for
    bit."""
    checked = 0
    for name in ("dp2", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_mb2_offload"):
        to_hf(two / name / "final", tmp_path / name, mesh, verify=False, progress=SILENT)
        assert families.same_bits(
            families.tensors(two / name / "hf"), families.tensors(tmp_path / name)
        ), name
        for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert (two / name / "hf" / file).read_bytes() == (
                tmp_path / name / file
            ).read_bytes(), (name, file)
        checked += 1
    assert checked == 6


def test_meta_says_where_it_comes_from(base: Path) -> None:
    meta = read_meta(base / "rm" / "final")
    assert meta.template == "auto" and meta.recipe == "tiny/rm" and len(meta.commit) >= 7
    assert meta.roles["reward"].dtype == "fp32"
    assert "NOT checked: outputs" in (base / "rm" / "hf" / "README.md").read_text()
