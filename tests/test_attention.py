"""MLA's two forms against each other and against the equations, in fp64; GQA; the choice between the forms."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_nanodeepseek import LatentCache
from modeling_nanodeepseek.attention import GroupedQueryAttention, MultiHeadLatentAttention, prefers_expanded
from modeling_nanodeepseek.rotary import RotaryEmbedding
from tests.conftest import assert_close, tiny_config, tiny_model, tokens


def build(seed: int = 0, **overrides):
    """An attention layer in fp64 with random weights, its input, and the rotations of two rows."""
    torch.manual_seed(seed)
    config = tiny_config(**overrides)
    config._attn_implementation = overrides.get("attention", "eager")
    layer = MultiHeadLatentAttention(config, 0).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    hidden = torch.randn(2, 13, config.hidden_size, dtype=torch.float64)
    return layer, hidden, RotaryEmbedding(config)(hidden, torch.arange(13).expand(2, -1))


def causal(queries: int, keys: int) -> torch.Tensor:
    mask = torch.full((queries, keys), float("-inf"), dtype=torch.float64).triu(keys - queries + 1)
    return mask[None, None]


def by_the_equations(layer: MultiHeadLatentAttention, hidden: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The equations of MLA token by token and head by head (V2 report, appendix C), no tensor trick shared."""
    config, P = layer.config, {name: parameter.detach() for name, parameter in layer.named_parameters()}
    n, r, v, c, H = 10, 6, 14, 22, 3

    def norm(x, weight):
        return weight * x / (x.pow(2).mean() + 1e-6).sqrt()

    def rope(x, t):  # interleaved pairs, in place
        out = x.clone()
        for j in range(r // 2):
            cos, sin = (t * theta[j]).cos(), (t * theta[j]).sin()
            out[2 * j] = x[2 * j] * cos - x[2 * j + 1] * sin
            out[2 * j + 1] = x[2 * j + 1] * cos + x[2 * j] * sin
        return out

    rows = []
    for h in hidden:
        latents, rope_keys, queries = [], [], []
        for t, h_t in enumerate(h):
            if config.q_lora_rank is None:
                q = P["q_proj.weight"] @ h_t
            else:
                q = P["q_b_proj.weight"] @ norm(P["q_a_proj.weight"] @ h_t, P["q_a_layernorm.weight"])
            queries.append([(q[i * (n + r) :][:n], rope(q[i * (n + r) + n :][:r], t)) for i in range(H)])
            kv = P["kv_a_proj_with_mqa.weight"] @ h_t
            latents.append(norm(kv[:c], P["kv_a_layernorm.weight"]))
            rope_keys.append(rope(kv[c:], t))
        outputs = []
        for t in range(len(h)):
            heads = []
            for i in range(H):
                W = P["kv_b_proj.weight"][i * (n + v) : (i + 1) * (n + v)]
                logits = [
                    layer.scaling * (queries[t][i][0] @ (W[:n] @ latents[s]) + queries[t][i][1] @ rope_keys[s])
                    for s in range(t + 1)
                ]
                weights = torch.stack(logits).softmax(0)
                heads.append(sum(weights[s] * (W[n:] @ latents[s]) for s in range(t + 1)))
            outputs.append(P["o_proj.weight"] @ torch.cat(heads))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("q_lora_rank", [18, None])
def test_the_equations(form, q_lora_rank):
    layer, hidden, rotary = build(attention_form=form, q_lora_rank=q_lora_rank)
    theta = RotaryEmbedding(layer.config).inv_freq.double()
    output, weights = layer(hidden, rotary, causal(13, 13))
    assert_close(by_the_equations(layer, hidden, theta), output, 1e-6)  # cos and sin are fp32
    assert weights.shape == (2, 3, 13, 13)
    assert_close(torch.ones(2, 3, 13, dtype=torch.float64), weights.sum(-1), 1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_absorbed_equals_expanded(attention):
    """Outputs, weights, and the gradients of every parameter and of the input, in fp64."""
    results = []
    for form in ("expanded", "absorbed"):
        layer, hidden, rotary = build(attention_form=form)
        layer.config._attn_implementation = attention
        hidden.requires_grad_()
        mask = causal(13, 13) if attention == "eager" else None
        output, weights = layer(hidden, rotary, mask)
        probe = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        gradients = torch.autograd.grad((output * probe).sum(), [hidden, *layer.parameters()])
        results.append([output, *([] if weights is None else [weights]), *gradients])
    for expanded, absorbed in zip(*results):
        assert_close(expanded, absorbed, 1e-12)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 7], [12, 1], [3, 10]])
def test_cached_equals_full(form, chunks):
    layer, hidden, turns = build(attention_form="expanded")
    full, _ = layer(hidden, turns, causal(13, 13))
    layer.config.attention_form = form
    cache, start, parts = LatentCache(layer.config), 0, []
    with torch.no_grad():
        for size in chunks:
            end = start + size
            rotary = turns[:, start:end]
            parts.append(layer(hidden[:, start:end], rotary, causal(size, end), cache)[0])
            start = end
    assert_close(full, torch.cat(parts, 1), 1e-12)


def test_the_choice_between_forms():
    """By multiply-adds; for V3's dims (n 128, v 128, c 512) the break-even of the absorbed form is near T = 170."""
    v3 = {"n": 128, "v": 128, "c": 512}
    assert prefers_expanded(4096, 4096, **v3) and prefers_expanded(1, 1, **v3)
    assert not prefers_expanded(1, 4096, **v3)
    assert not prefers_expanded(163, 4096, **v3) and prefers_expanded(164, 4096, **v3)
    assert not prefers_expanded(170, 10**9, **v3) and prefers_expanded(171, 10**9, **v3)


def test_auto_runs_what_it_chose(monkeypatch):
    layer, hidden, turns = build(attention_form="auto", kv_lora_rank=22)
    calls = []
    for form in ("expanded", "absorbed"):
        inner = getattr(layer, f"attend_{form}")
        monkeypatch.setattr(layer, f"attend_{form}", lambda *a, _f=form, _i=inner, **k: calls.append(_f) or _i(*a, **k))
    cache = LatentCache(layer.config)
    with torch.no_grad():
        layer(hidden[:, :12], turns[:, :12], causal(12, 12), cache)
        layer(hidden[:, 12:], turns[:, 12:], None, cache)
    assert calls == ["expanded", "absorbed"]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_an_adapter_on_kv_b_proj_acts_in_both_forms(form):
    model = tiny_model()
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["kv_b_proj"], init_lora_weights=False)).eval()
    ids = tokens()
    plain = tiny_model()(ids).logits
    model.config.attention_form = "expanded"
    expected = adapted(ids).logits
    model.config.attention_form = form
    assert_close(expected, adapted(ids).logits, 1e-5)
    with pytest.raises(AssertionError):  # the adapter matters at all
        assert_close(plain, expected, 1e-2)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_grouped_query_attention(qk_norm, attention):
    """Against per-head loops: each key head serves its consecutive query heads."""
    config = tiny_config(
        attention_type="gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=6, qk_norm=qk_norm
    )
    config._attn_implementation = attention
    layer = GroupedQueryAttention(config, 0).double()
    hidden = torch.randn(2, 9, 40, dtype=torch.float64)
    positions = torch.arange(9).expand(2, -1)
    turns = RotaryEmbedding(config)(hidden, positions)
    mask = causal(9, 9) if attention == "eager" else None
    output, _ = layer(hidden, turns, mask)

    def heads(projection, norm, count):
        x = norm((hidden @ projection.weight.T).view(2, 9, count, 6))
        first, second = x.chunk(2, -1)
        turn = [t[:, :, None].double() for t in (turns.real, turns.imag)]
        return torch.cat((first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]), -1)

    q, k = heads(layer.q_proj, layer.q_norm, 4), heads(layer.k_proj, layer.k_norm, 2)
    v = (hidden @ layer.v_proj.weight.T).view(2, 9, 2, 6)
    outputs = []
    for i in range(4):
        logits = torch.einsum("btx,bsx->bts", q[:, :, i], k[:, :, i // 2]) * layer.scaling
        outputs.append((logits + causal(9, 9)[0]).softmax(-1) @ v[:, :, i // 2])
    assert_close(torch.cat(outputs, -1) @ layer.o_proj.weight.T, output, 1e-6)


def test_without_causality_every_form_agrees():
    """`is_causal=False`, by the config or by the call, in training and evaluation: tokens see later ones."""
    ids, expected = tokens(2, 13), None
    for form in ("expanded", "absorbed"):
        for training in (False, True):
            for by_config in (False, True):
                model = tiny_model(attention_form=form).train(training)
                settings = {} if by_config else {"is_causal": False}
                if by_config:
                    model.config.is_causal = False
                logits = model(ids, **settings).logits
                expected = logits if expected is None else expected
                assert_close(expected, logits, 1e-5, f"{form} {training} {by_config}")
    assert (expected - tiny_model()(ids).logits).abs().max() > 0.1
