"""Speed per device, and its share of the device's peak."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gipo_megatron.specs import Architecture

# Dense bf16 peak rates in FLOP/s, from NVIDIA's data sheets; other devices get no perf/mfu.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}


def num_parameters(a: Architecture) -> int:
    """Return the number of the decoder's weights, embeddings included."""
    attention = a.hidden_size * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    attention += (
        a.head_dim * (a.num_heads + 2 * a.num_kv_heads) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    )
    layer = attention + 3 * a.hidden_size * a.ffn_hidden_size + 2 * a.hidden_size
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    return a.num_layers * layer + a.hidden_size + embeddings


def flops(a: Architecture, tokens: float, passes: float) -> float:
    """2 · parameters · tokens · passes: a forward pass counts once, a training pass three times.
    Attention's own products are left out."""
    return 2 * num_parameters(a) * tokens * passes


def performance(
    values: Mapping[str, float],
    architecture: Architecture,
    tokens: float,
    passes: int,
    sequences: int,
    world: int,
) -> dict[str, float]:
    """perf/tokens_per_second (prompt + response tokens, per device), perf/mfu where the device's
    peak is known, rollout/tokens_per_second (response tokens, all devices).

    mfu = flops / (seconds · world · peak): a lower bound, as `flops` is.
    """
    seconds = values["time/step_seconds"]
    result = {"perf/tokens_per_second": tokens / seconds / world}
    if "rollout/length_mean" in values and values.get("time/rollout", 0) > 0:
        result["rollout/tokens_per_second"] = (
            values["rollout/length_mean"] * sequences / values["time/rollout"]
        )
    peak = _peak()
    if peak is not None:
        result["perf/mfu"] = flops(architecture, tokens, passes) / (seconds * world * peak)
    return result


def _peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)
