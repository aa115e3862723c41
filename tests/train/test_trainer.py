"""The Trainer: exact evaluation, schedule, time limit, accumulation, log, resume."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.trainer_callback import TrainerState

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.balancing import routers
from train import pretrain
from train.accounting import count_parameters, training_flops_per_token
from train.models import build_config
from train.recipe import BalanceSection, ScheduleSection
from train.trainer import Clock, LineCallback, NanoDeepSeekTrainer, lr_factor


def test_schedule():
    schedule = ScheduleSection(warmup=0.1, decay=0.4, final=0.2)
    points = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.5: 1.0, 0.6: 1.0, 0.8: 0.6, 1.0: 0.2, 1.3: 0.2}
    for progress, factor in points.items():
        assert lr_factor(progress, schedule) == pytest.approx(factor), progress
    assert lr_factor(1.0, ScheduleSection(warmup=0, decay=0)) == 1.0
    assert lr_factor(1.2, ScheduleSection(warmup=0, decay=0)) == 1.0  # a scheduler looks one step beyond the end


def test_clock_ends_the_run_and_survives_a_resume():
    args, control = SimpleNamespace(world_size=1), SimpleNamespace(should_training_stop=False)
    clock = Clock(max_seconds=100.0, spent=50.0)
    clock.on_step_begin(args, None, control)
    clock.on_step_end(args, None, control)
    assert not control.should_training_stop and 50 < clock.spent < 51
    clock.spent = 100.0
    clock.on_step_begin(args, None, control)
    clock.on_step_end(args, None, control)
    assert control.should_training_stop
    restored = Clock.from_state(clock.state())
    assert restored.spent == clock.spent and restored.max_seconds == 100.0


def test_time_left(monkeypatch, capsys):
    """By steps or by the time limit, whichever ends first, with what evaluation takes beside the training."""
    assert Clock().seconds_left(10, 2.0) == 20.0
    assert Clock(max_seconds=100.0, spent=85.0).seconds_left(10, 2.0) == 15.0
    assert Clock(max_seconds=100.0, spent=70.0).seconds_left(10, 2.0) == 20.0
    assert Clock(max_seconds=100.0, spent=120.0).seconds_left(10, 2.0) == 0.0
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock, args = Clock(max_seconds=100.0, spent=30.0), SimpleNamespace(world_size=1)
    clock.on_train_begin(args, SimpleNamespace(stateful_callbacks={}), None)
    assert clock.seconds_left(10, 2.0) == 20.0
    clock.spent, now[0] = 50.0, 1030.0  # 20 s of training in 30 s
    assert clock.seconds_left(10, 2.0) == 30.0 and clock.seconds_left(100, 2.0) == 75.0
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=90)
    LineCallback().on_log(args, state, None, logs={"loss": 2.0, "seconds_left": 3725.4})
    assert capsys.readouterr().out == "step 5/90  loss 2.0000  1:02:05 left\n"


def build(recipe) -> NanoDeepSeekTrainer:
    return pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))


def test_evaluation_is_exact(tiny_recipe):
    """Bits per byte over every token, whatever the batches; only the cross-entropy counts."""
    recipe = tiny_recipe(trainer={"dataloader_drop_last": True, "report_to": []})
    trainer = build(recipe)
    assert len(trainer.eval_dataset) % 3 > 0  # the last batch is not full
    metrics = trainer.evaluate()
    _, validation = pretrain.load_data(recipe)
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    nats = tokens = 0
    for row in trainer.eval_dataset:
        logits = model(row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
        losses = F.cross_entropy(logits[:-1], row["input_ids"][1:], reduction="none")
        counted = row["position_ids"][1:] > 0
        nats, tokens = nats + losses[counted].sum().item(), tokens + counted.sum().item()
    size = sum(len(text.encode()) for text in validation["text"])
    every_token = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in validation["text"])
    assert metrics["eval_tokens"] == tokens == every_token
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("quiet", [True, False])
def test_bars_are_shown_unless_disabled(quiet, tiny_recipe, capfd):
    """The lines of the log always, and only those."""
    recipe = tiny_recipe(trainer={"disable_tqdm": quiet, "report_to": [], "eval_strategy": "steps", "eval_steps": 2})
    trainer = build(recipe)
    capfd.readouterr()  # packing has bars of its own
    trainer.train()
    told, bars = capfd.readouterr()
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert sum("loss" in line for line in lines) >= 6 and "{'" not in told + bars
    assert ("/6 [" in bars) != quiet, bars


def test_a_sequence_fills_its_last_step_too(tiny_recipe):
    """As a mixed epoch does, so that every number of processes takes the same rows."""
    trainer = build(tiny_recipe(trainer={"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2}))
    trainer.train_dataset = trainer.train_dataset.select(range(13))
    assert list(trainer._get_train_sampler()) == [*range(13), 0, 1, 2]


def test_evaluation_moves_no_bias_and_counts_nothing(tiny_recipe):
    trainer = build(tiny_recipe(trainer={"report_to": []}))
    trainer.evaluate()
    assert all(gate.tokens_per_expert is None for gate in routers(trainer.model))


def train(recipe, **kwargs):
    trainer = build(recipe)
    trainer.train(**kwargs)
    return trainer


def test_accumulation_is_the_same_run(tiny_recipe):
    """8 x 1, 4 x 2 and 2 x 4 rows per step: equal losses, weights and router biases."""
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        model = {"config": "small", "overrides": pretrain_overrides(aux_loss_alpha=0.1)}
        runs.append(train(tiny_recipe(trainer=sizes, model=model)))
    histories = [[entry for entry in run.state.log_history if "ce_loss" in entry] for run in runs]
    for other in histories[1:]:
        for a, b in zip(histories[0], other):
            for term in ("loss", "ce_loss", "balance_loss", "grad_norm"):
                assert a[term] == pytest.approx(b[term], rel=2e-3), term
            assert a["expert_max_violation"] == pytest.approx(b["expert_max_violation"], abs=0.1)


def pretrain_overrides(**more):
    from tests.small_run import TINY_MODEL

    return TINY_MODEL | more


def test_the_log_holds_every_term(tiny_recipe):
    trainer = train(tiny_recipe(model={"config": "small", "overrides": pretrain_overrides(aux_loss_alpha=0.1)}))
    entries = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + 0.1 * entry["balance_loss"], rel=1e-3)
        assert 0.9 < entry["balance_loss"] < 2
        assert entry["tokens_per_second"] > 0 and 0 < entry["flop_utilisation"] < 1
        assert {"expert_max_violation", "expert_load_entropy", "expert_dead_share", "expert_bias_range"} <= set(entry)
    assert entries[0]["ce_loss"] == pytest.approx(math.log(320), rel=0.1)
    events = list((trainer.args.output_dir and pretrain.Path(trainer.args.output_dir)).rglob("events.out.tfevents*"))
    assert events


def test_biases_move_once_per_step_and_freeze(tiny_recipe):
    trainer = train(tiny_recipe(balance={"gamma": 0.01, "freeze_at": 0.5}))
    steps = torch.stack([gate.e_score_correction_bias for gate in routers(trainer.model)]) / 0.01
    assert torch.allclose(steps, steps.round(), atol=1e-4) and 0 < steps.abs().max() <= 3


def test_a_falling_step_of_the_biases(tiny_recipe):
    balance = BalanceSection(gamma=0.08, final_gamma=0.005, freeze_at=0.8)
    assert [round(balance.step(i / 10), 6) for i in (0, 2, 4, 6, 8, 10)] == [0.08, 0.04, 0.02, 0.01, 0.0, 0.0]
    assert BalanceSection(gamma=0.08).step(0.9) == 0.08 and BalanceSection(gamma=0.0, final_gamma=0.1).step(0.1) == 0.0
    # A bias is a sum of these steps, each up, down or, for an expert with just the mean load, left out.
    trainer = train(tiny_recipe(balance={"gamma": 0.064, "final_gamma": 0.001, "freeze_at": 1.0}))
    steps = [0.064 * (1 / 64) ** (i / trainer.state.max_steps) for i in range(trainer.state.max_steps)]
    sums = torch.cartesian_prod(*(torch.tensor([-step, 0.0, step]) for step in steps)).sum(-1)
    biases = torch.stack([gate.e_score_correction_bias for gate in routers(trainer.model)]).flatten()
    assert len(steps) == 6 and ((biases[:, None] - sums).abs().amin(1) < 1e-6).all()


def test_a_time_limit_decays_and_ends_the_run(tiny_recipe):
    recipe = tiny_recipe(
        schedule={"max_seconds": 1.0, "warmup": 0.0}, trainer={"max_steps": 100000, "logging_steps": 1}
    )
    trainer = train(recipe)
    assert 1.0 <= trainer.clock.spent < 5.0 and trainer.state.global_step < 100000
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == max(rates) and rates[-1] < 0.3 * max(rates)


def test_resume_equals_uninterrupted(tiny_recipe, tmp_path):
    """Experts, momenta, router biases, schedule and data order all come back."""
    save = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tiny_recipe(output_dir=str(tmp_path / "whole"), trainer=save))
    resumed = build(tiny_recipe(output_dir=str(tmp_path / "whole"), trainer=save))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("restored_by_transformers", [False, True])
def test_the_clock_goes_on_after_a_resume(restored_by_transformers, tiny_recipe, tmp_path):
    """A run that had used up its time stops after one step, fully decayed."""
    save = {
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restored_by_transformers,
    }
    recipe = tiny_recipe(trainer=save, schedule={"max_seconds": 1000.0})
    train(recipe)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
    assert 0 < state.stateful_callbacks["Clock"]["args"]["spent"] < 100
    state.stateful_callbacks["Clock"]["args"]["spent"] = 1000.0
    state.save_to_json(checkpoint / "trainer_state.json")
    resumed = train(recipe, resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4 and 1000 < resumed.clock.spent < 1100


def test_flops_by_hand():
    config = build_config("quickstart")
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = 3 * config.num_hidden_layers * heads * 256
    active = count_parameters(config)["active_matmul"]
    assert training_flops_per_token(config, 256) == 6 * active + attention
    model = NanoDeepSeekForCausalLM(config)
    embedding, experts = model.model.embed_tokens.weight.numel(), 0
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            experts += parameter.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    share = config.num_experts_per_tok / config.n_routed_experts
    assert active == matrices - embedding - experts + round(experts * share)


def test_metrics_file(tiny_recipe):
    recipe = tiny_recipe(prompt="the quick")
    metrics = pretrain.run(recipe)
    saved = json.loads((pretrain.Path(recipe.output_dir) / "metrics.json").read_text())
    assert saved == metrics and saved["eval_bits_per_byte"] > 0
