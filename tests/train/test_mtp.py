"""Multi-token prediction by recipes: the schedule of its weight, log, evaluation, resume, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.small_run import TINY_MODEL
from train import pretrain
from train.trainer import NanoDeepSeekTrainer

MODEL = {"config": "small", "overrides": TINY_MODEL | {"num_nextn_predict_layers": 2}}


@pytest.fixture
def recipe(tiny_recipe):
    def build(trainer: dict | None = None, model: dict = MODEL, **changes):
        trainer = {"report_to": "none", "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1} | (trainer or {})
        return tiny_recipe(trainer=trainer, **changes).model_copy(update={"model": pretrain.ModelSection(**model)})

    return build


def history(run: str) -> list[dict]:
    return json.loads(Path(run, "trainer_state.json").read_text())["log_history"]


def test_the_weight_follows_its_schedule(recipe, capsys):
    run = recipe({"max_steps": 8}, mtp={"coef": 0.4, "final_coef": 0.05, "switch_at": 0.5})
    pretrain.run(run)
    entries = [entry for entry in history(run.output_dir) if "ce_loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    for entry in entries:
        weight = 0.4 if entry["step"] <= 4 else 0.05
        further = (entry["mtp_loss_1"] + entry["mtp_loss_2"]) / 2
        total = entry["ce_loss"] + 1e-4 * entry["balance_loss"] + weight * further
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert 0 <= entry["mtp_accuracy_2"] <= 1 and "mtp_loss_3" not in entry
    printed = capsys.readouterr().out
    assert "more for multi-token prediction" in printed and "second token" in printed
    model = NanoDeepSeekForCausalLM.from_pretrained(run.output_dir)
    assert model.config.mtp_loss_coef == 0.05 and len(model.model.predictors) == 2


def test_evaluation_measures_each_module(recipe):
    run = recipe({"max_steps": 4})
    trainer = pretrain.build_trainer(run, pretrain.training_arguments(run))
    trainer.train()
    metrics = trainer.evaluate()
    right, counted = torch.zeros(2), torch.zeros(2)
    with torch.no_grad():
        for row in trainer.eval_dataset:  # token by token
            output = trainer.model(
                row["input_ids"][None], position_ids=row["position_ids"][None], output_mtp_hidden_states=True
            )
            ids, positions = row["input_ids"], row["position_ids"]
            document = (positions == 0).cumsum(0)
            for k, state in enumerate(output.mtp_hidden_states, start=1):
                guesses = trainer.model.lm_head(state)[0].argmax(-1)
                for i in range(len(ids) - k - 1):
                    if document[i] == document[i + k + 1]:
                        counted[k - 1] += 1
                        right[k - 1] += guesses[i] == ids[i + k + 1]
    for k in (0, 1):
        assert metrics[f"eval_mtp_accuracy_{k + 1}"] == pytest.approx((right[k] / counted[k]).item(), rel=1e-6)


def test_accumulated_batches_log_the_same(recipe, tmp_path):
    logs = []
    for size, steps in ((4, 1), (2, 2)):
        run = recipe({"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps})
        run.output_dir = str(tmp_path / f"{size}")
        pretrain.run(run)
        logs.append([entry for entry in history(run.output_dir) if "ce_loss" in entry])
    for whole, parts in zip(*logs):
        for key in ("loss", "mtp_loss_1", "mtp_loss_2", "mtp_accuracy_1", "mtp_accuracy_2"):
            assert parts[key] == pytest.approx(whole[key], rel=2e-4, abs=1e-6), key


def test_resume_goes_on_as_if_uninterrupted(recipe, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    schedule = {"coef": 0.4, "final_coef": 0.1, "switch_at": 0.7}
    whole = recipe(settings, mtp=schedule)
    pretrain.run(whole)
    again = recipe(settings | {"resume_from_checkpoint": str(Path(whole.output_dir, "checkpoint-3"))}, mtp=schedule)
    again.output_dir = str(tmp_path / "again")
    pretrain.run(again)
    first, second = (load_file(Path(run.output_dir, "model.safetensors")) for run in (whole, again))
    assert any(".layers.3.eh_proj" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    losses = [[e["loss"] for e in history(run.output_dir) if "loss" in e] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_a_model_without_modules_is_refused(recipe):
    run = recipe(model={"config": "small", "overrides": TINY_MODEL}, mtp={"coef": 0.3})
    with pytest.raises(ValueError, match="num_nextn_predict_layers of at least 1, and 'small' has none"):
        pretrain.run(run)


def test_a_detached_trunk(recipe):
    run = recipe(mtp={"detach_trunk": True})
    trainer = pretrain.build_trainer(run, pretrain.training_arguments(run))
    assert isinstance(trainer, NanoDeepSeekTrainer) and trainer.model.config.mtp_detach_trunk
