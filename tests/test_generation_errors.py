"""Masks, caches and lengths that cannot be right: one error each, before anything is written."""

import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache

from modeling_nanodeepseek import LatentCache
from tests.conftest import SPARSE, assert_close, tiny_model
from tests.generating import GQA, KINDS, SETTINGS, a_cache, by_hand, kinds, tokens


def wrong_masks() -> dict:
    """For a batch of 2 with 5 tokens after 7 cached ones, in a model of 3 heads."""
    return {
        "short": (torch.ones(2, 11), r"\[2, 11\].*\(7 of them cached\).*\[2, 12\]"),
        "news alone": (torch.ones(2, 5), r"\[2, 5\].*\[2, 12\]"),
        "long": (torch.ones(2, 13), r"\[2, 13\].*\[2, 12\]"),
        "another batch": (torch.ones(1, 12), r"\[1, 12\].*\[2, 12\]"),
        "one dim": (torch.ones(12), r"1 dims, \[12\]: .* 2 or 4"),
        "three dims": (torch.ones(2, 5, 12, dtype=torch.bool), r"3 dims, \[2, 5, 12\]"),
        "keys": (torch.ones(2, 1, 5, 5, dtype=torch.bool), r"\[2, 1, 5, 5\].*\[2 or 1, 3 or 1, 5, 12\]"),
        "queries": (torch.ones(2, 1, 12, 12, dtype=torch.bool), r"\[2, 1, 12, 12\]"),
        "heads": (torch.ones(2, 2, 5, 12, dtype=torch.bool), r"\[2, 2, 5, 12\]"),
        "4-D batch": (torch.ones(3, 1, 5, 12, dtype=torch.bool), r"\[3, 1, 5, 12\]"),
        "integers": (torch.ones(2, 1, 5, 12, dtype=torch.long), r"4-D and of torch.int64.*boolean.*floating"),
    }


@pytest.mark.parametrize("case", wrong_masks())
@pytest.mark.parametrize("cached", ["latent", "fp8", "transformers"])
@torch.no_grad()
def test_wrong_masks(cached, case):
    model, (mask, message) = tiny_model(), wrong_masks()[case]
    cache = a_cache(cached, model)
    model(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 5), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 7  # refused before anything was written


@torch.no_grad()
def test_masks_of_a_static_cache():
    """As long as the tokens so far or as the cache; 4-D as wide as the cache."""
    model, ids = tiny_model(), tokens(2, 12)
    expected = model(ids).logits[:, 7:]
    visible = torch.ones(5, 20, dtype=torch.bool).tril(7)[None, None]
    for mask in (torch.ones(2, 12), F.pad(torch.ones(2, 12), (0, 8)), visible):
        cache = StaticCache(config=model.config, max_cache_len=20)
        model(ids[:, :7], past_key_values=cache)
        assert_close(expected, model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits, 1e-5)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match=r"\[2, 11\].*\[2, 12\]"):
        model(ids[:, 7:], attention_mask=torch.ones(2, 11), past_key_values=cache)
    with pytest.raises(ValueError, match=r"\[1, 1, 5, 12\].*5, 20\]"):
        model(ids[:, 7:], attention_mask=visible[..., :12], past_key_values=cache)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_hidden_layers": 2}, r"2 layers, .* num_hidden_layers=3"),
        ({"kv_lora_rank": 24}, r"1 x 30 numbers .* 1 x 28"),
        ({"attention_type": "gqa", "head_dim": 28, "num_key_value_heads": 3}, r"3 x 28 numbers .* 1 x 28"),
    ],
)
@pytest.mark.parametrize("cached", ["latent", "transformers", "static"])
@torch.no_grad()
def test_caches_of_other_models(cached, other, message):
    other = tiny_model(**other)
    cache = a_cache(cached, other)
    other(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=f"another model's: .*{message}"):
        tiny_model()(tokens(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=f"another model's: .*{message}"):
        tiny_model().generate(tokens(2, 9), past_key_values=cache, **SETTINGS)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ({"dsa_stage": "dense"}, {}, "holds no keys of the indexer: .* in dsa_stage='dense'"),
        ({"index_topk": None}, {}, "holds no keys of the indexer: .* by a model without one"),
        ({}, {"dsa_stage": "dense"}, "holds keys of an indexer: .* not in dsa_stage='dense'"),
        ({}, {"index_topk": None}, "holds keys of an indexer: it was filled by a model with one"),
        ({"index_head_dim": 12}, {}, "is another model's: its keys of the indexer hold 12 numbers, not 10"),
    ],
)
@pytest.mark.parametrize("cached", ["latent", "fp8", "transformers", "static"])
@torch.no_grad()
def test_caches_of_other_stages(cached, before, after, message):
    """Also where all of its tokens were cropped off: the memory it keeps is of the other width."""
    before, after = tiny_model(**SPARSE | before), tiny_model(**SPARSE | after)
    cache = a_cache(cached, before)
    before(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=f"The cache {message}.*fresh cache"):
        after(tokens(2, 5), past_key_values=cache)
    if cached != "static":
        cache.crop(-7)
        with pytest.raises(ValueError, match=f"The cache {message}"):
            after(tokens(2, 5), past_key_values=cache)
    cache.reset()
    if cached in ("latent", "fp8"):
        assert after(tokens(2, 5), past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_latents_are_no_keys():
    latent, gqa = tiny_model(), tiny_model(**GQA)
    cache = LatentCache(latent.config)
    latent(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=r"another model's: .* 1 x 28 numbers .* 2 x 8"):
        gqa(tokens(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="is a tuple: it must be a Cache"):
        latent(tokens(2, 5), past_key_values=((torch.zeros(1), torch.zeros(1)),) * 3)


@pytest.mark.parametrize("cached", ["latent", "fp8", "transformers", "static"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_caches_of_another_batch(batch, cached):
    model = tiny_model()
    cache = a_cache(cached, model)
    model(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=f"batch of 2, and the input is a batch of {batch}"):
        model(tokens(batch, 5), past_key_values=cache)
    if cached != "static":
        cache.crop(-7)  # nothing left, but still two rows
        with pytest.raises(ValueError, match=f"batch of 2, and the input is a batch of {batch}"):
            model(tokens(batch, 5), past_key_values=cache)


@kinds
@torch.no_grad()
def test_sequences_beyond_the_limit(kind):
    """max_position_embeddings is the limit as it is, also under YaRN (16 * 40 = 640 here, V3: 4096 * 40 = 163840)."""
    model = tiny_model(**KINDS[kind])
    assert model(tokens(1, 640)).logits.isfinite().all()
    with pytest.raises(ValueError, match="has 641 tokens, and max_position_embeddings is 640"):
        model(tokens(1, 641))
    assert model.model(tokens(1, 641)).last_hidden_state.isfinite().all()  # the decoder alone goes on
    cache = model.model.new_cache()
    model(tokens(1, 638), past_key_values=cache)
    model(tokens(1, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="has 641 tokens, and max_position_embeddings is 640"):
        model(tokens(1, 1), past_key_values=cache)
    # Positions of one's own decide, whatever the length: here two documents packed into a row.
    packed = torch.cat((torch.arange(400), torch.arange(400)))[None]
    assert model(tokens(1, 800), position_ids=packed).logits.isfinite().all()
    with pytest.raises(ValueError, match="Position 640 is beyond max_position_embeddings=640: the last is 639"):
        model(tokens(1, 3), position_ids=torch.tensor([[0, 640, 1]]))
    with pytest.raises(ValueError, match=r"position_ids has the shape \[1, 2\]: it must be \[1 or 1, 3\]"):
        model(tokens(1, 3), position_ids=torch.tensor([[0, 1]]))


@torch.no_grad()
def test_dynamic_frequencies_have_no_limit():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    model = tiny_model(max_position_embeddings=16, rope_parameters=rope)
    assert model(tokens(1, 41)).logits.isfinite().all()
    assert model.generate(tokens(1, 20), max_new_tokens=9, eos_token_id=None, pad_token_id=0).shape == (1, 29)


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_prompts_beyond_the_limit(implementation, embeds, monkeypatch):
    """A prompt that is too long is refused; what would run beyond the limit ends at it, with a warning."""
    model = tiny_model(max_position_embeddings=20)
    settings = SETTINGS | {"cache_implementation": implementation}

    def generate(ids, **more):
        given = {"inputs_embeds": model.get_input_embeddings()(ids).detach()} if embeds else {"input_ids": ids}
        return model.generate(**given, **settings | more)[:, 0 if embeds else ids.shape[1] :]

    with pytest.raises(ValueError, match="prompt has 21 tokens, and max_position_embeddings is 20"):
        generate(tokens(1, 21))
    with monkeypatch.context() as patch:
        warnings = []
        patch.setattr("modeling_nanodeepseek.generation.logger.warning", warnings.append)
        written = generate(tokens(2, 15))
        assert warnings == ["max_position_embeddings is 20: after a prompt of 15 tokens at most 6 are written, not 8."]
        assert torch.equal(by_hand(model, tokens(2, 15), 6)[:, 15:], written)
        warnings.clear()
        assert torch.equal(by_hand(model, tokens(2, 20), 1)[:, 20:], generate(tokens(2, 20), max_new_tokens=1))
        assert generate(tokens(2, 9)).shape == (2, 8) and not warnings


def test_an_assistant_with_fewer_positions_is_refused_at_the_start():
    model, assistant = tiny_model(eos_token_id=None), tiny_model(max_position_embeddings=16, eos_token_id=None)
    settings = {"do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match="max_position_embeddings is 16"):
        model.generate(tokens(1, 12), assistant_model=assistant, max_new_tokens=20, **settings)
    expected = model.generate(tokens(1, 12), max_length=17, **settings)
    assert torch.equal(expected, model.generate(tokens(1, 12), assistant_model=assistant, max_length=17, **settings))
