from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import megatron.core.optimizer as mcore_optimizer
import pytest
import torch

from gipo_megatron import environment
from gipo_megatron.megatron import cpu_compat

on_host = pytest.mark.skipif(
    torch.cuda.is_available(), reason="redirections exist only without CUDA"
)


def test_host_adam_is_adamw() -> None:
    """Against torch's own, in float64, with decay and a parameter that joins late."""
    g = torch.Generator().manual_seed(0)
    mine = [
        torch.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(7, generator=g, dtype=torch.float64).requires_grad_(),
    ]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, reference = cpu_compat.HostAdam(mine, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(6):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert ours.param_groups[0]["step"] == 6
    assert set(ours.state[mine[0]]) == {"exp_avg", "exp_avg_sq"}


def test_host_adam_refuses_what_it_does_not_do() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        cpu_compat.HostAdam([torch.zeros(1)], adam_w_mode=False)
    with pytest.raises(ValueError, match="CUDA graph"):
        cpu_compat.HostAdam([torch.zeros(1)], capturable=True)
    cpu_compat.HostAdam([torch.zeros(1)], capturable=False)  # as mcore 0.19 calls it


@on_host
def test_host_mode_redirects_and_model_mode_leaves_it() -> None:
    with cpu_compat.host_mode():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        with cpu_compat.model_mode():
            assert torch.zeros(2).type() == "torch.FloatTensor"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with cpu_compat.model_mode():  # nothing to leave
        assert torch.zeros(2).type() == "torch.FloatTensor"


@on_host
def test_install_is_idempotent_and_gives_mcore_a_host() -> None:
    cpu_compat.install()
    adam = mcore_optimizer.Adam
    cpu_compat.install()
    assert mcore_optimizer.Adam is adam
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() is None
    assert torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state())


def test_cudnn_attention_is_off() -> None:
    """It plans every exact shape anew. The others stay."""
    cpu_compat.install()
    sdp = torch.backends.cuda
    assert (
        not sdp.cudnn_sdp_enabled()
        and sdp.flash_sdp_enabled()
        and sdp.mem_efficient_sdp_enabled()
        and sdp.math_sdp_enabled()
    )


def test_a_missing_cuda_variable_is_heard() -> None:
    """environment.py sets it; where a user sets another value, mcore's warning is true."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        cpu_compat.silence()
        for name in ("sequence parallelism", "async grad allreduce"):
            warnings.warn(
                f"When using {name} it is recommended to set the environment variable"
                " CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup",
                stacklevel=1,
            )
    assert len(heard) == 2


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What environment.py takes for os.environ. Afterwards torch's switches are as they were."""
    found: dict[str, str] = {}
    monkeypatch.setattr(environment, "os", SimpleNamespace(environ=found))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield found
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@on_host
def test_determinism_changes_nothing_on_the_cpu(variables: dict[str, str]) -> None:
    cpu_compat.make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled() and not variables


def test_determinism_on_cuda(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, not warnings: with warn_only torch's attention keeps its atomic sums. New memory is
    not filled with NaN."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu_compat.make_deterministic()
    assert (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert variables == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "^NVLS",
    }
