"""Checkpoints of a run: whole or not there; a resumed run is the uninterrupted one, step by step and bit by bit."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments, modeling_utils

from modeling_nanodeepseek import LoadBalancingCallback, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.stacking import CheckpointError
from tests.conftest import tiny_model, tokens
from tests.killing import at_change, killed
from tests.small_run import TINY_MODEL
from train import checkpointing, pretrain
from train import trainer as trainer_module
from train.checkpointing import (
    DEEPSPEED,
    STAGE,
    WHOLE,
    AtomicCheckpoints,
    check_resumable,
    checkpoints,
    last_good_checkpoint,
)
from train.fingerprint import ORDER

STEPS = 8
# Noise in the router, so that the generators' states matter; two shards, two kinds of optimizer, a moving schedule.
MODEL = {"config": "small", "overrides": TINY_MODEL | {"router_noise": 0.05, "aux_loss_alpha": 0.01}}
TRAINER = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "report_to": [],
    "resume_from_checkpoint": True,
}
TERMS = ["loss", "ce_loss", "balance_loss", "grad_norm", "learning_rate", "epoch", "expert_max_violation"]
TERMS += ["expert_load_entropy", "expert_dead_share", "expert_bias_range"]


def history(folder: Path, first: int = 1) -> list[dict]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{t: e[t] for t in TERMS} for e in entries if "ce_loss" in e and e["step"] >= first]


@pytest.fixture
def recipe(tiny_recipe, tmp_path, monkeypatch):
    """Every run of a test reads one corpus and writes to a folder of its own; none measures the machine or draws."""
    monkeypatch.setattr(trainer_module, "matmul_peak", lambda *a: 1e12)
    monkeypatch.setattr(pretrain, "plot_losses", lambda history, path, title: path.write_text(title) and path)

    def build(folder: str = "run", **trainer):
        return tiny_recipe(
            output_dir=str(tmp_path / folder), model=MODEL, balance={"gamma": 0.01}, trainer=TRAINER | trainer
        )

    return build


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that all others must equal: its folder, kept for the module, is filled by the first test that asks."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture
def whole(uninterrupted, recipe, tmp_path):
    if not (uninterrupted / "model.safetensors").exists():
        pretrain.run(recipe("whole"))
        shutil.copytree(tmp_path / "whole", uninterrupted, dirs_exist_ok=True)
    return uninterrupted


def assert_same_run(run: Path, whole: Path):
    assert len(history(whole)) == STEPS and history(run) == history(whole)
    assert_same_weights(run, whole)
    left = [path for path in run.rglob("*") if path.name.startswith((".", "_"))]
    assert not left and [path.name for path in checkpoints(run)] == ["checkpoint-8", "checkpoint-6"]


def assert_same_weights(run: Path, whole: Path):
    a, b = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert a.keys() == b.keys() and sum("e_score_correction_bias" in name for name in a) == 1
    for name in a:
        assert torch.equal(a[name], b[name]), name


def half(write, name: str):
    """A writer that is killed in the middle of the file of that name; they take what is written, then the file."""

    def write_and_die(content, file, **kwargs):
        write(content, file, **kwargs)
        if name in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return write_and_die


KILLS = {  # in the middle of a file, or at a change of the disk that is not made any more; the checkpoint that is left
    "first save": ("checkpoint-2/optimizer.pt", None),
    "in the weights": ("checkpoint-6/.saving/model.safetensors", 4),
    "in the optimizer's state": ("checkpoint-6/optimizer.pt", 4),
    "in the generators' state": ("checkpoint-6/rng_state.pth", 4),
    "at the state": (lambda words: f"{STAGE}/checkpoint-6/trainer_state.json" in words, 4),
    "before the rename": (lambda words: "os.rename" in words and f"{STAGE}/checkpoint-6 " in words + " ", 4),
    "before an old one goes": (lambda words: words.endswith(f"{STAGE}/deleted"), 6),
    "while an old one goes": (lambda words: "os.remove" in words and "model.safetensors" in words, 6),
    "the final save": (lambda words: words.startswith("os.rename") and words.endswith("run/.saved"), 8),
    "in the middle of the final save": (lambda words: words.startswith("os.rename") and "run/.saved/to" in words, 8),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_as_if_nothing_had_happened(moment, whole, recipe, tmp_path, monkeypatch):
    when, left = KILLS[moment]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if isinstance(when, str):
            patch.setattr(modeling_utils, "safe_save_file", half(modeling_utils.safe_save_file, when))
            patch.setattr(torch, "save", half(torch.save, when))
        assert killed(lambda: pretrain.run(recipe()), when if callable(when) else lambda words: False)
    good, refused = last_good_checkpoint(run)
    assert (good and good.name) == (left and f"checkpoint-{left}") and not refused
    if left:
        NanoDeepSeekForCausalLM.from_pretrained(good)
    pretrain.run(recipe())
    assert_same_run(run, whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_a_checkpoint_is_whole_whenever_it_is_killed(exists, whole, recipe, tmp_path):
    """At every change of the disk that saving makes; also where the only checkpoint is replaced by one of its name."""
    trainer = pretrain.build_trainer(recipe(max_steps=2), pretrain.training_arguments(recipe(max_steps=2)))
    trainer.train()
    run, marker = tmp_path / "run", "checkpoint-2/trainer_state.json"
    if not exists:
        trainer.state.global_step = 4
        marker = "checkpoint-4/trainer_state.json"
    shutil.copytree(run, tmp_path / "kept")
    seen = []
    for number in range(200):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        trainer.state.total_flos = 12345.0  # tells new from old
        if not killed(lambda: trainer._save_checkpoint(trainer.model, None), at_change(number, run)):
            break
        checkpointing.settle(run)
        good, refused = last_good_checkpoint(run)
        assert good is not None and not refused, number
        state = run / marker
        seen.append(state.exists() and json.loads(state.read_text())["total_flos"] == 12345.0)
        assert {path.name for path in run.iterdir()} <= {"checkpoint-2", "checkpoint-4", "expert_load.jsonl"}
    assert len(seen) > 8 and seen == sorted(seen) and set(seen) == {False, True}


def full(at_step: int, kind: str):
    """A disk that is full when the weights, or the optimizer's state, of that step are written."""
    write, save = modeling_utils.safe_save_file, torch.save

    def write_weights(tensors, filename, **kwargs):
        if kind == "weights" and f"checkpoint-{at_step}/" in str(filename):
            raise OSError(28, "No space left on device")
        write(tensors, filename, **kwargs)

    def write_state(state, file, **kwargs):
        if kind == "optimizer" and f"checkpoint-{at_step}/optimizer" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(state, file, **kwargs)

    return write_weights, write_state


def command(recipe, tmp_path) -> list[str]:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    return ["--config", str(file)]


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_full_disk_ends_the_run_with_one_error(kind, whole, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        write_weights, write_state = full(6, kind)
        patch.setattr(modeling_utils, "safe_save_file", write_weights)
        patch.setattr(torch, "save", write_state)
        with pytest.raises(SystemExit) as caught:
            pretrain.main(command(recipe(), tmp_path))
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    for words in ("checkpoint-6' cannot be saved", "o space left on", "last complete checkpoint is 'checkpoint-4'"):
        assert words in message, message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-4", "expert_load.jsonl"}
    NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    pretrain.run(recipe())
    assert_same_run(tmp_path / "run", whole)


def test_a_really_full_disk(whole, recipe, tmp_path, small_disk):
    run = small_disk / "run"
    first, second = recipe(), recipe()
    first.output_dir = second.output_dir = str(run)
    first.trainer["max_steps"] = 4
    trainer = pretrain.build_trainer(first, pretrain.training_arguments(first))
    trainer.create_optimizer_and_scheduler(STEPS)  # a longer run's schedule, ended early
    trainer.train()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 150_000))
    with pytest.raises(SystemExit, match="error: .*checkpoint-6' cannot be saved.*o space left.*'checkpoint-4'"):
        pretrain.main(command(second, tmp_path))
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "checkpoint-4", "expert_load.jsonl"}
    check_resumable(run / "checkpoint-4")
    (small_disk / "ballast").unlink()
    pretrain.run(second)
    assert_same_run(run, whole)


def test_a_disk_that_fills_up_under_a_log(whole, recipe, tmp_path, small_disk, monkeypatch, capfd):
    """TensorBoard's writer is a thread; what it held is lost, the run and its checkpoint are not."""
    given = recipe(report_to=["tensorboard"])
    given.output_dir = str(small_disk / "run")
    on_log, ballast = trainer_module.LineCallback.on_log, small_disk / "ballast"

    def fill(self, args, state, *rest, **kwargs):
        on_log(self, args, state, *rest, **kwargs)
        if state.global_step == 5 and not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
            for events in small_disk.rglob("events.out.tfevents*"):  # whose last page has room for some more
                with events.open("ab") as file:
                    file.write(bytes(-events.stat().st_size % os.sysconf("SC_PAGE_SIZE")))

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.LineCallback, "on_log", fill)
        with pytest.raises(SystemExit) as caught:
            pretrain.main(command(given, tmp_path))
    message, run = str(caught.value), small_disk / "run"
    assert (
        message.startswith(f"error: '{run}' cannot be written to: ")
        and "o space left" in message
        and "\n" not in message
    )
    assert "last complete checkpoint is 'checkpoint-4'" in message and "Traceback" not in capfd.readouterr().err
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "checkpoint-4", "expert_load.jsonl", "runs"}
    ballast.unlink()
    pretrain.run(given)
    assert_same_run(run, whole)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def by_deepspeed(folder):
    """What a run under ZeRO-3 leaves: whole weights, and the rest in a folder of its own."""
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / f"global_step{folder.name.removeprefix('checkpoint-')}").mkdir()


DAMAGED = {
    "no state": (remove("trainer_state.json"), ["has no trainer_state.json"]),
    "half a state": (cut("trainer_state.json"), ["trainer_state.json' is damaged"]),
    "no weights": (remove("model.safetensors"), ["has no weights"]),
    "cut weights": (cut("model.safetensors"), ["model.safetensors' is no complete safetensors file"]),
    "no optimizer": (remove("optimizer.pt"), ["has no optimizer state", "model.checkpoint"]),
    "no schedule": (remove("scheduler.pt"), ["has no scheduler.pt", "model.checkpoint"]),
    "no generators": (remove("rng_state.pth"), ["lacks the generators' states", "model.checkpoint"]),
    "another layout": (by_deepspeed, ["has no optimizer.pt", "under DeepSpeed (global_step*)", "launch file of that"]),
    "cut optimizer": (cut("optimizer.pt"), ["optimizer.pt' is damaged or was cut short"]),
    "cut generators": (cut("rng_state.pth"), ["rng_state.pth' is damaged or was cut short"]),
    "cut schedule": (cut("scheduler.pt"), ["scheduler.pt' is damaged or was cut short"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_passed_over_or_named(case, whole, tmp_path):
    damage, words = DAMAGED[case]
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-8")
    needs = (WHOLE, {"rng_state.pth"})
    good, refused = last_good_checkpoint(tmp_path / "run", *needs)
    assert good.name == "checkpoint-6" and len(refused) == 1
    damage(tmp_path / "run" / "checkpoint-6")
    with pytest.raises(OSError, match="no checkpoint in .* can be resumed: ") as caught:
        last_good_checkpoint(tmp_path / "run", *needs)
    for message in (refused[0], str(caught.value)):
        assert all(word in message for word in ["checkpoint-8", *words]), message


def test_a_checkpoint_of_another_layout_or_count(whole, tmp_path):
    """Every layout's own is taken, also where none is asked for; of other processes only all of their generators."""
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(whole / "checkpoint-8", folder)
    with pytest.raises(
        CheckpointError, match=r"has no global_step\*, which a run .* under DeepSpeed .*\(optimizer.pt\)"
    ):
        check_resumable(folder, DEEPSPEED)
    by_deepspeed(folder)
    check_resumable(folder, DEEPSPEED, {"rng_state.pth"})
    check_resumable(folder)
    two = {"rng_state_0.pth", "rng_state_1.pth"}
    check_resumable(folder, DEEPSPEED, two)  # one process wrote it
    (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
    for generators in (two, {"rng_state.pth"}):
        with pytest.raises(CheckpointError, match="lacks the generators' states of its processes"):
            check_resumable(folder, DEEPSPEED, generators)
    check_resumable(folder, DEEPSPEED, {"rng_state_1.pth"})  # on the second of two nodes


def test_a_resume_on_other_data_is_one_clear_error(whole, recipe, tmp_path, corpus, capsys):
    """A file more would be another tokenizer, other rows in another order, and other documents held out."""
    shutil.copytree(whole / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    (corpus / "61.txt").write_text("Another text of other words altogether, 0123456789.\n" * 20)
    with pytest.raises(SystemExit) as caught:
        pretrain.main(command(recipe(), tmp_path))
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    rows = json.loads((whole / "checkpoint-6" / "training_data.json").read_text())["rows"]
    for words in ("checkpoint-6' was not trained on", f"rows {rows} then", "output_dir", "model.checkpoint"):
        assert words in message, message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]
    # The tokenizer is the checkpoint's, whatever one trained on these texts would be.
    own, new, resumed = (
        pretrain.build_trainer(given, pretrain.training_arguments(given)).processing_class.get_vocab()
        for given in (recipe("whole", resume_from_checkpoint=str(whole / "checkpoint-6")), recipe("new"), recipe())
    )
    saved = AutoTokenizer.from_pretrained(whole / "checkpoint-6").get_vocab()
    assert own == resumed == saved and new != saved
    (corpus / "61.txt").unlink()
    with pytest.raises(SystemExit, match="was not trained on this data: seed 3 then and 4 now. A resume"):
        pretrain.main(command(recipe(seed=4, data_seed=3), tmp_path))
    (tmp_path / "run" / "checkpoint-6" / "training_data.json").unlink()  # of a run before there was one
    capsys.readouterr()
    pretrain.run(recipe())
    assert "training_data.json: whether it was trained on this data is not known" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


ORDERS = {  # what is changed in the recipe, words of the message
    "accumulation": (
        "trainer.gradient_accumulation_steps=4",
        "order than this run would: rows per step 4 then and 8 now",
    ),
    "batch": (
        "trainer.per_device_train_batch_size=1",
        "rows per step 4 then and 2 now (trainer.per_device_train_batch",
    ),
    "seed": ("trainer.data_seed=6", "data seed 3 then and 6 now (trainer.data_seed, or else trainer.seed)"),
    "ramp": (
        "schedule.batch_ramp={start: 2, tokens: 1e3}",
        "order random then and of a batch_ramp now (schedule.batch",
    ),
    "strategy": ("trainer.train_sampling_strategy=sequential", "order random then and sequential now"),
    "drawn": (
        "trainer.train_sampling_strategy=group_by_length",
        "'group_by_length', whose order is drawn anew by each",
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_a_resume_in_another_order_is_one_clear_error(case, whole, recipe, tmp_path):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    change, words = ORDERS[case]
    with pytest.raises(SystemExit) as caught:
        pretrain.main([*command(recipe(), tmp_path), change])
    message = str(caught.value)
    assert message.startswith("error: ") and "checkpoint-6' " in message and words in message, message
    assert "model.checkpoint" in message and "\n" not in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]


def test_a_checkpoint_that_does_not_say_in_which_order(whole, recipe, tmp_path):
    """Of a run from before that was kept."""
    checkpoint = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", checkpoint)
    kept = json.loads((checkpoint / "training_data.json").read_text())
    assert [kept.pop(name) for name in ORDER] == [4, 3, "random"]
    (checkpoint / "training_data.json").write_text(json.dumps(kept))
    pretrain.run(recipe())
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_other_micro_batches_go_on_with_the_same_rows(strategy, recipe, tmp_path):
    """4 x 1 rows, then 1 x 4: from the middle of the second epoch, whose last step takes rows a second time."""
    ids = [[10 + row] * 32 for row in range(14)]
    places = {"attention_mask": [[1] * 32] * 14, "position_ids": [list(range(32))] * 14}

    def steps(folder: str, batch: int, accumulation: int, resume: str | None = None) -> dict[int, list[int]]:
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        given = recipe(folder, train_sampling_strategy=strategy, **sizes)
        trainer = pretrain.build_trainer(given, pretrain.training_arguments(given))
        trainer.train_dataset = Dataset.from_dict({"input_ids": ids} | places).with_format("torch")
        step, seen = trainer.training_step, {}

        def training_step(model, inputs, *args):
            seen.setdefault(trainer.state.global_step, []).extend((inputs["input_ids"][:, 0] - 10).tolist())
            return step(model, inputs, *args)

        trainer.training_step = training_step
        trainer.train(resume_from_checkpoint=resume)
        return seen

    one = steps("one", 4, 1)
    two = steps("two", 1, 4, str(tmp_path / "one" / "checkpoint-6"))
    assert list(two) == [6, 7] and two == {step: one[step] for step in two}
    assert [len(rows) for rows in one.values()] == [4] * STEPS
    for epoch in (0, 4):
        rows = [row for step in range(epoch, epoch + 4) for row in one[step]]
        assert set(rows) == set(range(14)) and len(rows) == 16


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


def evil(name):
    return lambda folder: torch.save({"python": Evil()}, folder / name)


def without(name):
    def damage(folder):
        tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if key != name}
        checkpointing_save(tensors, folder / "model.safetensors")

    return damage


def checkpointing_save(tensors, file):
    from safetensors.torch import save_file

    save_file(tensors, file, {"format": "pt"})


LAYER = "model.layers.1"
REFUSED = {  # what is done to checkpoint-6, what is changed in the recipe, words of the message
    "cut weights": (cut("model.safetensors"), [], ["model.safetensors' is no complete safetensors file"]),
    "absent": (shutil.rmtree, [], ["checkpoint-6' is no folder"]),
    "no schedule": (remove("scheduler.pt"), [], ["has no scheduler.pt"]),
    "another layout": (by_deepspeed, [], ["has no optimizer.pt", "under DeepSpeed"]),
    "an expert is missing": (
        without(f"{LAYER}.mlp.experts.2.up_proj.weight"), [],
        ["does not fit this run", f"{LAYER}.mlp.experts.2.up_proj.weight is missing"],
    ),
    "a projection is missing": (
        without(f"{LAYER}.self_attn.o_proj.weight"), [], [f"{LAYER}.self_attn.o_proj.weight is missing"]
    ),
    "another model": (None, ["model.overrides.intermediate_size=56"], ["does not fit this run", "size mismatch for"]),
    "more layers": (None, ["model.overrides.num_hidden_layers=3"], ["model.layers.2", "is missing"]),
    "fewer layers": (None, ["model.overrides.num_hidden_layers=1"], ["model.layers.1", "has no place in the model"]),
    "another optimizer": (None, ["optimizer.name=adamw"], ["trained with muon=True of group 'matrices', not False"]),
    "another rate": (None, ["optimizer.head_lr=0.1"], ["trained with initial_lr=0.004 of group 'head', not 0.1"]),
    "code in the optimizer": (evil("optimizer.pt"), [], ["does not fit this run", "Weights only load failed"]),
    "code in the generators": (evil("rng_state.pth"), [], ["does not fit this run", "Weights only load failed"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_resume_that_cannot_be_is_one_clear_error(case, whole, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    damage, changes, words = REFUSED[case]
    checkpoint = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", checkpoint)
    if damage:
        damage(checkpoint)
    given = recipe(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(SystemExit) as caught:
        pretrain.main([*command(given, tmp_path), *changes])
    message = str(caught.value)
    assert message.startswith("error: ") and "checkpoint-6" in message and "\n" not in message, message
    assert all(word in message for word in words), message
    assert not (tmp_path / "evil").exists() and not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_to_start_from_that_are_damaged(whole, recipe, tmp_path):
    shutil.copytree(whole, tmp_path / "damaged")
    cut("model.safetensors")(tmp_path / "damaged")
    given = recipe()
    given.model.config, given.model.overrides, given.model.checkpoint = None, {}, str(tmp_path / "damaged")
    with pytest.raises(SystemExit, match="error: .*damaged/model.safetensors' is no complete safetensors file"):
        pretrain.main(command(given, tmp_path))


def test_true_without_a_checkpoint_starts_anew_and_says_so(recipe, capsys, tmp_path):
    trainer = pretrain.build_trainer(recipe(max_steps=2), pretrain.training_arguments(recipe(max_steps=2)))
    trainer.train(resume_from_checkpoint=True)
    assert "resuming from the start: there is no checkpoint" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    # Killed between the two renames that replace a checkpoint by one of its name: both are whole, the new one counts.
    stage = tmp_path / "run" / STAGE
    shutil.copytree(tmp_path / "run" / "checkpoint-2", stage / checkpointing.REPLACED)
    (tmp_path / "run" / "checkpoint-2").rename(stage / "checkpoint-2")
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-2'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "expert_load.jsonl"}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = tokens(16, 12)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class AtomicTrainer(AtomicCheckpoints, Trainer):
    pass


def plain_trainer(kind, folder, **settings):
    """transformers' own Trainer and AdamW on our model."""
    arguments = TrainingArguments(
        str(folder), max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=4, seed=5, use_cpu=True,
        learning_rate=0.01, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    model = tiny_model(router_noise=0.05).train()
    return kind(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[LoadBalancingCallback(gamma=0.01)]
    )


@pytest.mark.parametrize("kind", [Trainer, AtomicTrainer])
@pytest.mark.parametrize("shards", [False, True], ids=["one", "shards"])
def test_plain_trainer_resumes_every_expert(kind, shards, tmp_path, monkeypatch):
    """transformers' own DeepSeek models keep fresh experts here, with a warning."""
    if shards:
        save = NanoDeepSeekForCausalLM.save_pretrained
        monkeypatch.setattr(
            NanoDeepSeekForCausalLM, "save_pretrained", lambda *a, **k: save(*a, **k | {"max_shard_size": "150KB"})
        )
    straight = plain_trainer(kind, tmp_path)
    straight.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists() != shards
    resumed = plain_trainer(kind, tmp_path)
    with torch.no_grad():  # nothing of the fresh model may be left
        for parameter in resumed.model.parameters():
            parameter.normal_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    for (name, a), (_, b) in zip(straight.model.state_dict().items(), resumed.model.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", [Trainer, AtomicTrainer])
def test_the_best_model_comes_back_whole(kind, tmp_path, monkeypatch):
    scores = {2: 3.0, 4: 1.0, 6: 2.0}  # the second is the best
    trainer = plain_trainer(
        kind, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1
    )
    monkeypatch.setattr(trainer, "evaluate", lambda **k: {"eval_loss": scores[trainer.state.global_step]})
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert Path(trainer.state.best_model_checkpoint) == best and best.is_dir()
    for (name, a), (_, b) in zip(
        trainer.model.state_dict().items(), NanoDeepSeekForCausalLM.from_pretrained(best).state_dict().items()
    ):
        assert torch.equal(a, b), name
    assert not (tmp_path / STAGE).exists()
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_the_best_model_of_a_recipe(recipe, tmp_path, monkeypatch):
    """The same through our own Trainer: its optimizer, its evaluation, the model saved at the end."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    given = recipe(**settings, metric_for_best_model="loss", greater_is_better=True)  # the worst, which is not the last
    pretrain.run(given)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    saved, best = (load_file(tmp_path / "run" / x / "model.safetensors") for x in ("", "checkpoint-2"))
    assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in saved)


def test_weights_are_safetensors_and_the_rest_is_read_without_code(whole):
    """What Trainer writes by torch.save is read with weights_only; training_args.bin, a pickle, is read by nobody."""
    files = {path.name for path in (whole / "checkpoint-8").iterdir()}
    assert {name for name in files if name.endswith((".pt", ".pth", ".bin"))} == {
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"
    }  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(whole / "checkpoint-8" / name, weights_only=True)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(whole / "checkpoint-8" / "training_args.bin", weights_only=True)
    assert "model.safetensors" in files and not any(name.startswith("pytorch_model") for name in files)
