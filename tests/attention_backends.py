"""Attention backends on a machine that cannot run them: flex without its compiler, flash by a transcription."""

import sys
from types import ModuleType

import pytest
import torch
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as flex_integration

BACKENDS = ["eager", "sdpa", "flex_attention", "flash_attention_3"]


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    """FlashAttention's contract: [B, T, H, D] with one D <= 256 for all, key heads that divide H, causal from the end.

    -> [B, T, H, D]. Query t of T sees the keys up to S - T + t.
    """
    (B, T, H, D), (_, S, Hkv, _) = q.shape, k.shape
    assert k.shape == v.shape == (B, S, Hkv, D) and D <= 256 and H % Hkv == 0, (q.shape, k.shape, v.shape)
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "kernels read rows"
    k, v = (x.repeat_interleave(H // Hkv, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if causal:
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """The same for sequences laid end to end, [N, H, D], cut at `cu_seqlens`."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    assert int(max_seqlen_q) == cu_seqlens_q.diff().max() and int(max_seqlen_k) == cu_seqlens_k.diff().max()
    pieces = (x.split(cu.diff().tolist()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k)))
    return torch.cat([flash_attn_func(*(x[None] for x in qkv), softmax_scale, causal)[0] for qkv in zip(*pieces)])


@pytest.fixture
def portable_backends(monkeypatch):
    """Flex by its reference, which has gradients on a CPU, and a package in place of FlashAttention 3."""
    module = sys.modules["torch.nn.attention.flex_attention"]
    reference, create_block_mask = module.flex_attention, module.create_block_mask
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(
        flex_integration, "compile_friendly_flex_attention", lambda *qkv, training, **k: reference(*qkv, **k)
    )
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *a, _compile, **k: create_block_mask(*a, _compile=False, **k)
    )
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


def use_backend(model, backend: str):
    """As `set_attn_implementation`, which would ask for the package and a GPU."""
    model.config._attn_implementation = backend
    return model
