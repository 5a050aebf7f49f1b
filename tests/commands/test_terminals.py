"""Any terminal: without UTF-8, without a reader, without stdout; files are in UTF-8 everywhere."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gipo_megatron import cli, environment
from gipo_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHOWN = "tensor 2 × data 3 → ja …"


def on(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)


def read(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", "tensor 2 ? data 3 ? ja ?"),
        ("latin-1", "tensor 2 × data 3 ? ja ?"),
        ("utf-8", SHOWN),
    ],
)
def test_signs_that_a_terminal_lacks_are_replaced(
    encoding: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = on(encoding), on(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.run(lambda: print(SHOWN)) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: fail(UserError(SHOWN)))
    assert (read(out), read(err)) == (f"{printed}\n", f"{printed}\n")


def fail(error: BaseException) -> None:
    raise error


def test_ascii_prints_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    out = on("ascii", "surrogateescape")  # as with LC_ALL=C
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["recipe", "diff", "hh_ppo_kl", "hh_gipo"]) == 0
    assert " ? " in read(out)


def test_a_closed_stdout_is_devnull(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sets sys.stdout to None where the descriptor is closed at its start."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(lambda: print(SHOWN)) == 0
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    """A reader that leaves before the first line, as `head -0` does."""
    gone, output = os.pipe()
    os.close(gone)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gipo_megatron.cli", "recipe", "list"],
            stdout=output,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    finally:
        os.close(output)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("name", "action"),
    [("stdout", lambda: print(SHOWN)), ("stderr", lambda: fail(UserError(SHOWN)))],
)
def test_output_on_a_full_disk_is_exit_code_2(
    name: str, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is dropped: no error follows at the end of the program."""
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit, match="2"):
            cli.run(action)
        print(SHOWN, file=stream, flush=True)


def test_what_a_run_prints_at_its_end_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        environment.emit(SHOWN, error=False)


def test_ctrl_c_says_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: fail(KeyboardInterrupt("kept"))) == 130
    assert cli.run(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "kept\nstopped\n"


def test_git_may_print_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag's name may be no text in the locale's encoding."""
    inner: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    code = r"import sys; sys.stdout.buffer.write(b'v1-\xff\n')"
    command = [sys.executable, "-I", "-S", "-c", code]
    monkeypatch.setattr("subprocess.run", lambda _, **how: inner(command, **how))
    assert environment.commit() == "v1-�"


# ---------------------------------------------------------------------------------- files in UTF-8

CODE = [
    *ROOT.joinpath("gipo_megatron").rglob("*.py"),
    *ROOT.joinpath("tools").rglob("*.py"),
    *ROOT.joinpath("launch").rglob("*.py"),
]


def without_encoding(path: Path) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(
            k.arg in ("encoding", None) for k in node.keywords
        ):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ""
        name = function.id if isinstance(function, ast.Name) else name
        keywords = {k.arg: k.value for k in node.keywords}
        modes = [a.value for a in [*node.args, *keywords.values()] if isinstance(a, ast.Constant)]
        binary = any(isinstance(m, str) and "b" in m and len(m) <= 3 for m in modes)
        text = (name == "open" and not binary) or name == "read_text"
        text |= name == "write_text" and len(node.args) == 1  # gipo_megatron.files has its own
        text |= (
            name in ("run", "Popen", "check_output")
            and {"text", "universal_newlines"} & {*keywords} != set()
        )
        if text and not is_another(function):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def is_another(function: ast.expr) -> bool:
    """os.open, urllib's openers, and methods of this project that are called `open`."""
    owner = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in ("os", "record", "webbrowser", "opener")


def test_text_files_have_an_encoding() -> None:
    assert len(CODE) > 150
    assert not [line for path in CODE for line in without_encoding(path)]
