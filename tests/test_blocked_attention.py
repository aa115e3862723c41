"""Attention in blocks against the softmax written out, values and all gradients, at sizes that do not divide."""

import pytest
import torch

from modeling_nanodeepseek import blocked_attention as module
from modeling_nanodeepseek.blocked_attention import blocked_attention, visible_columns
from tests.conftest import assert_close, rms_ratio, tiny_model, tokens

B, H, T, S, n, r, v = 2, 3, 13, 17, 10, 6, 14


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)


def operands(dtype=torch.float64):
    """As attention makes them: heads in the middle of the layout, keys and values one tensor."""
    q = torch.randn(B, T, H, n + r, dtype=dtype, requires_grad=True)
    kv = torch.randn(B, S, H, n + v, dtype=dtype, requires_grad=True)
    k_rope = torch.randn(B, S, r, dtype=dtype, requires_grad=True)
    return (q, kv, k_rope), (q.transpose(1, 2)[..., :n], q.transpose(1, 2)[..., n:], kv.transpose(1, 2), k_rope)


def written_out(q_nope, q_rope, kv, k_rope, mask, scale):
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril()
    scores = scale * (q_nope @ kv[..., :n].mT + q_rope @ k_rope[:, None].mT)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # a query that sees nothing
    return (weights @ kv[..., n:]).transpose(1, 2)


def packed(*lengths: int) -> torch.Tensor:
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (documents[:, None] == documents[None]) & torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).tril()


def seen_by_nobody() -> torch.Tensor:
    mask = torch.rand(B, 1, T, S) < 0.4
    mask[0, :, 2] = mask[1, :, :8] = False  # a query alone, and two whole blocks
    mask[..., 5] = False  # a key
    return mask


MASKS = {
    "causal": lambda: None,
    "random": lambda: torch.rand(B, 1, T, S) < 0.5,
    "one-for-all-rows": lambda: torch.rand(1, 1, T, S) < 0.5,
    "by-head": lambda: torch.rand(B, H, T, S) < 0.5,
    "packed": lambda: torch.cat((packed(6, 7), torch.zeros(T, S - T, dtype=torch.bool)), 1)[None, None],
    "seen-by-nobody": seen_by_nobody,
}


@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients(kind):
    leaves, inputs = operands()
    mask = MASKS[kind]()
    ours, expected = blocked_attention(*inputs, mask, 0.3), written_out(*inputs, mask, 0.3)
    assert_close(expected, ours, 1e-14, "output")
    probe = torch.randn_like(ours)
    gradients = [torch.autograd.grad(output, leaves, probe, retain_graph=True) for output in (expected, ours)]
    for name, a, b in zip(("q", "kv", "k_rope"), *gradients):
        assert_close(a, b, 1e-13, name)


def test_columns_nobody_sees_are_left_out():
    mask = packed(6, 7)[None, None]
    assert visible_columns(None, 0, 8, 12, 17) == (0, 12)
    assert visible_columns(mask, 1, 8, 12, 13) == (6, 12)
    assert visible_columns(mask, 0, 4, 8, 13) == (0, 8)
    assert visible_columns(torch.zeros(1, 1, 13, 13, dtype=torch.bool), 0, 0, 4, 13) == (0, 0)


def test_extreme_scores_stay_finite():
    leaves, inputs = operands(torch.float32)
    output = blocked_attention(*(1e3 * t for t in inputs), None, 1.0)
    output.sum().backward()
    assert output.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)


def test_bf16_is_computed_in_fp32():
    _, inputs = operands()
    rounded = [tensor.bfloat16() for tensor in inputs]
    exact = written_out(*(tensor.double() for tensor in rounded), None, 0.3)
    ours = blocked_attention(*rounded, None, 0.3)
    assert ours.dtype == torch.bfloat16
    assert rms_ratio(exact, ours) < 2.5e-3  # one rounding, of the result


def test_autocast_does_not_reach_inside():
    leaves, inputs = operands(torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = blocked_attention(*inputs, None, 0.3)
            results.append((output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
def test_training_mode_uses_it_and_agrees_with_torch(rows, monkeypatch):
    """In the model: loss and every gradient equal those of evaluation mode, which runs torch's kernel."""
    calls = []
    inner = module._BlockedAttention.apply
    monkeypatch.setattr(module._BlockedAttention, "apply", lambda *a: calls.append(1) or inner(*a))
    ids = tokens(2, 31)
    inputs = {"input_ids": ids, "labels": ids.clone(), "skip_logits": False}
    if rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :7] = inputs["attention_mask"][1, 20:] = 0
        inputs["labels"][inputs["attention_mask"] == 0] = -100
    elif rows == "packed":
        inputs["position_ids"] = torch.cat((torch.arange(13), torch.arange(18)))[None].expand(2, -1)
    results = []
    for training in (False, True):
        model = tiny_model(aux_loss_alpha=0.0, attention_form="expanded").train(training)
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
        assert len(calls) == (3 if training else 0)
    (loss, expected), (ours, gradients) = results
    assert_close(loss, ours, 1e-6)
    for name in expected:
        assert_close(expected[name], gradients[name], 1e-4, name)


def test_what_it_cannot_do_is_left_to_torch():
    """Dropout, and masks that are added: in training too."""
    ids = tokens(2, 14)
    model = tiny_model(attention_dropout=0.5, attention_form="expanded").train()
    assert rms_ratio(model.model(ids)[0], model.model(ids)[0]) > 1e-2
    model = tiny_model(attention_form="expanded")
    window = torch.ones(14, 14, dtype=torch.bool).tril().triu(-3)[None, None]
    added = torch.where(window, 0.0, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=added).logits
    for mask in (added, window):
        assert_close(expected, model.train()(ids, attention_mask=mask).logits, 1e-5)
