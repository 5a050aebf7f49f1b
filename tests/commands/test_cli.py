"""The `gipo` command: its list, its help, its errors, and what a wheel contains."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gipo_megatron import cli, commands

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_is_a_module_and_every_module_a_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = Path(commands.__file__).parent.glob("*.py")
    modules = {path.stem for path in files if "\ndef main(" in path.read_text(encoding="utf-8")}
    assert modules == {name.replace("-", "_") for name in cli.COMMANDS}
    assert cli.main([]) == cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"gipo {name}" in capsys.readouterr().out


def test_a_misspelt_command_is_one_screen_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    assert capsys.readouterr() == (
        "",
        "unknown command 'trian'\n  where: command line\n  fix:   did you mean 'train'?\n",
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_is_exit_code_130_and_one_line_of_rank_0(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", rank)
    train = importlib.import_module("gipo_megatron.commands.train")
    monkeypatch.setattr(train, "main", stop)
    assert cli.main(["train", "recipe=tiny/sft"]) == 130
    assert capsys.readouterr().err == (f"{train.STOPPED}\n" if rank == "0" else "")


def test_convert_needs_a_direction(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "hf=a"])
    assert "gipo convert to-hf" in capsys.readouterr().err


def test_a_wheel_has_the_recipes_and_finds_them(tmp_path: Path) -> None:
    """Built from a copy of this tree, without network, unpacked, and started from another
    folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gipo_megatron", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    build += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    written = {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")}
    packed = {p.relative_to(site / "gipo_megatron") for p in (site).rglob("*.yaml")}
    assert packed == written and len(written) > 50
    files = {path.relative_to(source) for path in (source / "gipo_megatron").rglob("*.*")}
    packed = {path.relative_to(site) for path in (site / "gipo_megatron").rglob("*.*")}
    recipes = {Path("gipo_megatron") / path for path in written}
    assert packed - recipes == files and len(files) > 100
    entry = (next(site.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "gipo = gipo_megatron.cli:main" in entry
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from gipo_megatron.cli import main; "
    listed = subprocess.run(
        [sys.executable, "-I", "-c", code + "sys.exit(main(['recipe', 'list']))"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=200,
    )
    assert "tiny/gipo " in listed.stdout and len(listed.stdout.splitlines()) == len(written)
