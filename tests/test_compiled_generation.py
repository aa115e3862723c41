"""Static caches, and compiled decoding with its number of graphs."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from modeling_nanodeepseek import Fp8LatentCache, LatentCache
from tests.conftest import SPARSE, assert_close, graphs, tiny_model
from tests.generating import KINDS, SETTINGS, by_hand, choose_best, kinds, padded, tokens

ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}  # with experts: to compile takes long enough


@kinds
@torch.no_grad()
def test_a_static_cache_is_used_again(kind):
    model = tiny_model(**KINDS[kind])
    cache = StaticCache(config=model.config, max_cache_len=30)
    for length in (7, 11, 3):
        ids = tokens(2, length, seed=length)
        assert torch.equal(by_hand(model, ids), model.generate(ids, past_key_values=cache, **SETTINGS))
        cache.reset()


@pytest.mark.parametrize("kind", ["mla-expanded", "mla-absorbed", "gqa", "dsa"])
@torch.no_grad()
def test_compiled_with_a_static_cache(kind, fresh_compiler):
    """Prompt and decode step: a graph each for 24 tokens, and for the next text in the same cache."""
    model = tiny_model(**ONE_LAYER, **KINDS[kind])
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(tokens(2, 7), past_key_values=cache)  # it takes its memory at the first update: better outside a graph
    for seed in (1, 2):
        cache.reset()
        ids = tokens(2, 7, seed=seed)
        chosen = choose_best(step(ids, past_key_values=cache).logits[:, -1])
        written = [ids, chosen]
        for _ in range(23):
            chosen = choose_best(step(chosen, past_key_values=cache).logits[:, -1])
            written.append(chosen)
        assert torch.equal(by_hand(model, ids, 24), torch.cat(written, -1))
        assert graphs() == 2


@pytest.mark.parametrize("kind", ["mla", "gqa", "dsa"])
def test_generate_compiles_by_itself(kind, fresh_compiler):
    """As on a GPU, where generate() compiles the decode step by default: one graph, also for the second text."""
    model = tiny_model(**ONE_LAYER, **KINDS[kind])
    compilation = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compilation._compile_all_devices = True
    settings = SETTINGS | {"cache_implementation": "static", "compile_config": compilation, "max_new_tokens": 24}
    for lengths in ((9, 4), (6, 8)):
        ids, mask = padded([tokens(1, n, seed=n)[0] for n in lengths])
        plain = model.generate(ids, attention_mask=mask, **SETTINGS | {"max_new_tokens": 24})
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, **settings))
        assert graphs() == 1


@pytest.mark.parametrize("kind", [LatentCache, Fp8LatentCache])
@pytest.mark.parametrize("attention", [{}, SPARSE | {"sparse_form": "gathered"}], ids=["mla", "dsa"])
@torch.no_grad()
def test_compiled_decoding_with_a_growing_cache(attention, kind, fresh_compiler):
    """A graph for the first length, one for all lengths after it; none per token. (With the form of sparse attention
    left to its cost, one more where that changes.)"""
    model, ids = tiny_model(**ONE_LAYER, **attention), tokens(2, 7)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache, seen = kind(model.config), []
    chosen = choose_best(model(ids, past_key_values=cache).logits[:, -1])
    written = [ids, chosen]
    for _ in range(40):
        chosen = choose_best(step(chosen, past_key_values=cache).logits[:, -1])
        written.append(chosen)
        seen.append(graphs())
    expected = model.generate(ids, past_key_values=kind(model.config), **SETTINGS | {"max_new_tokens": 41})
    assert torch.equal(expected, torch.cat(written, -1))
    assert seen == [1] + [2] * 39


def test_a_compiled_model_under_autocast():
    model, ids = tiny_model(), tokens(1, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        assert_close(model(ids).logits, compiled, 2e-2)
