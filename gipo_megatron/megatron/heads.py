"""Heads on the trunk: a language model's, one number per token (value, reward) in its place, and
the group head beside the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from gipo_megatron.megatron.cpu_compat import HostAdam
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import SCORE, unwrap
from gipo_megatron.specs import HeadSpec, width_scaled
from gipo_megatron.types import Sequences

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of HostAdam


class LanguageHead(ColumnParallelLinear):
    """The output layer of a language model. It multiplies nothing and hands on the hidden states:
    `outputs.token_stats` multiplies those that it reads.

    Under sequence parallelism the shards of the positions are gathered. Each rank then gets the
    whole gradient, and takes its shard.
    """

    @classmethod
    def replace(cls, model: GPTModel) -> None:
        """Make the output layer that mcore has built a LanguageHead. Its weight, which may be the
        embedding's, and its names in checkpoints stay."""
        assert type(model.output_layer) is ColumnParallelLinear
        model.output_layer.__class__ = cls

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """[s, b, H] (this rank's shard of s under sequence parallel) -> [s, b, H], whole"""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden, None


def output_weight(chunk: nn.Module) -> nn.Parameter:
    """Return the weight [V' / tensor, H] of a last stage's LanguageHead: where it is tied and the
    stage has the embedding, the embedding's."""
    model = unwrap(chunk)
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def all_logits(chunk: nn.Module, hidden: Tensor) -> Tensor:
    """Return this tensor rank's logits [b, s, V' / tensor] of all positions, from the output
    [b, s, H] of a last stage's `chunk`. For comparisons of models: training and scoring read
    masked positions only."""
    return F.linear(hidden, output_weight(chunk))


class ScalarHead(nn.Module):
    """w · h at every position, in fp32: a critic's value or a reward model's score. It takes the
    place of GPTModel.output_layer.

    The weight [1, H] has the model's dtype (mcore's optimizer keeps the fp32 copy) and is
    replicated over the tensor group. Under sequence parallelism each rank reads its shard and the
    outputs are gathered, so the weight's gradient is summed over the group.
    """

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.hidden: Tensor | None = None

    def forward(
        self, hidden: Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """[s, b, H] (this rank's shard of s under sequence parallel) -> [s, b, 1]"""
        self.hidden = hidden
        out = F.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
        return out, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        # the name differs from the output layer's, so that neither is loaded as the other
        stored = make_sharded_tensors_for_checkpoint(
            {SCORE: self.state_dict(keep_vars=True)["weight"]}, "", {}, sharded_offsets
        )
        return {f"{prefix}weight": stored[SCORE]}


def take_hidden(chunk: nn.Module) -> Tensor:
    """Return, once, the hidden states [s, b, H] that the scalar head of `chunk` has just read,
    still in the graph."""
    head = unwrap(chunk).output_layer
    assert isinstance(head, ScalarHead) and head.hidden is not None, "no forward pass before this"
    hidden, head.hidden = head.hidden, None
    return hidden


def hidden_at(hidden: Tensor, sequences: Sequences, position: str, mesh: Mesh) -> Tensor:
    """Return the hidden state of the last prompt token (position "prompt") or of the last token.

    [s, b, H] (a shard of s under sequence parallel) -> [b, H]
    """
    lengths = sequences.prompt_lengths if position == "prompt" else sequences.lengths
    index = lengths.to(hidden.device) - 1
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    if not mesh.parallel.sequence:
        return hidden[index, rows]
    size = hidden.shape[0]
    local = index - mesh.tensor_rank * size
    inside = (local >= 0) & (local < size)
    picked = hidden[local.clamp(0, size - 1), rows] * inside[:, None].to(hidden.dtype)
    # sum forward, identity backward: one rank has the token
    return reduce_from_tensor_model_parallel_region(picked)


class GroupHead:
    """Group logits from the critic's trunk: W h + b in fp32, W [M, H], at one token of each
    sequence.

    The head is on the last stage, outside the model and mcore's optimizer, with its own Adam (0.9,
    0.999), gradient sum and clip (norm 1). So a head that only observes (`detach_trunk`) changes
    nothing else, bit for bit. On other stages all methods do nothing. W ~ normal(0, init_std),
    width-scaled (algorithm.md 5.4), b = 0.
    """

    clip = 1.0

    def __init__(self, spec: HeadSpec, hidden_size: int, mesh: Mesh, seed: int) -> None:
        self.spec, self.mesh = spec, mesh
        if spec.input not in ("prompt", "trajectory"):
            raise ValueError(f"input of a group head is prompt or trajectory, not {spec.input!r}")
        generator = torch.Generator().manual_seed(seed)
        lr, init_std = width_scaled(spec.lr, spec.init_std, hidden_size)
        weight = torch.randn(spec.num_groups, hidden_size, generator=generator) * init_std
        self.weight = nn.Parameter(weight.to(mesh.device))
        self.bias = nn.Parameter(torch.zeros(spec.num_groups, device=mesh.device))
        self.optimizer = HostAdam([self.weight, self.bias], lr=lr, betas=(0.9, 0.999))

    def features(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """Return the hidden states that the head reads, [b, H]; see `hidden_at`."""
        if self.spec.detach_trunk:
            hidden = hidden.detach()
        return hidden_at(hidden, sequences, self.spec.input, self.mesh)

    def logits(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """[b, M], fp32"""
        return F.linear(self.features(hidden, sequences).float(), self.weight, self.bias)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def reduce_gradients(self) -> float:
        """Sum the gradients over the replicas and return their norm (0 on other stages, and before
        any backward pass)."""
        if not self.mesh.is_last_stage:
            return 0.0
        sums = []
        for p in self.parameters():
            p.grad = self.mesh.data_parallel.sum(torch.zeros_like(p) if p.grad is None else p.grad)
            sums.append(p.grad.flatten())
        return float(torch.linalg.vector_norm(torch.cat(sums)))

    def step(self, norm: float) -> None:
        """Take one Adam step on the gradients of `reduce_gradients`, whose norm is `norm`, clipped
        to norm 1; then clear them."""
        if not self.mesh.is_last_stage:
            return
        if norm > self.clip:
            for p in self.parameters():
                assert p.grad is not None
                p.grad.mul_(self.clip / (norm + 1e-6))
        self.optimizer.step()
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors on the host and the step count; only the last stage's are valid."""
        state: dict[str, Any] = {"step": self.optimizer.param_groups[0].get("step", 0)}
        for name, p in (("weight", self.weight), ("bias", self.bias)):
            moments = self.optimizer.state[p] or dict.fromkeys(_MOMENTS, torch.zeros_like(p))
            state[name] = p.detach().cpu().clone()
            for key, value in moments.items():
                state[f"{name}.{key}"] = value.detach().cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.param_groups[0]["step"] = int(state["step"])
        for name, p in (("weight", self.weight), ("bias", self.bias)):
            p.copy_(state[name])
            self.optimizer.state[p] = {
                key: state[f"{name}.{key}"].to(p.device, torch.float32, copy=True)
                for key in _MOMENTS
            }

    def sharded_state(self, prefix: str = "group_head.") -> dict[str, Any]:
        """Return `state_dict` for dist_checkpointing: the last stage writes it, and every stage
        reads it, at any layout. `load_sharded_state` takes the loaded dictionary.
        """
        stage = self.mesh.pipeline_size - 1 - self.mesh.pipeline_rank  # replica 0: the last one
        replica = (stage, self.mesh.tensor_rank, self.mesh.data_parallel.rank)
        state = self.state_dict()
        state["step"] = torch.tensor([state["step"]])
        return {
            prefix + k: ShardedTensor.from_rank_offsets(prefix + k, v, replica_id=replica)
            for k, v in state.items()
        }

    def load_sharded_state(self, state: dict[str, Any], prefix: str = "group_head.") -> None:
        if self.mesh.is_last_stage:
            self.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})

    def broadcast(self) -> None:
        """Copy the last stage's weights to every stage, so that each rank can save the head."""
        for p in self.parameters():
            if self.mesh.pipeline_size > 1:
                dist.broadcast(
                    p.data, src=self.mesh.last_stage_rank, group=self.mesh.pipeline_group
                )
