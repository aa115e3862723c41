"""Attention to selected keys: gathered, masked and dense are one, in values and gradients; replays; memory; errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_nanodeepseek import LatentCache, indexer, sparse_attention
from modeling_nanodeepseek.sparse_attention import (
    DeepseekSparseAttention,
    attend_selected,
    mask_of,
    prefers_gathered,
)
from tests.attention_backends import BACKENDS, use_backend
from tests.conftest import SPARSE, assert_close, assert_same, rms_ratio, tiny_model, tokens

# -- the function ------------------------------------------------------------------------------------------------------


def selections() -> dict:
    """For 2 rows of 7 queries on 11 keys."""
    generator = torch.Generator().manual_seed(3)
    some = torch.rand(2, 7, 11, generator=generator).argsort(-1)[..., :5].int()
    short = some.masked_fill(torch.arange(5) >= torch.arange(7)[:, None], -1)  # from none to all five
    return {
        "full": some,
        "short": short,
        "gaps": some.masked_fill(torch.rand(2, 7, 5, generator=generator) < 0.4, -1),
        "nothing at all": torch.full((2, 7, 5), -1, dtype=torch.int32),
        "one key for all": torch.full((2, 7, 1), 4, dtype=torch.int32),
        "all keys": torch.arange(11, dtype=torch.int32).expand(2, 7, 11),
        "no keys": some[..., :0],
        "long": short.long(),
    }


def dense_reference(query, latent, indices, c: int):
    """Over all keys under a mask; a query without keys gets zeros."""
    selected = mask_of(indices, 11)[:, 0]
    scores = torch.einsum("bthl,bsl->bths", query, latent).masked_fill(~selected[:, :, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(~selected[:, :, None], 0.0)  # NaN where nothing is selected
    return torch.einsum("bths,bsc->bthc", weights, latent[..., :c]), weights


@pytest.mark.parametrize("numbers", [1, 5 * 9 * 4, 2**21])
@pytest.mark.parametrize("case", selections())
def test_gathered_attention(case, numbers, monkeypatch):
    """Values, p, and the gradients of query and latent, which many queries share, in fp64."""
    monkeypatch.setitem(indexer.CHUNK_NUMBERS, "cpu", numbers)
    indices, c = selections()[case], 6
    query, latent = torch.randn(2, 7, 3, 9, dtype=torch.float64), torch.randn(2, 11, 9, dtype=torch.float64)
    probe = torch.randn(2, 7, 3, c, dtype=torch.float64)
    operands = [x.requires_grad_() for x in (query, latent)]
    output, p = attend_selected(query, latent, indices, c, wants_p=True)
    gradients = torch.autograd.grad((output * probe).sum(), operands)
    expected, weights = dense_reference(query, latent, indices, c)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), operands)
    pairs = [(expected, output), *zip(expected_gradients, gradients)]
    for a, b in pairs:
        nothing = indices.numel() == 0 or bool((indices < 0).all())
        assert torch.equal(b, torch.zeros_like(b)) if nothing else rms_ratio(a.nan_to_num(), b) < 1e-12
    if indices.shape[-1]:
        expected_p = weights.mean(2).gather(-1, indices.long().clamp(min=0)).masked_fill(indices < 0, 0.0)
        assert_close(expected_p, p, 1e-6)  # kept in fp32
    nothing = (indices < 0).all(-1)
    assert torch.equal(output[nothing], torch.zeros_like(output[nothing]))
    assert attend_selected(query, latent, indices, c)[1] is None


def test_gathered_attention_in_bf16():
    """Computed in fp32 on a CPU; results and gradients in bf16."""
    indices, c = selections()["short"], 6
    query, latent = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((2, 7, 3, 9), (2, 11, 9)))
    output, _ = attend_selected(query, latent, indices, c)
    exact, _ = attend_selected(query.float(), latent.float(), indices, c)
    assert torch.equal(exact.bfloat16(), output)
    gradients = torch.autograd.grad(output.float().square().sum(), (query, latent))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_masks_of_indices():
    indices = torch.tensor([[[3, 0, -1], [-1, -1, -1], [2, 1, 0]]])
    expected = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(mask_of(indices, 4), expected[None, None])


# -- which form --------------------------------------------------------------------------------------------------------

V3 = {"K": 2048, "n": 128, "r": 64, "v": 128, "c": 512}


def test_the_cheaper_form():
    """By hand for V3's dims, a gathered multiply-add counting three: a decoded token from S > 3 K = 6144 keys on; a
    prompt where 3 K (2c + r) < S (n + r + v), S >= 20890."""
    assert not prefers_gathered(1, 6144, **V3) and prefers_gathered(1, 6145, **V3)
    assert not prefers_gathered(20889, 20889, **V3) and prefers_gathered(20890, 20890, **V3)
    # The last 2000 tokens of many: 3 T K (2c + r) + T c (n+v) = 13,631,488,000 against T S (n+r+v) + S c (n+v), which
    # is 771,072 S.
    assert not prefers_gathered(2000, 17678, **V3) and prefers_gathered(2000, 17679, **V3)


def test_the_form_that_is_taken(monkeypatch):
    """`auto` masks under eager, gathers where masks are not taken, and else asks what is cheaper."""
    taken, gathered = [], DeepseekSparseAttention.attend_gathered
    monkeypatch.setattr(
        DeepseekSparseAttention, "attend_gathered", lambda *args: taken.append("gathered") or gathered(*args)
    )
    for name in ("attend_expanded", "attend_absorbed"):
        method = getattr(DeepseekSparseAttention, name)
        monkeypatch.setattr(
            DeepseekSparseAttention, name, lambda *args, _f=method, **k: taken.append("masked") or _f(*args, **k)
        )

    def forms(model, length=31):
        taken.clear()
        with torch.no_grad():
            model(tokens(1, length))
        return set(taken)

    for form in ("gathered", "masked"):
        for backend in ("eager", "sdpa"):
            assert forms(use_backend(tiny_model(**SPARSE, sparse_form=form), backend)) == {form}
    model = tiny_model(**SPARSE)
    assert forms(use_backend(model, "eager")) == {"masked"}
    assert forms(use_backend(model, "sdpa"), 25) == {"masked"}  # 3 K (2c + r) = 750 = S (n + r + v)
    assert forms(use_backend(model, "sdpa"), 26) == {"gathered"}
    assert forms(use_backend(model, "flex_attention")) == {"gathered"}
    assert forms(use_backend(tiny_model(**SPARSE, sparse_form="gathered"), "sdpa"), 5) == {"masked"}  # that is, dense


@pytest.mark.parametrize(
    "settings, backend, training",
    [
        ({"sparse_form": "masked"}, "flex_attention", False),
        ({"sparse_form": "masked"}, "flash_attention_3", False),
        ({"sparse_form": "gathered", "attention_dropout": 0.1}, "sdpa", True),
        ({"attention_dropout": 0.1}, "flex_attention", True),
    ],
)
def test_impossible_forms(settings, backend, training):
    model = use_backend(tiny_model(**SPARSE | settings), backend).train(training)
    form, dropout = settings.get("sparse_form", "auto"), settings.get("attention_dropout", 0.0)
    with pytest.raises(ValueError, match=f"sparse_form='{form}' with attention_dropout={dropout} .*'{backend}'.*sdpa"):
        model(tokens(1, 9))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_of_attention_takes_masks(backend):
    model, ids = use_backend(tiny_model(**SPARSE, attention_dropout=0.3), backend), tokens(1, 400)
    plain = model(ids).logits
    model.train()
    assert rms_ratio(plain, model(ids).logits) > 1e-2
    assert rms_ratio(model(ids).logits, model(ids).logits) > 1e-2


# -- the model ---------------------------------------------------------------------------------------------------------


def gradients_of(model, ids, **inputs):
    """Logits and the gradients of all parameters and of the embeddings fed, of a random function of the logits of
    tokens that are no padding."""
    model.zero_grad()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **inputs).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    (logits * probe * inputs.get("attention_mask", torch.ones_like(ids))[..., None]).sum().backward()
    return logits, {"embeds": embeds.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b, tolerance: float):
    assert_close(a[0], b[0], tolerance, "logits")
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert_close(gradient, b[1][name], tolerance, name)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gathered_equals_masked(backend, form):
    """In fp64, of a left-padded batch; the indexer has no part in the gradient."""
    ids, mask = tokens(2, 31), torch.ones(2, 31, dtype=torch.long)
    mask[1, :7] = 0
    a, b = (
        gradients_of(
            use_backend(tiny_model(**SPARSE, sparse_form=sparse, attention_form=form).double(), backend),
            ids,
            attention_mask=mask,
        )
        for sparse in ("masked", "gathered")
    )
    a, b = ((logits[mask.bool()], gradients) for logits, gradients in (a, b))
    assert_equal_gradients(a, b, 1e-10)
    assert not any("indexer" in name for name in a[1])


def dense_twin(model, **settings):
    """The same weights without an indexer."""
    dense = tiny_model(**settings)
    missing = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all(".indexer." in name for name in missing.unexpected_keys)
    return dense


@pytest.mark.parametrize("topk", [31, 32, 2048])
@pytest.mark.parametrize("settings", [{}, {"attention_form": "absorbed"}, {"sparse_form": "gathered"}])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_with_enough_keys_it_is_dense_attention(backend, settings, topk):
    """Bit for bit: values, gradients, padded, cached."""
    model = use_backend(tiny_model(**SPARSE | settings | {"index_topk": topk}), backend)
    dense = use_backend(dense_twin(model, **settings), backend)
    ids, mask = tokens(2, 31), torch.ones(2, 31, dtype=torch.long)
    mask[1, :7] = 0
    (expected, expected_gradients), (logits, gradients) = (gradients_of(x, ids) for x in (dense, model))
    assert torch.equal(expected, logits)
    assert expected_gradients.keys() == gradients.keys()
    assert all(torch.equal(expected_gradients[name], gradients[name]) for name in gradients)
    with torch.no_grad():
        batch = {"attention_mask": mask}
        assert torch.equal(dense(ids, **batch).logits, model(ids, **batch).logits)
        caches = LatentCache(dense.config), LatentCache(model.config)
        for start, stop in ((0, 9), (9, 10), (10, 31)):
            part = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            a, b = (x(**part, past_key_values=cache).logits for x, cache in zip((dense, model), caches))
            assert torch.equal(a, b)
    cliff = tiny_model(**SPARSE | {"index_topk": 30})
    assert rms_ratio(expected, use_backend(cliff, backend)(ids).logits) > 1e-3


@pytest.mark.parametrize("stage", ["dense", "warmup"])
@torch.no_grad()
def test_stages_of_dense_attention(stage):
    model, ids = tiny_model(**SPARSE, dsa_stage=stage), tokens(2, 31)
    assert torch.equal(dense_twin(model)(ids).logits, model(ids).logits)
    cache = LatentCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 21], 1)]
    assert_close(model(ids).logits, torch.cat(parts, 1), 1e-5)
    assert cache.layers[0].values.shape[-1] == (0 if stage == "dense" else 10)


@torch.no_grad()
def test_a_warm_cache_can_be_used_sparsely():
    """In the warm-up the indexer's keys are cached already."""
    model, ids = tiny_model(**SPARSE), tokens(2, 31)
    expected = model(ids[:, :1], use_cache=True).past_key_values
    model.config.dsa_stage = "warmup"
    cache = model(ids[:, :1], use_cache=True).past_key_values
    model.config.dsa_stage = "sparse"
    a, b = (model(ids[:, 1:], past_key_values=x).logits for x in (expected, cache))
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [4, 5, 6, 31])
@pytest.mark.usefixtures("portable_backends")
@torch.no_grad()
def test_backends(length, backend):
    model, ids = tiny_model(**SPARSE).double(), tokens(2, length)
    expected = use_backend(model, "eager")(ids).logits
    assert_close(expected, use_backend(model, backend)(ids).logits, 1e-10)


def test_attention_weights_lie_on_the_selection():
    model, ids = use_backend(tiny_model(**SPARSE), "eager"), tokens(2, 31)
    output = model(ids, output_attentions=True, output_index_topk_indices=True)
    for weights, indices in zip(output.attentions, output.index_topk_indices):
        selected = mask_of(indices, 31).expand(-1, 3, -1, -1)
        assert weights.shape == (2, 3, 31, 31) and (weights[~selected] == 0).all() and (weights[selected] > 0).all()
        assert_close(torch.ones(2, 3, 31), weights.sum(-1), 1e-6)


@pytest.mark.parametrize("form", ["gathered", "masked"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_rows_of_padding_are_numbers(backend, form):
    """Queries that see nothing, a whole row of them too, alone or beside real rows."""
    model, ids = use_backend(tiny_model(**SPARSE, sparse_form=form), backend), tokens(3, 31)
    mask = torch.ones(3, 31, dtype=torch.long)
    mask[0, :9] = mask[1] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert_close(model(ids[2:]).logits[0], logits[2], 1e-5)
    assert_close(model(ids[:1, 9:]).logits[0], logits[0, 9:], 1e-5)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with torch.enable_grad():
        model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()].sum().backward()
    assert embeds.grad.isfinite().all() and not embeds.grad[~mask.bool()].any()


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_a_replay(form):
    """What was selected can be given back, in any order and with any number of -1; other keys give other logits."""
    model, ids = tiny_model(**SPARSE, sparse_form=form).double(), tokens(2, 31)
    chosen = model(ids, output_index_topk_indices=True).index_topk_indices
    assert [tuple(x.shape) for x in chosen] == [(2, 31, 5)] * 3 and all(x.dtype == torch.int32 for x in chosen)
    assert model(ids).index_topk_indices is None
    expected = gradients_of(model, ids)
    shuffled = tuple(torch.nn.functional.pad(x.flip(-1).long(), (1, 2), value=-1) for x in chosen)
    for given in (chosen, shuffled):
        assert_equal_gradients(expected, gradients_of(model, ids, index_topk_indices=given), 1e-10)
    last = torch.arange(31)[:, None] - torch.arange(5)
    others = (torch.where(last < 0, -1, last).expand(2, -1, -1),) * 3
    with torch.no_grad():
        moved = model(ids, index_topk_indices=others, output_index_topk_indices=True)
        assert rms_ratio(expected[0], moved.logits) > 1e-2
        window = torch.ones(31, 31, dtype=torch.bool).tril().triu(-4)[None, None]
        dense = dense_twin(model.float()).double()
        assert_close(
            dense(ids, attention_mask=window).logits, model.double()(ids, index_topk_indices=others).logits, 1e-6
        )


@torch.no_grad()
def test_a_replay_of_decoding():
    """Also of fewer keys than index_topk, where the model itself would attend to all; with any cache."""
    model, ids = tiny_model(**SPARSE), tokens(2, 12)
    whole = model(ids, output_index_topk_indices=True)
    first, second = LatentCache(model.config), LatentCache(model.config)
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, 12)):
        step = model(ids[:, start:stop], past_key_values=first, output_index_topk_indices=True)
        chosen = step.index_topk_indices
        for a, b in zip(whole.index_topk_indices, chosen):
            assert torch.equal(a[:, start:stop, : b.shape[-1]], b)
        again = model(ids[:, start:stop], past_key_values=second, index_topk_indices=chosen)
        assert_close(whole.logits[:, start:stop], step.logits, 1e-5)
        assert_close(step.logits, again.logits, 1e-5)
    itself = tuple(torch.arange(3)[None, :, None].expand(2, -1, -1) for _ in range(3))
    alone = model(ids[:, :3], index_topk_indices=itself).logits
    assert rms_ratio(whole.logits[:, :3], alone) > 1e-2  # three keys are fewer than index_topk


def wrong_replays() -> dict:
    """For 2 rows of 3 tokens after 7 cached ones."""
    right = torch.zeros(2, 3, 4, dtype=torch.int32)
    return {
        "layers": ((right,) * 2, "has 2 layers: it must have 3"),
        "batch": ((right[:1],) * 3, r"\[1, 3, 4\] of torch.int32: .*\[2, 3, any\]"),
        "queries": ((right[:, :2],) * 3, r"\[2, 2, 4\] .*\[2, 3, any\]"),
        "dims": ((right[..., 0],) * 3, r"\[2, 3\] of"),
        "bytes": ((right.to(torch.uint8),) * 3, "of torch.uint8: it must hold int32 or int64"),
        "a number": (5, "is a int: it must be a tuple"),
        "floats": ((right.float(),) * 3, "of torch.float32: it must hold int32 or int64"),
        "beyond": ((right + 10,) * 3, r"10..10: keys are 0..9, -1 is none"),
        "below": ((right - 2,) * 3, r"-2..-2: keys are 0..9"),
        "one layer": ((right - 1, right - 1, right + 99), r"99..99"),
        "twice": ((right,) * 3, "holds a key twice"),
    }


@pytest.mark.parametrize("case", wrong_replays())
@torch.no_grad()
def test_wrong_replays(case):
    model, (given, message) = tiny_model(**SPARSE), wrong_replays()[case]
    cache = LatentCache(model.config)
    model(tokens(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=f"index_topk_indices.* {message}"):
        model(tokens(2, 3), past_key_values=cache, index_topk_indices=given)
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("settings", [{}, SPARSE | {"dsa_stage": "dense"}, SPARSE | {"dsa_stage": "warmup"}])
def test_replays_need_a_selection(settings):
    given = (torch.zeros(2, 3, 1, dtype=torch.int32),) * 3
    with pytest.raises(ValueError, match="index_topk_indices are given, and this model selects no keys"):
        tiny_model(**settings)(tokens(2, 3), index_topk_indices=given)


# -- memory ------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers that any result holds, views and what shares another's memory left out."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x._base is None:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_no_tensor_of_all_queries_by_all_keys(padded):
    """4096 tokens: T S = 2^24 numbers; nothing is larger than a chunk (2^21) with what one query may add to it."""
    S, chunk = 4096, indexer.CHUNK_NUMBERS["cpu"]
    small = {"num_hidden_layers": 1, "n_routed_experts": None, "index_n_heads": 3, "max_position_embeddings": S}
    model = tiny_model(**SPARSE | small | {"index_topk": 64, "index_window": 8})
    ids, mask = tokens(1, S), torch.ones(1, S, dtype=torch.long)
    mask[:, :9] = 0
    with Largest() as largest:
        output = model(ids, attention_mask=mask if padded else None, output_index_topk_indices=True)
    assert output.index_topk_indices[0].shape == (1, S, 64)
    assert chunk / 2 < largest.numbers <= chunk < S * S // 4


def test_the_states_of_a_cache_are_read_where_they_lie():
    """Rows of longer buffers, of which each sequence's are apart; flattened, they would be copied at every token."""
    generator = torch.Generator().manual_seed(0)
    buffers = torch.randn(3, 17, 6, generator=generator)
    query, states = torch.randn(3, 2, 4, 6, generator=generator), buffers[:, :11]
    indices = torch.tensor([[[0, 10, -1], [3, 4, 5]], [[1, 9, 2], [-1, -1, -1]], [[10, 0, 7], [6, 2, -1]]])
    with torch.no_grad():
        expected, _ = attend_selected(query, states.contiguous(), indices, c=4)
        rows, apart = sparse_attention._rows(states)
        assert (rows.data_ptr(), apart) == (buffers.data_ptr(), 17)
        actual, _ = attend_selected(query, states, indices, c=4)
    assert torch.equal(expected, actual)
    assert sparse_attention._rows(states.requires_grad_())[1] == 11  # with gradients a copy, made by autograd's rules


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_a_replay_of_nothing_is_nothing(form, backend):
    """Not the mean of all keys, those of the future too, which is what a softmax of equals gives."""
    model = tiny_model(**SPARSE, sparse_form=form)
    model.set_attn_implementation(backend)
    replay = [torch.full((2, 9, 5), -1, dtype=torch.int32)] * 3
    with torch.no_grad():
        changed = tokens(2, 9)
        changed[:, 5:] += 1
        first, second = (model(ids % 97, index_topk_indices=replay).logits[:, :5] for ids in (tokens(2, 9), changed))
    assert_same(first, second)
