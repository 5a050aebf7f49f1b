"""Bytes that a pass through one rank's layers needs beside the model's state.

Counted like Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models,
section 4), for the modules this project builds: fused attention keeps no s × s matrix, nothing is
dropped out, the feed-forward layer is SwiGLU, norms are RMSNorm. Per layer and token, in elements
of the model's dtype, tensor size t, sequence parallel size u (t or 1):

    norms         2 H/u in, 2 H/u out
    value         a view: keeps the fused (Q + 2K)/t
    query, key    after RoPE: (Q + K)/t, Q = heads · d, K = key-value heads · d
    attention     output Q/t, and log-sum-exp 4 bytes a head
    feed-forward  fused gate and up 2F/t, product F/t

An adapter keeps the input that its frozen layer would have kept for the weight's gradient, A's
product, and its B as a matrix of the fused layer's rows.

recompute selective drops the feed-forward layer's; full keeps a layer's input only. What is dropped
is there again for one layer at a time in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gipo_megatron.megatron.kv_budget import PREFILL_TOKENS, Need
from gipo_megatron.megatron.model import padded_vocab
from gipo_megatron.megatron.outputs import block_columns
from gipo_megatron.specs import AdapterSpec, Architecture, Parallel, Sampling

FP32 = 4
# fp32 blocks of logits at work in outputs.token_stats, with an entropy
READOUT_BLOCKS = 2


@dataclass
class Slot:
    """One micro-batch on one rank, and the bytes of its tensors there."""

    architecture: Architecture
    parallel: Parallel
    itemsize: int  # of the model's dtype
    sequences: int
    length: int  # padded
    device: torch.device = torch.device("cuda")  # that the plan is for
    adapter: AdapterSpec = AdapterSpec()

    def __post_init__(self) -> None:
        a, tensor = self.architecture, self.parallel.tensor
        self.tokens = self.sequences * self.length
        wide = self.tokens * self.itemsize  # bytes of one element a token
        self.shards = tensor if self.parallel.sequence else 1  # of the residual stream
        self.hidden = wide * a.hidden_size  # [s, b, H], whole
        self.residual = self.hidden // self.shards
        self.query = wide * a.num_heads * a.head_dim // tensor
        self.key = wide * a.num_kv_heads * a.head_dim // tensor
        self.feed = wide * a.ffn_hidden_size // tensor  # [s, b, F / t]
        self.logits = FP32 * self.tokens * padded_vocab(a, tensor) // tensor  # of all positions
        self.low, self.matrices = self._adapters()  # products with A; B's matrices

    def _adapters(self) -> tuple[int, int]:
        """Return the bytes of the adapters of one layer, for its tokens and for its weights."""
        a, tensor, spec = self.architecture, self.parallel.tensor, self.adapter
        attention = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        width, matrices = 0, 0
        for rows, layers in (
            (attention // tensor, {"q_proj", "k_proj", "v_proj"}),
            (a.hidden_size, {"o_proj"}),
            (2 * a.ffn_hidden_size // tensor, {"gate_proj", "up_proj"}),
            (a.hidden_size, {"down_proj"}),
        ):
            own = len(layers.intersection(spec.targets)) * spec.rank
            width, matrices = width + own, matrices + rows * own
        return self.tokens * self.itemsize * width, self.itemsize * matrices


def layer_kept(slot: Slot, recompute: str) -> int:
    """Return the bytes that one layer keeps of one micro-batch for its backward pass."""
    if recompute == "full":
        return slot.residual
    a = slot.architecture
    rows = FP32 * slot.tokens
    norms = 4 * slot.residual + 2 * rows // slot.shards
    attention = slot.query + slot.key + (slot.query + 2 * slot.key) + slot.query
    # the norms' inputs: the query's is a copy unless a group has one query; the key's is a view of
    # the fused projection
    if a.qk_norm:
        attention += (slot.query if a.num_heads > a.num_kv_heads else 0) + rows * (
            a.num_heads + a.num_kv_heads
        ) // slot.parallel.tensor
    statistics = rows * a.num_heads // slot.parallel.tensor  # log-sum-exp
    kept = norms + attention + statistics + slot.low + slot.matrices
    return kept + (3 * slot.feed if recompute == "none" else 0)


def in_flight(parallel: Parallel, stage: int, slots: int) -> int:
    """Return the largest number of passes through a model chunk that wait for their backward pass:
    1F1B, interleaved with a virtual pipeline."""
    p, v = parallel.pipeline, parallel.virtual_pipeline
    if p == 1:
        return 1
    if v == 1:
        return min(slots, p - stage)
    return min(slots * v, 2 * (p - stage - 1) + (v - 1) * p + 1)


@dataclass(frozen=True)
class Pass:
    """Bytes of one pass. `layer` and `logits` are not in use at once, and nothing else is during
    `step`."""

    activations: int = 0  # kept for the backward pass, all micro-batches in flight
    layer: int = 0  # at work in one layer
    logits: int = 0  # logits of a block, or a head's fp32 input, with their gradients
    cache: int = 0  # keys and values of generation
    rows: int = 0  # sequences of a replica that generate at once
    step: int = 0  # Adam's denominators in the optimizer step; a GPU's fused Adam has none

    @property
    def peak(self) -> int:
        return max(self.activations + self.cache + max(self.layer, self.logits), self.step)


def _output(slot: Slot, head: bool, training: bool) -> int:
    """The last stage's output layer and what reads it, every position masked: blocks of logits and
    gradients in fp32; a head reads fp32."""
    # the final norm; a gathered input
    ends = 2 * slot.residual + (slot.hidden if slot.shards > 1 else 0)
    if head:
        return ends + slot.residual // slot.itemsize * FP32 * (2 if training else 1)
    columns = block_columns(slot.tokens, slot.device)
    block = min(FP32 * slot.tokens * columns, slot.logits)
    # in the readout's order of positions, and the rows that are read
    found = ends + 2 * slot.hidden + READOUT_BLOCKS * block
    if not training:
        return found
    a, tensor = slot.architecture, slot.parallel.tensor
    weight = padded_vocab(a, tensor) // tensor * a.hidden_size * slot.itemsize
    if slot.adapter.rank:  # the output layer is frozen
        weight = 0
    kept = block if block == slot.logits else 0
    return found + kept + weight + slot.hidden // slot.itemsize * FP32


def training(
    slot: Slot,
    recompute: str,
    chunk_layers: tuple[int, ...],
    stage: int,
    slots: int,
    head: bool,
    moments: int,
) -> Pass:
    """Forward and backward of one optimizer step of `slots` micro-batches.

    moments: bytes of one of Adam's moments on this rank, where its step needs as much again.
    """
    parallel, a = slot.parallel, slot.architecture
    passing_on = slot.residual if parallel.pipeline > 1 else 0
    kept = in_flight(parallel, stage, slots) * (
        max(chunk_layers) * layer_kept(slot, recompute) + passing_on
    )
    again = {"none": 0, "selective": 3 * slot.feed, "full": layer_kept(slot, "none")}[recompute]
    # gradient of gate and up, in the model's dtype
    matrix = 2 * a.ffn_hidden_size * a.hidden_size * slot.itemsize // parallel.tensor
    if slot.adapter.rank:  # no such gradient; those of B's matrices and of the products with A
        matrix = slot.matrices + slot.low
    layer = again + 3 * slot.feed + 2 * slot.residual + slot.hidden + matrix
    output = _output(slot, head, training=True) if stage == parallel.pipeline - 1 else 0
    return Pass(activations=kept, layer=layer, logits=output, step=moments)


def forward(slot: Slot, stage: int, head: bool) -> Pass:
    """A pass without gradients: one layer at a time, nothing kept."""
    attention = 5 * slot.query + 3 * slot.key
    layer = 2 * slot.residual + slot.hidden + max(attention, 3 * slot.feed)
    last = stage == slot.parallel.pipeline - 1
    return Pass(layer=layer, logits=_output(slot, head, training=False) if last else 0)


def need_of(slot: Slot) -> Need:
    """Return the bytes that generation needs, for the model of `slot`."""
    return Need(slot.architecture, slot.parallel, slot.itemsize)


def generation(slot: Slot, rows: int, max_length: int, sampling: Sampling, stage: int) -> Pass:
    """Prefill of the longest prompts, then decoding, of `rows` sequences at once."""
    need, prompt = need_of(slot), max(1, max_length - sampling.max_response)
    cache = rows * (max_length - 1) * need.token
    # a tensor of the cache is there twice at most, while rows move
    leaving = cache // (2 * need.layers)
    block = min(rows, PREFILL_TOKENS[slot.device.type] // prompt)
    # the decoder holds every layer's B as a matrix
    layer = max(need.prefill(max(1, block) * prompt), leaving) + need.layers * slot.matrices
    logits = rows * need.logits(sampling) if stage == slot.parallel.pipeline - 1 else 0
    return Pass(layer=layer, logits=logits, cache=cache, rows=rows)
