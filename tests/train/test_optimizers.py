"""Parameter groups; Muon against torch's own; AdamW against torch's own."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import assert_close, tiny_model, tokens
from train.optimizers import MuonAdamW, build_optimizer, orthogonalize, parameter_groups
from train.recipe import OptimizerSection
from train.trainer import NanoDeepSeekTrainer


def test_every_parameter_is_in_one_group():
    model = tiny_model()
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerSection())}
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert sum(map(len, inside.values())) == len(names) == len(set().union(*inside.values()))
    assert inside["embedding"] == {"model.embed_tokens.weight"} and inside["head"] == {"lm_head.weight"}
    assert inside["gate_up"] == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (1, 2)}
    assert all("norm" in name for name in inside["scalars"])
    assert inside["router"] == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)}
    assert groups["router"]["lr"] == groups["scalars"]["lr"] == OptimizerSection().scalar_lr
    slower = {group["name"]: group["lr"] for group in parameter_groups(model, OptimizerSection(router_lr=2e-4))}
    assert slower["router"] == 2e-4 and slower["scalars"] == OptimizerSection().scalar_lr
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.kv_b_proj.weight"} <= inside["matrices"]
    assert [kind for kind, group in groups.items() if group["muon"]] == ["matrices", "gate_up"]
    assert {kind for kind, group in groups.items() if group["row_blocks"] == 2} == {"gate_up"}
    assert [kind for kind, group in groups.items() if group["weight_decay"]] == ["matrices", "gate_up"]


def test_tied_head_and_frozen_parameters():
    model = tiny_model(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, OptimizerSection())}
    assert "head" not in groups and len(groups["embedding"]) == 1
    assert not any(p is model.model.norm.weight for p in groups["scalars"])


@pytest.mark.parametrize("stage, layers", [("warmup", 3), ("sparse", 3), ("dense", 0)])
def test_the_indexers_groups(stage, layers):
    """In warm-up nothing else is stepped, nor does anything else decay."""
    model = tiny_model(index_topk=5, index_n_heads=6, index_head_dim=8, dsa_stage=stage)
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerSection())}
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {kind: [names[id(p)].split(".indexer.") for p in group["params"]] for kind, group in groups.items()}
    found = {kind: sorted(name[1] for name in group if len(name) == 2) for kind, group in inside.items()}
    assert found["matrices"] == sorted(["wk.weight", "wq_b.weight"] * layers) if layers else not any(found.values())
    if layers:
        assert found["scalars"] == sorted(["k_norm.bias", "k_norm.weight", "weights_proj.weight"] * layers)
    if stage == "warmup":
        assert set(groups) == {"matrices", "scalars"} and sum(map(len, inside.values())) == 5 * layers
    else:
        assert set(groups) == {"matrices", "gate_up", "embedding", "head", "router", "scalars"}


def test_muon_under_deepspeed_is_refused():
    recipe = SimpleNamespace(optimizer=OptimizerSection())
    trainer = SimpleNamespace(is_deepspeed_enabled=True, recipe=recipe, optimizer=None, model=tiny_model())
    with pytest.raises(ValueError, match="optimizer.name='muon' is not possible with DeepSpeed"):
        NanoDeepSeekTrainer.create_optimizer(trainer)
    recipe.optimizer = OptimizerSection(name="adamw")
    assert not any(group["muon"] for group in NanoDeepSeekTrainer.create_optimizer(trainer).param_groups)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_is_torchs_muon(shape):
    """Ten steps from the same start with the same gradients; torch rounds its iteration to bf16."""
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = MuonAdamW([{"params": [ours], "lr": 0.02, "weight_decay": 0.1, "muon": True}])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step(), reference.step()
    assert_close(theirs - start, ours - start, 2e-2)


def test_stacked_experts_are_stepped_matrix_by_matrix():
    """[E, 2m, d] with two row blocks equals 2E separate matrices; scaling one leaves the others alone."""
    stack = torch.nn.Parameter(torch.randn(3, 16, 12))
    singles = [torch.nn.Parameter(block.clone()) for matrix in stack.data for block in matrix.chunk(2)]
    together = MuonAdamW([{"params": [stack], "lr": 0.1, "muon": True, "row_blocks": 2}])
    apart = MuonAdamW([{"params": singles, "lr": 0.1, "muon": True}])
    for scale in (1.0, 50.0):
        stack.grad = torch.randn(3, 16, 12) * torch.tensor([1.0, scale, 0.01]).view(3, 1, 1)
        for single, gradient in zip(singles, [b for m in stack.grad for b in m.chunk(2)]):
            single.grad = gradient.clone()
        together.step(), apart.step()
    expected = torch.stack([torch.cat((singles[2 * e], singles[2 * e + 1])) for e in range(3)])
    assert_close(expected, stack, 1e-6)


def test_orthogonalize_moves_singular_values_to_one():
    matrices = torch.randn(4, 10, 30)
    values = torch.linalg.svdvals(orthogonalize(matrices, 5).float())
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity((u @ vh).flatten(1), orthogonalize(matrices, 5).flatten(1))
    assert cosine.min() > 0.95


def test_adamw_is_torchs_adamw():
    start = torch.randn(5, 7)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = MuonAdamW([{"params": [ours], "lr": 0.01, "weight_decay": 0.1}], betas=(0.8, 0.9), eps=1e-7)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    for _ in range(5):
        ours.grad = torch.randn(5, 7)
        theirs.grad = ours.grad.clone()
        mine.step(), reference.step()
    assert_close(theirs - start, ours - start, 1e-5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_count_of_steps_is_loaded_beside_its_parameter(name):
    """As the fused kernel wants it; checkpoints are read on the CPU. "meta" stands in for another device."""
    optimizer = build_optimizer(tiny_model().train(), section := OptimizerSection(name=name))
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    elsewhere = build_optimizer(tiny_model().to("meta"), section)
    elsewhere.load_state_dict(optimizer.state_dict())
    counts = [state["step"] for state in elsewhere.state.values() if "step" in state]
    assert counts and all(count.device.type == "meta" for count in counts)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_survives_saving(name):
    """Three steps, save, load, three more = six steps."""

    def run(model, optimizer, steps):
        for step in steps:
            ids = tokens(seed=step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    section = OptimizerSection(name=name, matrix_lr=0.01, embedding_lr=0.01)
    whole = tiny_model().train()
    run(whole, build_optimizer(whole, section), range(6))
    first = tiny_model().train()
    optimizer = build_optimizer(first, section)
    run(first, optimizer, range(3))
    second = tiny_model(seed=9).train()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, section)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(3, 6))
    for (key, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), key
