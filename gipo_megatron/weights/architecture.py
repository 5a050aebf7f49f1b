"""The architecture of stored weights, read from their config.json or meta.json."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from gipo_megatron.data.hub import is_hub_name, reach_hub
from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.checkpoints import parse_meta
from gipo_megatron.weights.hf_checks import check_shapes
from gipo_megatron.weights.hf_config import architecture_from_hf
from gipo_megatron.weights.hf_files import open_weights
from gipo_megatron.weights.peft_config import CONFIG, base_name


@dataclass(frozen=True)
class Stored:
    """An architecture and the file that describes it."""

    path: str
    architecture: Architecture


def stored_architecture(
    load: str, role: str, where: str, *, may_be_hub: bool, network: bool
) -> Stored | None:
    """Return the architecture of the weights at `load`; None where none can be read yet.

    That is the case for random weights, for a stage that is not trained yet and, without `network`,
    for a hub model outside the local cache. `where` is the recipe key of `load`; `role` chooses
    among a checkpoint's models. Raises UserError for what cannot be read.
    """
    if load == "random":
        return None
    folder = Path(load)
    if not folder.exists():
        return _hub(load, where, network) if may_be_hub else None
    if (folder / CONFIG).is_file():
        base = base_name(folder)
        hub = is_hub_name(base)
        where = str(folder / CONFIG)
        return stored_architecture(base, role, where, may_be_hub=hub, network=network)
    config = folder / "config.json"
    if (folder / "meta.json").is_file() and (stored := _of_checkpoint(folder, role)) is not None:
        return stored
    if config.is_file():
        return Stored(str(config), _named(folder))
    newest = folder / "final"
    raise UserError(
        f"{folder} is neither a checkpoint (meta.json) nor a Hugging Face folder (config.json)",
        fix=(
            f"{where}={newest}"
            if newest.exists()
            else "give the folder of one checkpoint, or of one Hugging Face model"
        ),
    )


def _of_checkpoint(folder: Path, role: str) -> Stored | None:
    """One recipe made all roles of a checkpoint, so they share their architecture; a critic may
    start from a checkpoint without one."""
    path, meta = str(folder / "meta.json"), parse_meta(folder)
    if meta is None:
        return None
    if not meta.roles:
        raise UserError("lists no role", where=path, fix="use another checkpoint")
    first = next(iter(meta.roles))
    return Stored(path, meta.roles[role if role in meta.roles else first].architecture)


def folder_architecture(folder: Path) -> Architecture:
    """Return the architecture of a Hugging Face folder, compared with its tensors where it has
    them: a model of the wrong size may not even fit in memory."""
    architecture = architecture_from_hf(folder)
    if any(folder.glob("*.safetensors")):
        shapes = open_weights(folder).shapes
        check_shapes(architecture, shapes, str(folder / "config.json"))
    return architecture


def _named(folder: Path, name: str = "") -> Architecture:
    """Return the architecture. An error names the file at fault, or `name` for a copy of it."""
    try:
        return folder_architecture(folder)
    except UserError as error:
        raise UserError(error.what, where=name or error.where, fix=error.fix) from None


def _hub(load: str, where: str, network: bool) -> Stored | None:
    """Read config.json from the local cache, else, with `network`, that file alone from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # slow to import

    name = f"{load}/config.json (hub)"
    cached = try_to_load_from_cache(load, "config.json")
    if isinstance(cached, str):
        return Stored(name, _named(Path(cached).parent, name))
    if not network:
        return None
    fix = (
        "download the model and load its folder, or add with=model/NAME (recipes/model/), which"
        " writes an architecture"
    )
    reach_hub(load, where, fix)
    # Not into the cache: a snapshot there that holds config.json alone would pass for the model
    # itself.
    with tempfile.TemporaryDirectory() as folder:
        with library_errors(f"cannot get {name}", fix=fix):
            hf_hub_download(load, "config.json", local_dir=folder)
        return Stored(name, _named(Path(folder), name))
