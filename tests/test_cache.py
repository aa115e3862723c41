"""LatentCache: what it holds, how it grows, and the operations generation needs of it."""

import pytest
import torch

from modeling_nanodeepseek import LatentCache
from modeling_nanodeepseek.cache import GROWTH, RESERVE, GrowingLayer
from tests.conftest import assert_close, tiny_config, tiny_model, tokens


def filled(model, ids):
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_it_holds_the_latents_and_nothing_more():
    model = tiny_model()
    cache = filled(model, tokens(2, 31))
    assert cache.nbytes() == 2 * 31 * 3 * (22 + 6) * 4
    assert all(layer.keys.shape == (2, 1, 31, 28) and layer.values.numel() == 0 for layer in cache.layers)
    assert cache.get_seq_length() == 31
    half = filled(model.to(torch.bfloat16), tokens(2, 31))
    assert half.nbytes() == cache.nbytes() // 2


def test_generate_and_forward_build_it():
    model = tiny_model()
    output = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(output.past_key_values) is LatentCache
    assert output.past_key_values.get_seq_length() == 8  # the last token is never fed
    assert type(model(tokens(), use_cache=True).past_key_values) is LatentCache
    assert model(tokens(), use_cache=False).past_key_values is None
    static = model.generate(
        tokens(2, 5), max_new_tokens=4, do_sample=False, cache_implementation="static", return_dict_in_generate=True
    )
    assert torch.equal(static.sequences, output.sequences)


@torch.no_grad()
def test_growth_copies_rarely_and_reserves_little():
    layer, copied, reserves = GrowingLayer(), 0, 0
    previous = None
    for token in range(3000):
        layer.update(torch.full((1, 1, 1, 5), float(token)), torch.empty(1, 1, 1, 0))
        if layer._buffers[0] is not previous:
            previous, reserves = layer._buffers[0], reserves + 1
            copied += token
    assert torch.equal(layer.keys[0, 0, :, 0], torch.arange(3000.0))
    assert copied <= 3000 / (GROWTH - 1) + 3000 and reserves < 30
    assert layer.reserved_nbytes() <= layer.nbytes() * GROWTH + RESERVE * 5 * 4


@torch.no_grad()
def test_updates_write_in_place():
    layer = GrowingLayer()
    layer.update(torch.randn(2, 1, 10, 5), torch.empty(2, 1, 10, 0))
    address = layer.keys.data_ptr()
    for _ in range(RESERVE):
        layer.update(torch.randn(2, 1, 1, 5), torch.empty(2, 1, 1, 0))
    assert layer.keys.data_ptr() == address and layer.keys.shape == (2, 1, 10 + RESERVE, 5)


OPERATIONS = {
    "crop": (lambda cache: cache.crop(-4), lambda ids: ids[:, :-4]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda ids: ids[[2, 0, 0]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), lambda ids: ids[[2, 1]]),
}


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_then_continue(operation, form):
    """After the operation, continuing must equal a fresh full forward; the original rows must be untouched by it."""
    model = tiny_model(attention_form=form)
    ids, more = tokens(3, 12), tokens(6, 5, seed=9)
    cache = filled(model, ids)
    act, same = OPERATIONS[operation]
    act(cache)
    kept = same(ids)
    full = torch.cat((kept, more[: len(kept)]), -1)
    with torch.no_grad():
        expected = model(full).logits[:, kept.shape[1] :]
        parts = [model(more[: len(kept), i : i + 1], past_key_values=cache).logits for i in range(5)]
    assert_close(expected, torch.cat(parts, 1), 1e-5)


def test_reset_starts_over():
    model, ids = tiny_model(), tokens(2, 9)
    cache = filled(model, tokens(2, 14, seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, past_key_values=cache).logits)


@pytest.mark.parametrize("frozen", [(), ("kv_a",)])
def test_gradients_flow_through_a_cache(frozen):
    """Chunks with gradients equal one pass: nothing that autograd saved may be written over, trainable or not."""
    model, ids = tiny_model(), tokens(2, 12)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    probe = torch.randn(2, 12, 97)
    (model(ids).logits * probe).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    cache = LatentCache(model.config)
    logits = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 6], dim=1)]
    (torch.cat(logits, 1) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(expected[name], parameter.grad, 1e-4, name)


def test_inference_mode_then_continue():
    model, ids = tiny_model(), tokens(2, 9)
    with torch.inference_mode():
        cache = filled(model, ids[:, :5])
        rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
        assert_close(model(ids).logits[:, 5:], torch.cat(rest, 1), 1e-5)


@torch.no_grad()
def test_docstring_figure():
    """V3: 576 numbers per token and layer; 1000 tokens in 61 layers of bf16."""
    config = tiny_config(num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config)
    latent = torch.zeros(1, 1, 1000, 576, dtype=torch.bfloat16)
    for layer in range(61):
        cache.update(latent, latent[..., :0], layer)
    assert cache.nbytes() == 70_272_000
