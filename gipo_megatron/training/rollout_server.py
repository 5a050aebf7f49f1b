"""The server of a recipe's sampler, from the sampler's keys and the policy that it has to run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gipo_megatron.components.rollout import VLLMRollout
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.files import write_text
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.serving.client import Needed
from gipo_megatron.serving.process import ServerProcess
from gipo_megatron.serving.rollouts import ServerRollouts
from gipo_megatron.serving.server import Server
from gipo_megatron.serving.transfer import TRANSFERS
from gipo_megatron.specs import Architecture
from gipo_megatron.telemetry.loggers import warn
from gipo_megatron.weights.end_tokens import GENERATION, generation_config
from gipo_megatron.weights.hf_config import config_text
from gipo_megatron.weights.hf_files import HF_DTYPES
from gipo_megatron.weights.sources import locate, stored_hf_files

if TYPE_CHECKING:  # `gipo doctor` runs where Megatron cannot be imported
    from gipo_megatron.megatron.mesh import Mesh

# read by two tokenizers that agree as the same ids: letters, figures, other scripts, spaces
SAMPLE = "\n\nHuman: What is 12 + 7?  Größe, 東京, naïve…\n\nAssistant: 19."


@dataclass(frozen=True)
class Policy:
    """The model that a server runs. `files`: of its Hugging Face folder, {name: text}; `longest`:
    tokens of a prompt and its response."""

    architecture: Architecture
    dtype: str  # of precision.dtype
    tokenizer: Tokenizer
    files: Mapping[str, str]
    longest: int

    @property
    def needed(self) -> Needed:
        """Return what the server must have."""
        a, tokens = self.architecture, self.tokenizer.encode(SAMPLE)
        return Needed(self.longest, a.vocab_size, a.hidden_size, a.num_layers, SAMPLE, tokens)

    def write(self, folder: Path) -> None:
        """Write a Hugging Face folder without weights."""
        ids = self.tokenizer.special_ids
        config = config_text(self.files, self.architecture, HF_DTYPES[self.dtype], ids)
        write_text(folder / "config.json", config)
        write_text(folder / GENERATION, generation_config(self.files, ids))
        self.tokenizer.save(folder)


def trained_policy(recipe: Recipe, tokenizer: Tokenizer) -> Policy:
    """Return the actor of a training recipe. Raises UserError where its weights are absent."""
    data, load = recipe.data, recipe.models["actor"].load
    response = max(data.max_response, recipe.algorithm["rollout"]["max_response"])
    return Policy(
        recipe.model.architecture,
        recipe.precision.dtype,
        tokenizer,
        {} if load == "random" else stored_hf_files(locate(load, "models.actor.load")),
        data.max_length - data.max_response + response,
    )


def connect(
    sampler: VLLMRollout, policy: Policy, mesh: Mesh, folder: Path, closing: ExitStack
) -> ServerRollouts:
    """Start or find the server, check it, and return its rollouts. Collective.

    folder: for the model's files and the log of a server that is started. It ends when `closing`
    is closed. Raises UserError.
    """
    tokenizer, model = policy.tokenizer, folder / "model"
    process = ServerProcess(
        sampler.serve,
        model.absolute(),
        folder / "server.log",
        HF_DTYPES[policy.dtype],
        policy.longest,
    )
    server = Server(
        policy.needed,
        TRANSFERS[sampler.transfer](),
        None if sampler.url else process,
        sampler.url,
        sampler.timeout,
        sampler.serve.restarts,
        warn,
    )

    def open_server() -> None:
        if not sampler.url:
            policy.write(model)
            print(f"vLLM's server starts; its output: {process.log}", flush=True)
        server.start()

    if mesh.is_main:
        closing.callback(server.close)
    mesh.from_main(open_server)
    return ServerRollouts(mesh, server, mesh.device, tokenizer.pad_id, tokenizer.decode)
