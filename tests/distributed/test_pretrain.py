"""The whole pipeline in two processes (gloo) is the run of one process: losses step by step, and the final score."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train import pretrain
from train.recipe import REPOSITORY


def history(folder: Path) -> list[dict]:
    return [e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "ce_loss" in e]


def test_two_processes_are_one(tiny_recipe, tmp_path):
    alone = tiny_recipe(output_dir=str(tmp_path / "alone"), trainer={"per_device_train_batch_size": 8})
    pretrain.run(alone)
    file = tmp_path / "recipe.yaml"
    shared = tiny_recipe(
        output_dir=str(tmp_path / "shared"), trainer={"per_device_train_batch_size": 4, "use_cpu": True}
    )
    file.write_text(yaml.safe_dump(shared.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "train.pretrain", "--config", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history(tmp_path / "alone")) == 3
    for one, two in zip(history(tmp_path / "alone"), history(tmp_path / "shared"), strict=True):
        for term in ("loss", "ce_loss", "balance_loss", "grad_norm", "expert_max_violation", "expert_load_entropy"):
            assert two[term] == pytest.approx(one[term], rel=1e-3), term
    scores = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("alone", "shared")]
    assert scores[0]["eval_tokens"] == scores[1]["eval_tokens"]
    assert scores[1]["eval_loss"] == pytest.approx(scores[0]["eval_loss"], rel=1e-4)
