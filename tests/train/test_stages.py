"""Sparse training by recipes: dense, warm-up, sparse; its log, its resume, and stages that cannot be started."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.balancing import routers
from tests.small_run import TINY_MODEL
from train import pretrain

INDEXER = {"index_topk": 4, "index_n_heads": 3, "index_head_dim": 8}
# Weights large enough for attention to differ between keys: there is something to learn.
LATENT = {
    "config": "small",
    "overrides": TINY_MODEL | {"q_lora_rank": 16, "num_hidden_layers": 3, "initializer_range": 0.2},
}


@pytest.fixture
def stage(tiny_recipe, tmp_path):
    """The recipe of a run of six steps in the folder `name`, from the model in the folder `start`."""

    def build(name: str, start: str | None = None, model: dict | None = None, **changes):
        origin = LATENT if start is None else {"checkpoint": str(tmp_path / start)}
        trainer = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "report_to": "none"}
        trainer |= changes.pop("trainer", {})
        recipe = tiny_recipe(output_dir=str(tmp_path / name), trainer=trainer, **changes).model_dump()
        recipe["model"] = origin | (model or {})
        return pretrain.Recipe.model_validate(recipe)

    return build


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def dense(stage):
    return pretrain.run(stage("dense", trainer={"max_steps": 12}))


def test_three_stages(dense, stage, tmp_path, capsys):
    rates = {"matrix_lr": 0.05, "scalar_lr": 0.02}
    warm = stage(
        "warmup", "dense", {"indexer": INDEXER, "dsa_stage": "warmup"}, optimizer=rates, trainer={"max_steps": 30}
    )
    after = pretrain.run(warm)
    entries = [entry for entry in history(tmp_path / "warmup") if "index_loss" in entry]
    assert entries[-1]["index_loss"] < 0.8 * entries[0]["index_loss"]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + entry["index_loss"], rel=1e-4)
        assert entry["index_kl"] == pytest.approx(entry["index_loss"] / 3, rel=1e-6)
        assert "expert_max_violation" not in entry and "balance_loss" not in entry
    printed = capsys.readouterr().out
    assert "index KL" in printed and "index recall" in printed
    scores = [entry["eval_index_recall"] for entry in history(tmp_path / "warmup") if "eval_index_recall" in entry]
    assert scores[-1] == after["eval_index_recall"] and 0.2 < scores[0] < 1
    # Attention stayed dense and everything else frozen.
    assert after["eval_loss"] == pytest.approx(dense["eval_loss"], rel=1e-6)
    before, now = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "warmup"))
    assert {name for name in now if name not in before} == {name for name in now if ".indexer." in name} != set()
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    assert NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "warmup").config.dsa_stage == "warmup"

    sparse = pretrain.run(
        stage(
            "sparse",
            "warmup",
            {"dsa_stage": "sparse"},
            optimizer={"matrix_lr": 0.005, "embedding_lr": 0.02, "head_lr": 0.001},
        )
    )
    entries = [entry for entry in history(tmp_path / "sparse") if "index_loss" in entry]
    for entry in entries:
        terms = entry["ce_loss"] + 1e-4 * entry["balance_loss"] + entry["index_loss"]
        assert entry["loss"] == pytest.approx(terms, rel=1e-4)
        assert entry["expert_max_violation"] >= 0
    assert 0.2 < sparse["eval_index_recall"] < 1 and sparse["eval_loss"] < dense["eval_loss"]
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "sparse")
    assert model.config.dsa_stage == "sparse" and all(p.requires_grad for p in model.parameters())
    moved = load_file(tmp_path / "sparse" / "model.safetensors")
    assert all(not torch.equal(now[name], moved[name]) for name in moved if "indexer.w" in name)
    # Without a word about it the stage is the checkpoint's.
    recipe = stage("more", "sparse")
    assert pretrain.load_model(recipe, pretrain.load_tokenizer(recipe, None)).config.dsa_stage == "sparse"


def test_resume_in_the_middle_of_warm_up(dense, stage, tmp_path):
    added = {"indexer": INDEXER, "dsa_stage": "warmup"}
    save = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    pretrain.run(stage("whole", "dense", added, trainer=save))
    half = stage("half", "dense", added, trainer=save)
    trainer = pretrain.build_trainer(half, pretrain.training_arguments(half))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    keys = ("loss", "index_loss", "ce_loss", "learning_rate", "grad_norm")
    whole = [{k: e[k] for k in keys} for e in history(tmp_path / "whole") if "index_loss" in e]
    again = [{k: e[k] for k in keys} for e in trainer.state.log_history if "index_loss" in e]
    assert len(whole) == 6 and whole == again
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        if ".experts." not in name:  # stacked in memory
            assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if ".indexer." not in n)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"accumulation": 2}])
def test_ways_to_run_a_stage(settings, dense, stage):
    """Warm-up with checkpointed activations, under bf16 autocast and in micro-batches: the same KL."""
    added, losses = {"indexer": INDEXER, "dsa_stage": "warmup"}, []
    for name, way in (("plain", {}), ("other", settings)):
        split = way.get("accumulation", 1)
        trainer = {"max_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": split}
        trainer |= {"per_device_train_batch_size": 4 // split, "eval_strategy": "no"}
        trainer["gradient_checkpointing"] = way.get("gradient_checkpointing", False)
        recipe = stage(name, "dense", added, trainer=trainer, precision=way.get("precision", "fp32"))
        run = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
        run.train()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        losses.append([entry["index_loss"] for entry in run.state.log_history if "index_loss" in entry])
    plain, other = losses
    assert len(plain) == 2 and other == pytest.approx(plain, rel=0.02 if "precision" in settings else 1e-4)


def test_recall_in_evaluation_is_exact(dense, stage):
    """Over the tokens that predict one and see more keys than are selected, whatever the batches; all layers alike."""
    recipe = stage("warmup", "dense", {"indexer": INDEXER, "dsa_stage": "warmup"})
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    assert len(trainer.eval_dataset) % 3 > 0  # the last batch is not full
    metrics, mass, count = trainer.evaluate(), 0.0, 0
    for row in trainer.eval_dataset:
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
        recalls = torch.stack(trainer.model(**inputs, output_index_recall=True).index_recall)[:, 0]
        for t in range(31):
            if row["position_ids"][t] >= 4 and row["position_ids"][t + 1] > 0:
                mass, count = mass + recalls[:, t].mean().item(), count + 1
    assert 0 < count < metrics["eval_tokens"]
    assert metrics["eval_index_recall"] == pytest.approx(mass / count, rel=1e-5)
    assert all(gate.tokens_per_expert is None for gate in routers(trainer.model))


REFUSED = {
    "sparse without indexer": (
        {"dsa_stage": "sparse"},
        ["dsa_stage='sparse' cannot start from", "dense", "no indexer", "'warmup' first"],
    ),
    "warm-up without indexer": ({"dsa_stage": "warmup"}, ["dsa_stage='warmup' cannot start from", "model.indexer="]),
    "another field": ({"indexer": INDEXER | {"hidden_size": 3}}, ["begin with 'index_'", "hidden_size"]),
    "a misspelt field": ({"indexer": INDEXER | {"index_heads": 3}}, ["index_heads", "did you mean"]),
    "an impossible value": ({"indexer": INDEXER | {"index_head_dim": 2}}, ["index_head_dim=2", "qk_rope_head_dim=4"]),
}


@pytest.mark.parametrize("case", [*REFUSED, "a second indexer"])
def test_stages_that_cannot_start(case, stage, tiny_recipe, tmp_path, monkeypatch):
    """One clear error, before any text is tokenised."""
    changes, words = REFUSED.get(case) or ({"indexer": INDEXER}, ["for a model without one", "index_topk=4"])
    recipe = stage("dense")
    documents, _ = pretrain.load_data(recipe)
    tokenizer = pretrain.load_tokenizer(recipe, documents)
    model = pretrain.load_model(recipe, tokenizer)
    (model.with_indexer(**INDEXER) if case == "a second indexer" else model).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(pretrain, "pack", lambda *a, **k: pytest.fail("text was tokenised"))
    values = stage("refused", "dense").model_dump(mode="json")
    values["model"] |= changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as error:
        pretrain.main(["--config", str(tmp_path / "recipe.yaml")])
    message = str(error.value)
    for word in words:
        assert word in message, message
