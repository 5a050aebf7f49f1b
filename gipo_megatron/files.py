"""Files that stay readable after a kill at any moment: atomic writes, and JSON Lines.

A line of JSON Lines counts once its newline is there. Writers raise UserError naming the file.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from gipo_megatron.errors import UserError, library_errors, refusal, short

Rows = Iterable[Mapping[str, Any]]
_POINTER = b"version https://git-lfs"
_NAME, _PATH = 250, 4000  # bytes of a file's name, with its ending, and of a path


def expand(path: str, where: str = "command line") -> str:
    """Return a path of the user's, from `where`, with `~` and `~name` replaced by home folders.

    `./~name` is a file of that name. Raises UserError for a home folder that cannot be found, and
    for characters and lengths that file names cannot have here.
    """
    full = os.path.expanduser(path)
    if full.startswith("~"):
        fix = "write the whole path, or ./~… for a file of that name"
        raise UserError(f"{path!r}: there is no such home folder", where=where, fix=fix)
    try:
        encoded = os.fsencode(full)
    except UnicodeEncodeError:
        what = f"{path!r} has characters that this system's encoding lacks"
        raise UserError(what, where=where, fix="export PYTHONUTF8=1") from None
    if b"\0" in encoded:
        raise UserError(f"{path!r} has a character that no file name can have", where=where)
    if len(encoded) > _PATH or max(map(len, encoded.split(b"/"))) > _NAME:
        raise UserError(f"{short(path)} is longer than a file's name can be", where=where)
    return full


def inside(folder: Path, name: str, where: str) -> Path:
    """Return the file `name` of `folder`, a name that comes from the file `where`.

    Links of the folder are followed: the hub's cache is made of them. Raises UserError for a name
    that leads out of the folder, or that no file can have.
    """
    try:
        longest = max(len(os.fsencode(part)) for part in PurePath(name).parts)
    except ValueError:  # characters that no file name has, or no part at all
        longest = 0
    if leads_out(name) or "\0" in name or not 0 < longest <= 255:
        raise UserError(
            f"{name[:100]!r} is no file of this folder",
            where=where,
            fix="names count from the folder and stay in it; get the files from their source again",
        )
    return folder / name


def leads_out(name: str) -> bool:
    """Check for a name that may lead out of the folder that it counts from."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file in one step: a reader sees the old or the new content. Makes its folder."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    with user_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, target)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Rows) -> None:
    write_bytes(path, b"".join(map(_line, rows)))


def to_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names, where the file system offers
    that."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def append_jsonl(path: str | Path, rows: Rows, *, sync: bool = False) -> None:
    """Remove a torn last line, append one line a row; with `sync` wait until the disk has them."""
    target = Path(path)
    with user_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.truncate(target.read_bytes().rfind(b"\n") + 1)
            file.write(b"".join(map(_line, rows)))
            if sync:
                file.flush()
                os.fsync(file.fileno())


def read_jsonl(path: str | Path, fix: str = "remove it") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object); nothing where there is no file. A torn last line is left out.

    Raises UserError, with the advice `fix`, for a line that is not a JSON object.
    """
    file = Path(path)
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
                raise bad_line(file, number, f"not JSON: {error}", fix) from error
            if not isinstance(row, dict):
                raise bad_line(file, number, f"a JSON {type(row).__name__}, not an object", fix)
            yield number, row


def refuse_pointer(path: Path) -> None:
    """Raise UserError for a Git LFS pointer: a few lines of text in place of the file."""
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise UserError(
            f"{path.name} is a Git LFS pointer, not the file itself",
            where=str(path),
            fix="run `git lfs pull` in its folder, or download the file again",
        )


def read_object(path: str | Path, fix: str) -> dict[str, Any]:
    """Return a file's JSON object. Raises UserError, with the advice `fix`, for anything else, a
    Git LFS pointer too."""
    file = Path(path)
    with library_errors(f"cannot read {file.name}", where=str(file), fix=fix):
        refuse_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        what = f"cannot read {file.name}: a JSON {type(content).__name__}, not an object"
        raise UserError(what, where=str(file), fix=fix)
    return content


def bad_line(path: Path, number: int, why: str, fix: str) -> UserError:
    return UserError(f"unreadable line: {why}", where=f"{path}:{number}", fix=fix)


def _line(row: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; a lone surrogate, which is no UTF-8, as json.loads reads it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


@contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn the errors of an operating system that cannot write `path` into UserError."""
    try:
        yield
    except OSError as error:
        fix = refusal(error).fix
        raise UserError(f"cannot write: {error.strerror}", where=str(path), fix=fix) from error
