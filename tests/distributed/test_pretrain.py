"""The whole pipeline in two processes (gloo) is the run of one process: losses step by step, and the final score."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.small_run import TINY_MODEL
from train import pretrain
from train.expert_load import read_expert_load
from train.recipe import REPOSITORY


def history(folder: Path) -> list[dict]:
    return [e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "ce_loss" in e]


WARM_UP = {
    "config": "small",
    "overrides": TINY_MODEL | {"q_lora_rank": 16, "initializer_range": 0.2},
    "dsa_stage": "warmup",
    "indexer": {"index_topk": 4, "index_n_heads": 3, "index_head_dim": 8},
}
TERMS = {
    "all": (
        "loss",
        "ce_loss",
        "balance_loss",
        "grad_norm",
        "expert_max_violation",
        "expert_load_entropy",
        "grad_norm/experts",
        "grad_norm/scalars",
        "expert_max_violation/layer_1",
    ),
    "warm-up": ("loss", "ce_loss", "index_loss", "index_kl", "grad_norm"),
    "streamed": ("loss", "ce_loss", "balance_loss", "grad_norm", "learning_rate", "expert_max_violation"),
}
STREAMED = {  # whose batch grows from 8 rows to 16
    "data": {"streaming": True, "validation_documents": 5, "fim_rate": 0.2},
    "schedule": {"kind": "v3", "batch_ramp": {"start": 8, "tokens": 600}},
}


@pytest.mark.parametrize("learns", TERMS)
def test_two_processes_are_one(learns, tiny_recipe, tmp_path):
    model = {"warm-up": {"model": WARM_UP}, "streamed": STREAMED}.get(learns, {})
    steps = {"gradient_accumulation_steps": 2 if learns == "streamed" else 1}
    alone = tiny_recipe(output_dir=str(tmp_path / "alone"), trainer={"per_device_train_batch_size": 8} | steps, **model)
    pretrain.run(alone)
    file = tmp_path / "recipe.yaml"
    shared = tiny_recipe(
        output_dir=str(tmp_path / "shared"),
        trainer={"per_device_train_batch_size": 4, "use_cpu": True} | steps,
        **model,
    )
    file.write_text(yaml.safe_dump(shared.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "train.pretrain", "--config", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history(tmp_path / "alone")) == 3
    for one, two in zip(history(tmp_path / "alone"), history(tmp_path / "shared"), strict=True):
        assert ("expert_max_violation" in two) == ("expert_max_violation" in TERMS[learns])
        for term in TERMS[learns]:
            assert two[term] == pytest.approx(one[term], rel=1e-3), term
    loads = [read_expert_load(tmp_path / folder) for folder in ("alone", "shared")]
    assert len(loads[0]) == (3 if learns == "all" else 0) and loads[0] == loads[1]  # counts of both ranks, to the token
    scores = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("alone", "shared")]
    assert scores[0]["eval_tokens"] == scores[1]["eval_tokens"]
    assert scores[1]["eval_loss"] == pytest.approx(scores[0]["eval_loss"], rel=1e-4)
    recalls = [score["eval_index_recall"] for score in scores if "eval_index_recall" in score]
    assert len(recalls) == (2 if learns == "warm-up" else 0)
    assert recalls[1:] == pytest.approx(recalls[:1], rel=1e-3)
