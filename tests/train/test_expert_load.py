"""What a run keeps of its experts and gradients: numbers by layer and part, a file that survives kills and resumes."""

import json
import math

import pytest
import torch

from modeling_nanodeepseek.balancing import ExpertLoad
from tests.conftest import tiny_model, tokens
from tests.small_run import TINY_MODEL
from train import pretrain
from train.expert_load import FILE, by_layer, read_expert_load
from train.gradients import gradient_norms, part_of


def test_numbers_of_each_layer():
    load = ExpertLoad(torch.tensor([[4, 0, 2, 2], [0, 0, 0, 0]]), torch.tensor([[0.1, -0.2, 0.0, 0.0], [0.0] * 4]))
    numbers = by_layer(load, [1, 2])  # layer 2 rested
    assert numbers == pytest.approx({"expert_max_violation/layer_1": 1.0, "expert_bias_range/layer_1": 0.3})


def test_gradients_by_part():
    sparse = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8, "num_nextn_predict_layers": 1}
    model, ids = tiny_model(**sparse, aux_loss_alpha=0.1).train(), tokens()
    model(ids, labels=ids).loss.backward()
    norms = gradient_norms(model)
    parts = ("embedding", "head", "router", "experts", "indexer", "mtp", "matrices", "scalars")
    assert set(norms) == {f"grad_norm/{part}" for part in parts}
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert math.hypot(*norms.values()) == pytest.approx(whole, rel=1e-5)
    names = dict(model.named_parameters())
    assert norms["grad_norm/head"] == pytest.approx(model.lm_head.weight.grad.norm().item(), rel=1e-5)
    gates = [names[f"model.layers.{layer}.mlp.gate.weight"].grad for layer in (1, 2)]
    assert norms["grad_norm/router"] == pytest.approx(torch.stack(gates).norm().item(), rel=1e-5)
    assert gradient_norms(model, scale=4.0)["grad_norm/head"] == pytest.approx(norms["grad_norm/head"] / 4, rel=1e-6)
    assert part_of("base.model.layers.3.mlp.gate.weight", gates[0], layers=3) == "mtp"
    assert part_of("model.layers.0.self_attn.o_proj.weight", gates[0], layers=3) == "matrices"


def build(recipe):
    return pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))


def test_a_run_keeps_them_and_a_resume_goes_on(tiny_recipe, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 4, "report_to": []}
    settings |= {"max_grad_norm": 0.01, "gradient_accumulation_steps": 2}
    recipe = tiny_recipe(trainer=settings, balance={"gamma": 0.01})
    trainer = build(recipe)
    trainer.train()
    run = tmp_path / "run"
    entries = read_expert_load(run)
    log = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in log] == [1, 2, 3, 4]
    choices = 2 * 4 * 32 * TINY_MODEL["num_experts_per_tok"]  # micro-batches, rows, tokens of a full row
    for kept, logged in zip(entries, log):
        (loads,), (bias,) = kept["tokens"], kept["bias"]
        assert kept["layers"] == [1] and 0.8 * choices < sum(loads) <= choices
        assert logged["expert_max_violation/layer_1"] == pytest.approx(max(loads) / (sum(loads) / 4) - 1)
        assert logged["expert_bias_range/layer_1"] == pytest.approx(max(bias) - min(bias), abs=1e-6)
        parts = [value for key, value in logged.items() if key.startswith("grad_norm/")]
        assert math.hypot(*parts) == pytest.approx(logged["grad_norm"], rel=1e-4) and logged["grad_norm"] > 0.1
        assert logged["expert_global_violation"] == pytest.approx(logged["expert_max_violation"])
    settings["logging_steps"] = 2
    trainer = build(tiny_recipe(output_dir=str(tmp_path / "less"), trainer=settings, balance={"gamma": 0.01}))
    trainer.train()
    found = [entry["expert_global_violation"] for entry in trainer.state.log_history if "ce_loss" in entry]
    loads = torch.tensor([entry["tokens"][0] for entry in entries]).view(2, 2, 4).sum(1).double()  # of two steps each
    assert found == pytest.approx((loads.amax(-1) / loads.mean(-1) - 1).tolist())
    whole = (run / FILE).read_text()
    (run / FILE).write_text(whole + '{"step": 5, "la')  # killed while it wrote
    build(recipe).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / FILE).read_text() == whole
    build(recipe).train()  # from the start: nothing of the old run stays
    assert [entry["step"] for entry in read_expert_load(run)] == [1, 2, 3, 4]
    (run / FILE).write_text("damaged\n" + whole)
    with pytest.raises(ValueError, match="expert_load.jsonl' line 1 is damaged"):
        read_expert_load(run)


def test_a_dense_model_keeps_none(tiny_recipe, tmp_path):
    recipe = tiny_recipe(trainer={"max_steps": 2, "report_to": []})
    recipe.model.overrides["n_routed_experts"] = None
    build(recipe).train()
    assert read_expert_load(tmp_path / "run") == [] and not (tmp_path / "run" / FILE).exists()
    assert json.dumps(read_expert_load(tmp_path)) == "[]"
