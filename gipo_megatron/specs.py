"""Plain values that recipes, roles and checkpoints share: architecture, parallel sizes, precision,
optimiser, group head, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A dense Llama-like decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's `rope_scaling` block
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False


@dataclass(frozen=True)
class Parallel:
    """Sizes of the model parallel groups; the rest of the world is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline stage
    sequence: bool = False  # shard norms and residuals over the tensor group

    @property
    def model(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Precision:
    dtype: str = "bf16"  # fp32 | bf16
    fp8: str = "none"  # none | delayed | tensorwise | blockwise (Transformer Engine's recipes)
    # the same bits in every run on the same GPUs; always so on a CPU
    deterministic: bool = False


@dataclass(frozen=True)
class Optimisation:
    """Adam with gradient-norm clipping."""

    lr: float
    schedule: str = "constant"  # constant | cosine | linear, after the warm-up
    warmup_steps: int = 0  # optimizer steps from 0 to lr
    # optimizer steps in the run; where cosine and linear end (at 0.1 lr and 0)
    total_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class HeadSpec:
    """A group head on the critic's trunk."""

    num_groups: int
    input: str  # prompt: hidden state of the last prompt token | trajectory: of the last token
    detach_trunk: bool
    init_std: float = 0.02
    lr: float = 1e-3
    loss_weight: float = 1.0  # of R_var in the critic's loss
    observes: bool = False  # labels are given; this head's are measured and never used


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Noise is a pure function of (seed, step, sample_id, position)."""

    max_response: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # evaluation only (algorithm.md 5.7)
    seed: int = 0
    step: int = 0


# role -> what stands in place of the output layer; None: a language model
HEADS = {"actor": None, "reference": None, "reward": "score", "critic": "value"}


def base_role(role: str) -> str:
    """Return the kind of a role: `reward_helpful` is a reward model."""
    return "reward" if role.startswith("reward_") else role


def head_of(role: str) -> str | None:
    """Return what stands in place of the output layer: None, "score" or "value"."""
    return HEADS[base_role(role)]
