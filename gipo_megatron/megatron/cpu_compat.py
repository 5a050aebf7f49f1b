"""Run Megatron-Core on a machine without CUDA, on 0.16.1 to 0.19.2. No other file redirects
torch.cuda. Also torch's own switches.

`install` redirects torch.cuda's functions for the whole process. `host_mode` also rewrites literal
`device="cuda"` arguments. It is held only around schedules, optimizer and checkpoint code, because
it costs time in every torch call (15 % of a small model's forward pass). Both do nothing where CUDA
is available.

Each redirection, a line of megatron/core 0.16.1 that needs it, and the same line in 0.17.1, 0.18.2
and 0.19.2 (-: not there yet):

    redirection              0.16.1                                0.17.1   0.18.2   0.19.2
    current_device           optimizer/optimizer.py:1141             1150     1177     1492
    synchronize              pipeline_parallel/p2p_commun…:398        419      419      419
    manual_seed              tensor_parallel/random.py:422            477      477      490
    get_rng_state            tensor_parallel/random.py:235            290      290      303
    _set_cuda_rng_state      tensor_parallel/random.py:240            295      295      308
    device="cuda"            optimizer/optimizer.py:473               474      501      690
                             pipeline_parallel/schedules.py:596       646      669      749
                             dist_checkpointing/exchange_u…:104       103      103      103
    Tensor.cuda              optimizer/distrib_optimizer.py:1089     1106     1318     1374
    Tensor.type              optimizer/distrib_optimizer.py:361       364      378      401
    Adam, HAVE_APEX_OR_TE    optimizer/distrib_optimizer.py:640       645      791      837
    USING_PYTORCH_OPTIMIZER  optimizer/__init__.py:359                543      556      556
    Adam(capturable=…)       -            optimizer/__init__.py:      538      551      551
    current_stream           -      distributed/param_and_gra…:         -        -      632

All are still needed. 0.19 renamed one method (optimizer._counted). From 0.18 on Megatron-Core also
imports triton, which must then be installed (0.18.2 transformer/moe/paged_stash.py:8, 0.19.2
transformer/moe/ops/paged_stash.py:4). 0.19 stores its own settings as a pickle in the index of
tensors (common_state) in place of common.pt: megatron/stored.py reads both as data alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from gipo_megatron import environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optional accelerator packages that are not there
    import megatron.core.optimizer as mcore_optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    import megatron.core.tensor_parallel.random as mcore_random

# Warnings of torch and mcore about each other's calls, which a user cannot change. Each is matched
# by its text, so that other warnings stay visible.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        FutureWarning,
    ),
    # torch.distributed.checkpoint's
    (r"`load_state_dict` is deprecated and will be removed in future versions", FutureWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # mcore 0.19: imports of its optimizer, and its calls of torch.distributed.checkpoint
    (r"\w+ is experimental and still under active development", UserWarning),
    (r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning),
    (r"The argument order of load has been changed", UserWarning),
)

_installed = False


def silence() -> None:
    """Ignore the known warnings, until warnings.catch_warnings restores the filters."""
    for message, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)


def install() -> None:
    """Make the redirections of the whole process, once. HostAdam replaces Megatron's Adam where
    neither Transformer Engine nor apex is installed."""
    global _installed
    if _installed:
        return
    _installed = True
    silence()
    # cuDNN's attention needs a new plan for every shape, 50 ms or more each. torch 2.11 prefers it
    # on Hopper, and the shapes of our batches differ.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = distrib_optimizer.Adam = HostAdam
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    if torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: None  # mcore 0.19's DDP calls it
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": (
        torch.default_generator.get_state()
    )
    mcore_random._set_cuda_rng_state = _set_host_rng_state


def make_deterministic() -> None:
    """Use only deterministic algorithms from here on. Call it before CUDA is used; without CUDA it
    changes nothing.

    Not `warn_only`: torch's flash and memory-efficient attention take their deterministic backward
    pass only where any other operation would be an error. The float cumsum of sampling has a
    deterministic kernel (pytorch pull request 140887).
    """
    if not torch.cuda.is_available():
        return
    environment.set_deterministic()
    torch.use_deterministic_algorithms(True)
    # In this mode torch also fills new memory with NaN, to expose reads of it: one more pass over
    # all that is allocated.
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False


def _set_host_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


class _HostMode(TorchFunctionMode):
    """Treat `device="cuda"` as the CPU and `.cuda()` as no change, and give host tensors the type
    names that mcore's optimizers test."""

    def __torch_function__(
        self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@contextmanager
def host_mode() -> Iterator[None]:
    """Hold around mcore's schedules, optimizer construction and step, sharded_state_dict and
    checkpoint load. The known warnings are ignored, for any filters of the caller."""
    with warnings.catch_warnings():
        silence()
        with nullcontext() if torch.cuda.is_available() else _HostMode():
            yield


@contextmanager
def model_mode() -> Iterator[None]:
    """Leave host_mode for a model's forward pass, which needs no redirection."""
    if isinstance(_get_current_function_mode(), _HostMode):
        with _pop_mode_temporarily():
            yield
    else:
        yield


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without memory for their parameters: on the meta device."""
    meta = torch.device("meta")
    with meta, patch.object(torch.cuda, "current_device", lambda: meta):
        yield


class HostAdam(torch.optim.Optimizer):
    """AdamW with the state layout of the fused Adams: the step count in the parameter group,
    exp_avg and exp_avg_sq per parameter.

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²
        p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    mcore's distributed optimizer saves and loads all of this layout; of torch's AdamW it loses the
    step tensor of each parameter.
    """

    # torch's, without the wrapper around each, which imports the compiler: as long as torch itself
    add_param_group, zero_grad, state_dict, load_state_dict = (
        getattr(torch.optim.Optimizer, name).__wrapped__
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,  # passed by mcore from 0.17 on
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "HostAdam only decays weights decoupled from the gradient (adam_w_mode=True)"
            )
        if capturable:
            raise ValueError(
                "HostAdam counts its steps on the host: it cannot be part of a CUDA graph"
                " (capturable=False)"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with model_mode():
            for group in self.param_groups:
                group["step"] = int(group["step"]) + 1 if "step" in group else 1
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        step = torch.tensor(float(group["step"]), device=params[0].device)
        beta1, beta2 = group["betas"]
        # one kernel: 28 bytes of memory traffic per parameter, where an operation for each term
        # takes 72, and no temporaries. It reads the step count and does not change it.
        torch._fused_adamw_(
            params,
            grads,
            first,
            second,
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
