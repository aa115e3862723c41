"""configuration/accelerate/zero3.yaml, as `accelerate launch` starts it, on two CPUs: step for step the run under DDP,
and a resume that is the uninterrupted run to the last bit.

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


def run(launch_file: str, recipe, folder, program=("-m", "train.pretrain")) -> subprocess.CompletedProcess:
    """Two processes of a recipe; what they wrote is in the recipe's output folder."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2"]
    command += ["--config_file", f"configuration/accelerate/{launch_file}.yaml"]
    command += [*program, "--config", str(file)]
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def build(tiny_recipe, tmp_path):
    def build(name: str, precision: str = "fp32", **more):
        trainer = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "use_cpu": True}
        trainer |= {"per_device_train_batch_size": 2, "report_to": []} | more
        settings = {"model": {"config": "small", "overrides": MODEL}, "optimizer": {"name": "adamw", "matrix_lr": 3e-3}}
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


def test_zero3_is_ddp(build, tmp_path):
    def result(name: str):
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in log if "ce_loss" in entry], load_file(tmp_path / name / "model.safetensors")

    for file in ("ddp", "zero3"):
        done = run(file, build(file), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for resumed, file in (("on", "zero3"), ("elsewhere", "ddp")):
        shutil.copytree(tmp_path / "zero3" / "checkpoint-2", tmp_path / resumed / "checkpoint-2")
        done = run(file, build(resumed, resume_from_checkpoint=True), tmp_path)
        assert (done.returncode == 0) == (file == "zero3"), done.stderr[-3000:]
    assert "it was written by a run under DeepSpeed" in done.stderr

    (expected, weights), (found, same), (further, again) = map(result, ("ddp", "zero3", "on"))
    for one, two, three in zip(expected, found, further, strict=True):
        assert {t: two[t] for t in TERMS} == pytest.approx({t: one[t] for t in TERMS}, rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert {t: three[t] for t in TERMS} == {t: two[t] for t in TERMS}
    assert len(found) == 4 and weights.keys() == same.keys()
    assert all((weights[name] - same[name]).abs().max() < 1e-4 for name in weights)
    assert all((again[name] == same[name]).all() for name in same)
