"""From settings to an Engine with its weights: the one place where training, evaluation, conversion
and tests make their models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.checkpoint import (
    check_architecture,
    check_finite,
    load_weights,
    source_of,
)
from gipo_megatron.megatron.engine import Count, Engine
from gipo_megatron.megatron.hf import Seen, ignore, load_group_head, load_hf
from gipo_megatron.megatron.hf_adapters import load_adapters
from gipo_megatron.megatron.hf_table import HF_SCORE
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import initialise_weights
from gipo_megatron.megatron.offload import Snapshot
from gipo_megatron.specs import (
    AdapterSpec,
    Architecture,
    HeadSpec,
    Optimisation,
    Precision,
    base_role,
    head_of,
)
from gipo_megatron.weights.base import BaseMeta, base_at, random_base
from gipo_megatron.weights.checkpoints import read_hf_files, weights_kind
from gipo_megatron.weights.hf_config import architecture_from_hf
from gipo_megatron.weights.hf_files import open_weights
from gipo_megatron.weights.peft_config import CONFIG, spec_of
from gipo_megatron.weights.sources import adapted_model

_AGAIN = "download or export the model again"


def build_engine(
    role: str,
    mesh: Mesh,
    architecture: Architecture,
    precision: Precision,
    *,
    load: str = "random",
    micro_batch: int | None = 1,
    micro_tokens: int | None = None,
    seed: int = 0,
    group: HeadSpec | None = None,
    adapter: AdapterSpec = AdapterSpec(),
    base: Base | None = None,
    optimisation: Optimisation | None = None,
    recompute: str = "none",
    offload: str = "none",
    seen: Seen = ignore,
    count: Count = lambda *numbers: None,
) -> Engine:
    """Return the model of `role` with the weights at `load`; `group` is a critic's group head. On a
    `base` the model is frozen, but for adapters and head, and shared with all that have this base.

    Collective. Raises UserError when the weights do not fit.
    """
    if adapter.rank and base is None:
        base = Base()
    engine = Engine(
        mesh,
        architecture,
        precision,
        micro_batch=micro_batch,
        micro_tokens=micro_tokens,
        seed=seed,
        head=head_of(role),
        group=group,
        adapter=adapter,
        base=base,
        optimisation=optimisation,
        recompute=recompute,
        offload=offload,
        initialise=load == "random",
        count=count,
    )
    load_into(engine, load, role, seen)
    return engine


@dataclass
class Bases:
    """The frozen models of a process: roles whose weights come from the same one share it."""

    seed: int = 0  # of random weights
    held: dict[str, Base] = field(default_factory=dict)  # by fingerprint

    def settings(self, role: str, load: str, adapter: AdapterSpec | None = None) -> dict[str, Any]:
        """Return `adapter` and `base` of build_engine. adapter: of a role that is trained; others
        have the adapters that are stored at `load`.

        A whole model that is not trained is the base of an earlier call for adapters, where there
        is one: roles with adapters come first. Raises UserError for weights that cannot be read.
        """
        spec = stored_adapters(load, role) if adapter is None else adapter
        if not spec.rank and (adapter is not None or not self.held):
            return {"adapter": spec, "base": None}  # identities are read where a base is shared
        identity = stored_base(load, role, self.seed).fingerprint
        if spec.rank:
            self.held.setdefault(identity, Base())
        return {"adapter": spec, "base": self.held.get(identity)}


def stored_adapters(load: str, role: str) -> AdapterSpec:
    """Return the adapters at `load`, of rank 0 for a whole model."""
    if load == "random" or (kind := weights_kind(Path(load))) == "huggingface":
        return AdapterSpec()
    if kind == "adapter":
        return spec_of(Path(load))
    home, meta = source_of(Path(load), base_role(role))
    return meta.roles[home].adapter or AdapterSpec()


def stored_base(load: str, role: str, seed: int) -> BaseMeta:
    """Return the identity of the model that the adapters at `load` belong to, or of the whole model
    there."""
    if load == "random":
        return random_base(seed)
    path = Path(load)
    kind = weights_kind(path)
    if kind == "adapter":
        return base_at(adapted_model(path))
    if kind == "huggingface":
        return base_at(path)
    home, meta = source_of(path, base_role(role))
    return meta.roles[home].base or base_at(path / home)


def load_into(engine: Engine, load: str, role: str, seen: Seen = ignore) -> str:
    """Fill a model with the weights of a Hugging Face folder, PEFT's adapters or a checkpoint;
    "random" keeps what it was built with.

    Returns their source ("random", "huggingface", "adapter", or the checkpoint's role). Collective.
    Raises UserError when nothing fits, or when config.json describes another model than this one.
    """
    if load == "random":
        return load
    path, base = Path(load), engine.base
    kind = weights_kind(path)
    if kind == "adapter":
        _load_adapters(engine, path, role, seen)
        return kind
    if kind == "checkpoint":
        home, meta = source_of(path, base_role(role))
        saved = meta.roles[home].base
        if base is not None and saved is not None:
            _load_base(engine, base, saved, role, path, seen)
            return load_weights(path, base_role(role), engine)
        with _filling(base, path / home):
            return load_weights(path, base_role(role), engine)
    check_architecture(path / "config.json", architecture_from_hf(path), engine.architecture)
    with _filling(base, path), engine.residency.use(training=engine.optimisation is not None):
        place = engine.chunks, engine.mesh, engine.architecture
        filled = base.filled if base is not None else ()
        load_hf(path, *place, head=engine.head, but=filled, seen=seen)
        if engine.group_head is not None:
            load_group_head(path, engine.group_head)
        engine.weights_changed()
        check_finite(engine, path, _AGAIN)
    engine.hf_files = read_hf_files(path)
    return "huggingface"


def _load_adapters(engine: Engine, folder: Path, role: str, seen: Seen) -> None:
    """Load PEFT's adapters, what the base lacks of their model, and a head: theirs, else the
    model's. Raises UserError where they are not of this model's shape."""
    spec = spec_of(folder)
    if spec != engine.adapter:
        raise UserError(
            f"the folder has other adapters: there {spec}, here {engine.adapter}",
            where=str(folder / CONFIG),
            fix="give the same model.adapter",
        )
    load_into(engine, str(adapted_model(folder)), role, seen)
    with engine.residency.use(training=engine.optimisation is not None):
        place = engine.chunks, engine.mesh, engine.architecture
        own_head = HF_SCORE in open_weights(folder).shapes
        load_adapters(folder, *place, spec, head=engine.head if own_head else None)
        if engine.group_head is not None:
            load_group_head(folder, engine.group_head)
        engine.weights_changed()
        check_finite(engine, folder, _AGAIN)


@contextmanager
def _filling(base: Base | None, folder: Path) -> Iterator[None]:
    """Hold while the whole model in `folder` is loaded, of which a base takes what it lacks."""
    if base is None:
        yield
        return
    meta = base_at(folder)
    _check_base(base, meta, folder)
    yield
    base.fill(meta)


def _check_base(base: Base, meta: BaseMeta, where: Path) -> None:
    if base.meta not in (None, meta):
        raise UserError(
            f"its base is another model than the one at {base.meta.source or 'random'}",
            where=str(where),
            fix="give roles that share a base weights that were trained on it",
        )


def _load_base(
    engine: Engine, base: Base, meta: BaseMeta, role: str, where: Path, seen: Seen
) -> None:
    """Load what the base lacks of the model that the adapters at `where` belong to. Collective,
    because a rank may lack nothing and another the output layer.

    Raises UserError where that model is no longer there, or has changed.
    """
    _check_base(base, meta, where)
    base.meta = meta
    if meta.seed is not None:
        names = {name for name in base.held if name not in base.filled}
        place = engine.chunks, engine.architecture, engine.mesh
        initialise_weights(*place, meta.seed, only=names)
        base.fill(meta)
        return
    source = Path(meta.source)
    if base_at(source) != meta:
        raise UserError(
            f"the base of these adapters is not at {source}, or has changed since",
            where=str(where),
            fix="put the model there that they were trained on",
        )
    whole = source if (source / "config.json").is_file() else source.parent  # a role's folder
    load_into(engine, str(whole), role, seen)


def snapshot_of(engine: Engine, load: str, role: str, seed: int = 0) -> Snapshot:
    """Return the weights at `load` as a host copy, read through the model of `engine`, which keeps
    its own.

    For a reference that shares the policy's model. Must come before the policy is trained or
    restored. Collective.
    """
    with engine.swapped(engine.snapshot()):
        engine.scaling.write({})  # the loaded weights bring their own, or have none
        if load == "random":
            initialise_weights(engine.chunks, engine.architecture, engine.mesh, seed)
        own = engine.hf_files
        load_into(engine, load, role)
        engine.hf_files = own
        copied = engine.snapshot()
    with engine.residency.use(training=engine.optimisation is not None):
        engine.weights_changed()
    return copied
