"""PEFT's folders: what PEFT writes is read and goes out again, bit for bit; what is written here
has PEFT's outputs; merged weights are PEFT's own; all else is refused."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gipo_megatron.conversion import verify
from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.conversion.export import export_run
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine, stored_adapters
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf_adapters import export_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import outputs
from gipo_megatron.specs import LINEARS, AdapterSpec, Precision
from gipo_megatron.telemetry.console import Display
from gipo_megatron.weights.checkpoints import CheckpointMeta, read_meta
from gipo_megatron.weights.hf_config import architecture_from_hf
from gipo_megatron.weights.peft_config import base_name, spec_of
from tests.conversion import families
from tests.parity.tiny import ARCHITECTURE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages' imports print
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")

pytestmark = pytest.mark.global_rng
SILENT = Display(shown=False)
FEW = AdapterSpec(rank=4, alpha=6.0, targets=("q_proj", "v_proj"), scaling="rslora")
# as users write them; without target_modules, PEFT takes its own for the family
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {"r": 4, "use_rslora": True, "task_type": "CAUSAL_LM"},
    "reward": {"r": 3, "lora_alpha": 9, "target_modules": list(LINEARS), "task_type": "SEQ_CLS"},
}


def from_transformers(folder: Path, kind: str) -> Any:
    if kind == "reward":
        auto, labels = AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        auto, labels = AutoModelForCausalLM, {}
    return auto.from_pretrained(folder, dtype="auto", **labels).eval()


def quietly(call: Any, *arguments: Any, **options: Any) -> Any:
    """PEFT 0.21 reads a name that transformers 5 has changed."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return call(*arguments, **options)


def write_peft(folder: Path, base: Path, kind: str, **changes: Any) -> Path:
    """Adapters as PEFT saves them, B not 0."""
    config = peft.LoraConfig(**{**SETTINGS[kind], **changes})
    model = quietly(peft.get_peft_model, from_transformers(base, kind), config)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "score" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return folder


def with_peft(folder: Path, base: Path, kind: str) -> Any:
    return quietly(peft.PeftModel.from_pretrained, from_transformers(base, kind), str(folder))


def as_in_card(card: str, folder: Path) -> Any:
    """The model that the code of a model card loads; a padded text has its own score."""
    found: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```")[0].replace('"PATH"', repr(str(folder))), found)
    model = found["model"].eval()
    if "num_labels" in card:  # the tokenizer pads, and the model finds each text's last token
        texts = found["tokenizer"](["a text", "text"], padding=True, return_tensors="pt")
        one = found["tokenizer"](["text"], return_tensors="pt")
        with torch.no_grad():
            both, alone = model(**texts).logits, model(**one).logits
        torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_hf(tmp_path_factory.mktemp("base") / "hf", "llama2")


def ids(engine: Engine) -> Tensor:
    g = torch.Generator().manual_seed(6)
    return torch.randint(0, engine.architecture.vocab_size - 5, (1, 11), generator=g)


def loaded(mesh: Mesh, load: Path, model: Path, spec: AdapterSpec, kind: str) -> Engine:
    role = "reward" if kind == "reward" else "actor"
    place = role, mesh, architecture_from_hf(model), Precision("fp32")
    return build_engine(*place, load=str(load), adapter=spec)


def adapters(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def within(text: str) -> list[float]:
    return [
        float(line.split("within ")[1].split()[0])
        for line in text.splitlines()
        if "of PEFT's" in line
    ]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("family", "dtype"), [("llama2", "float32"), ("qwen2_tied", "bfloat16")])
def test_what_peft_writes_goes_in_and_out(
    family: str, dtype: str, kind: str, mesh: Mesh, tmp_path: Path, capsys: Any
) -> None:
    """PEFT keeps adapters in fp32, on a base in bf16, too; a head beside them is in the base's
    dtype, and goes out with more bits."""
    model = families.write_hf(tmp_path / "hf", family, dtype)
    folder = write_peft(tmp_path / "peft", model, kind)
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=True, progress=Display())
    to_hf(tmp_path / "checkpoint", tmp_path / "again", mesh, verify=True, progress=Display())
    errors = within(capsys.readouterr().out)
    assert len(errors) == 2 and max(errors) < 1e-5
    before = {name: t.float() for name, t in adapters(folder).items()}
    assert families.same_bits(before, adapters(tmp_path / "again"))
    assert spec_of(tmp_path / "again") == spec_of(folder)
    assert base_name(tmp_path / "again") == str(model)
    about = next(iter(read_meta(tmp_path / "checkpoint").roles.values()))
    assert about.base is not None and about.base.source == str(model)
    files = sum(f.stat().st_size for f in (tmp_path / "checkpoint").rglob("*.distcp"))
    assert files < 3 * (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", SETTINGS)
def test_outputs_are_pefts(kind: str, base: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Of a folder that PEFT wrote, and of one written here."""
    folder = write_peft(tmp_path / "peft", base, kind)
    engine = loaded(mesh, folder, base, spec_of(folder), kind)
    role = "reward" if kind == "reward" else "actor"
    meta = CheckpointMeta(3, recipe="a/recipe", commit="c")
    export_run(tmp_path / "hf", role, engine, byte_tokenizer(), meta, SILENT)
    found = outputs(engine, ids(engine))
    card = (tmp_path / "hf" / "README.md").read_text()
    for model in (with_peft(folder, base, kind), quietly(as_in_card, card, tmp_path / "hf")):
        with torch.no_grad():
            theirs = model(ids(engine)).logits
        expected = theirs if kind == "text" else theirs[:, None]
        got = found if kind == "text" else found[:, -1:]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "library_name: peft" in card and f'from_pretrained("{base}"' in card
    assert "NOT checked: outputs against PEFT" in card and "recipe `a/recipe`, step 3" in card


@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_weights_are_pefts(kind: str, base: Path, mesh: Mesh, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", base, kind)
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=False, progress=SILENT)
    to_hf(tmp_path / "checkpoint", tmp_path / "m", mesh, merge=True, verify=True, progress=SILENT)
    merged = with_peft(folder, base, kind).merge_and_unload()
    expected = {name: p.detach() for name, p in merged.named_parameters()}
    found = families.tensors(tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "merged into the weights here" in card and "of transformers'" in card
    assert not (tmp_path / "m" / "adapter_config.json").exists()


def test_a_merged_sum_may_be_rounded(mesh: Mesh, tmp_path: Path) -> None:
    """In bf16 the outputs of the rounded sum are compared."""
    model = families.write_hf(tmp_path / "hf", "qwen3", "bfloat16")
    engine = filled(mesh, model, FEW, "bf16")
    saved = save(engine, mesh, tmp_path)
    to_hf(saved, tmp_path / "m", mesh, merge=True, verify=True, progress=SILENT)
    assert {t.dtype for t in families.tensors(tmp_path / "m").values()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------- round trips


def filled(mesh: Mesh, load: Path | str, spec: AdapterSpec, dtype: str = "fp32") -> Engine:
    shape = replace(ARCHITECTURE, vocab_size=261)
    if load != "random":
        shape = architecture_from_hf(load)
    engine = build_engine(
        "critic" if spec.rank % 2 else "actor",
        mesh,
        shape,
        Precision(dtype),
        load=str(load),
        adapter=spec,
    )
    g = torch.Generator().manual_seed(spec.rank)
    with torch.no_grad():
        for chunk in engine.chunks:
            for name, p in chunk.named_parameters():
                if name.endswith("adapter.a") or ("output_layer" in name and p.requires_grad):
                    p.copy_(torch.randn(p.shape, generator=g))
                if name.endswith("adapter.b"):  # rows without an adapter stay 0
                    parts = chunk.get_submodule(name.removesuffix(".b")).parts
                    p.copy_(torch.randn(p.shape, generator=g) * parts.sum(1, keepdim=True))
    return engine


def save(engine: Engine, mesh: Mesh, folder: Path) -> Path:
    role = "actor" if engine.head is None else "critic"
    return checkpoint.save(folder, {role: engine}, mesh, CheckpointMeta(1))


def test_round_trips(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Any targets, ranks and factors, with a head and without: checkpoint, PEFT's folder and
    checkpoint again have the same bits."""
    draw, done = random.Random(4), 0
    for rank in range(1, 7):
        targets = tuple(draw.sample(LINEARS, draw.randint(1, 7)))
        scaling = draw.choice(("standard", "rslora"))
        spec = AdapterSpec(rank, draw.choice((1.0, 2.5, 32.0)), targets, scaling)
        engine, place = filled(mesh, base, spec), tmp_path / str(rank)
        head = engine.head
        to_hf(save(engine, mesh, place), place / "peft", mesh, verify=rank < 3, progress=SILENT)
        to_megatron(str(place / "peft"), place / "again", mesh, verify=False, progress=SILENT)
        kind = "text" if head is None else "reward"
        again = loaded(mesh, place / "again", base, spec_of(place / "peft"), kind)
        shape = mesh, engine.architecture, spec
        before = dict(export_adapters(engine.chunks, *shape, head=head))
        after = dict(export_adapters(again.chunks, *shape, head=head))
        assert families.same_bits(before, after), spec
        done += 1
    assert done == 6


# ----------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora True"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "output layer": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "target embed_tokens"),
    "pattern": ({"target_modules": ".*q_proj"}, "target_modules: '.*q_proj' is not a list"),
    "one layer": ({"target_modules": ["layers.0.self_attn.q_proj"]}, "target layers.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused(name: str, base: Path, mesh: Mesh, tmp_path: Path) -> None:
    """One message that names the key, and nothing under the final name."""
    changes, named = REFUSED[name]
    folder = write_peft(tmp_path / "peft", base, "text")
    peft.LoraConfig(
        **{**SETTINGS["text"], "target_modules": ["q_proj"], **changes}
    ).save_pretrained(folder)
    with pytest.raises(UserError) as error:
        to_megatron(str(folder), tmp_path / "out", mesh, verify=True, progress=SILENT)
    assert named in str(error.value) and error.value.where.endswith("adapter_config.json")
    assert error.value.fix and len(str(error.value).splitlines()) < 10
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folders_that_are_not_whole(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", base, "text")
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=False, progress=SILENT)

    def broken(said: str, **changes: Any) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
        edit(copy, **changes)
        with pytest.raises(UserError, match=said):
            to_megatron(str(copy), tmp_path / "out", mesh, verify=False, progress=SILENT)
        assert not (tmp_path / "out").exists()

    broken("nothing to load at", base_model_name_or_path=str(tmp_path / "gone"))
    broken("no model that adapters could be added to", base_model_name_or_path=None)
    broken("model that adapters could be added to", base_model_name_or_path=str(folder))
    broken("is no Hugging Face model", base_model_name_or_path=str(tmp_path / "checkpoint"))
    broken("wrong shape", r=5)
    broken("missing", target_modules=["q_proj", "k_proj", "v_proj"])
    broken("unexpected", target_modules=["q_proj"])
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot read adapter_model\.safetensors"):
        to_megatron(str(tmp_path / "copy"), tmp_path / "out", mesh, verify=False, progress=SILENT)
    (tmp_path / "copy" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json without adapter_model\.safetensors"):
        to_megatron(str(tmp_path / "copy"), tmp_path / "out", mesh, verify=False, progress=SILENT)


def test_a_recipe_with_other_adapters(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", base, "text")
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=False, progress=SILENT)
    for load, role in ((folder, "actor"), (tmp_path / "checkpoint", "reference")):
        assert stored_adapters(str(load), role) == spec_of(folder)  # as an evaluation does
    assert stored_adapters(str(base), "actor") == AdapterSpec()
    for spec in (FEW, AdapterSpec()):
        with pytest.raises(UserError, match="other adapters: there AdapterSpec") as error:
            loaded(mesh, folder, base, spec, "text")
        assert error.value.fix == "give the same model.adapter"


def test_a_base_that_peft_cannot_load_is_merged(mesh: Mesh, tmp_path: Path) -> None:
    """Random weights are in no folder: the command refuses to write adapters for them, a run's
    export is the whole model."""
    engine = filled(mesh, "random", FEW)
    saved = save(engine, mesh, tmp_path)
    with pytest.raises(UserError, match="PEFT cannot load the base") as error:
        to_hf(saved, tmp_path / "out", mesh, verify=True, progress=SILENT)
    assert error.value.fix == "write the whole model: merge=true"
    to_hf(saved, tmp_path / "merged", mesh, merge=True, verify=True, progress=SILENT)
    export_run(tmp_path / "hf", "actor", engine, byte_tokenizer(), CheckpointMeta(1), SILENT)
    assert families.same_bits(
        families.tensors(tmp_path / "merged"), families.tensors(tmp_path / "hf")
    )


def test_merge_of_a_whole_model(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    to_megatron(str(base), tmp_path / "checkpoint", mesh, verify=False, progress=SILENT)
    with pytest.raises(UserError, match="this model has no adapters") as error:
        to_hf(
            tmp_path / "checkpoint",
            tmp_path / "out",
            mesh,
            merge=True,
            verify=True,
            progress=SILENT,
        )
    assert error.value.fix == "leave merge out"


def test_without_peft(
    base: Path, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = write_peft(tmp_path / "peft", base, "text")
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=True, progress=Display())
    assert "NOT checked (peft is not installed)" in capsys.readouterr().out
    to_hf(tmp_path / "checkpoint", tmp_path / "again", mesh, verify=True, progress=SILENT)
    assert "NOT checked (peft is not installed)" in (tmp_path / "again/README.md").read_text()


def test_other_outputs_are_a_mismatch(base: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Every tensor agrees, and another factor makes another model."""
    folder = write_peft(tmp_path / "peft", base, "text")
    edit(folder, lora_alpha=12)
    engine = loaded(mesh, folder, base, spec_of(folder), "text")
    edit(folder, lora_alpha=16)
    with pytest.raises(verify.Mismatch, match="from PEFT's"):
        verify.check_outputs(folder, engine)
