"""configuration/accelerate/zero3.yaml, as `accelerate launch` starts it, on CPUs: step for step the run under DDP, a
resume that is the uninterrupted run to the last bit, and checkpoints that other layouts go on from.

Needs DeepSpeed (pip install -e '.[zero]'), whose exchange of tensors between CPUs is compiled when it is first used: a
minute.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from tests.distributed.launching import MODEL
from train.recipe import REPOSITORY

pytest.importorskip("deepspeed", reason="pip install 'nanodeepseek[zero]'")
TERMS = ("loss", "ce_loss", "balance_loss", "index_loss", "mtp_loss_1", "expert_max_violation")


SPOILED = """
import sys
from modeling_nanodeepseek.losses import is_plain_head
from tests.distributed import test_faults
from tests.train.test_faults import Poison
from train import pretrain

spoil = getattr(test_faults, sys.argv.pop(1))

def look(model):
    assert is_plain_head(model.lm_head), "all logits are formed"

def build(recipe, args, build=pretrain.build_trainer):
    trainer = build(recipe, args)
    trainer.add_callback(Poison(1, look))
    trainer.add_callback(Poison(2, spoil))
    return trainer

pretrain.build_trainer = build
pretrain.main(sys.argv[1:])
"""


def run(launch_file: str, recipe, folder, program=("-m", "train.pretrain"), world: int = 2):
    """The processes of a recipe, once they are done; what they wrote is in the recipe's output folder."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(world)]
    command += ["--config_file", f"configuration/accelerate/{launch_file}.yaml"]
    command += [*program, "--config", str(file)]
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def build(tiny_recipe, tmp_path):
    def build(name: str, precision: str = "fp32", checkpoint=None, **more):
        trainer = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "use_cpu": True}
        trainer |= {"per_device_train_batch_size": 2, "report_to": []} | more
        model = {"config": "small", "overrides": MODEL}
        if checkpoint:
            model = {"config": None, "overrides": {}, "checkpoint": str(checkpoint)}
        settings = {"model": model, "optimizer": {"name": "adamw", "matrix_lr": 3e-3}}
        return tiny_recipe(output_dir=str(tmp_path / name), precision=precision, trainer=trainer, **settings)

    return build


@pytest.mark.parametrize("spoil, message", [
    ("spoil_gradient", "and gradients are not finite: model.norm.weight."),
    ("spoil_output", "first in the output of model.layers.1.mlp.experts (GatedExperts)."),
])  # fmt: skip
def test_what_is_no_number_reaches_no_weight(spoil, message, build, tmp_path):
    """Its engine steps within backward, and leaves such a step out; the run ends there, before a checkpoint."""
    (tmp_path / "spoiled.py").write_text(SPOILED)
    done = run("zero3", build("spoiled", "bf16", save_steps=1), tmp_path, [str(tmp_path / "spoiled.py"), spoil])
    assert done.returncode != 0 and message in done.stderr, done.stderr[-3000:]
    assert [path.name for path in sorted((tmp_path / "spoiled").glob("checkpoint-*"))] == ["checkpoint-1"]


def result(folder):
    """The log of a run, and its weights."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "ce_loss" in entry], load_file(folder / "model.safetensors")


def assert_same(expected, found, near: float):
    """Every logged term, and every weight, of the steps that both have."""
    for one, two in zip(expected[0], found[0], strict=True):
        assert {t: two[t] for t in TERMS} == pytest.approx({t: one[t] for t in TERMS}, rel=near)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=100 * near)
    assert expected[1].keys() == found[1].keys()
    assert all((expected[1][name] - found[1][name]).abs().max() <= 10 * near for name in expected[1])


def test_zero3_is_ddp_and_each_goes_on_from_the_other(build, tmp_path):
    """Also from a checkpoint of another number of processes; a resume by itself changes no bit."""
    for file in ("ddp", "zero3"):
        done = run(file, build(file), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, found = result(tmp_path / "ddp"), result(tmp_path / "zero3")
    assert len(found[0]) == 4
    assert_same(expected, found, 1e-5)
    files = [sorted(path.name for path in (tmp_path / name / "checkpoint-2").iterdir()) for name in ("ddp", "zero3")]
    assert files[0] == files[1]
    itself = ("zero3", "zero3", 2)
    for source, file, world in (itself, ("zero3", "single", 1), ("ddp", "zero3", 2), ("zero3", "zero3", 4)):
        name = f"{file}-{world}-from-{source}"
        shutil.copytree(tmp_path / source / "checkpoint-2", tmp_path / name / "checkpoint-2")
        rows = 4 // world
        recipe = build(name, resume_from_checkpoint=True, per_device_train_batch_size=rows)
        done = run(file, recipe, tmp_path, world=world)
        assert done.returncode == 0, done.stderr[-3000:]
        further = result(tmp_path / name)
        assert_same(expected, further, 1e-5)
        assert_same(found, further, 0.0 if (source, file, world) == itself else 1e-5)


def test_from_the_weights_of_another_run_and_what_comes_after(build, tmp_path):
    """All processes read weights whole, one after the other; one alone writes a text; a run that is over goes on to its
    end."""
    done = run("single", build("first", max_steps=1), tmp_path, world=1)
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("ddp", "zero3"):
        done = run(file, build(file, checkpoint=tmp_path / "first"), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(result(tmp_path / "ddp"), result(tmp_path / "zero3"), 1e-5)
    again = build("zero3", checkpoint=tmp_path / "first", resume_from_checkpoint=True)
    done = run("zero3", again.model_copy(update={"prompt": "w1 w2"}), tmp_path)
    assert done.returncode == 0 and "w1 w2" in done.stdout, done.stderr[-3000:]
    assert_same(result(tmp_path / "ddp"), result(tmp_path / "zero3"), 1e-5)


def test_a_resume_in_bf16_has_the_weights_that_are_stepped(build, tmp_path):
    """Those are in fp32, and those that multiply in bf16: of a checkpoint in bf16 alone the steps would be others."""
    done = run("zero3", build("whole", "bf16"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    done = run("zero3", build("resumed", "bf16", resume_from_checkpoint=True), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(result(tmp_path / "whole"), result(tmp_path / "resumed"), 0.0)
