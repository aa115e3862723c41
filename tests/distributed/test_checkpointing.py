"""Two processes: a checkpoint appears when both have written to it, and a run of theirs resumes as if uninterrupted."""

import inspect
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from tests.distributed import launching
from train import checkpointing, pretrain
from train.recipe import Recipe
from train.trainer import NanoDeepSeekTrainer


def work(recipe: Recipe):
    """A run whose second process is late with its file; the first, when it renames, reports what is there."""
    save_rng, commit = NanoDeepSeekTrainer._save_rng_state, checkpointing.commit

    def late(self, folder):
        time.sleep(0.5 * int(os.environ["RANK"]))
        save_rng(self, folder)

    def report(run, name):
        print(name, sorted(path.name for path in (run / checkpointing.STAGE / name).glob("rng*")), flush=True)
        commit(run, name)

    NanoDeepSeekTrainer._save_rng_state = late
    checkpointing.commit = report
    pretrain.run(recipe)


def history(folder: Path) -> list[dict]:
    terms = ("step", "loss", "ce_loss", "grad_norm", "learning_rate", "expert_max_violation", "expert_bias_range")
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{term: entry[term] for term in terms} for entry in entries if "ce_loss" in entry]


def test_two_processes_save_and_resume_together(tiny_recipe, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "use_cpu": True}
    settings |= {"max_steps": 4, "resume_from_checkpoint": True, "report_to": []}

    def run(folder: Path) -> str:
        recipe = tiny_recipe(output_dir=str(folder), trainer=settings)
        recipe.model.overrides["router_noise"] = 0.05
        log = tmp_path / f"log of {folder.name}"
        _, errors = launching.launch("cpu", 2, log, work, recipe)
        assert not errors, errors
        return (log / "0.log").read_text()

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
