"""What the operating system refuses, and what a library makes of it, is an error of the user."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError, refusal, system_error, system_errors
from gipo_megatron.weights.hf_files import save_tensors


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let this process write no file of more than `size` bytes: a full disk without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "give the rights for it, or another place"),
    ],
)
def test_the_system_s_reason_and_its_file_are_named(number: int, fix: str) -> None:
    refused = refusal(OSError(number, os.strerror(number), "a", None, "b"))
    assert refused.what == f"the system refuses: {os.strerror(number)}"
    assert (refused.where, refused.fix) == ("b", fix)
    assert refusal(OSError(number, os.strerror(number), "a")).where == "a"


def test_the_system_s_error_behind_a_library_s() -> None:
    inner = OSError(errno.ENOSPC, "No space left on device")
    try:
        try:
            raise inner
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 as torch does
    except RuntimeError as outer:
        assert system_error(outer) is inner
    assert system_error(RuntimeError("a bug")) is None


def test_a_reader_that_has_gone_is_no_refusal() -> None:
    with pytest.raises(BrokenPipeError), system_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(UserError, match="No space"), system_errors():
        raise OSError(errno.ENOSPC, "No space left on device")


def write_tokenizer(folder: Path) -> None:
    byte_tokenizer().save(folder)


def write_tensors(folder: Path) -> None:
    save_tensors(folder / "model.safetensors", {"a": torch.zeros(1000)})


@pytest.mark.parametrize("write", [write_tokenizer, write_tensors])
def test_libraries_without_the_system_s_error(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    """tokenizers and safetensors are written in Rust, and raise errors of their own."""
    said = r"cannot write (the tokenizer|model\.safetensors): .*File too large"
    with pytest.raises(UserError, match=said), small_files(1000), system_errors():
        write(tmp_path)
    write(tmp_path)
