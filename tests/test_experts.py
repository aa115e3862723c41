"""Every implementation of the routed experts against one call per token and slot: values and all gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from modeling_nanodeepseek import experts
from modeling_nanodeepseek.moe import DeepseekMoE
from tests.conftest import assert_close, tiny_config, tiny_model, tokens

IMPLEMENTATIONS = ["eager", "sorted_mm", "batched_mm", "grouped_mm"]
AND_ON_A_GPU = [*IMPLEMENTATIONS, "sorted_mm-as-on-a-gpu"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
T = 21
EMPTY, SINGLE = 3, 5  # the expert that no token chooses, and the one that a single token does


@pytest.fixture(autouse=True)
def as_on_a_gpu(request, monkeypatch):
    """The form of ours that GPUs run, run here."""
    if "as-on-a-gpu" in request.node.name:
        monkeypatch.setattr(experts, "prefers_grouped", lambda *operands: True)


@torch.no_grad()
def build(implementation: str, dtype: torch.dtype, gated: bool, threshold: float) -> tuple[DeepseekMoE, torch.Tensor]:
    """A layer and [1, T, d] inputs to it, with router biases for which EMPTY and SINGLE are what they say."""
    config = tiny_config(
        adaptive_expert_threshold=threshold, gated_mlp=gated, hidden_act="silu" if gated else "relu2",
        n_group=1, topk_group=1,
    )  # fmt: skip
    config._experts_implementation = implementation.split("-")[0]
    moe = DeepseekMoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe, hidden = moe.to(dtype), torch.randn(1, T, 40).to(dtype)
    bias = moe.gate.e_score_correction_bias
    bias[EMPTY] = -100.0
    scores = (hidden[0].float() @ moe.gate.weight.float().T).sigmoid()
    rivals = (scores + bias)[:, [e for e in range(8) if e != SINGLE]].topk(3).values[:, -1]
    wanted, next_one = (rivals - scores[:, SINGLE]).sort().values[:2]  # the bias at which a token takes it
    bias[SINGLE] = (wanted + next_one) / 2
    return moe, hidden


def by_the_definition(moe: DeepseekMoE, hidden: torch.Tensor) -> torch.Tensor:
    """sum_k w_k Expert_k(u) + Shared(u) of [1, T, d] in fp64."""
    _, weights, indices = moe.gate(hidden)
    routed, rows = moe.experts, []
    for t, u in enumerate(hidden[0]):
        row = moe.shared_experts(u)
        for weight, e in zip(weights[t], indices[t]):
            if e == 8:  # dropped
                continue
            if routed.has_gate:
                gate, up = F.linear(u, routed.gate_up_proj[e]).chunk(2)
                inner = F.silu(gate) * up
            else:
                inner = F.linear(u, routed.up_proj[e]).relu() ** 2
            row = row + weight * F.linear(inner, routed.down_proj[e])
        rows.append(row)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("implementation", AND_ON_A_GPU)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_they_agree(implementation, dtype, gated, threshold):
    """Input, router, experts and shared experts; twice, in memory that held NaN."""
    moe, hidden = build(implementation, dtype, gated, threshold)
    exact, probe = copy.deepcopy(moe).double(), torch.randn(1, T, 40, dtype=torch.float64)
    exact_hidden = hidden.double().requires_grad_()
    expected = by_the_definition(exact, exact_hidden)
    (expected * probe).sum().backward()
    counts = exact.gate.last_choice.flatten().bincount(minlength=9)
    assert counts[EMPTY] == 0 and counts[SINGLE] <= 1 and (threshold > 0 or counts[SINGLE] == 1)
    assert (counts[8] > 0) == (threshold > 0)

    for _ in range(2):
        moe.zero_grad()
        inputs = hidden.clone().requires_grad_()
        output = moe(inputs)
        assert output.dtype == dtype
        (output * probe.to(dtype)).sum().backward()
        assert torch.equal(moe.gate.last_choice.sort(-1).values, exact.gate.last_choice.sort(-1).values)
        assert_close(expected, output, TOLERANCE[dtype], "output")
        assert_close(exact_hidden.grad, inputs.grad, TOLERANCE[dtype], "input")
        for (name, parameter), reference in zip(moe.named_parameters(), exact.parameters()):
            assert_close(reference.grad, parameter.grad, TOLERANCE[dtype], name)
        for name in moe.experts.stacked_names:
            assert (getattr(moe.experts, name).grad[EMPTY] == 0).all(), name


@pytest.mark.parametrize("implementation", AND_ON_A_GPU)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_no_token_and_one(implementation, count, threshold):
    moe, hidden = build(implementation, torch.float32, True, threshold)
    hidden = hidden[:, :count].clone().requires_grad_()
    output = moe(hidden)
    assert output.shape == (1, count, 40)
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
    if count:
        assert_close(by_the_definition(copy.deepcopy(moe).double(), hidden.double()), output, 1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_model_learns_the_same_by_each(threshold):
    """Loss and every gradient of a whole training step, balance loss included."""
    results = []
    for implementation in IMPLEMENTATIONS:
        model = tiny_model(adaptive_expert_threshold=threshold, aux_loss_alpha=0.3).train()
        model.set_experts_implementation(implementation)
        assert all(
            layer.mlp.experts.config._experts_implementation == implementation for layer in model.model.layers[1:]
        )
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        results.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
    for implementation, result in zip(IMPLEMENTATIONS[1:], results[1:]):
        for name, expected in results[0].items():
            assert_close(expected, result[name], 1e-4, f"{implementation} {name}")


def test_the_fast_experts_really_run(monkeypatch):
    """transformers looks for the switch in the model file's text; ours lies elsewhere and must still be found."""
    model = tiny_model()
    assert model.config._experts_implementation == "sorted_mm"
    calls = []
    inner = experts._SortedExperts.apply
    monkeypatch.setattr(experts._SortedExperts, "apply", lambda *a: calls.append(1) or inner(*a))
    model(tokens())
    assert len(calls) == 2
    model.set_experts_implementation("eager")
    model(tokens())
    assert len(calls) == 2


def test_an_unknown_implementation_is_refused():
    with pytest.raises((ValueError, KeyError), match="fastest"):
        tiny_model().set_experts_implementation("fastest")
