from __future__ import annotations

import megatron.core.optimizer as mcore_optimizer
import pytest
import torch

from gipo_megatron.megatron import host

on_host = pytest.mark.skipif(torch.cuda.is_available(), reason="redirections exist only without CUDA")


def test_host_adam_is_adamw() -> None:
    """Against torch's own, in float64, with decay and a parameter that joins late."""
    g = torch.Generator().manual_seed(0)
    mine = [
        torch.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(7, generator=g, dtype=torch.float64).requires_grad_(),
    ]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, reference = host.HostAdam(mine, **settings), torch.optim.AdamW(theirs, **settings)
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


def test_host_adam_refuses_coupled_decay() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        host.HostAdam([torch.zeros(1)], adam_w_mode=False)


@on_host
def test_host_mode_redirects_and_model_mode_leaves_it() -> None:
    with host.host_mode():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        with host.model_mode():
            assert torch.zeros(2).type() == "torch.FloatTensor"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with host.model_mode():  # nothing to leave
        assert torch.zeros(2).type() == "torch.FloatTensor"


@on_host
def test_install_is_idempotent_and_gives_mcore_a_host() -> None:
    host.install()
    adam = mcore_optimizer.Adam
    host.install()
    assert mcore_optimizer.Adam is adam
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    assert torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state())
