"""The fixed sections of a recipe. A field is a key; its default here is the only one. Components
bring their own keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from gipo_megatron.data.config import FORMATS, DataConfig, PlantedConfig
from gipo_megatron.recipe.registry import OneOf, Range, component
from gipo_megatron.recipe.source import Block, to_yaml
from gipo_megatron.specs import Architecture, Parallel, Precision
from gipo_megatron.telemetry.alerts import Alerts

Count = Annotated[int, Range(1)]
NotNegative = Annotated[int, Range(0)]
ROLES = ("actor", "reference", "reward", "critic")


@dataclass(frozen=True)
class ModelConfig:
    """One role's weights and, where the algorithm trains it, its optimiser."""

    load: str  # a checkpoint of this project, a Hugging Face folder or hub name, or `random`
    # required for a role that is trained, refused for one that is not
    lr: Annotated[float, Range(0, open=True)] | None = None
    # after the warm-up
    schedule: Annotated[str, OneOf("constant", "cosine", "linear")] = "constant"
    warmup_steps: NotNegative = 0  # optimizer steps from 0 to lr
    weight_decay: Annotated[float, Range(0)] = 0.0
    clip_grad: Annotated[float, Range(0, open=True)] = 1.0  # largest global gradient norm
    offload: Annotated[str, OneOf("none", "cpu")] = "none"  # cpu: kept in host memory while idle


TRAINING_KEYS = ("lr", "schedule", "warmup_steps", "weight_decay", "clip_grad")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    hub: str = ""  # the model's name on the Hugging Face hub, or its folder
    tokenizer: str = ""  # "": beside the weights; bytes: built in; or a folder or hub name
    architecture: Architecture


@dataclass(frozen=True)
class Memory:
    # activations computed again in the backward pass
    recompute: Annotated[str, OneOf("none", "selective", "full")] = "none"


@dataclass(frozen=True)
class Batch:
    """In sequences (in pairs for a reward model and DPO). micro_batch is per replica; the others
    count all replicas together."""

    prompts: Count = 64  # prompts an iteration
    responses: Count = 4  # responses a prompt
    minibatch: Count = 64  # rows of one optimizer step
    micro_batch: Count = 4  # rows of one forward pass on one replica


@dataclass(frozen=True)
class Stop:
    kl_above: Annotated[float, Range(0, open=True)] | None = None  # end when kl/mean exceeds this
    score_patience: Count | None = None  # end after that many evaluations without a new best score


@dataclass(frozen=True)
class Run:
    dir: str  # where everything of this run is written
    steps: Count  # iterations; for SFT, reward models and DPO, optimizer steps
    seed: NotNegative = 0
    save_every: NotNegative = 100  # iterations between checkpoints; 0: only at the end
    keep: Count = 2  # newest checkpoints that stay; `best` and `final` stay anyway
    eval_every: NotNegative = 50  # iterations between held-out evaluations; 0: none
    eval_prompts: Count = 64  # held-out prompts, examples or pairs of one evaluation
    # auto: from the newest checkpoint of run.dir | never: refuse a used run.dir | a checkpoint's
    # path
    resume: str = "auto"
    export_hf: bool = False  # write the final weights as a Hugging Face folder, too
    # consecutive steps with a non-finite loss or gradient before the run stops
    max_skipped: Count = 3
    loggers: list[Annotated[str, OneOf("console", "tensorboard", "wandb")]] = field(
        default_factory=lambda: ["console", "tensorboard"]
    )
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Evaluation:
    """How held-out responses are drawn (training always draws at its own `algorithm.rollout`)."""

    temperature: Annotated[float, Range(0)] = 0.8  # 0: greedy
    top_k: NotNegative = 0  # 0: off
    top_p: Annotated[float, Range(0, 1, open=True)] = 0.9
    repetition_penalty: Annotated[float, Range(1)] = 1.0


@dataclass(frozen=True)
class Hardware:
    """What the recipe is written for; used by checks and planning when torchrun has not said how
    many there are."""

    gpus: NotNegative = 0  # 0: CPU, any number of processes
    gpu_memory_gib: NotNegative = 0


def composed() -> Any:
    """A field that composition fills in, not the user."""
    return field(metadata={"composed": True}, repr=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
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

    name: str = composed()
    world: int = composed()  # processes the checks were made for
    # roles the algorithm updates; the other models only answer
    trained: tuple[str, ...] = composed()
    warnings: tuple[str, ...] = composed()
    tree: Block = composed()  # every value with its origin

    @property
    def data_parallel(self) -> int:
        return self.world // self.parallel.model

    def to_yaml(self, origins: bool = True) -> str:
        """The expanded recipe, itself a recipe; with origins as comments."""
        return to_yaml(self.tree, origins)


# Ranges of nouns that live in types.py and data/config.py, which know nothing of recipes.
_POSITIVE = Range(1)
_SHARE = Range(0, 1)
RANGES: dict[type, dict[str, Range | OneOf]] = {
    Parallel: {"tensor": _POSITIVE, "pipeline": _POSITIVE, "virtual_pipeline": _POSITIVE},
    Precision: {
        "dtype": OneOf("fp32", "bf16"),
        "fp8": OneOf("none", "delayed", "tensorwise", "blockwise"),
    },
    Architecture: {
        **{f.name: _POSITIVE for f in dataclasses.fields(Architecture) if f.type == "int"},
        "rope_base": Range(0, open=True),
        "norm_eps": Range(0, open=True),
    },
    DataConfig: {
        "format": OneOf(*FORMATS),
        "max_length": Range(2),
        "max_response": _POSITIVE,
        "held_out": _SHARE,
    },
    PlantedConfig: {
        "prompts": Range(4),
        "pairs_per_prompt": _POSITIVE,
        **dict.fromkeys(("easy_share", "held_out", "label_noise", "hack_share"), _SHARE),
    },
}
