"""Loss-free balancing: the update rule, what is counted, and that it balances."""

import math

import pytest
import torch

from modeling_nanodeepseek import LoadBalancingCallback, update_expert_bias
from modeling_nanodeepseek.balancing import ExpertLoad, routers
from tests.conftest import checkpoint_activations, tiny_model, tokens


def biases(model) -> torch.Tensor:
    return torch.stack([gate.e_score_correction_bias.clone() for gate in routers(model)])


def count_by_hand(model, ids, mask=None) -> torch.Tensor:
    """Load [layers, E] from the routers' outputs, seen by hooks."""
    seen, hooks = [], []
    for gate in routers(model):
        hooks.append(gate.register_forward_hook(lambda module, args, output: seen.append(output[2])))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    keep = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    return torch.stack([torch.bincount(choice[keep].flatten(), minlength=8) for choice in seen])


def test_the_rule():
    model = tiny_model().train()
    before, ids = biases(model), tokens()
    expected = count_by_hand(model, ids)
    for gate in routers(model):
        gate.tokens_per_expert = None
    model(ids)
    load = update_expert_bias(model, gamma=0.01)
    assert torch.equal(load.tokens, expected) and (load.tokens.sum(-1) == ids.numel() * 3).all()
    mean = load.tokens.double().mean(-1, keepdim=True)
    step = biases(model) - before
    assert (step[load.tokens > mean] < 0).all() and (step[load.tokens < mean] > 0).all()
    assert torch.allclose(step.abs()[load.tokens != mean], torch.tensor(0.01), atol=1e-6)
    assert torch.equal(load.bias, biases(model))


def test_an_expert_at_the_mean_stays():
    model = tiny_model().train()
    model(tokens())
    for gate in routers(model):
        gate.tokens_per_expert = torch.tensor([10, 20, 30, 20, 20, 20, 20, 20])
    before = biases(model)
    update_expert_bias(model, gamma=0.5)
    assert torch.allclose(biases(model) - before, torch.tensor([0.5, 0, -0.5, 0, 0, 0, 0, 0]), atol=1e-6)


def test_accumulation_counts_the_whole_batch():
    ids = tokens(8, 17)
    whole, split = tiny_model().train(), tiny_model().train()
    whole(ids)
    for part in ids.split([1, 3, 4]):
        split(part)
    a, b = update_expert_bias(whole), update_expert_bias(split)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.bias, b.bias)
    assert update_expert_bias(whole) is None  # forgotten


def test_evaluation_and_inference_are_not_counted():
    model = tiny_model()
    model(tokens())
    for training in (False, True):
        model.train(training).generate(tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert update_expert_bias(model) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    plain, checkpointed = tiny_model().train(), tiny_model(aux_loss_alpha=0.0).train()
    checkpoint_activations(checkpointed, use_reentrant=reentrant)
    if reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(tokens(), labels=tokens()).loss.backward()
    assert torch.equal(update_expert_bias(plain).tokens, update_expert_bias(checkpointed).tokens)


def test_padding_is_not_counted():
    model = tiny_model().train()
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :7] = 0
    mask[2, 10:] = 0
    expected = count_by_hand(model, ids, mask)
    for gate in routers(model):
        gate.tokens_per_expert = None
    model(ids, attention_mask=mask)
    assert torch.equal(update_expert_bias(model).tokens, expected)


def test_dropped_experts_are_not_counted():
    model = tiny_model(adaptive_expert_threshold=0.8).train()
    model(tokens())
    total = update_expert_bias(model).tokens.sum(-1)
    assert (total < tokens().numel() * 3).all() and (total >= tokens().numel()).all()


def test_frozen_and_centred():
    model = tiny_model().train()
    before = biases(model)
    model(tokens())
    load = update_expert_bias(model, gamma=0.0)
    assert torch.equal(before, biases(model)) and load.tokens.sum() > 0
    model(tokens())
    update_expert_bias(model, gamma=0.01, centre=True)
    assert biases(model).mean(-1).abs().max() < 1e-6


def test_models_without_biases():
    dense = tiny_model(n_routed_experts=None).train()
    dense(tokens())
    assert update_expert_bias(dense) is None
    greedy = tiny_model(topk_method="greedy").train()
    greedy(tokens())
    load = update_expert_bias(greedy)
    assert load.tokens.sum() > 0 and (load.bias == 0).all()


def test_it_balances_a_skewed_router():
    model = tiny_model(n_group=1, topk_group=1).train()
    for gate in routers(model):
        gate.e_score_correction_bias.zero_()
        gate.weight.data[:2] *= 6  # two loud experts
    ids = tokens(16, 32)
    violations = []
    for _ in range(150):
        model(ids)
        violations.append(update_expert_bias(model, gamma=0.01).metrics()["expert_max_violation"])
    assert violations[0] > 0.4 and violations[-1] < 0.15


def test_metrics_by_hand():
    load = ExpertLoad(torch.tensor([[4, 4, 4, 4], [8, 8, 0, 0]]), torch.tensor([[0.0, 0, 0, 0], [-0.1, 0, 0, 0.3]]))
    metrics = load.metrics()
    assert metrics["expert_max_violation"] == pytest.approx((0 + 1) / 2)
    assert metrics["expert_load_entropy"] == pytest.approx((1 + math.log(2) / math.log(4)) / 2)
    assert metrics["expert_dead_share"] == pytest.approx(2 / 8)
    assert metrics["expert_bias_range"] == pytest.approx(0.4)


def test_callback_follows_its_schedule():
    class State:
        global_step, max_steps = 0, 10

    model, callback = tiny_model().train(), LoadBalancingCallback(lambda done: 0.01 if done < 0.5 else 0.0)
    moved = []
    for State.global_step in range(10):
        before = biases(model)
        model(tokens())
        callback.on_optimizer_step(None, State, None, model=model)
        moved.append(not torch.equal(before, biases(model)))
    assert moved == [True] * 5 + [False] * 5 and callback.load.tokens.sum() > 0
