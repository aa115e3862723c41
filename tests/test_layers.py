"""RMSNorm and the dense feed-forward layers against their formulas."""

import torch
from torch.nn import functional as F

from modeling_nanodeepseek.layers import GatedMLP, PlainMLP, RMSNorm, build_mlp
from tests.conftest import assert_close, tiny_config


def test_rms_norm_values_and_gradients():
    norm = RMSNorm(7, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 7, requires_grad=True)
    expected = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    probe = torch.randn(3, 5, 7)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, norm.weight])
    got = torch.autograd.grad((norm(x) * probe).sum(), [x, norm.weight])
    assert_close(expected, norm(x), 1e-6)
    for a, b in zip(wanted, got):
        assert_close(a, b, 1e-5)


def test_rms_norm_backward_leaves_autocast_out():
    """A backward called inside autocast, too: its products would be bf16 otherwise."""
    x, probe = torch.randn(5, 512, requires_grad=True), torch.randn(5, 512)
    norm, gradients = RMSNorm(512), []
    for inside in (False, True):
        loss = (norm(x) * probe).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, [x, norm.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_rms_norm_statistics_are_fp32():
    x = (torch.randn(2, 512) * 300).bfloat16()
    assert_close(RMSNorm(512)(x.float()), RMSNorm(512).bfloat16()(x), 5e-3)
    # 6e4^2 overflows fp16; the norm of a constant vector is ones
    assert_close(torch.ones(1, 512), RMSNorm(512).half()(torch.full((1, 512), 6e4).half()), 1e-3)


def test_rms_norm_rounds_before_the_weight():
    """In training as in evaluation; one rounding less would differ in a quarter of the numbers."""
    norm = RMSNorm(512).bfloat16().train()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(20, 512).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = norm.weight * exact.bfloat16()
    for training in (True, False):
        assert (norm.train(training)(x) == expected).double().mean() > 0.99


def test_rms_norm_without_weight():
    norm = RMSNorm(9, learned=False)
    assert not list(norm.parameters())
    x = torch.randn(4, 9)
    assert_close(F.rms_norm(x, (9,), eps=1e-6), norm(x), 1e-6)


def test_mlps():
    x = torch.randn(5, 40)
    gated = build_mlp(tiny_config(), 24)
    assert type(gated) is GatedMLP
    assert_close(gated.down_proj(F.silu(gated.gate_proj(x)) * gated.up_proj(x)), gated(x), 1e-6)
    plain = build_mlp(tiny_config(gated_mlp=False, hidden_act="relu2"), 24)
    assert type(plain) is PlainMLP
    assert_close(plain.down_proj(plain.up_proj(x).clamp(min=0) ** 2), plain(x), 1e-6)
