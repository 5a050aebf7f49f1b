"""Shared parts of the benchmarks: two sides taking turns, a table, a Hugging Face model with given
weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gipo_megatron.specs import Architecture


def interleave(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side in every round. One unmeasured round first; the order turns each round,
    so that neither is always second."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for round_ in range(repeats + 1):
        for name in names if round_ % 2 else reversed(names):
            start = time.perf_counter()
            sides[name]()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> tuple[float, float, float]:
    """Median, lowest and highest of above / below over the rounds."""
    each = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return statistics.median(each), min(each), max(each)


def show(rows: Iterable[Iterable[object]]) -> None:
    table = [[str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print(
            "  ".join(
                x.ljust(w) if i == 0 else x.rjust(w)
                for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def markdown(rows: Iterable[Iterable[object]]) -> None:
    """Print a table as Markdown; the first row is its header."""
    header, *rest = ([str(x) for x in row] for row in rows)
    for row in (header, ["---"] * len(header), *rest):
        print(f"| {' | '.join(row)} |")


def hf_config(a: Architecture) -> LlamaConfig:
    """Without tokens of its own: nothing ends a response."""
    return LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        rms_norm_eps=a.norm_eps,
        tie_word_embeddings=a.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def hugging_face(state: Mapping[str, Tensor], a: Architecture) -> LlamaForCausalLM:
    model = LlamaForCausalLM(hf_config(a)).float().eval()
    if a.tied_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state)
    return model
