"""The fixed sections of a recipe. A field is a key. Components add their own keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from gipo_megatron.data.config import DataConfig
from gipo_megatron.recipe.source import Block, to_yaml
from gipo_megatron.registry import component
from gipo_megatron.specs import (
    AdapterSpec,
    Architecture,
    OneOf,
    Parallel,
    PathText,
    Positive,
    Precision,
    Range,
)
from gipo_megatron.telemetry.alerts import Alerts

Count = Annotated[int, Range(1)]
NotNegative = Annotated[int, Range(0)]
ROLES = ("actor", "reference", "reward", "critic", "gold")


@dataclass(frozen=True)
class ModelConfig:
    """One role's weights and, where the algorithm trains it, its optimiser."""

    load: PathText  # a checkpoint of this project, a Hugging Face folder or hub name, or `random`
    # required for a role that is trained, refused for one that is not
    lr: Positive | None = None
    # after the warm-up
    schedule: Annotated[str, OneOf("constant", "cosine", "linear")] = "constant"
    warmup_steps: NotNegative = 50  # optimizer steps from 0 to lr
    weight_decay: Annotated[float, Range(0)] = 0.0
    clip_grad: Positive = 1.0  # largest global gradient norm
    offload: Annotated[str, OneOf("none", "cpu")] = "none"  # cpu: kept in host memory while idle


TRAINING_KEYS = ("lr", "schedule", "warmup_steps", "weight_decay", "clip_grad")


@dataclass(frozen=True, kw_only=True)
class SharedModel:
    """The model that all roles are built as."""

    hub: PathText = ""  # the model's name on the Hugging Face hub, or its folder
    tokenizer: PathText = ""  # "": beside the weights; bytes: built in; or a folder or hub name
    architecture: Architecture


@dataclass(frozen=True, kw_only=True)
class ModelSpec(SharedModel):
    adapter: AdapterSpec = field(default_factory=AdapterSpec)


@dataclass(frozen=True)
class Memory:
    # activations computed again in the backward pass
    recompute: Annotated[str, OneOf("none", "selective", "full")] = "none"


@dataclass(frozen=True)
class Batch:
    """In sequences (in pairs for a reward model and DPO). micro_batch and micro_tokens are per
    replica; the others count all replicas together."""

    prompts: Count = 64  # prompts an iteration
    responses: Count = 4  # responses a prompt
    minibatch: Count = 64  # rows of one optimizer step
    # exactly one of the two is set: rows of one forward pass on one replica, or its tokens with
    # their padding, in which the longest row has room
    micro_batch: Count | None = 4
    micro_tokens: Count | None = None

    @property
    def micro(self) -> str:
        """The size of a micro-batch in words."""
        at_most = f"at most {self.micro_tokens} tokens"
        return at_most if self.micro_batch is None else str(self.micro_batch)


@dataclass(frozen=True)
class Stop:
    kl_above: Positive | None = None  # end when kl/mean exceeds this
    score_patience: Count | None = None  # end after that many evaluations without a new best score


@dataclass(frozen=True)
class Run:
    dir: PathText  # where everything of this run is written
    # exactly one of the two is set. steps: iterations; for SFT, reward models and DPO, optimizer
    # steps. epochs: passes over the training rows, from which the steps follow at the start
    steps: Count | None = None
    epochs: Count | None = None
    seed: NotNegative = 0
    save_every: NotNegative = 100  # iterations between checkpoints; 0: only at the end
    keep: Count = 2  # newest checkpoints that stay; `best` and `final` stay anyway
    eval_every: NotNegative = 50  # iterations between held-out evaluations; 0: none
    eval_prompts: Count = 64  # held-out prompts, examples or pairs of one evaluation
    # auto: from the newest checkpoint of run.dir | never: refuse a used run.dir | a checkpoint's
    # path
    resume: PathText = "auto"
    export_hf: bool = False  # write the final weights as a Hugging Face folder, too
    # consecutive steps with a non-finite loss or gradient before the run stops
    max_skipped: Count = 3
    loggers: list[Annotated[str, OneOf("console", "tensorboard", "wandb")]] = field(
        default_factory=lambda: ["console", "tensorboard"]
    )
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Evaluation:
    """Sampling of held-out responses (training samples by `algorithm.rollout`)."""

    temperature: Annotated[float, Range(0)] = 0.8  # 0: greedy
    top_k: NotNegative = 0  # 0: off
    top_p: Annotated[float, Range(0, 1, open=True)] = 0.9
    repetition_penalty: Annotated[float, Range(1)] = 1.0


NODE = 8  # GPUs of one machine, unless the recipe has fewer


@dataclass(frozen=True)
class Hardware:
    """The machine that the recipe is written for; for checks and planning without torchrun."""

    gpus: NotNegative = 0  # 0: CPU, any number of processes
    gpu_memory_gib: NotNegative = 0

    @property
    def per_node(self) -> int:
        """GPUs of one machine; for a CPU, processes."""
        return min(self.gpus or NODE, NODE)


def composed() -> Any:
    """A field that composing sets; it is not a recipe key."""
    return field(metadata={"composed": True}, repr=False)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """Fields that composing adds to a recipe, of training or of an evaluation."""

    name: str = composed()
    world: int = composed()  # processes the checks were made for
    warnings: tuple[str, ...] = composed()
    tree: Block = composed()  # every value with its origin

    def to_yaml(self, origins: bool = True) -> str:
        """Return the expanded recipe, itself a recipe; with origins as comments."""
        return to_yaml(self.tree, origins)


@dataclass(frozen=True, kw_only=True)
class Recipe(Composed):
    """A checked recipe: every key typed and complete."""

    models: dict[str, ModelConfig] = field(default_factory=dict)
    model: ModelSpec
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    memory: Memory = field(default_factory=Memory)
    batch: Batch = field(default_factory=Batch)
    algorithm: dict[str, Any] = component("algorithm", "")  # what registry.build reads
    data: DataConfig = field(default_factory=DataConfig)
    run: Run
    evaluation: Evaluation = field(default_factory=Evaluation)
    alerts: Alerts = field(default_factory=Alerts)
    hardware: Hardware = field(default_factory=Hardware)
    plugins: list[str] = field(default_factory=list)

    # roles that the algorithm updates; the other models are only evaluated
    trained: tuple[str, ...] = composed()

    @property
    def data_parallel(self) -> int:
        return self.world // self.parallel.model
