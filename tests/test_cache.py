"""LatentCache and its FP8 form: what they hold, how they grow, and the operations generation needs of them."""

import copy

import pytest
import torch
from transformers import StaticCache

from modeling_nanodeepseek import Fp8LatentCache, LatentCache
from modeling_nanodeepseek.cache import GROWTH, RESERVE, Fp8Layer, GrowingLayer
from tests.conftest import SPARSE, assert_close, assert_same, rms_ratio, tiny_config, tiny_model, tokens

CACHES = {"latent": LatentCache, "fp8": Fp8LatentCache}
KINDS = {"expanded": {"attention_form": "expanded"}, "absorbed": {"attention_form": "absorbed"}, "dsa": SPARSE}


def filled(model, ids, kind=LatentCache):
    cache = kind(model.config)
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


def test_it_holds_the_keys_of_the_indexer_as_values():
    model = tiny_model(**SPARSE)
    cache = filled(model, tokens(2, 31))
    assert cache.nbytes() == 2 * 31 * 3 * (22 + 6 + 10) * 4
    assert all(layer.keys.shape[-1] == 28 and layer.values.shape == (2, 1, 31, 10) for layer in cache.layers)
    rounded = filled(model, tokens(2, 31), Fp8LatentCache)
    assert rounded.nbytes() == 2 * 31 * 3 * (22 + 4 + 2 * 6 + 10 * 4)
    model.config.dsa_stage = "dense"
    assert filled(model, tokens(2, 31)).nbytes() == 2 * 31 * 3 * (22 + 6) * 4


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
    "crop-nothing": (lambda cache: cache.crop(0), lambda ids: ids),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda ids: ids[[2, 0, 0]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), lambda ids: ids[[2, 1]]),
}


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_then_continue(operation, kind, attention):
    """After the operation, continuing token by token must equal one forward of the whole."""
    model = tiny_model(**KINDS[attention])
    ids, more = tokens(3, 12), tokens(6, 5, seed=9)
    cache = filled(model, ids, CACHES[kind])
    act, same = OPERATIONS[operation]
    act(cache)
    kept = same(ids)
    full = torch.cat((kept, more[: len(kept)]), -1)
    with torch.no_grad():
        expected = model(full, past_key_values=CACHES[kind](model.config)).logits[:, kept.shape[1] :]
        parts = [model(more[: len(kept), i : i + 1], past_key_values=cache).logits for i in range(5)]
    assert_close(expected, torch.cat(parts, 1), 1e-5)


def layer_pair(kind: str):
    """A layer, and what it must return for states: these, or these rounded once."""
    if kind == "latent":
        return GrowingLayer(), lambda states: states
    layer = Fp8Layer(150, 6)
    return layer, lambda states: layer.unpack(layer.pack(states), states.dtype)


class Twins:
    """A layer and the tensor it must equal, [B, 1, S, 156 + 3]: what a plain concatenation holds."""

    def __init__(self, kind: str, seed: int):
        self.layer, self.rounded = layer_pair(kind)
        self.whole, self.copies = torch.empty(2, 1, 0, 159), []
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def append(self):
        new = torch.randn(len(self.whole), 1, self.pick(1, 40), 159, generator=self.generator)
        with [torch.no_grad, torch.no_grad, torch.enable_grad, torch.inference_mode][self.pick(0, 3)]():
            self.layer.update(new[..., :156], new[..., 156:])
        self.whole = torch.cat((self.whole, new), 2)

    def crop(self):
        removed = self.pick(0, self.whole.shape[2])
        self.layer.crop(-removed)
        self.whole = self.whole[:, :, : self.whole.shape[2] - removed]

    def reorder(self):
        order = torch.randint(0, len(self.whole), (len(self.whole),), generator=self.generator)
        self.layer.reorder_cache(order)
        self.whole = self.whole[order]

    def repeat(self):
        repeats = 2 if len(self.whole) <= 3 else 1
        self.layer.batch_repeat_interleave(repeats)
        self.whole = self.whole.repeat_interleave(repeats, 0)

    def select(self):
        chosen = torch.randperm(len(self.whole), generator=self.generator)[: self.pick(1, len(self.whole))]
        self.layer.batch_select_indices(chosen)
        self.whole = self.whole[chosen]

    def reset(self):
        self.layer.reset()
        self.whole = torch.empty(self.pick(1, 4), 1, 0, 159)

    def copy(self):
        self.copies.append((copy.deepcopy(self.layer), self.whole))

    def offload(self):
        self.layer.offload()
        self.layer.prefetch()

    def check(self, layer, whole):
        assert layer.get_seq_length() == whole.shape[2]
        new = torch.zeros(len(whole), 1, 0, 159)
        with torch.no_grad():
            keys, values = layer.update(new[..., :156], new[..., 156:])
        assert torch.equal(keys, self.rounded(whole[..., :156])) and torch.equal(values, whole[..., 156:])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations(seed, kind):
    """200 random operations, updates of random length in and out of gradient and inference mode among them, against a
    tensor that is concatenated and indexed. What was copied on the way must not change afterwards."""
    twins = Twins(kind, seed)
    names = ["append"] * 7 + ["crop", "reorder", "repeat", "select", "reset", "copy", "offload"]
    for _ in range(200):
        getattr(twins, names[twins.pick(0, 13)])()
        if twins.pick(0, 1):  # not always: a look is an update of its own
            twins.check(twins.layer, twins.whole)
    assert len(twins.copies) > 3
    for layer, whole in twins.copies:
        twins.check(layer, whole)


@pytest.mark.parametrize("kind", CACHES)
def test_beams_keep_their_reserve(kind):
    """Beam search reorders at every token: the buffer must not be copied a second time to make room."""
    layer, _ = layer_pair(kind)
    new = torch.randn(3, 1, 20, 156)
    with torch.no_grad():
        layer.update(new, new[..., :0])
        capacity = layer.reserved_nbytes()
        for _ in range(RESERVE):
            layer.reorder_cache(torch.tensor([1, 0, 2]))
            layer.update(new[:, :, :1], new[:, :, :1, :0])
            assert layer.reserved_nbytes() == capacity


@pytest.mark.parametrize("kind", CACHES)
def test_reset_starts_over_with_another_batch(kind):
    model, ids = tiny_model(), tokens(3, 9)
    cache = filled(model, tokens(2, 14, seed=5), CACHES[kind])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0 and cache.reserved_nbytes() == 0
    with torch.no_grad():
        fresh = model(ids, past_key_values=CACHES[kind](model.config)).logits
        assert_same(fresh, model(ids, past_key_values=cache).logits)


@pytest.mark.parametrize("attention", KINDS)
def test_a_static_cache_reorders_and_resets(attention):
    """What transformers defines of its static cache; it cannot be cropped, repeated or selected from."""
    model, ids, more = tiny_model(**KINDS[attention]), tokens(3, 9), tokens(3, 4, seed=9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        for _ in range(2):
            model(ids, past_key_values=cache)
            cache.reorder_cache(order)
            parts = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
            expected = model(torch.cat((ids[order], more), -1)).logits[:, 9:]
            assert_close(expected, torch.cat(parts, 1), 1e-5)
            cache.reset()


def test_crop_takes_minus_the_tokens():
    cache = filled(tiny_model(), tokens(2, 5))
    with pytest.raises(ValueError, match=r"crop\(3\) .* minus"):
        cache.crop(3)
    cache.crop(-9)  # more than there are
    assert cache.get_seq_length() == 0


def test_offloading_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="no CUDA device"):
        LatentCache(tiny_config(), offloading=True)


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
@pytest.mark.parametrize("kind", CACHES)
def test_modes_mix(kind, mode):
    """A prompt read in inference mode, continued outside of it (generate() uses no_grad), and the other way round."""
    model, ids = tiny_model(), tokens(2, 12)
    first, second = (torch.inference_mode, torch.no_grad)[:: 1 if mode == "inference" else -1]
    cache = CACHES[kind](model.config)
    with first():
        model(ids[:, :5], past_key_values=cache)
    with second():
        rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
        expected = model(ids, past_key_values=CACHES[kind](model.config)).logits[:, 5:]
        assert_close(expected, torch.cat(rest, 1), 1e-5)


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


def test_what_others_hold_is_not_written():
    """Neither what autograd saved, nor a tensor that was put into the layer, when their last rows are cropped off and
    written anew."""
    model, ids = tiny_model(), tokens(2, 12)
    (model(ids).logits ** 2).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    cache = LatentCache(model.config)
    loss = (model(ids, past_key_values=cache).logits ** 2).sum()
    cache.crop(-5)
    with torch.no_grad():
        model(tokens(2, 4, seed=7), past_key_values=cache)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(expected[name], parameter.grad, 1e-6, name)

    layer, mine = GrowingLayer(), torch.randn(2, 1, 9, 5)
    kept = mine.clone()
    with torch.no_grad():
        layer.update(mine, mine)
        layer.keys = layer.values = mine
        layer.crop(-3)
        layer.update(torch.zeros(2, 1, 2, 5), torch.zeros(2, 1, 2, 5))
    assert torch.equal(mine, kept) and torch.equal(layer.keys[:, :, :6], mine[:, :, :6])


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


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def test_fp8_row():
    """Byte for byte: codes, scales and rope key of one token, from the definition."""
    layer, latent = Fp8Layer(150, 6), torch.randn(156) * 3
    row = layer.pack(latent)
    assert row.dtype == torch.uint8 and row.shape == (150 + 2 * 4 + 6 * 2,)
    scales = torch.stack([block.abs().max() / 448 for block in latent[:150].split(128)])
    codes = torch.cat([block / scale for block, scale in zip(latent[:150].split(128), scales)]).to(torch.float8_e4m3fn)
    assert torch.equal(row[:150], codes.view(torch.uint8))
    assert torch.equal(row[150:158], scales.view(torch.uint8))
    assert torch.equal(row[158:], latent[150:].bfloat16().view(torch.uint8))
    back = torch.cat((codes.float() * scales.repeat_interleave(128)[:150], latent[150:].bfloat16().float()))
    assert torch.equal(back, layer.unpack(row, torch.float32))


def test_fp8_bytes_of_v3():
    """512 + 4 * 4 + 64 * 2 = 656 bytes per token and layer, against 1152 in bf16."""
    config = tiny_config(kv_lora_rank=512, qk_rope_head_dim=64)
    cache = Fp8LatentCache(config)
    latent = torch.randn(2, 1, 10, 576, dtype=torch.bfloat16)
    for layer in range(3):
        states, values = cache.update(latent, latent[..., :0], layer)
    assert cache.nbytes() == 2 * 10 * 3 * 656
    assert states.dtype == torch.bfloat16 and states.shape == latent.shape and values.shape[-1] == 0
    assert torch.equal(states[..., 512:], latent[..., 512:])  # the rope key is exact


def test_fp8_error():
    """E4M3 keeps 3 bits after the leading one: within 2^-4 each, in the mean square 2^-4 / sqrt(3) of the spacing's
    share, about 2.6 %; whatever the block's size, and for any magnitude that fp32 has."""
    layer = Fp8Layer(512, 64)
    for magnitude in (1e-25, 1e-3, 1.0, 1e4, 1e30):
        states = torch.randn(4, 1, 50, 576) * magnitude
        states[..., 512:] = 0
        back = layer.unpack(layer.pack(states), torch.float32)
        assert 0.024 < rms_ratio(states, back) < 0.028
        # Numbers below 2^-6 of E4M3's unit, 2^-6 / 448 of the block's largest, lose relative precision.
        large = states.abs() > 2e-4 * magnitude
        assert ((back - states).abs() <= 2**-4 * states.abs() * 1.0001)[large].all()
    assert torch.equal(layer.unpack(layer.pack(torch.zeros(1, 1, 3, 576)), torch.float32), torch.zeros(1, 1, 3, 576))
    broken = torch.ones(1, 1, 1, 576)
    broken[..., 5] = float("nan")
    back = layer.unpack(layer.pack(broken), torch.float32)
    assert back[..., :128].isnan().all() and torch.equal(back[..., 128:], broken[..., 128:])


@torch.no_grad()
def test_fp8_rounds_once():
    """Rows already held keep their bytes; and a text that arrives in chunks gives what it gives whole."""
    model, ids = tiny_model().double(), tokens(2, 40)  # in fp32 the order of sums may move a number over a rounding
    whole = filled(model, ids, Fp8LatentCache)
    cache = Fp8LatentCache(model.config)
    logits, before = [], None
    for part in ids.split([7, 1, 1, 20, 11], dim=1):
        logits.append(model(part, past_key_values=cache).logits)
        rows = cache.layers[0].keys
        assert before is None or torch.equal(rows[:, :, : before.shape[2]], before)
        before = rows.clone()
    assert torch.equal(cache.layers[0].keys, whole.layers[0].keys)
    fresh = Fp8LatentCache(model.config)
    assert_close(model(ids, past_key_values=fresh).logits, torch.cat(logits, 1), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_fp8_logits_are_those_of_rounded_latents(form, monkeypatch):
    """Not near them: equal to attention on the rounded latents. And the rounding matters."""
    from modeling_nanodeepseek.attention import MultiHeadLatentAttention

    model, ids = tiny_model(attention_form=form), tokens(2, 31)
    exact = model(ids).logits
    logits = model(ids, past_key_values=Fp8LatentCache(model.config)).logits
    latent = MultiHeadLatentAttention.latent

    def rounded(self, *args):
        states = latent(self, *args)
        scale = states[..., :22].abs().amax(-1, keepdim=True) / 448
        codes = (states[..., :22] / scale).to(torch.float8_e4m3fn).float()
        return torch.cat((codes * scale, states[..., 22:].bfloat16().float()), -1)

    monkeypatch.setattr(MultiHeadLatentAttention, "latent", rounded)
    assert_close(model(ids).logits, logits, 1e-5)
    assert 1e-3 < rms_ratio(exact, logits) < 0.2


def test_fp8_refuses_gradients_and_other_models():
    model, ids = tiny_model(), tokens(2, 5)
    with pytest.raises(ValueError, match=r"no gradient.*no_grad"):
        model(ids, past_key_values=Fp8LatentCache(model.config))
    with pytest.raises(ValueError, match="attention_type='gqa' has none"):
        Fp8LatentCache(tiny_config(attention_type="gqa", num_key_value_heads=3, head_dim=8))
    other = Fp8LatentCache(tiny_config(kv_lora_rank=24))
    with torch.no_grad(), pytest.raises(ValueError, match=r"made for 24 \+ 6 .* 28"):
        model(ids, past_key_values=other)


def test_the_keys_of_an_indexer_lie_in_columns():
    """Whatever is done to the cache: turning rows would take as long as the product with them."""
    cache = LatentCache(tiny_config(**SPARSE))
    with torch.no_grad():
        for tokens in (9, 1, 100, 1):
            keys, values = cache.update(torch.randn(2, 1, tokens, 28), torch.randn(2, 1, tokens, 10), 0)
    states = values.clone()
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda: cache.crop(-7),
    ):
        change()
        with torch.no_grad():
            one = len(cache.layers[0].keys)
            keys, values = cache.update(torch.randn(one, 1, 1, 28), torch.randn(one, 1, 1, 10), 0)
        assert values.stride()[-2] == 1 and keys.stride()[-1] == 1
    assert torch.equal(states[[1, 0], :, :100], values[:, :, :100])
