"""Two processes: a checkpoint appears when both have written to it, and a run of theirs resumes as if uninterrupted."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from train.recipe import REPOSITORY

# The second process is late with its file; the first, when it renames, reports what is there.
SCRIPT = """
import os, sys, time
from train import checkpointing, pretrain
from train.trainer import NanoDeepSeekTrainer

save_rng, commit = NanoDeepSeekTrainer._save_rng_state, checkpointing.commit

def late(self, folder):
    time.sleep(0.5 * int(os.environ["RANK"]))
    save_rng(self, folder)

def report(run, name):
    print(name, sorted(path.name for path in (run / checkpointing.STAGE / name).glob("rng*")), flush=True)
    commit(run, name)

NanoDeepSeekTrainer._save_rng_state = late
checkpointing.commit = report
pretrain.main(sys.argv[1:])
"""


def history(folder: Path) -> list[dict]:
    terms = ("step", "loss", "ce_loss", "grad_norm", "learning_rate", "expert_max_violation", "expert_bias_range")
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{term: entry[term] for term in terms} for entry in entries if "ce_loss" in entry]


def test_two_processes_save_and_resume_together(tiny_recipe, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "use_cpu": True}
    settings |= {"max_steps": 4, "resume_from_checkpoint": True, "report_to": []}
    (tmp_path / "run.py").write_text(SCRIPT)

    def run(folder: Path) -> str:
        recipe = tiny_recipe(output_dir=str(folder), trainer=settings)
        recipe.model.overrides["router_noise"] = 0.05
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, str(tmp_path / "run.py"), "--config", str(tmp_path / "recipe.yaml")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = run(whole)
    for step in (2, 4):
        assert f"checkpoint-{step} ['rng_state_0.pth', 'rng_state_1.pth']" in printed
    if 'type != "cpu"' not in inspect.getsource(Trainer._load_optimizer_and_scheduler):
        pytest.skip("this release of transformers cannot resume on several CPUs: it maps optimizer states to cpu:0")
    # What a kill in the middle of the second save leaves.
    shutil.copytree(whole / "checkpoint-2", killed / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-4", killed / "_saving" / "checkpoint-4")
    (killed / "_saving" / "checkpoint-4" / "trainer_state.json").unlink()
    assert f"resuming from {killed / 'checkpoint-2'}" in run(killed)
    assert len(history(whole)) == 4 and history(killed) == history(whole)
    a, b = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
