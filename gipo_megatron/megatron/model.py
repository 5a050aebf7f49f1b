"""Megatron's GPTModel for Llama-like decoders, built for this rank's place in the mesh. The weights
do not depend on the place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import cpu_compat, fusions
from gipo_megatron.megatron import precision as number_formats
from gipo_megatron.megatron.adapters import adapt
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.heads import LanguageHead, ScalarHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import ADAPTER, EMBEDDING, OUTPUT, SCORE, placements
from gipo_megatron.specs import AdapterSpec, Architecture, Parallel, Precision, split_problems
from gipo_megatron.weights.base import random_base

INIT_STD = 0.02
VOCAB_MULTIPLE = 64
HEADS = ("value", "score")
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def build_chunks(
    architecture: Architecture,
    mesh: Mesh,
    precision: Precision,
    *,
    recompute: str = "none",
    head: str | None = None,
    adapter: AdapterSpec = AdapterSpec(),
    base: Base | None = None,
    seed: int = 0,
    initialise: bool = True,
) -> list[GPTModel]:
    """Build this rank's model chunks, one per virtual pipeline stage. `head` is None (language
    model), "value" or "score".

    Without `initialise` only a head and adapters are; a load of the other weights follows. On the
    last stage a chunk returns hidden states [b, s, H] in the model's dtype, for
    `outputs.token_stats`, or the head's [b, s, 1] in fp32. Raises UserError for an architecture
    that cannot be split over the mesh or is not supported. On a `base` the weights are its
    parameters, which it keeps frozen.
    """
    assert head is None or head in HEADS, head
    check_split(architecture, mesh.parallel)
    config = transformer_config(architecture, mesh.parallel, precision, recompute)
    config.init_model_with_meta_device = base is not None  # for Transformer Engine's layers
    with cpu_compat.host_mode():
        chunks = [
            _chunk(architecture, mesh, config, head, adapter, base, stage)
            for stage in range(mesh.parallel.virtual_pipeline)
        ]
    names = {
        place.name for chunk in chunks for place, _ in placements(chunk, architecture.vocab_size)
    }
    if not initialise:
        names = {name for name in names if name == SCORE or ADAPTER in name}
    filled = base.filled if base is not None else set[str]()
    initialise_weights(chunks, architecture, mesh, seed, only=names - filled)
    if base is not None and initialise:
        base.fill(random_base(seed))
    return chunks


def check_split(architecture: Architecture, parallel: Parallel) -> None:
    """Raises UserError for a size that does not divide, or a RoPE scaling that is not built."""
    for error in split_problems(architecture, parallel):
        raise error
    rope_frequencies(architecture)


def padded_vocab(architecture: Architecture, tensor: int) -> int:
    """Return the rows of the embedding: the vocabulary rounded up, equal for all ranks and for all
    tensor sizes that divide 64."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor)
    return math.ceil(architecture.vocab_size / multiple) * multiple


def transformer_config(
    architecture: Architecture, parallel: Parallel, precision: Precision, recompute: str = "none"
) -> TransformerConfig:
    """Return mcore's configuration. Raises UserError for an unknown recompute, and as
    `precision.check`."""
    number_formats.check(precision)
    number_formats.check_widths(precision, architecture, parallel)
    if recompute not in RECOMPUTE:
        raise UserError(
            f"unknown recompute {recompute!r}",
            where="recompute",
            fix=f"one of {', '.join(RECOMPUTE)}",
        )
    cuda, stages = torch.cuda.is_available(), parallel.virtual_pipeline
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=stages if stages > 1 else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        moe_token_dispatcher_type="alltoall",  # mcore needs it for variable lengths
        calculate_per_token_loss=True,
        perform_initialization=False,  # see initialise_weights
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=fusions.weight_gradients_fused(),
        apply_rope_fusion=_engine_layers(precision.dtype == "bf16"),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=False,
        cuda_graph_scope=[],  # mcore warns of its own default
        **number_formats.config_fields(precision),
        **RECOMPUTE[recompute],
    )


def _chunk(
    architecture: Architecture,
    mesh: Mesh,
    config: TransformerConfig,
    head: str | None,
    adapter: AdapterSpec,
    base: Base | None,
    stage: int,
) -> GPTModel:
    virtual = stage if mesh.parallel.virtual_pipeline > 1 else None
    frequencies = rope_frequencies(architecture)
    tied = architecture.tied_embeddings and head is None
    with cpu_compat.on_meta() if base is not None else nullcontext():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, virtual, frequencies),
            vocab_size=padded_vocab(architecture, mesh.tensor_size),
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=virtual
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=virtual
            ),
            parallel_output=True,
            # mcore sums the two copies of a tied weight, which have no memory on the meta device
            share_embeddings_and_output_weights=tied and (base is None or mesh.pipeline_size == 1),
            position_embedding_type="rope" if config.apply_rope_fusion else "none",
            rotary_base=architecture.rope_base,
            vp_stage=virtual,
        )
    model.share_embeddings_and_output_weights = tied
    if config.apply_rope_fusion:
        model.rotary_pos_emb.inv_freq = frequencies.to(mesh.device)
    if model.post_process and head is None:
        LanguageHead.replace(model)
    elif model.post_process:
        model.output_layer = ScalarHead(config, mesh.device)
    if base is not None:
        base.adopt(model, architecture.vocab_size, mesh)
    if adapter.rank:
        adapt(model, adapter, architecture, mesh)
    return model.to(mesh.device)


def _engine_layers(bf16: bool) -> bool:
    """Check that layers are Transformer Engine's: in bf16, where it can be used. It multiplies fp32
    matrices in TF32, with 10 bits."""
    return bf16 and number_formats.transformer_engine_usable()


def _block_spec(
    config: TransformerConfig, virtual: int | None, frequencies: Tensor
) -> TransformerBlockSubmodules:
    """Return Transformer Engine's layers, with its RoPE, or the local ones, with RoPE of
    `frequencies`."""
    if _engine_layers(config.bf16):
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        layer, norm = _local_layer(config, frequencies), RMSNorm
    count = get_num_layers_to_build(config, vp_stage=virtual)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _local_layer(config: TransformerConfig, frequencies: Tensor) -> ModuleSpec:
    """Return mcore's own layer with the norm and the attention below. All layers share the cosines
    of one rotation."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(
        module=CausalAttention, params={"rotation": fusions.Rotation(frequencies)}
    )
    if config.qk_layernorm:
        norm = ModuleSpec(module=RMSNorm, params={"shard": False})
        attention.q_layernorm = attention.k_layernorm = norm
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · w over the last dimension. Unlike mcore's own it works on a shard
    of the sequence."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, shard: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel and shard  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CausalAttention(nn.Module):
    """RoPE and core attention by torch's scaled_dot_product_attention. Sequences are right-padded,
    so the causal mask is enough."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
        *,
        rotation: fusions.Rotation,
    ) -> None:
        super().__init__()
        self.softmax_scale, self.rotation = softmax_scale, rotation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads · d]"""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None, (
            "causal attention only"
        )
        query, key = self.rotation(query, key)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def rope_frequencies(architecture: Architecture) -> Tensor:
    """Return the inverse wavelengths of RoPE, fp32 [head_dim / 2]: base^(-2i / d), scaled by the
    `rope_scaling` block of Hugging Face.

    linear: f / factor. llama3: long waves f / factor, short waves f, in between a linear blend in
    (old length / wavelength). Raises UserError for any other rope_type.
    """
    d, scaling = architecture.head_dim, architecture.rope_scaling
    f = 1.0 / (architecture.rope_base ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))
    if scaling is None:
        return f
    kind = scaling["rope_type"] if "rope_type" in scaling else scaling["type"]
    if kind == "default":
        return f
    if kind == "linear":
        return f / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # wavelengths in the old context
        waves = scaling["original_max_position_embeddings"] / (2 * math.pi / f)
        blend = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * f / scaling["factor"] + blend * f
    raise UserError(
        f"RoPE scaling {kind!r} is not supported",
        where="rope_scaling",
        fix="use a model with rope_type default, linear or llama3",
    )


@torch.no_grad()
def initialise_weights(
    chunks: list[GPTModel],
    architecture: Architecture,
    mesh: Mesh,
    seed: int,
    only: Collection[str] | None = None,
) -> None:
    """Draw weights ~ normal(0, 0.02), in layers that write to the residual stream normal(0, 0.02 /
    sqrt(2 L)); norms are 1, biases 0. Adapters, as PEFT's: A ~ uniform(-1, 1) / sqrt(in), B is 0.

    only: names of whole tensors, where others stay as they are.

    Each whole tensor is drawn from a generator keyed by (seed, its name in the whole model) and
    then cut, so every layout starts from the same weights.
    """
    for chunk in chunks:
        for place, parameter in placements(chunk, architecture.vocab_size):
            name = place.name
            if only is not None and name not in only:
                continue
            if name.endswith("layernorm.weight"):
                parameter.fill_(1.0)
            elif name.endswith((".bias", f"{ADAPTER}b")):
                parameter.zero_()
            else:
                shape = place.full_shape(parameter, mesh.tensor_size)
                generator = generator_for(seed, name)
                if ADAPTER in name:
                    full = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
                else:
                    full = torch.randn(shape, generator=generator) * _init_std(name, architecture)
                parameter.copy_(place.take(full, mesh.tensor_rank, parameter, mesh.tensor_size))


def _init_std(name: str, architecture: Architecture) -> float:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return INIT_STD / math.sqrt(2 * architecture.num_layers)
    known = name in (EMBEDDING, OUTPUT, SCORE)
    assert known or name.endswith(("linear_qkv.weight", "linear_fc1.weight")), name
    return INIT_STD


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a generator on the host that depends only on (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
