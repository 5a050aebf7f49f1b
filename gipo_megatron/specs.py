"""Plain values that recipes, roles and checkpoints share: architecture, parallel sizes, precision,
optimiser, group head, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from gipo_megatron.errors import UserError


@dataclass(frozen=True)
class Range:
    """`Annotated[float, Range(0, 1)]`: low <= value <= high; with `open`, low < value."""

    low: float | None = None
    high: float | None = None
    open: bool = False

    def refuse(self, value: Any) -> str:
        """Return why `value` is out of range; empty when it is not."""
        # negated, so that NaN is out of every range
        if self.low is not None and not (value > self.low if self.open else value >= self.low):
            return f"{value!r} must be {'above' if self.open else 'at least'} {self.low:g}"
        if self.high is not None and not value <= self.high:
            return f"{value!r} must be at most {self.high:g}"
        return ""


@dataclass(frozen=True)
class OneOf:
    """`Annotated[str, OneOf("mass", "uniform")]`"""

    options: tuple[str, ...]

    def __init__(self, *options: str) -> None:
        object.__setattr__(self, "options", options)

    def refuse(self, value: Any) -> str:
        """Return why `value` is not among the options; empty when it is."""
        return "" if value in self.options else f"{value!r} is not one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Place:
    """Marks text that is a path, or may be one: the recipe reader expands `~` in it."""

    def refuse(self, value: Any) -> str:
        return ""


PathText = Annotated[str, Place()]


def refusals(item: object) -> Iterator[tuple[str, str]]:
    """Yield (field, why) for each field of a dataclass whose value its annotation refuses."""
    for name, hint in get_type_hints(type(item), include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if why := mark.refuse(getattr(item, name)):
                yield name, why


Size = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, open=True)]


# far above all models, and the product of three is a size that torch can count
Count = Annotated[int, Range(1, 5000)]
Width = Annotated[int, Range(1, 20_000_000)]


@dataclass(frozen=True)
class Architecture:
    """A dense Llama-like decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    num_layers: Count
    hidden_size: Width
    ffn_hidden_size: Width
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Width
    max_positions: Width
    rope_base: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's `rope_scaling` block
    norm_eps: Positive = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False


# the linear layers of a decoder layer, by Hugging Face's names
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """Low-rank adapters (LoRA, Hu et al. 2021): the weights W are frozen, and each of these layers
    computes W x + factor · B A x, A [rank, in], B [out, rank]."""

    rank: Annotated[int, Range(0)] = 0  # 0: no adapters, all weights are trained
    alpha: Positive = 32.0
    targets: tuple[Annotated[str, OneOf(*LINEARS)], ...] = LINEARS
    # rslora (Kalajdzievski 2023): the factor falls as the square root of the rank
    scaling: Annotated[str, OneOf("standard", "rslora")] = "standard"

    def __post_init__(self) -> None:
        """Put the targets in the model's order: equal specs are one shape, however written."""
        order = {name: i for i, name in enumerate(LINEARS)}
        ordered = sorted(self.targets, key=lambda name: order.get(name, len(order)))
        object.__setattr__(self, "targets", tuple(ordered))

    @property
    def factor(self) -> float:
        return self.alpha / (self.rank**0.5 if self.scaling == "rslora" else self.rank)


@dataclass(frozen=True)
class Parallel:
    """Sizes of the model parallel groups; the rest of the world is data parallel. Also the time
    after which a rank without a sign of life ends the others."""

    tensor: Size = 1
    pipeline: Size = 1
    virtual_pipeline: Size = 1  # model chunks per pipeline stage
    sequence: bool = False  # shard norms and residuals over the tensor group
    timeout: Positive = 1800.0  # seconds; exchanges between ranks may last half as long again

    @property
    def model(self) -> int:
        return self.tensor * self.pipeline

    def problems(self, world: int) -> Iterator[UserError]:
        """Reasons why tensor × pipeline × data is not `world`, or a schedule does not exist."""
        sizes = f"tensor {self.tensor} × pipeline {self.pipeline} × data ?"
        if min(self.tensor, self.pipeline, self.virtual_pipeline) < 1:
            what = f"a size is below 1: {sizes}, virtual_pipeline {self.virtual_pipeline}"
            yield UserError(what, where="parallel", fix="use 1")
            return
        if world % self.model:
            yield UserError(
                f"{sizes} ≠ world {world}: {world} is no multiple of {self.model}",
                where="parallel",
                fix=f"start a multiple of {self.model} processes, or change parallel.tensor or"
                " parallel.pipeline",
            )
        for key, wrong, needs, fix in (
            ("sequence", self.sequence and self.tensor == 1, "tensor", "false"),
            ("virtual_pipeline", self.virtual_pipeline > 1 and self.pipeline == 1, "pipeline", "1"),
        ):
            if wrong:
                what, key = f"needs parallel.{needs} above 1", f"parallel.{key}"
                yield UserError(what, where=key, fix=f"{key}={fix}")


def split_problems(architecture: Architecture, parallel: Parallel) -> Iterator[UserError]:
    """Sizes of the architecture that do not divide: heads and the feed-forward width by the tensor
    ranks, layers by the pipeline's chunks."""
    chunks = parallel.pipeline * parallel.virtual_pipeline
    cut = f"pipeline {parallel.pipeline} × virtual_pipeline {parallel.virtual_pipeline} = {chunks}"
    tensor = parallel.tensor, f"tensor {parallel.tensor}"
    kv_heads = architecture.num_kv_heads
    for key, (divisor, words) in (
        ("num_heads", (kv_heads, f"num_kv_heads {kv_heads}")),
        ("num_heads", tensor),
        ("num_kv_heads", tensor),
        ("ffn_hidden_size", tensor),
        ("num_layers", (chunks, cut)),
    ):
        value = getattr(architecture, key)
        if value % divisor:
            what = f"{value} does not divide by {words}"
            yield UserError(what, where=f"model.architecture.{key}", fix=divisors(value))
    if architecture.head_dim % 2:
        what = f"{architecture.head_dim} must be even (rotary positions)"
        yield UserError(what, where="model.architecture.head_dim")


def divisors(value: int) -> str:
    """Return the divisors of `value` up to 64, in words."""
    found = [str(n) for n in range(1, min(value, 64) + 1) if value % n == 0]
    return f"divisors of {value}: {', '.join(found)}"


@dataclass(frozen=True)
class Precision:
    dtype: Annotated[str, OneOf("fp32", "bf16")] = "bf16"
    # Transformer Engine's recipes
    fp8: Annotated[str, OneOf("none", "delayed", "tensorwise", "blockwise")] = "none"
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
    init_std: float = 0.02  # and lr: for a trunk of width 128, see width_scaled
    lr: float = 1e-3
    loss_weight: float = 1.0  # of R_var in the critic's loss
    entropy: float = 0.03  # weight of the labels' entropy beside R_var
    observes: bool = False  # labels are given; this head's are measured and never used


def width_scaled(lr: float, init_std: float, width: int) -> tuple[float, float]:
    """Return lr 128/H and init_std sqrt(128/H) of a group head on a trunk of width H.

    Adam moves a logit by lr sum |h|, which grows as H, and the first logits have std init_std |h|,
    which grows as sqrt(H); so labels move alike on every trunk.
    """
    ratio = 128 / width
    return lr * ratio, init_std * ratio**0.5


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw of tokens. Noise depends on (seed, step, sample_id, position) alone."""

    max_response: Size
    temperature: Annotated[float, Range(0)] = 1.0  # 0: greedy
    top_k: Annotated[int, Range(0)] = 0  # 0: off
    top_p: Annotated[float, Range(0, 1, open=True)] = 1.0  # 1: off
    repetition_penalty: Positive = 1.0  # 1: off; evaluation only (algorithm.md 5.7)
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Serve:
    """A vLLM server that rank 0 starts, watches and stops."""

    # the interpreter of an environment that has vLLM; "": the variable VLLM_PYTHON's
    python: PathText = ""
    port: Annotated[int, Range(0, 65535)] = 0  # 0: a free one
    tensor_parallel: Size = 1
    # share of each GPU's memory that the server takes
    gpu_memory: Annotated[float, Range(0, 1, open=True)] = 0.3
    # the server's CUDA_VISIBLE_DEVICES; "": the GPUs of rank 0, shared with the training
    devices: str = ""
    start_timeout: Positive = 600.0  # seconds until it has to be ready
    # starts after it died or hung, in the whole run
    restarts: Annotated[int, Range(0)] = 3
    args: list[str] = field(default_factory=list)  # more arguments of vLLM's server
    # in place of python and all arguments, such as a container's start; {model}, {port} and
    # {plugin} are filled in
    command: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> list[str]:
        """The GPUs that it works on, by their names in CUDA_VISIBLE_DEVICES; rank r of training on
        this machine has GPU r."""
        listed = [name.strip() for name in self.devices.split(",") if name.strip()]
        return (listed or [*map(str, range(self.tensor_parallel))])[: self.tensor_parallel]


# role -> what stands in place of the output layer; None: a language model
HEADS = {
    "actor": None,
    "reference": None,
    "reward": "score",
    "critic": "value",
    "gold": "score",
}


def base_role(role: str) -> str:
    """Return the kind of a role: `reward_helpful` is a reward model."""
    return "reward" if role.startswith("reward_") else role


def head_of(role: str) -> str | None:
    """Return what stands in place of the output layer: None, "score" or "value"."""
    return HEADS[base_role(role)]
