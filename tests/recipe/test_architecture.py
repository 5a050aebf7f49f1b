"""model.architecture comes from the weights; what a recipe writes about it must agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.schema import ModelSpec
from gipo_megatron.recipe.source import Block, leaves, plain
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import architecture_from_hf
from tests.recipe.helpers import RECIPES, problems, small

SFT = """\
defaults: [base/sft, hardware/cpu, data/planted]
models:
  actor: {load: LOAD}
run: {dir: runs/small, steps: 3}
"""
PPO = SFT.replace("base/sft", "base/gipo").replace("LOAD}", "LOAD}\n  reward: {load: LOAD}")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e4,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "tie_word_embeddings": True,
}
SAYS = Architecture(
    3, 48, 64, 6, 2, 8, 259, 96, 5e4, {"type": "linear", "factor": 2.0}, 1e-6, False, False, True
)
BLOCK = "model.architecture."


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def checkpoint(path: Path, *roles: str, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    about = {
        "architecture": {**asdict(SAYS), **changes},
        "head": None,
        "num_groups": None,
        "trained": True,
    }
    (path / "meta.json").write_text(
        json.dumps({"format": "gipo_megatron", "version": 1, "roles": dict.fromkeys(roles, about)})
    )
    return path


def origins(tree: Block) -> set[str]:
    found = {
        path[-1]: leaf.origin
        for path, leaf in leaves(tree)
        if path[:2] == ("model", "architecture")
    }
    assert found.keys() == {f.name for f in fields(Architecture)}
    return set(found.values())


# --------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("text", [SFT, PPO])
def test_a_folder_says_it_and_is_the_origin(tmp_path: Path, text: str) -> None:
    hf = folder(tmp_path / "hf")
    recipe = small(tmp_path, text=text.replace("LOAD", str(hf)))
    assert recipe.model.architecture == SAYS and not recipe.warnings
    assert origins(recipe.tree) == {f"{hf}/config.json"}
    assert f"# {hf}/config.json" in recipe.to_yaml()
    again = small(tmp_path, text=recipe.to_yaml())
    assert again.model == recipe.model and plain(again.tree) == plain(recipe.tree)


def test_a_checkpoint_says_it(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "final", "actor", "critic")
    # a reward model may start from an actor
    recipe = small(tmp_path, text=PPO.replace("LOAD", str(saved)))
    assert recipe.model.architecture == SAYS and origins(recipe.tree) == {f"{saved}/meta.json"}
    assert small(tmp_path, f"models.actor.load={saved}", text=SFT).model.architecture == SAYS


def test_another_programs_meta_json_is_no_checkpoint(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    (hf / "meta.json").write_text('{"format": "other"}')
    assert origins(small(tmp_path, f"models.actor.load={hf}", text=SFT).tree) == {
        f"{hf}/config.json"
    }


def test_weights_beside_random_ones(tmp_path: Path) -> None:
    """One role that says it is enough, and what nobody needs is not asked."""
    hf = folder(tmp_path / "hf")
    text = PPO.replace("LOAD", "random")
    assert small(tmp_path, f"models.reward.load={hf}", text=text).model.architecture == SAYS
    other = SFT.replace(
        "LOAD}", f"{hf}}}\n  reward: {{load: {folder(tmp_path / 'gpt', model_type='gpt2')}}}"
    )
    assert small(tmp_path, text=other).model.architecture == SAYS


def test_the_load_may_point_at_another_key(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    words = [f"model.hub={hf}", "models.actor.load=${model.hub}", "data.max_length=64"]
    assert small(tmp_path, *words, text=SFT).model.architecture == SAYS
    words[-1] = "data.max_length=${model.architecture.max_positions}"
    (found,) = problems(tmp_path, *words, text=SFT)
    assert found.key == "data.max_length" and "has no value" in found.what


def test_a_model_block_may_be_absent_or_written_in_part(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    bare = SFT.replace("base/sft, ", "").replace("LOAD", str(hf)) + "algorithm: sft\n"
    for more in (
        "",
        "model: {hub: x}\n",
        'model: {architecture: "???"}\n',
        "model: {architecture: {head_dim: 8}}\n",
    ):
        assert small(tmp_path, "models.actor.lr=1e-3", text=bare + more).model.architecture == SAYS
    (found,) = problems(tmp_path, "models.actor.lr=1e-3", text=bare + "model: {architecture: 3}\n")
    assert found.key == "model.architecture" and "must be a block" in found.what


def test_where_nothing_is_loaded_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    required: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
    }
    required |= {"vocab_size": 259, "max_positions": 64}
    words = [f"{BLOCK}{key}={value}" for key, value in required.items()]
    recipe = small(tmp_path, *words, text=SFT.replace("LOAD", "random"))
    assert (
        recipe.model.architecture == Architecture(**required)
        and recipe.model.architecture.rope_base == 10000.0
    )
    assert origins(recipe.tree) == {"command line", "default"}
    found = problems(tmp_path, *words[:-1], text=SFT.replace("LOAD", "random"))
    assert [(p.key, p.what) for p in found] == [(f"{BLOCK}max_positions", "missing")]


# ----------------------------------------------------------------------------------- contradictions


def test_every_written_key_is_compared(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    agreeing = {
        **asdict(SAYS),
        "rope_scaling": {"rope_type": "linear", "factor": 2},
        "rope_base": 50000,
    }
    other = {
        key: value + 1 if type(value) in (int, float) else not value
        for key, value in asdict(SAYS).items()
    }
    other["rope_scaling"] = None
    for key, value in agreeing.items():
        word = f"{BLOCK}{key}={json.dumps(value)}"
        assert (
            small(tmp_path, word, f"models.actor.load={hf}", text=SFT).model.architecture.num_layers
            == 3
        )
        wrong = f"{BLOCK}{key}={json.dumps(other[key])}"
        (found,) = [
            p
            for p in problems(tmp_path, wrong, f"models.actor.load={hf}", text=SFT)
            if "weights to load" in p.what
        ]
        assert (found.key, found.where) == (
            "model.architecture",
            "command line",
        ) and found.fix.startswith("remove it")
        assert (
            f": {key} {other[key]} ≠ {asdict(SAYS)[key]} (command line ≠ {hf}/config.json)"
            in found.what
        )
    assert len(agreeing) == len(fields(Architecture)) == 14


def test_a_fragment_that_contradicts_is_one_problem_with_one_fix(tmp_path: Path) -> None:
    hf = folder(
        tmp_path / "hf",
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    words = [f"models.actor.load={hf}", "model.tokenizer=bytes"]
    (found,) = problems(tmp_path, "with=model/tiny", *words, text=SFT)
    assert (found.key, found.where) == ("model.architecture", "recipes/model/tiny.yaml:6")
    expected = "num_layers 4 ≠ 3, max_positions 1024 ≠ 96, rope_base 10000.0 ≠ 50000.0, "
    expected += "rope_scaling None ≠ {'type': 'linear', 'factor': 2.0}, norm_eps 1e-05 ≠ 1e-06"
    assert found.what.endswith(f"{expected} (recipes/model/tiny.yaml ≠ {hf}/config.json)")
    assert "with=model/from_weights" in found.fix
    again = small(tmp_path, "with=model/tiny,model/from_weights", *words, text=SFT)
    assert again.model.architecture == architecture_from_hf(hf) and origins(again.tree) == {
        f"{hf}/config.json"
    }


def test_each_place_that_contradicts_is_a_problem(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    text = SFT.replace("LOAD", str(hf)) + "model: {architecture: {num_layers: 5, head_dim: 10}}\n"
    found = problems(tmp_path, f"{BLOCK}vocab_size=300", text=text)
    assert [(p.where.rsplit("/", 1)[-1], p.what.split(": ")[1].split(" (")[0]) for p in found] == [
        ("small.yaml:5", "num_layers 5 ≠ 3, head_dim 10 ≠ 8"),
        ("command line", "vocab_size 300 ≠ 259"),
    ]


@pytest.mark.parametrize("name", ["hh_sft", "hh_gipo", "tiny/sft", "ablation/cvar"])
def test_a_recipes_own_model_gives_way_to_the_weights(tmp_path: Path, name: str) -> None:
    """Architecture, tokenizer and hub name of a shipped recipe, all replaced by one fragment."""
    hf = folder(tmp_path / "hf", max_position_embeddings=4096)
    loads = [
        f"models.actor.load={hf}",
        *([] if name.endswith("sft") else [f"models.reward.load={hf}"]),
    ]
    with pytest.raises(RecipeErrors) as caught:
        compose([f"recipe={name}", *loads], RECIPES)
    (found,) = [p for p in caught.value.problems if p.key == "model.architecture"]
    assert found.where.startswith("recipes/model/") and "with=model/from_weights" in found.fix
    recipe = compose([f"recipe={name}", "with=model/from_weights,hardware/cpu", *loads], RECIPES)
    assert recipe.model == ModelSpec(architecture=architecture_from_hf(hf)) and not recipe.warnings


def test_a_recipes_own_model_needs_weights_in_its_place(tmp_path: Path) -> None:
    """Its hub name is gone, too, so that nothing claims to come from there."""
    with pytest.raises(RecipeErrors, match="1 problem") as caught:
        compose(["recipe=hh_sft", "with=model/from_weights"], RECIPES)
    (found,) = caught.value.problems
    assert found.key == "models.actor.load" and "neither a checkpoint" in found.what


def test_roles_must_agree(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), checkpoint(tmp_path / "b", "reward", num_layers=4, norm_eps=1e-5)
    (found,) = problems(tmp_path, f"models.actor.load={a}", f"models.reward.load={b}", text=PPO)
    assert (
        found.key == "models.reward.load"
        and found.where == "command line"
        and "models.actor.load" in found.what
    )
    assert (
        f"num_layers 4 ≠ 3, norm_eps 1e-05 ≠ 1e-06 ({b}/meta.json ≠ {a}/config.json)" in found.what
    )


# ---------------------------------------------------------------------------------- nothing to read


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (
            "random",
            (
                "model.architecture: not set, and cannot be read from any weights:"
                " models.actor.load is random"
            ),
        ),
        (
            "runs/no/final",
            (
                "model.architecture: not set, and cannot be read from any weights:"
                " 'runs/no/final' (models.actor.load)"
            ),
        ),
        (
            "empty",
            (
                "models.actor.load: empty is neither a checkpoint (meta.json) nor a Hugging Face"
                " folder (config.json)"
            ),
        ),
        ("run", "models.actor.load: run is neither"),
        ("gpt", "models.actor.load: gpt/config.json: model_type 'gpt2' is not built"),
        ("torn", "models.actor.load: torn/meta.json: cannot read meta.json"),
        (
            "old",
            "models.actor.load: old/meta.json: describes no checkpoint of this version",
        ),
        (
            "none",
            "models.actor.load: none/meta.json: lists no role",
        ),
    ],
)
def test_one_clear_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("run/final").mkdir(parents=True)
    folder(Path("gpt"), model_type="gpt2")
    (checkpoint(Path("torn"), "actor") / "meta.json").write_text("{")
    checkpoint(Path("old"), "actor", width=3)
    checkpoint(Path("none"))
    (found,) = problems(tmp_path, text=SFT.replace("LOAD", load))
    assert what in str(found) and found.where.endswith("small.yaml:3") and found.fix
    assert load != "run" or found.fix == "models.actor.load=run/final"


def test_an_unset_load_is_the_only_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, text=SFT.replace("LOAD", '"???"'))
    assert (found.key, found.what) == ("models.actor.load", "missing")
    (found,) = problems(tmp_path, "algorithm.name=stf", text=SFT.replace("LOAD", "random"))
    assert found.key == "algorithm.name"


# ------------------------------------------------------------------------------------------ the hub


def test_a_cached_hub_model_is_read_and_compared_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    folder(repository / "snapshots" / "abc")
    recipe = small(tmp_path, text=SFT.replace("LOAD", "owner/small"))
    assert recipe.model.architecture == SAYS and origins(recipe.tree) == {
        "owner/small/config.json (hub)"
    }
    (found,) = problems(tmp_path, f"{BLOCK}head_dim=16", text=SFT.replace("LOAD", "owner/small"))
    assert "(command line ≠ owner/small/config.json (hub))" in found.what
    assert (
        small(
            tmp_path, "model.hub=owner/small", text=SFT.replace("LOAD", "random")
        ).model.architecture
        == SAYS
    )


def test_an_unreachable_hub_is_one_problem_and_not_asked_where_the_recipe_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words, key in (
        (["models.actor.load=owner/none"], "models.actor.load"),
        (["model.hub=owner/none"], "model.hub"),
    ):
        (found,) = problems(tmp_path, *words, text=SFT.replace("LOAD", "random"))
        assert (
            found.key == key
            and "'owner/none' is no local path" in found.what
            and found.where == "command line"
        )
    assert (
        small(
            tmp_path, "with=model/tiny", "models.actor.load=owner/none", text=SFT
        ).model.architecture.num_layers
        == 4
    )


@pytest.fixture
def hub() -> Iterator[str]:
    """A server with the hub's address of one file: owner/small's config.json."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            body = json.dumps(CONFIG).encode()
            known = self.path == "/owner/small/resolve/main/config.json"
            self.send_response(200 if known or self.path == "/" else 404)
            if known:
                self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("ETag", '"b"')
            else:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            if known and self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SHOW = """
import json, sys
from pathlib import Path
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.compose import compose
try:
    compose(["recipe=small.yaml", "models.actor.load=owner/other"], Path(sys.argv[1]))
except UserError as error:
    print(str(error).replace(chr(10), " "))
recipe = compose(["recipe=small.yaml"], Path(sys.argv[1]))
loaded = [name for name in ("megatron", "transformers") if name in sys.modules]
print(json.dumps([recipe.to_yaml().count("# owner/small/config.json (hub)"), loaded]))
"""


def test_only_config_json_is_downloaded_and_the_cache_stays_as_it_was(
    tmp_path: Path, hub: str
) -> None:
    """In a process of its own, since the client reads its address when it is imported. A cached
    config.json would pass for the model."""
    (tmp_path / "small.yaml").write_text(SFT.replace("LOAD", "owner/small"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
    }
    environment["PYTHONPATH"] = str(RECIPES.parent)
    command = [sys.executable, "-c", SHOW, str(RECIPES)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    refused, read = done.stdout.splitlines()
    assert (
        "models.actor.load: cannot get owner/other/config.json (hub): RepositoryNotFoundError: 404"
        in refused
    )
    assert json.loads(read) == [len(fields(Architecture)), []]
    assert not list(tmp_path.rglob("snapshots"))
