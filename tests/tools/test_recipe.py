from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.commands import recipe as tool
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.compose import load_components
from gipo_megatron.recipe.files import recipe_names
from gipo_megatron.recipe.source import Block
from tests import forked
from tests.smollm import beside_the_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "recipe.py"
# here, since a package that the components import may draw from a global generator
load_components(Block({}, "tests"))


def run(*words: str, folder: Path) -> forked.Finished:
    return forked.run(TOOL, *words, folder=folder)


def test_two_mistakes_in_one_process_are_one_screen_and_exit_code_2(tmp_path: Path) -> None:
    done = run(
        "check", "hh_gipo", "algorithm.kl_controler.eta=1", "run.steps=many", folder=tmp_path
    )
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "hh_gipo: 2 problems",
        "algorithm.kl_controler: unknown key",
        "  where: command line",
        "  fix:   did you mean 'kl_controller'?",
        "run.steps: needs a whole number or null, not 'many' (text)",
        "  where: command line",
    ]


def test_a_sound_recipe_is_exit_code_0_from_any_folder(tmp_path: Path) -> None:
    done = run("check", "hh_gipo", "world=16", folder=tmp_path)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "ok hh_gipo: ppo; 16 processes = tensor 4 × pipeline 1 × data 4; 64 prompts × 4 responses ="
        " 4 minibatches;"
    )
    assert "; 2,000 steps × 64 prompts = 1.48 epochs of about 86,400 (data.rows)\n" in done.stdout


def test_check_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with beside_the_model():
        tool.main(["check"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok ")]
    assert len(lines) == len(recipe_names(tool.RECIPES)) >= 18


def test_check_of_everything_passes_over_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tool.main(["check"])
    lines = capsys.readouterr().out.splitlines()
    smollm = [name for name in recipe_names(tool.RECIPES) if name.startswith("smollm/")]
    assert [line for line in lines if line.startswith("-- ")] == [
        f"-- {name}: not checked, no weights to read the architecture from" for name in smollm
    ]
    assert (
        sum(line.startswith("ok ") for line in lines)
        == len(recipe_names(tool.RECIPES)) - len(smollm)
        == len(recipe_names(tool.RECIPES)) - 9
    )
    with pytest.raises(
        UserError, match=r"'\./runs/smollm2' \(models\.actor\.load\) is not on this machine"
    ):
        tool.main(["check", "smollm/sft"])


def test_check_goes_on_after_a_bad_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="hh_gippo"):
        tool.main(["check", "hh_gippo", "tiny/sft"])
    assert capsys.readouterr().out.startswith("ok tiny/sft")


def test_diff_is_exactly_what_differs_and_a_component_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool.main(["diff", "hh_ppo_kl", "hh_ppo"])
    assert capsys.readouterr().out.splitlines() == [
        "algorithm.kl_controller: fixed {eta: 0.05} → none",
        "run.dir: runs/hh_ppo_kl → runs/hh_ppo",
    ]
    tool.main(["diff", "hh_gipo", "ablation/kl_only"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "algorithm.variance_regulariser: group_variance {min_weight: 0.1, "
    ) and first.endswith("} → none")
    assert second == "run.dir: runs/hh_gipo → runs/ablation/kl_only"
    tool.main(["diff", "hh_gipo", "hh_gipo"])
    assert capsys.readouterr().out == ""


def test_diff_names_keys_that_one_side_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["diff", "tiny/sft", "tiny/rm"])
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("models.actor: {load: random, ") and line.endswith("→ -") for line in lines
    )
    assert "algorithm: sft → reward_model {centre: 0.01}" in lines


def test_show_says_where_each_value_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["show", "hh_gipo", "run.seed=3"])
    lines = {
        line.split("#")[0].strip(): line.split("# ")[1]
        for line in capsys.readouterr().out.splitlines()
        if "# " in line
    }
    assert lines["seed: 3"] == "command line"
    assert lines["steps: 2000"].startswith("recipes/hh_gipo.yaml:")
    assert lines["num_layers: 32"].startswith("recipes/model/llama2_7b.yaml:")


def test_list_shows_the_first_line_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipe_names(tool.RECIPES, fragments=True))
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_anything_else_shows_how_to_use_it() -> None:
    for words in ([], ["chek"], ["diff", "one"], ["show"]):
        with pytest.raises(UserError, match=r"gipo recipe list"):
            tool.main(words)
