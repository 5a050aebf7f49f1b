"""Checkpoint folders of this project: the kind of a folder of weights, and meta.json as a value."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from gipo_megatron.errors import UserError
from gipo_megatron.files import inside, read_object, write_json
from gipo_megatron.specs import AdapterSpec, Architecture, HeadSpec, OneOf, Size
from gipo_megatron.typed import Mismatch, built
from gipo_megatron.weights.base import BaseMeta
from gipo_megatron.weights.hf_config import architecture_from_hf
from gipo_megatron.weights.peft_config import CONFIG, TENSORS

FORMAT, VERSION = "gipo_megatron", 2  # 2: FP8 scaling state as tensors; all else as in 1
HF_FILES = ("config.json", "generation_config.json")
# what to do about a damaged one
OTHER = (
    "copy it again, or use another; a run resumes from the checkpoint before it when this folder is"
    " removed"
)
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RoleMeta:
    """One model of a checkpoint."""

    architecture: Architecture
    head: Annotated[str, OneOf("value", "score")] | None = None  # in place of the output layer
    # None in the first checkpoints, which did not record it
    dtype: Annotated[str, OneOf("fp32", "bf16", "fp16")] | None = None
    num_groups: Size | None = None  # None: no group head
    group_input: Annotated[str, OneOf("prompt", "trajectory")] | None = None
    trained: bool = False  # saved with its optimizer
    adapter: AdapterSpec | None = None  # None: the whole model is saved
    base: BaseMeta | None = None  # that the adapters belong to

    @property
    def group(self) -> HeadSpec | None:
        """The group head, to be loaded but not trained."""
        if self.num_groups is None or self.group_input is None:
            return None
        return HeadSpec(self.num_groups, self.group_input, detach_trunk=True)


@dataclass(frozen=True)
class CheckpointMeta:
    """meta.json. `save` fills in roles, files and digests; its caller gives all else."""

    step: int = 0
    roles: dict[str, RoleMeta] = field(default_factory=dict)
    files: dict[str, int] | None = None  # path in the folder -> bytes
    digests: dict[str, str] | None = None  # path -> xxh3_64; None in the first checkpoints
    version: int = VERSION
    epochs: float = 0.0  # passes over the training rows up to this step
    recipe: str = ""  # its name; empty for a converted model
    hub: str = ""
    commit: str = ""
    parallel: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # its fingerprint
    chat_template: str | None = None
    template: str | None = None  # data.template of the run
    style: str | None = None  # of the data: a single prompt, or messages

    def write(self, folder: Path) -> None:
        write_json(folder / "meta.json", {"format": FORMAT, **asdict(self)})


def parse_meta(path: Path) -> CheckpointMeta | None:
    """Return meta.json of a checkpoint folder, its files unchecked; None for another program's.

    Raises UserError for a file that cannot be read, and for a newer version.
    """
    file = path / "meta.json"
    content = read_object(file, OTHER)
    if content.get("format") != FORMAT:
        return None
    version = content.get("version", 1)
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"checkpoint version {version} is newer than this program's {VERSION}",
            where=str(path),
            fix="update the program",
        )
    known = {f.name for f in fields(CheckpointMeta)}
    try:
        return built(CheckpointMeta, {key: content[key] for key in content if key in known})
    except Mismatch as mismatch:
        what = f"describes no checkpoint of this version: {mismatch}"
        raise _unusable(file, what) from None


def read_meta(path: Path) -> CheckpointMeta:
    """Return a checkpoint's meta.json after comparing every file's size with it.

    Raises UserError when `path` is no checkpoint, a damaged one, or of a newer version.
    """
    meta = parse_meta(path) if weights_kind(path) == "checkpoint" else None
    if meta is None:
        raise UserError(
            f"{path} is a Hugging Face folder, not a checkpoint of this project", where=str(path)
        )
    if meta.files is None:
        raise _unusable(path, "meta.json does not list the checkpoint's files")
    for role in meta.roles:
        inside(path, role, str(path / "meta.json"))
    for name, size in meta.files.items():
        file = inside(path, name, str(path / "meta.json"))
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, {size} were written"
            raise UserError(
                f"damaged checkpoint: {name} {state}",
                where=str(path),
                fix=OTHER,
            )
    return meta


def _unusable(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), fix=OTHER)


def with_contents(
    meta: CheckpointMeta, folder: Path, roles: dict[str, RoleMeta], digests: dict[str, str]
) -> CheckpointMeta:
    """Return `meta` with the models, and the files' sizes and digests, of a folder that is about to
    be named."""
    files = {name: (folder / name).stat().st_size for name in digests}
    return replace(meta, roles=roles, files=files, digests=digests)


def read_hf_files(folder: Path) -> dict[str, str]:
    """Return the text of config.json and generation_config.json, where the folder has them. Raises
    UserError for values that `architecture_from_hf` refuses."""
    if (folder / HF_FILES[0]).is_file():
        architecture_from_hf(folder)
    return {
        name: (folder / name).read_text(encoding="utf-8")
        for name in HF_FILES
        if (folder / name).is_file()
    }


def weights_kind(path: Path) -> str:
    """Return "checkpoint" (of this project), "huggingface" or "adapter" (PEFT's, on a Hugging Face
    model), judged by the folder's content.

    Raises UserError that lists what was found instead.
    """
    if not path.exists():
        raise UserError(
            f"nothing to load at {path}",
            fix="give a Hugging Face folder, a checkpoint of this project, or `random`",
        )
    found = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if "meta.json" in found and parse_meta(path) is not None:
        return "checkpoint"
    if CONFIG in found:  # transformers, too, takes such a folder for adapters
        return _with_tensors(path, found)
    if "config.json" in found and any(name.endswith(".safetensors") for name in found):
        return "huggingface"
    if "config.json" in found and (old := [name for name in found if name.endswith(".bin")]):
        raise UserError(
            f"a Hugging Face folder without safetensors: {old[0]} is not read",
            where=str(path),
            fix="save it again with transformers: from_pretrained(OLD).save_pretrained(NEW)",
        )
    shown = ", ".join(found[:8]) + (" …" if len(found) > 8 else "") if path.is_dir() else "a file"
    hint = f"; its newest checkpoint is {newest}" if (newest := latest(path)) else ""
    raise UserError(
        "neither a checkpoint (meta.json) nor a Hugging Face folder (config.json + *.safetensors);"
        f" found: {shown or 'nothing'}{hint}",
        where=str(path),
        fix="give the folder of one checkpoint, or of one Hugging Face model",
    )


def _with_tensors(path: Path, found: list[str]) -> str:
    if TENSORS in found:
        return "adapter"
    raise UserError(
        f"{CONFIG} without {TENSORS}",
        where=str(path),
        fix="save it again with PEFT: PeftModel.from_pretrained(MODEL, OLD).save_pretrained(NEW)",
    )


def steps(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the complete checkpoints in DIR, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (int(match.group(1)), path)
        for path in directory.iterdir()
        if (match := _STEP.fullmatch(path.name)) and (path / "meta.json").is_file()
    )


def latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint in DIR, or None."""
    found = steps(directory)
    return found[-1][1] if found else None
