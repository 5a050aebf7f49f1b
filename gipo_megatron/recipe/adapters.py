"""Check of a recipe whose roles are adapters on one frozen model."""

from __future__ import annotations

from gipo_megatron.recipe.draft import Draft, Found
from gipo_megatron.specs import LINEARS


def adapters(d: Draft) -> Found:
    """Some layer has adapters, and all roles stay where the base is."""
    spec = d.model.adapter
    if not spec.rank:
        return
    if not spec.targets:
        fix = f"model.adapter.targets=[{', '.join(LINEARS)}]"
        yield d.problem("model.adapter.targets", "is empty: nothing would be trained", fix)
    for role, config in d.models.items():
        if config.offload == "cpu":
            key = f"models.{role}.offload"
            what = "cpu, and with model.adapter the roles share their weights, which have to stay"
            yield d.problem(key, what, f"{key}=none")
