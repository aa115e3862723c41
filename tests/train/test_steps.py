"""Steps that grow, V3's schedule, and runs with everything on: killed and resumed, repeated, accumulated otherwise."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.conftest import rms_ratio
from tests.killing import killed
from tests.small_run import TINY_MODEL, small_tokenizer, text
from train import data, pretrain, steps, streams
from train import trainer as trainer_module
from train.checkpointing import STAGE, last_good_checkpoint
from train.data import load_documents, pack
from train.fingerprint import ORDER
from train.recipe import BatchRampSection, ScheduleSection
from train.steps import StepPlan
from train.streams import RepeatedRows
from train.trainer import lr_factor

# Every loss there is, noise in the router so that the generators' states matter, and a moving everything.
EVERYTHING = TINY_MODEL | {
    "q_lora_rank": 16,
    "aux_loss_alpha": 0.1,
    "num_nextn_predict_layers": 1,
    "index_topk": 6,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "initializer_range": 0.2,
}
STEPS = 6
TERMS = ["loss", "ce_loss", "balance_loss", "mtp_loss_1", "index_kl", "grad_norm", "learning_rate", "epoch"]
TERMS += ["expert_max_violation", "expert_bias_range"]


@pytest.fixture
def streamed(tmp_path, tiny_recipe, monkeypatch):
    """A recipe of a streamed folder of parquet files, with everything on; none measures the machine or draws."""
    monkeypatch.setattr(trainer_module, "matmul_peak", lambda *a: 1e12)
    monkeypatch.setattr(pretrain, "plot_losses", lambda history, path, title: path.write_text(title) and path)
    for module in (data, streams):
        monkeypatch.setattr(module, "BLOCK", 7)  # documents packed together
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for shard in range(3):
        texts = {"text": [text(20 * shard + i) for i in range(20)]}
        Dataset.from_dict(texts).to_parquet(folder / f"{shard}.parquet")

    def build(name: str, schedule=None, **trainer):
        return tiny_recipe(
            output_dir=str(tmp_path / name),
            model={"config": "small", "overrides": EVERYTHING | {"router_noise": 0.05}},
            data={"source": str(folder), "streaming": True, "validation_documents": 5, "fim_rate": 0.3},
            schedule={"kind": "v3", "warmup_steps": 2} | (schedule or {}),
            mtp={"coef": 0.3, "final_coef": 0.1},
            balance={"gamma": 0.01},
            trainer={
                "max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "steps",
                "gradient_accumulation_steps": 3, "save_steps": 2, "report_to": [], "resume_from_checkpoint": True,
            } | trainer,
        )  # fmt: skip

    return build


RAMP = {"batch_ramp": {"start": 2, "tokens": 300}}


def history(folder: Path) -> list[dict]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{term: entry[term] for term in TERMS} for entry in entries if "ce_loss" in entry]


def die_in_step(step: int):
    """A training step that is killed in the middle: after its first micro-batch's gradients."""
    whole = trainer_module.NanoDeepSeekTrainer.training_step

    def training_step(self, model, inputs, *args):
        loss = whole(self, model, inputs, *args)
        if inputs and self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    return training_step


KILLS = {  # in a step, or before a change of the disk; the checkpoint that is left
    "in the first step": (1, None),
    "in a later step": (4, 2),
    "at the position": (lambda words: f"{STAGE}/checkpoint-4/{steps.POSITION}" in words, 2),
    "before the rename": (lambda words: "os.rename" in words and words.endswith("run/checkpoint-4"), 2),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_everything_on_killed_and_resumed_is_the_uninterrupted_run(streamed, tmp_path, monkeypatch):
    """Streamed, rearranged, ramped, with MTP, an indexer, balancing and noise: to the last bit. Killed in its first
    step it starts anew, and is then the same run twice."""
    pretrain.run(streamed("whole", RAMP))
    whole = history(tmp_path / "whole")
    assert len(whole) == STEPS and [entry["epoch"] for entry in whole] == [(s + 1) / STEPS for s in range(STEPS)]
    assert all(entry[term] > 0 for entry in whole for term in ("balance_loss", "mtp_loss_1", "index_kl"))
    for moment, (when, left) in KILLS.items():
        run = tmp_path / moment / "run"
        recipe = streamed(f"{moment}/run", RAMP)
        with monkeypatch.context() as patch:
            if not callable(when):
                patch.setattr(trainer_module.NanoDeepSeekTrainer, "training_step", die_in_step(when))
            at = when if callable(when) else lambda words: False
            assert killed(partial(pretrain.run, recipe), at), moment
        good, _ = last_good_checkpoint(run)
        assert (good and good.name) == (left and f"checkpoint-{left}"), moment
        pretrain.run(recipe)
        assert history(run) == whole, moment
        a, b = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), moment
    changed = streamed("in a later step/run", {"batch_ramp": {"start": 4, "tokens": 300}})
    changed.trainer["resume_from_checkpoint"] = str(tmp_path / "in a later step/run/checkpoint-4")
    with pytest.raises(OSError, match="has taken 10 sequences by step 4, and this run would have taken"):
        pretrain.run(changed)
    Dataset.from_dict({"text": [text(99)]}).to_parquet(tmp_path / "fineweb" / "9.parquet")
    with pytest.raises(OSError, match="checkpoint-4' was not trained on this data: files 3 then and 4 now; bytes"):
        pretrain.run(changed)


class Rows(TrainerCallback):
    """The gradients of the first step, and the rows of each."""

    def __init__(self, trainer):
        self.rows, self.gradients, step = [], {}, trainer.training_step
        trainer.add_callback(self)

        def training_step(model, inputs, *args):
            self.rows.append((trainer.state.global_step, len(inputs["input_ids"]) if inputs else 0))
            return step(model, inputs, *args)

        trainer.training_step = training_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def of_step(self, step: int) -> list[int]:
        return [rows for at, rows in self.rows if at == step]


def train(recipe):
    recipe.trainer |= {"save_strategy": "no", "max_grad_norm": 0.0}
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    seen = Rows(trainer)
    trainer.train()
    return trainer, seen, [entry for entry in trainer.state.log_history if "ce_loss" in entry]


def same(one: list[dict], other: list[dict]) -> bool:
    return [[e[t] for t in TERMS] for e in one] == [[e[t] for t in TERMS] for e in other]


def test_steps_grow_by_tokens(streamed):
    """Exactly the rows of the plan; a step of one micro-batch is that of a run that takes no more; a ramp that starts
    at the whole batch is none."""
    trainer, seen, ramped = train(streamed("ramped", RAMP))
    # 2 rows, then 2 + 4 * taken * 32 / 300 until 6, in whole micro-batches of 2
    assert trainer.plan.rows == [0, 2, 4, 6, 10, 16, 22]
    assert [sum(seen.of_step(step)) for step in range(STEPS)] == [2, 2, 2, 4, 6, 6]
    assert seen.of_step(0) == [0, 0, 2] and seen.of_step(5) == [2, 2, 2]
    shares = [trainer.plan.share(step / STEPS) for step in range(STEPS + 1)]
    assert shares == [rows / 22 for rows in trainer.plan.rows]
    # warm-up over two steps, constant to 67.6 % of the tokens, a cosine after; a step's rate is that of its middle
    peak = trainer.recipe.optimizer.matrix_lr
    factors = [entry["learning_rate"] / peak for entry in ramped]
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (19 / 22 - 10 / 14.8) / (4.3 / 14.8))) / 2
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, cosine]) and 0.1 < cosine < 0.6
    _, _, small = train(streamed("small", gradient_accumulation_steps=1, max_steps=1))
    unmoved = [term for term in TERMS if term not in ("epoch", "learning_rate")]
    assert {t: small[0][t] for t in unmoved} == {t: ramped[0][t] for t in unmoved}
    _, _, fixed = train(streamed("fixed", max_steps=3))
    _, _, whole = train(streamed("whole", {"batch_ramp": {"start": 6, "tokens": 300}}, max_steps=3))
    assert same(fixed, whole) and not same(fixed, ramped[:3])


def test_a_ramp_that_is_taken_away(streamed, tmp_path):
    """The rows would come in another order; a checkpoint from before that was kept has its position to tell it by."""
    recipe = streamed("ramped", RAMP, max_steps=2)
    recipe.data.streaming, recipe.data.fim_rate = False, 0.0
    pretrain.run(recipe)
    checkpoint = tmp_path / "ramped" / "checkpoint-2"
    recipe.schedule.batch_ramp, recipe.trainer["max_steps"] = None, 3
    with pytest.raises(OSError, match=r"order of a batch_ramp then and random now \(schedule.batch_ramp, .* values"):
        pretrain.run(recipe)
    kept = json.loads((checkpoint / "training_data.json").read_text())
    (checkpoint / "training_data.json").write_text(json.dumps({n: v for n, v in kept.items() if n not in ORDER}))
    with pytest.raises(
        OSError, match="has a data_position.json: its run streamed its data or had a schedule.batch_ramp"
    ):
        pretrain.run(recipe)


def test_a_ramp_over_packed_rows(streamed):
    """Data that is packed beforehand grows its steps too, over the same rows again and again."""
    recipe = streamed("packed", RAMP, max_steps=2)
    recipe.data.streaming, recipe.data.fim_rate = False, 0.0
    trainer, seen, entries = train(recipe)
    assert isinstance(trainer.train_dataset, RepeatedRows) and len(entries) == 2
    assert [sum(seen.of_step(step)) for step in range(2)] == [2, 2]
    assert "a stream of training" in pretrain.describe(trainer)


def test_the_plan_of_v3():
    """3072 to 15360 sequences of 4096 over the first 469 of 14,800 billion tokens."""
    plan = StepPlan(20_000, 16, 960, BatchRampSection(start=3072, tokens=469e9), 4096)
    sizes = [16 * count for count in plan.micro_batches]
    assert sizes[0] == 3072 and sizes == sorted(sizes) and sizes[-1] == 15360
    whole = sizes.index(15360)
    assert plan.rows[whole] * 4096 == pytest.approx(469e9, rel=1e-3)
    assert 0 <= 3072 + 12288 * plan.rows[5000] * 4096 / 469e9 - sizes[5000] < 16
    for start in (3073, 15376):
        with pytest.raises(ValueError, match=rf"start={start} .* multiple of the 16 sequences .* at most 15360"):
            StepPlan(10, 16, 960, BatchRampSection(start=start, tokens=1e9), 4096)


def test_the_schedule_of_v3():
    """2.2e-4 to 10 trillion tokens, cosine to 2.2e-5 over 4.3, 2.2e-5 for 0.333, 7.3e-6 for 0.167."""
    schedule = ScheduleSection(kind="v3", warmup=0.0)

    def rate(trillions: float) -> float:
        return 2.2e-4 * lr_factor(trillions / 14.8, schedule)

    assert rate(0) == rate(5) == rate(10) == 2.2e-4
    assert rate(10 + 4.3 / 2) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rate(10 + 4.3 / 4) == pytest.approx(2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + 0.5**0.5) / 2)
    assert rate(14.3) == rate(14.5) == rate(14.632) == pytest.approx(2.2e-5)
    assert rate(14.634) == rate(14.8) == pytest.approx(7.3e-6)
    warm = ScheduleSection(kind="v3", warmup=0.1)
    assert [lr_factor(p, warm) for p in (0, 0.05, 0.1)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    "schedule, words",
    [
        ({"kind": "v3", "decay": 0.1}, "decay=0.1 is no field of kind='v3'"),
        ({"floor": 0.2}, "floor=0.2 is no field of kind='trapezoid'"),
        ({"kind": "v3", "tail_from": 0.2}, "must not fall"),
        ({"warmup": 0.1, "warmup_steps": 3}, "not both"),
        ({"batch_ramp": {"start": 2, "tokens": 5}, "max_seconds": 3}, "batch_ramp goes by tokens"),
        ({"batch_ramp": {"start": 2}}, "Field required"),
    ],
)
def test_schedules_that_cannot_be(schedule, words):
    with pytest.raises(ValueError, match=words):
        ScheduleSection(**schedule)


@pytest.mark.parametrize(
    "trainer, words",
    [
        ({"max_steps": -1}, "data.streaming needs trainer.max_steps"),
        ({"dataloader_num_workers": 2}, "must be 0"),
        ({"data_seed": 5}, "trainer.data_seed=5 is not honoured with data.streaming, whose order is by trainer.seed"),
        ({"train_sampling_strategy": "sequential"}, "strategy='sequential' is not honoured with data.streaming"),
    ],
)
def test_streams_that_cannot_be(trainer, words, streamed):
    with pytest.raises(ValueError, match=words):
        streamed("run", **trainer)


def test_accumulation_with_every_loss_on(tiny_recipe, monkeypatch):
    """1 x 8, 2 x 4 and 8 x 1 rows: the loss, its every term and every gradient, with balance, MTP and indexer's KL."""
    monkeypatch.setattr(trainer_module, "matmul_peak", lambda *a: 1e12)
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        recipe = tiny_recipe(
            model={"config": "small", "overrides": EVERYTHING},
            trainer=sizes | {"max_steps": 1, "logging_steps": 1, "report_to": []},
        )
        _, seen, (entry,) = train(recipe)
        assert seen.of_step(0) == [batch] * accumulation
        runs.append((entry, seen.gradients))
    (whole, gradients), *others = runs
    assert any(".indexer." in name for name in gradients) and any("eh_proj" in name for name in gradients)
    for entry, parts in others:
        for term in ("loss", "ce_loss", "balance_loss", "mtp_loss_1", "index_kl", "grad_norm"):
            assert entry[term] == pytest.approx(whole[term], rel=3e-6), term
        for name, gradient in gradients.items():
            assert rms_ratio(gradient, parts[name]) < 1e-5, name


def test_a_longer_context(tiny_recipe, tmp_path):
    """A checkpoint's config gets YaRN and its new length, once and again; the weights stay."""
    pretrain.run(tiny_recipe(output_dir=str(tmp_path / "short"), trainer={"max_steps": 1, "report_to": []}))

    def longer(origin: str, length: int, **context):
        recipe = tiny_recipe(
            output_dir=str(tmp_path / f"{length}"),
            model={"config": None, "overrides": {}, "checkpoint": str(tmp_path / origin)},
            data={"sequence_length": length},
            trainer={"max_steps": 1, "report_to": [], "per_device_train_batch_size": 2},
        )
        recipe = recipe.model_validate(
            recipe.model_dump() | {"model": recipe.model.model_dump() | {"context": {"length": length} | context}}
        )
        return recipe

    first = longer("short", 128)
    pretrain.run(first)
    config = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "128").config
    assert config.max_position_embeddings == 128 and config.rope_parameters["original_max_position_embeddings"] == 64
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 2
    second = pretrain.load_model(longer("128", 256), range(320))
    assert second.config.max_position_embeddings == 256
    assert second.config.rope_parameters == config.rope_parameters | {"factor": 4.0}
    saved = load_file(tmp_path / "128" / "model.safetensors")
    assert torch.equal(second.lm_head.weight, saved["lm_head.weight"])
    assert pretrain.load_model(longer("short", 96, factor=40), range(320)).config.rope_parameters["factor"] == 40
    with pytest.raises(ValueError, match="length=64 is no extension of the original 64"):
        pretrain.load_model(longer("short", 64), range(320))
    with pytest.raises(ValueError, match="length=128 is beyond what factor=1.5 makes of the original 64 tokens, 96"):
        pretrain.load_model(longer("short", 128, factor=1.5), range(320))
    with pytest.raises(ValueError, match="length=96 is below the 128 tokens that the checkpoint has"):
        pretrain.load_model(longer("128", 96), range(320))
    # A checkpoint's own temperature and ramp stay, unless the recipe says otherwise.
    own = config.rope_parameters | {"factor": 40.0, "mscale": 0.9, "mscale_all_dim": 0.707, "beta_fast": 16.0}
    file = tmp_path / "128" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": own}))
    assert pretrain.load_model(longer("128", 256), range(320)).config.rope_parameters == own
    other = pretrain.load_model(longer("128", 256, mscale_all_dim=0.5, beta_slow=2.0), range(320))
    assert other.config.rope_parameters == own | {"mscale": 0.5, "mscale_all_dim": 0.5, "beta_slow": 2.0}
    with pytest.raises(ValueError, match="context extends a checkpoint"):
        tiny_recipe(model={"context": {"length": 128}})


def test_rows_of_whole_documents(corpus):
    """cut_documents=False: a document starts a new row where the last has no room for all of it."""
    documents, tokenizer = load_documents(str(corpus)), small_tokenizer()
    sizes = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 2 for t in documents["text"]]
    length = 2 * max(sizes) - 5
    rows = pack(documents, tokenizer, length, cut_documents=False)
    starts = sum(int((row["input_ids"] == tokenizer.bos_token_id).sum()) for row in rows)
    ends = sum(int((row["input_ids"] == tokenizer.eos_token_id).sum()) for row in rows)
    restarts = sum(int(((row["position_ids"] == 0) & (row["attention_mask"] == 1)).sum()) for row in rows)
    assert starts == ends == restarts == len(documents)  # none goes on in another row
    assert sum(int(row["attention_mask"].sum()) for row in rows) == sum(sizes)
