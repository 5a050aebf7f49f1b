"""Which cells run in a world of one, two and four processes."""

from __future__ import annotations

from gipo_megatron.specs import Parallel

LAYOUTS: dict[int, dict[str, Parallel]] = {
    1: {"single": Parallel()},
    2: {
        "tp2": Parallel(tensor=2),
        "tp2_sp": Parallel(tensor=2, sequence=True),
        "pp2": Parallel(pipeline=2),
        "pp2_vpp2": Parallel(pipeline=2, virtual_pipeline=2),
        "dp2": Parallel(),
    },
    4: {
        "tp2_pp2_sp": Parallel(tensor=2, pipeline=2, sequence=True),
        "tp2_dp2": Parallel(tensor=2),
        "pp2_vpp2_dp2": Parallel(pipeline=2, virtual_pipeline=2),
    },
}
MICRO_BATCHES: dict[int, tuple[int, ...]] = {1: (1, 2, 4), 2: (1, 2, 4), 4: (1,)}
GRADIENTS: dict[int, tuple[str, ...]] = {
    1: ("pairs", "selective", "full", "bf16", "bf16_full", "bf16_pairs"),
    2: ("pairs", "selective", "full", "bf16", "bf16_full", "bf16_pairs"),
    4: ("full", "bf16_pairs"),
}
BF16_CHECKPOINTS = ("pp2_vpp2", "dp2")
