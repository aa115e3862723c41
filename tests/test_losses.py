"""The cross-entropy that never holds all logits, against torch's on all of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_nanodeepseek import losses
from modeling_nanodeepseek.losses import Head, is_plain_head, linear_cross_entropy
from tests.conftest import assert_close, rms_ratio, tiny_model, tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 97 * 7)  # 7 rows at a time: the last chunk is a partial one
    monkeypatch.setattr(losses, "MIN_ROWS", 3)


def example(dtype=torch.float64):
    head = Head(18, 97, bias=False, dtype=dtype)
    hidden = torch.randn(3, 31, 18, dtype=dtype, requires_grad=True)
    labels = tokens(3, 31)
    labels[0, :9] = labels[1, 20:] = labels[2, 5] = -100
    return head, hidden, labels


@pytest.mark.parametrize("arguments", ["labels", "shift_labels", "num_items", "num_items_tensor", "ignore_index"])
def test_value_and_gradients(arguments):
    head, hidden, labels = example()
    settings = {"labels": labels}
    if arguments == "shift_labels":
        settings = {"labels": labels, "shift_labels": labels.roll(3, -1)}
    elif arguments == "num_items":
        settings["num_items_in_batch"] = 11
    elif arguments == "num_items_tensor":
        settings["num_items_in_batch"] = torch.tensor(11)
    elif arguments == "ignore_index":
        settings = {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5}
    results = []
    for loss in (
        linear_cross_entropy(hidden, head, **settings),
        ForCausalLMLoss(head(hidden).double(), vocab_size=97, **settings),
    ):
        results.append((loss, *torch.autograd.grad(3 * loss, (hidden, head.weight))))
    for name, ours, expected in zip(("loss", "hidden", "weight"), *results):
        assert_close(expected, ours, 2e-7 if name == "loss" else 1e-6, name)  # transformers' loss is fp32


def test_frozen_sides():
    """With a frozen head only the hidden states get a gradient, and the other way round."""
    head, hidden, labels = example()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, head, labels), (hidden, head.weight))
    head.weight.requires_grad_(False)
    linear_cross_entropy(hidden, head, labels).backward()
    assert torch.equal(hidden.grad, expected[0]) and head.weight.grad is None
    head.weight.requires_grad_(True)
    linear_cross_entropy(hidden.detach(), head, labels).backward()
    assert torch.equal(head.weight.grad, expected[1])


def test_large_logits_neither_overflow_nor_vanish():
    head, hidden, labels = example(torch.float32)
    with torch.no_grad():
        head.weight *= 1e4
    loss = linear_cross_entropy(hidden, head, labels)
    assert_close(ForCausalLMLoss(head(hidden), labels, 97), loss, 1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, head.weight)))


def test_bf16_keeps_an_fp32_loss():
    head, hidden, labels = example(torch.bfloat16)
    loss = linear_cross_entropy(hidden, head, labels)
    ours = torch.autograd.grad(loss, (hidden, head.weight))
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    exact = F.cross_entropy((exact_hidden @ exact_weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.dtype == torch.float32 and ours[0].dtype == ours[1].dtype == torch.bfloat16
    assert_close(exact, loss, 1e-3)
    for expected, gradient in zip(torch.autograd.grad(exact, (exact_hidden, exact_weight)), ours):
        assert_close(expected, gradient, 1e-2)


def test_no_targets():
    """The mean over nothing is nan, as torch's; the sum of nothing is zero, and so are its gradients."""
    head, hidden, labels = example()
    nothing = torch.full_like(labels, -100)
    assert linear_cross_entropy(hidden, head, nothing).isnan()
    loss = linear_cross_entropy(hidden, head, nothing, num_items_in_batch=5)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (head.weight.grad == 0).all()


@pytest.mark.parametrize("chunk, rows", [(97 * 7, 7), (97 * 7 - 1, 6), (97, 3)])
def test_logits_are_never_all_there(chunk, rows, monkeypatch):
    """The largest tensor with a dimension of the vocabulary is a chunk of it, or the gradient of the head."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    largest = 0
    head, hidden, labels = example()
    mm = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        result = mm(a, b)
        largest = max(largest, result.shape[0] if result.shape[-1] == 97 else 0)
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    linear_cross_entropy(hidden, head, labels).backward()
    assert largest == rows


def test_bf16_adds_up_chunks_in_fp32(monkeypatch):
    """The head's gradient over 100 chunks: a running sum in bf16 is off by 1 % and more."""
    monkeypatch.setattr(losses, "CHUNK", 97 * 3)
    head, hidden = Head(18, 97, bias=False).bfloat16(), torch.randn(1, 301, 18).bfloat16()
    labels = tokens(1, 301)
    exact = head.weight.detach().double().requires_grad_()
    F.cross_entropy((hidden[0, :-1].double() @ exact.T), labels[0, 1:], reduction="sum").backward()
    linear_cross_entropy(hidden, head, labels, num_items_in_batch=1).backward()
    assert rms_ratio(exact.grad, head.weight.grad) < 4e-3


def test_autocast_does_not_reach_inside(monkeypatch):
    """Where bf16 has no matrix units its products are left aside: bit by bit the fp32 loss and gradients."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    head, hidden, labels = example(torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(hidden, head, labels)
            results.append((loss, *torch.autograd.grad(loss, (hidden, head.weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


class OtherWeight(torch.Tensor):
    """As sharded and quantised weights are."""


NOT_PLAIN = {
    "bias": lambda head: setattr(head, "bias", nn.Parameter(torch.ones(97))),
    "weight": lambda head: setattr(head, "weight", nn.Parameter(head.weight.detach().as_subclass(OtherWeight))),
    "forward_hook": lambda head: head.register_forward_hook(print),
    "forward_pre_hook": lambda head: head.register_forward_pre_hook(print),
    "full_backward_hook": lambda head: head.register_full_backward_hook(print),
    "full_backward_pre_hook": lambda head: head.register_full_backward_pre_hook(print),
}


@pytest.mark.parametrize("change", NOT_PLAIN)
def test_heads_that_are_more_than_a_product(change):
    head = Head(18, 97, bias=False)
    assert is_plain_head(head)
    NOT_PLAIN[change](head)
    assert not is_plain_head(head)


def test_a_resized_head_stays_one():
    """transformers makes a torch Linear of it."""
    model, ids = tiny_model().train(), tokens()
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(101, mean_resizing=False)
    assert is_plain_head(model.lm_head) and model.lm_head.out_features == 101
    assert torch.equal(model.lm_head.weight[:97], before) and model(ids, labels=ids).logits is None


class TestInTheModel:
    def test_training_skips_logits_and_equals_the_loss_with_them(self):
        ids, results = tokens(), []
        for skip in (None, False):
            model = tiny_model().train()
            output = model(ids, labels=ids, skip_logits=skip)
            output.loss.backward()
            results.append((output, {name: p.grad for name, p in model.named_parameters()}))
        (frugal, ours), (whole, expected) = results
        assert frugal.logits is None and whole.logits.shape == (2, 31, 97)
        assert_close(whole.loss, frugal.loss, 1e-6)
        for name in expected:
            assert_close(expected[name], ours[name], 1e-5, name)

    def test_evaluation_returns_logits_unless_told_otherwise(self):
        model, ids = tiny_model(), tokens()
        plain, frugal = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
        assert plain.logits is not None and frugal.logits is None
        assert_close(plain.loss, frugal.loss, 1e-6)
        assert model(ids, skip_logits=True).logits is not None  # without labels there is nothing else to return

    def test_gradients_reach_tied_embeddings_once(self):
        ids, gradients = tokens(), []
        for skip in (True, False):
            model = tiny_model(tie_word_embeddings=True).train()
            model(ids, labels=ids, skip_logits=skip).loss.backward()
            gradients.append(model.model.embed_tokens.weight.grad)
        assert_close(gradients[1], gradients[0], 1e-5)

    @pytest.mark.parametrize("change", ["hook", "subclass", "wrapped_forward", "loss", "logits_to_keep"])
    def test_where_a_product_with_the_weight_is_not_the_head(self, change):
        model, ids = tiny_model(aux_loss_alpha=0.0).train(), tokens()
        kept = 0
        if change == "hook":
            model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
        elif change == "subclass":
            model.lm_head.__class__ = type(
                "Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)}
            )
        elif change == "wrapped_forward":
            inner = model.lm_head.forward
            model.lm_head.forward = lambda x: 2 * inner(x)
        elif change == "loss":
            model.loss_function = lambda logits, labels, **kwargs: logits.sum()
        else:
            kept = 31
        output = model(ids, labels=ids, logits_to_keep=kept)
        assert output.logits is not None and is_plain_head(model.lm_head) == (change in ("loss", "logits_to_keep"))
        expected = output.logits.sum() if change == "loss" else ForCausalLMLoss(output.logits, ids, 97)
        assert_close(expected, output.loss, 1e-6)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("change", [lambda ids: ids[:, :-3], lambda ids: ids[:1], lambda ids: ids.repeat(1, 2)])
    def test_labels_of_another_shape(self, training, change):
        with pytest.raises(ValueError):
            tiny_model(aux_loss_alpha=0.0).train(training)(tokens(), labels=change(tokens()))

    def test_labels_outside_the_vocabulary(self):
        labels = tokens()
        labels[1, 4] = 97
        with pytest.raises(ValueError, match="Label 97 is outside the vocabulary: labels lie in 0..96"):
            tiny_model().train()(tokens(), labels=labels)

    def test_a_tuple_keeps_its_places(self):
        model, ids = tiny_model().train(), tokens()
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        assert logits.shape == (2, 31, 97) and torch.equal(loss, model(ids, labels=ids, skip_logits=False).loss)
        assert model(ids, labels=ids).router_logits is None
        assert len(model(ids, labels=ids, output_router_logits=True).router_logits) == 2

    def test_every_term_leaves_out_what_is_ignored(self):
        model, ids, other = tiny_model(aux_loss_alpha=0.3).train(), tokens(), tokens()
        ids[0, 3:20], other[0, 3:20] = -100, 96
        inputs = tokens()
        a = model(inputs, labels=ids)
        b = model(inputs, labels=other.masked_fill((other == 96) & (ids != -100), 95), ignore_index=96)
        c = model(inputs, labels=ids.masked_fill(ids == 96, 95))
        assert_close(c.loss, b.loss, 1e-6)
        assert_close(c.balance_loss, b.balance_loss, 1e-6)
        assert_close(a.balance_loss, c.balance_loss, 1e-6)

    def test_gradients_of_gradients_are_refused(self):
        model, ids = tiny_model().train(), tokens()
        with pytest.raises(RuntimeError, match="model.eval"):
            torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)
