"""Adapters on the tiny model of tools/gpu/tiny.py in plain torch: y + factor · B A x by a hook
on each layer, with PEFT's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gipo_megatron.specs import AdapterSpec
from tools.gpu.tiny import generator, hf_model

SPEC = AdapterSpec(rank=3, alpha=6.0)
FACTOR = 2.0  # 6 / 3


def adapter_tensors(spec: AdapterSpec = SPEC) -> dict[str, Tensor]:
    """Return lora_A and lora_B of every target, B not 0: so that all gradients count."""
    g, found = generator(5), {}
    for name, module in hf_model().named_modules():
        if name.endswith("_proj"):
            assert isinstance(module, nn.Linear)
            inputs, outputs = module.in_features, module.out_features
            for letter, shape in (("A", (spec.rank, inputs)), ("B", (outputs, spec.rank))):
                tensor = 0.2 * torch.randn(shape, generator=g)
                if name.split(".")[-1] in spec.targets:
                    found[f"{name}.lora_{letter}.weight"] = tensor
    return found


def hf_adapted() -> LlamaForCausalLM:
    """`tiny.hf_model`, frozen, with the adapters of SPEC."""
    model = hf_model().requires_grad_(False)
    for name, tensor in adapter_tensors().items():
        path, kind, _ = name.rsplit(".", 2)
        layer = model.get_submodule(path)
        added = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        added.weight = nn.Parameter(tensor)
        layer.add_module(kind, added)
        if kind == "lora_B":
            layer.register_forward_hook(_add)
    return model


def _add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + FACTOR * layer.lora_B(layer.lora_A(inputs[0]))
