from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from gipo_megatron.data.config import DataConfig


def test_omegaconf_takes_it_as_a_schema() -> None:
    schema = OmegaConf.structured(DataConfig())
    for frozen in (schema, schema.planted):
        # OmegaConf 2.3 merges nothing into a frozen dataclass
        OmegaConf.set_readonly(frozen, False)
    merged = OmegaConf.merge(
        schema,
        {"source": ["a"], "columns": {"prompt": "q"}, "planted": {"hack": False}, "max_length": 64},
    )
    built = OmegaConf.to_object(merged)
    assert isinstance(built, DataConfig)
    assert (built.source, built.columns, built.planted.hack, built.max_length) == (
        ["a"],
        {"prompt": "q"},
        False,
        64,
    )
    assert (
        dataclasses.replace(
            built, source=[], columns={}, max_length=2048, planted=DataConfig().planted
        )
        == DataConfig()
    )
