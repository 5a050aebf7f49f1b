"""One copy of a frozen model's weights for all roles of a process: each role has its own modules,
adapters and head, and the modules of all roles hold the same parameters.

So a role is never switched on or off: mcore's configuration, hooks, gradient buffers and FP8 state
are the role's own, as without adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import SCORE, placements
from gipo_megatron.weights.base import BaseMeta


@dataclass
class Base:
    """Parameters of this rank by the names of the whole tensors; the roles that are built on it add
    what they need: a critic's has no output layer.

    filled: names of those with values; the others are new, and wait for a load. meta: the model's
    identity, once it is loaded.
    """

    held: dict[str, nn.Parameter] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    meta: BaseMeta | None = None

    def adopt(self, model: GPTModel, vocab_size: int, mesh: Mesh) -> None:
        """Put the parameters held here in the place of the model's own, which may be on the meta
        device. A scalar head stays the model's."""
        names = {id(parameter): place.name for place, parameter in placements(model, vocab_size)}
        for path, own in list(model.named_parameters()):
            name = names[id(own)]
            if name == SCORE:
                continue
            if name not in self.held:
                empty = torch.empty_like(own, device=mesh.device)
                self.held[name] = nn.Parameter(empty, requires_grad=False)
                vars(self.held[name]).update(vars(own))  # mcore's marks
            module, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(module), attribute, self.held[name])

    def fill(self, meta: BaseMeta) -> None:
        """Note that all parameters have the values of this model now."""
        self.filled |= self.held.keys()
        self.meta = meta
