"""Router and the sequence-wise balance loss against per-token loops; the experts are in test_experts.py."""

import pickle

import pytest
import torch

from modeling_nanodeepseek.moe import TopkRouter, sequence_balance_loss
from tests.conftest import assert_close, tiny_config, tiny_model, tokens


def router(**overrides) -> TopkRouter:
    gate = TopkRouter(tiny_config(**overrides)).eval()
    torch.nn.init.normal_(gate.weight, std=0.3)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.normal_(std=0.3)
    return gate


def choose_by_the_definition(scores: torch.Tensor, bias: torch.Tensor, config) -> set[int]:
    choice = (scores + bias).tolist()
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    best = 2 if config.topk_method == "noaux_tc" else 1
    ranked = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:best]))
    allowed = [e for group in ranked[: config.topk_group] for e in group]
    return set(sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok])


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "topk_method, groups, kept", [("noaux_tc", 4, 2), ("group_limited_greedy", 4, 2), ("greedy", 1, 1)]
)
def test_router_by_the_definition(scoring_func, topk_method, groups, kept):
    gate = router(scoring_func=scoring_func, topk_method=topk_method, n_group=groups, topk_group=kept)
    hidden = torch.randn(50, 40)
    logits, weights, indices = gate(hidden)
    scores = (hidden @ gate.weight.T).sigmoid() if scoring_func == "sigmoid" else (hidden @ gate.weight.T).softmax(-1)
    assert_close(hidden @ gate.weight.T, logits, 1e-6)
    bias = torch.zeros(8) if gate.e_score_correction_bias is None else gate.e_score_correction_bias
    for t in range(50):
        chosen = choose_by_the_definition(scores[t], bias, gate.config)
        assert set(indices[t].tolist()) == chosen
        total = sum(scores[t, e] for e in chosen)
        for weight, expert in zip(weights[t], indices[t]):
            assert weight.item() == pytest.approx((scores[t, expert] / total * 2.5).item(), rel=1e-5)


def test_negative_choices_never_lose_to_a_closed_group():
    """With every bias far below zero a mask of 0 instead of -inf would pick experts outside the kept groups."""
    gate = router()
    gate.e_score_correction_bias.sub_(10)
    _, _, indices = gate(torch.randn(64, 40))
    assert all(len({e // 2 for e in row}) <= 2 for row in indices.tolist())


def test_bias_moves_the_choice_but_not_the_weights():
    gate, hidden = router(n_group=1, topk_group=1), torch.randn(30, 40)
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[5] = 100.0
    _, weights, indices = gate(hidden)
    assert (indices == 5).any(-1).all()
    scores = (hidden @ gate.weight.T).sigmoid().gather(1, indices)
    assert_close(scores / scores.sum(-1, keepdim=True) * 2.5, weights, 1e-6)


def test_router_is_fp32_in_bf16_and_under_autocast():
    gate = router()
    hidden = torch.randn(64, 40).bfloat16()
    exact = gate(hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gate(hidden.float())
    assert all(torch.equal(a, b) for a, b in zip(exact, under_autocast))
    logits, weights, _ = gate.to(torch.bfloat16)(hidden)
    assert logits.dtype == weights.dtype == torch.float32
    assert_close(hidden.float() @ gate.weight.float().T, logits, 1e-6)  # a bf16 product is off by 2e-3


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_bias_is_never_cast(cast):
    model = tiny_model()
    before = [b.clone() for n, b in model.named_buffers() if n.endswith("bias")]
    after = [b for n, b in getattr(model, cast)().named_buffers() if n.endswith("bias")]
    assert len(before) == 2 and all(b.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(before, after))
    assert model.lm_head.weight.dtype != torch.float32


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_a_model_pickles(scoring_func):
    model = tiny_model(scoring_func=scoring_func)
    assert torch.equal(model(tokens()).logits, pickle.loads(pickle.dumps(model))(tokens()).logits)


def test_noise_acts_in_training_only():
    gate, hidden = router(router_noise=0.5), torch.randn(200, 40)
    calm = gate(hidden)[2].sort(-1).values
    assert torch.equal(calm, gate(hidden)[2].sort(-1).values)
    gate.train()
    _, weights, noisy = gate(hidden)
    assert not torch.equal(calm, noisy.sort(-1).values)
    scores = (hidden @ gate.weight.T).sigmoid().gather(1, noisy)
    assert_close(scores / scores.sum(-1, keepdim=True) * 2.5, weights, 1e-6)  # weights stay clean


def test_adaptive_number_of_experts():
    gate, hidden = router(adaptive_expert_threshold=0.7, n_group=1, topk_group=1), torch.randn(100, 40)
    _, weights, indices = gate(hidden)
    scores = (hidden @ gate.weight.T).sigmoid()
    choice = scores + gate.e_score_correction_bias
    kept_counts = set()
    for t in range(100):
        chosen = choice[t].topk(3).indices
        kept = {e.item() for e in chosen if scores[t, e] >= 0.7 * scores[t, chosen].max()}
        assert {e for e in indices[t].tolist() if e < 8} == kept
        assert (weights[t][indices[t] == 8] == 0).all()
        assert weights[t].sum().item() == pytest.approx(2.5, rel=1e-5)
        kept_counts.add(len(kept))
    assert len(kept_counts) > 1  # the threshold does something on this input


def by_the_paper(logits: torch.Tensor, K: int, lengths: list[int], scoring: str) -> list[float]:
    """V3 report eq. 17-20 for each sequence of [B, T, E]."""
    losses = []
    for sequence, T in zip(logits, lengths):
        s = sequence[:T].sigmoid() if scoring == "sigmoid" else sequence[:T].softmax(-1)
        E, loss = s.shape[1], 0.0
        for i in range(E):
            f = sum(i in s[t].topk(K).indices for t in range(T)) * E / (K * T)
            P = sum((s[t, i] / s[t].sum()).item() for t in range(T)) / T
            loss += f * P
        losses.append(loss)
    return losses


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_balance_loss_by_the_paper(scoring):
    config = tiny_config(scoring_func=scoring)
    layers = [torch.randn(3, 7, 8) for _ in range(2)]
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0
    weights = torch.tensor([0.5, 0.2, 0.3])
    expected = sum(
        w * loss for logits in layers for w, loss in zip(weights, by_the_paper(logits, 3, [7, 4, 7], scoring))
    )
    actual = sequence_balance_loss(tuple(x.flatten(0, 1) for x in layers), config, weights, mask)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_scores_cost_one_per_layer():
    """Uniform scores, and counts that are exactly equal: f_i = 1, P_i = 1/E, so the loss is 1."""
    config = tiny_config(num_experts_per_tok=2)
    logits = torch.zeros(8, 8)
    for t in range(8):  # a vanishing preference that gives every expert two of the sixteen places
        logits[t, [t, (t + 1) % 8]] = 1e-6
    loss = sequence_balance_loss((logits,), config, torch.ones(1))
    assert loss.item() == pytest.approx(1.0, rel=1e-5)


def test_balance_loss_gradient_reaches_the_router_alone_through_P():
    config, logits = tiny_config(), torch.randn(10, 8, dtype=torch.float32, requires_grad=True)
    sequence_balance_loss((logits,), config, torch.ones(2)).backward()
    s = logits.detach().sigmoid().clone().requires_grad_()
    f = torch.zeros(2, 8)
    for b in range(2):
        for t in range(5):
            f[b, s[5 * b + t].topk(3).indices] += 8 / (3 * 5)
    P = (s / s.sum(-1, keepdim=True)).view(2, 5, 8).mean(1)
    (f * P).sum().backward()
    assert_close(s.grad * logits.detach().sigmoid() * (1 - logits.detach().sigmoid()), logits.grad, 1e-5)
