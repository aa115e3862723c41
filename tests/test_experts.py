"""Every implementation of the routed experts against one call per token and slot: values and all gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from modeling_nanodeepseek import experts, update_expert_bias
from modeling_nanodeepseek.moe import DeepseekMoE
from tests.conftest import EARLIER_TRANSFORMERS, assert_close, graphs, tiny_config, tiny_model, tokens

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


def test_autocast_does_not_reach_inside(monkeypatch):
    """Where bf16 has no matrix units its products are left aside, forward and backward."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    moe, hidden = build("sorted_mm", torch.float32, True, 0.0)
    _, weights, indices = moe.gate(hidden)
    leaves = hidden[0].requires_grad_(), weights.detach().requires_grad_(), *moe.experts.parameters()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = moe.experts(leaves[0], indices, leaves[1])
            results.append((output, *torch.autograd.grad(output.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_split_backward_computes_what_it_is_asked_for(monkeypatch):
    """A pipeline asks for the inputs' gradients first: no product for a weight is made then. Then it asks for these."""
    moe, hidden = build("sorted_mm", torch.float32, True, 0.0)
    _, weights, indices = moe.gate(hidden)
    leaf, mine = hidden[0].detach().requires_grad_(), tuple(moe.experts.parameters())
    output = moe.experts(leaf * 1.0, indices, weights.detach().requires_grad_()).square().sum()
    whole = torch.autograd.grad(output, (leaf, *mine), retain_graph=True)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or mm(*args, **kwargs))
    (of_input,) = torch.autograd.grad(output, leaf, retain_graph=True)
    assert not products and torch.equal(of_input, whole[0])
    of_weights = torch.autograd.grad(output, mine)
    assert products and all(torch.equal(a, b) for a, b in zip(of_weights, whole[1:]))


@torch.no_grad()
@pytest.mark.parametrize("count, gradients", [(T, True), (T, False), (1, False)])
def test_bf16_adds_up_experts_in_fp32(count, gradients):
    """Experts 0 and 2 are large and cancel; in a bf16 sum they would take expert 1 with them. So in the gradient."""
    moe, hidden = build("sorted_mm", torch.bfloat16, True, 0.0)
    experts = moe.experts.train(gradients)
    experts.gate_up_proj[2] = experts.gate_up_proj[0]
    experts.down_proj[0] *= 1024
    experts.down_proj[2] = -experts.down_proj[0]
    hidden, indices = hidden[0, :count].clone(), torch.arange(3).expand(count, -1)
    results = []
    for chosen in (indices, torch.where(indices == 1, 1, 3)):  # all three; the second alone, as 3 gets no weight
        inputs, weights = hidden.clone().requires_grad_(gradients), torch.ones(count, 3)
        with torch.set_grad_enabled(gradients):
            output = experts(inputs, chosen, weights.masked_fill(chosen == 3, 0.0))
            results.append((output, torch.autograd.grad(output.sum(), inputs)[0]) if gradients else (output,))
    for together, alone in zip(*results):
        assert_close(alone, together, 2e-2)


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_frozen_experts(frozen):
    """What is frozen gets no gradient, and the others theirs."""
    moe, hidden = build("sorted_mm", torch.float32, True, 0.0)
    moe(hidden).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in moe.named_parameters()}
    moe.zero_grad()
    getattr(moe.experts, frozen).requires_grad_(False)
    moe(hidden).square().sum().backward()
    for name, parameter in moe.named_parameters():
        if name == f"experts.{frozen}":
            assert parameter.grad is None
        else:
            assert torch.equal(expected[name], parameter.grad), name


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_at_a_time(gated, threshold, tokens, monkeypatch):
    """As in decoding and in the verification of drafts, which sort nothing."""
    calls, inner = [], experts._few_tokens
    monkeypatch.setattr(experts, "_few_tokens", lambda *a: calls.append(1) or inner(*a))
    moe, hidden = build("sorted_mm", torch.float32, gated, threshold)
    expected = by_the_definition(copy.deepcopy(moe).double(), hidden.double())
    for t in range(0, T, tokens):
        assert_close(expected[:, t : t + tokens], moe.eval()(hidden[:, t : t + tokens]), 1e-5, f"token {t}")
    assert len(calls) == -(-T // tokens)


class KernelGemm(torch.autograd.Function):
    """A grouped GEMM as GPUs run it: rows beyond the last end, and their gradients, are whatever memory held."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        output, start = x.new_full((len(x), weight.shape[-1]), float("nan")), 0
        for matrix, end in zip(weight, ends.tolist()):
            output[start:end], start = x[start:end] @ matrix, end
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        grad_x, grad_weight, start = torch.full_like(x, float("nan")), torch.zeros_like(weight), 0
        for e, end in enumerate(ends.tolist()):
            grad_x[start:end], grad_weight[e] = grad[start:end] @ weight[e].mT, x[start:end].mT @ grad[start:end]
            start = end
        return grad_x, grad_weight, None


@pytest.mark.parametrize("gemm", ["torch", "kernel"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_the_grouped_road_of_gpus(gemm, gated, threshold, monkeypatch):
    """On a CPU, with torch's grouped GEMM and with one that leaves the rows of dropped slots full of NaN."""
    if gemm == "kernel":
        monkeypatch.setattr(experts, "_grouped_mm", KernelGemm.apply)
    else:
        monkeypatch.setattr(experts, "_grouped_mm", lambda x, weight, ends: F.grouped_mm(x, weight, offs=ends))
    calls, inner = [], experts._grouped
    monkeypatch.setattr(experts, "_grouped", lambda *a, **k: calls.append(1) or inner(*a, **k))
    moe, hidden = build("sorted_mm", torch.float32, gated, threshold)
    exact = copy.deepcopy(moe).double()
    inputs, exact_inputs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    probe = torch.randn(1, T, 40, dtype=torch.float64)
    expected = by_the_definition(exact, exact_inputs)
    (expected * probe).sum().backward()
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        output = moe(inputs)
    (output * probe.float()).sum().backward()
    assert calls
    assert_close(expected, output, 1e-5, "output")
    assert_close(exact_inputs.grad, inputs.grad, 1e-5, "input")
    for (name, parameter), reference in zip(moe.named_parameters(), exact.parameters()):
        assert_close(reference.grad, parameter.grad, 1e-5, name)


# In transformers 5.17 the backward of what it registers for fp32, grouped_mm_fallback, cannot be compiled.
COMPILED = [(torch.bfloat16, 0.5)] if EARLIER_TRANSFORMERS else [(torch.float32, 0.0), (torch.bfloat16, 0.5)]


@pytest.mark.parametrize("dtype, threshold", COMPILED)
def test_training_compiles_into_one_graph(dtype, threshold, fresh_compiler):
    """Whatever the split of tokens over experts. A second graph adds to the counts of an earlier forward: none more."""
    overrides = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "adaptive_expert_threshold": threshold}
    model = tiny_model(aux_loss_alpha=0.3, **overrides).to(dtype).train()
    plain = copy.deepcopy(model)
    model(tokens(), labels=tokens())  # transformers' hooks for router logits are set up outside a graph
    update_expert_bias(model, gamma=0.0)
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    seen, splits = [], []
    for ids in (tokens(2, 16, seed=1), torch.full((2, 16), 5), tokens(2, 16, seed=2), tokens(2, 16, seed=3)):
        losses = [run(input_ids=ids, labels=ids).loss for run in (step, plain)]
        for loss in losses:
            loss.backward()
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert_close(losses[1], losses[0], tolerance)
        for (name, ours), expected in zip(model.named_parameters(), plain.parameters()):
            assert_close(expected.grad, ours.grad, tolerance, name)
        seen.append(graphs())
        splits.append(model.model.layers[0].mlp.gate.tokens_per_expert)
    assert seen == [1, 2, 2, 2]
    assert (splits[1] - splits[0] > 0).sum() <= 3 < (splits[0] > 0).sum()  # one token everywhere goes one way
    assert torch.equal(update_expert_bias(model).tokens, update_expert_bias(plain).tokens)


@pytest.mark.parametrize("implementation", ["eager", "sorted_mm"])
def test_what_zero3_hooks_runs_once(implementation):
    """ZeRO-3 hooks every module, and ends where processes count calls differently: the activation's, by experts that
    have tokens. And it loads stacked experts into weights that are empty, as it has shared them."""
    moe, hidden = build(implementation, torch.float32, True, 0.0)
    calls = []
    for module in moe.modules():
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    moe.train()(hidden)
    routed = [module for module in calls if module in set(moe.experts.modules())]
    assert routed == [moe.experts]
    state = {f"experts.{name}": torch.empty(0) for name in moe.experts.state_dict()}
    for parameter in moe.experts.parameters():
        parameter.data = torch.empty(0)
    assert not moe.load_state_dict(state, strict=False).unexpected_keys


def test_an_unknown_implementation_is_refused():
    with pytest.raises((ValueError, KeyError), match="fastest"):
        tiny_model().set_experts_implementation("fastest")


@torch.no_grad()
def test_a_module_runs_the_code_of_its_own_file(monkeypatch):
    """A package and a copy loaded from the Hub, of another version, register the same name; the last one stays."""
    moe, hidden = build("sorted_mm", torch.float32, True, 0.0)
    monkeypatch.setattr(type(moe.experts), "sorted_mm", lambda self, hidden, *args: torch.zeros_like(hidden))
    assert torch.equal(moe.eval()(hidden), moe.shared_experts(hidden))
