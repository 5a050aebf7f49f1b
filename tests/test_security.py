"""Files from elsewhere: none runs code, none leads out of its folder (docs/security.md).

Each attack makes a folder, which is the proof that code ran.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.features import Image
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from gipo_megatron.data.examples import BadRow, Turn
from gipo_megatron.data.folders import file_parts, folder_parts
from gipo_megatron.data.templates import choose
from gipo_megatron.data.tokenizer import byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.checkpoint.sharded import InlineSave
from gipo_megatron.megatron.cpu_compat import host_mode
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.stored import load, read_index
from gipo_megatron.recipe.compose import load_components
from gipo_megatron.recipe.source import Block, Leaf, parse_value, parse_yaml
from gipo_megatron.weights.checkpoints import CheckpointMeta
from gipo_megatron.weights.hf_config import config_like
from gipo_megatron.weights.hf_files import open_weights
from tests.parity.roles import new_reward

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gipo_megatron"
OUTSIDE = ["../other", "a/../../other", "/etc/passwd", "", "a\0b", "x" * 300, "\ud800"]


class Attack:
    """Its pickle makes the folder `mark` when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


class Lookup:
    """Its pickle looks an attribute up."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that must not be there at the end."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "code of the file ran"


def test_an_attack_runs_where_nothing_is_checked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small reward model's checkpoint."""
    engine = new_reward(mesh, optimisation=None).engine
    folder = tmp_path_factory.mktemp("run")
    path = checkpoint.save(folder, {"reward": engine}, mesh, CheckpointMeta(1))
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def planted(files: dict[str, bytes], folder: Path) -> Path:
    """Write a checkpoint of these files, which its meta.json lists with their sizes alone."""
    meta = json.loads(files["meta.json"])
    meta["files"] = {name: len(content) for name, content in files.items() if name != "meta.json"}
    meta["digests"] = None
    files = {**files, "meta.json": json.dumps(meta).encode()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def torch_saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


PICKLES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "the index": ("reward/.metadata", lambda m: pickle.dumps(Attack(m))),
    "in the index": ("reward/.metadata", lambda m: pickle.dumps(Metadata({}, Attack(m), {}))),
    "an attribute": ("reward/.metadata", lambda m: pickle.dumps(Lookup(Metadata, "__init__"))),
    "a module": ("reward/.metadata", lambda m: b"ctorch\nload\n."),
    "a dotted name": ("reward/.metadata", lambda m: b"\x80\x04\x8c\x05torch\x8c\x02os\x93."),
    "settings": ("reward/common.pt", lambda m: torch_saved({"scaling": Attack(m)})),
    "state": ("state.pt", lambda m: torch_saved({"algorithm": Attack(m)})),
}


@pytest.mark.global_rng
@pytest.mark.parametrize("name", PICKLES)
def test_a_checkpoint_runs_no_code(
    name: str, saved: dict[str, bytes], mesh: Mesh, tmp_path: Path, mark: Path
) -> None:
    file, content = PICKLES[name]
    path = planted({**saved, file: content(mark)}, tmp_path / "step_1")
    engine = new_reward(mesh, optimisation=None).engine
    with pytest.raises(UserError, match="could run code") as raised:
        checkpoint.restore(path, {"reward": engine}, mesh)
    assert raised.value.where.startswith(str(path)) and raised.value.fix
    if name != "state":  # weights alone do not need it
        with pytest.raises(UserError, match="could run code"):
            checkpoint.load_weights(path, "reward", engine)


@pytest.mark.global_rng
def test_the_environment_cannot_allow_code(
    saved: dict[str, bytes], mesh: Mesh, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    settings = torch_saved({"scaling": Attack(mark)})
    path = planted({**saved, "reward/common.pt": settings}, tmp_path / "step_1")
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load_weights(path, "reward", new_reward(mesh, optimisation=None).engine)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_an_object_between_the_tensors_runs_no_code(mesh: Mesh, tmp_path: Path, mark: Path) -> None:
    """mcore 0.19 stores its settings there, and torch reads them with weights_only=False."""
    folder = tmp_path / "role"
    folder.mkdir()
    stored = ShardedObject("x", Attack(mark), (1,), (0,))
    strategy = InlineSave("torch_dist", 1)
    dist_checkpointing.save({"x": stored}, str(folder), sharded_strategy=strategy)
    with host_mode(), pytest.raises(UserError, match="could run code"):
        load({"x": ShardedObject("x", None, (1,), (0,))}, folder)


def test_an_index_is_read_as_torch_reads_it(saved: dict[str, bytes], tmp_path: Path) -> None:
    folder = planted(saved, tmp_path) / "reward"
    theirs, ours = FileSystemReader(folder).read_metadata(), read_index(folder)
    theirs.storage_meta = ours.storage_meta  # torch adds the id of this load
    assert ours == theirs and len(ours.state_dict_metadata) > 5
    assert all(isinstance(v, TensorStorageMetadata) for v in ours.state_dict_metadata.values())


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_stays_in_its_folder(name: str, saved: dict[str, bytes], tmp_path: Path) -> None:
    index = pickle.loads(saved["reward/.metadata"])
    next(iter(index.storage_data.values())).relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="no file of this folder") as raised:
        read_index(tmp_path)
    assert raised.value.where == str(tmp_path / ".metadata")


@pytest.mark.parametrize("key", ["files", "roles"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_meta_json_stays_in_its_folder(
    key: str, name: str, saved: dict[str, bytes], tmp_path: Path
) -> None:
    path = planted(saved, tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    meta[key][name] = next(iter(meta[key].values()))
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="no file of this folder"):
        checkpoint.source_of(path, "reward")


# ------------------------------------------------------------------------- models and their folders


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_of_weights_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "other")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="no file of this folder") as raised:
        open_weights(folder)
    assert raised.value.where == str(index)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "part.safetensors").symlink_to("../blob")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "part.safetensors"}})
    )
    assert open_weights(folder).read("w").item() == 1


CODE = "import os\nos.mkdir({mark!r})\nclass Own: pass\n"
AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "own.Own")


def with_code(folder: Path, mark: Path) -> Path:
    """Add the code of a tokenizer and of a model, and its names, to a tokenizer's folder."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    for name in ("tokenizer_config.json", "config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {"model_type": "llama"}
        file.write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    return folder


def test_a_tokenizer_runs_no_code_of_its_folder(tmp_path: Path, mark: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    folder = with_code(tmp_path / "tokenizer", mark)
    load_tokenizer(str(folder)).save(tmp_path / "again")  # transformers has its class
    assert "auto_map" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Own"}))
    with pytest.raises(UserError):
        load_tokenizer(str(folder))


def test_written_models_name_no_code() -> None:
    given = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4}
    plain = config_like(json.dumps(given), "bfloat16")
    with_names = config_like(json.dumps(given | {"auto_map": AUTO_MAP}), "bfloat16")
    assert json.loads(with_names) == json.loads(plain) == given


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("home", ["tokenizer", "recipe"])
def test_a_chat_template_stays_in_its_sandbox(template: str, home: str, mark: Path) -> None:
    text = template.replace("MARK", repr(str(mark)))
    tokenizer = byte_tokenizer()
    spec = text
    if home == "tokenizer":
        tokenizer, spec = tokenizer.with_chat_template(text), "chat"
    with pytest.raises((BadRow, UserError)):
        choose(spec, "messages", tokenizer).prompt([Turn("user", "hello")])


# ------------------------------------------------------------------------------------ data, recipes


def saved_to_disk(folder: Path) -> Path:
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder))
    return folder


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_saved_data_stay_in_their_folder(tmp_path: Path) -> None:
    private = saved_to_disk(tmp_path / "private")
    there = "../../private/train"
    folder = saved_to_disk(tmp_path / "data")
    assert [len(list(part.rows)) for part in folder_parts(folder)[0]] == [2]
    file = next((private / "train").glob("*.arrow")).name
    state = folder / "train" / "state.json"
    edit(state, lambda s: s["_data_files"][0].update(filename=f"{there}/{file}"))
    with pytest.raises(UserError, match="no file of this folder") as raised:
        folder_parts(folder)
    assert raised.value.where == str(state)
    edit(folder / "dataset_dict.json", lambda d: d.update(splits=["../private/train"]))
    with pytest.raises(UserError, match="no file of this folder") as raised:
        folder_parts(folder)
    assert raised.value.where == str(folder / "dataset_dict.json")


@pytest.mark.parametrize("pattern", ["../*", "/**", "https://example.org/x.jsonl", "a/../../*"])
def test_a_data_sets_header_stays_in_its_folder(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only marks of own files come of it: other places are not searched."""
    header = {"configs": [{"config_name": "x", "data_files": [{"split": "test", "path": pattern}]}]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    searched: list[str] = []
    monkeypatch.setattr(
        datasets.data_files, "resolve_pattern", lambda found, _: searched.append(found) or []
    )
    parts, _ = folder_parts(tmp_path)
    assert [part.label for part in parts] == [""] and not searched


@pytest.mark.parametrize("nested", [False, True])
def test_media_of_a_row_are_not_opened(nested: bool, tmp_path: Path) -> None:
    """datasets would open the file; where it is an address, it would send a request."""
    (tmp_path / "private").write_text("no picture")
    address = {"path": str(tmp_path / "private"), "bytes": None}
    kind, value = (datasets.List(Image()), [address]) if nested else (Image(), address)
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": kind})
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "picture": [value]}, features)
    rows.save_to_disk(str(tmp_path / "data"))
    arrow = next((tmp_path / "data").glob("*.arrow"))
    for path in (tmp_path / "data", arrow):
        found = folder_parts(path)[0] if path.is_dir() else file_parts(path)
        assert [row for part in found for _, row in part.rows] == [{"prompt": "a"}]


RECIPES = {
    "python/object": "a: !!python/object/apply:os.mkdir [MARK]",
    "python/name": "a: !!python/name:os.mkdir",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_plain_values(name: str, mark: Path) -> None:
    text = RECIPES[name].replace("MARK", str(mark))
    with pytest.raises(UserError):
        parse_yaml(text, "file.yaml")
    with pytest.raises(UserError):
        parse_value(f"{{{text}}}", ("a",), "command line")


def test_the_current_folder_is_searched_for_a_recipes_modules_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an apex.py beside a model that was downloaded would be the package apex."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_security_plugin.py").write_text("")
    load_components(Block({}, "test"))
    assert str(tmp_path) not in sys.path
    plugins = Leaf(["my_security_plugin"], "test")
    assert load_components(Block({"plugins": plugins}, "test")) == []
    assert sys.path[-1] == str(tmp_path)


# ----------------------------------------------------------------------------------------- the code

# calls that run what they read, and those that read a checkpoint without the checks of stored.py
UNSAFE = {
    *("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "numpy.load", "torch.load"),
    *("dist_checkpointing.load", "torch_checkpoint.load", "torch_checkpoint.FileSystemReader"),
    *("tarfile.open", "shutil.unpack_archive"),
}
STORED = {"torch.load", "dist_checkpointing.load"}  # in stored.py alone
# values that a page shows as markup: a rendered section; a rater page's script and its data
MARKUP = {"gipo_megatron/reports/audit_page.py": 1, "gipo_megatron/evaluation/judges/human.py": 2}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted name of the function, call), of the package and the tools."""
    for folder in ("gipo_megatron", "tools", "launch", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield str(path.relative_to(ROOT)), ast.unparse(node.func), node


def options(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_nothing_that_is_read_is_run() -> None:
    found = [(file, name) for file, name, _ in calls() if name in UNSAFE]
    allowed = [("gipo_megatron/megatron/stored.py", name) for name in sorted(STORED)]
    allowed.append(("tools/faults/state.py", "torch.load"))  # of its own file, with weights_only
    assert sorted(found) == allowed
    shells = [file for file, _, call in calls() if "shell" in options(call)]
    assert not shells
    # an interpreter that is started in a folder imports from it first, but with -P or -I
    starts = [
        [ast.unparse(word) for word in node.elts[:3]]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.List) and {"'-c'", "'-m'"} & {*map(ast.unparse, node.elts)}
    ]
    assert len(starts) >= 3 and all({"'-P'", "'-I'"} & {*words} for words in starts)


def test_code_of_a_model_is_never_trusted() -> None:
    loads = {
        f"{file}: {name}": options(call)
        for file, name, call in calls()
        if name.split(".")[-1] in ("from_pretrained", "from_config")
        and name.lower().startswith("auto")
    }
    assert len(loads) >= 5
    trusting = [at for at, given in loads.items() if given.get("trust_remote_code") != "False"]
    assert not trusting


def test_no_page_shows_text_as_markup() -> None:
    found = Counter(file for file, name, _ in calls() if name == "Markup")
    assert found == MARKUP
    pages = {path: path.read_text() for path in PACKAGE.rglob("*.j2")}
    whole = {path.name: text for path, text in pages.items() if "<html" in text}
    assert whole.keys() == {"base.html.j2", "rater.html.j2"} and len(pages) > 5
    for text in whole.values():
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', text)
        rules = dict(rule.split(None, 1) for rule in policy.split(";"))
        scripts = rules.pop("script-src", "'sha256-{{ digest }}'")
        assert scripts == "'sha256-{{ digest }}'"
        assert rules == {
            "default-src": "'none'",
            "img-src": "data:",
            "style-src": "'unsafe-inline'",
            "base-uri": "'none'",
            "form-action": "'none'",
        }
    fragments = {"audit.html.j2", "macros.html.j2"}  # parts of the pages that extend base
    for path, text in pages.items():
        extends = '{% extends "base.html.j2" %}' in text
        assert path.name in whole or path.name in fragments or extends
        assert not re.findall(r"""(?<!["'])\|\s*safe|autoescape| on\w+=|javascript:""", text)
