"""The whole pipeline in two processes (gloo) is the run of one process: losses step by step, and the final score."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from tests.distributed import launching
from tests.small_run import TINY_MODEL
from train import pretrain
from train.checkpointing import checkpoints
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


def start(recipe):
    pretrain.launch(pretrain.run, recipe)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes on GPUs find each other")
def test_processes_that_would_train_alone(tiny_recipe, tmp_path):
    """Each the whole run, into one folder."""
    recipe = tiny_recipe(trainer={"use_cpu": False}, data={"source": str(tmp_path / "nowhere")})
    _, errors = launching.launch("ddp", 2, tmp_path / "log", start, recipe)
    assert set(errors) == {0, 1} and errors[0] == errors[1]
    assert errors[0].startswith(
        "error: 2 processes were started (WORLD_SIZE), and each would train alone, with trainer"
    )
    assert "trainer.use_cpu=False" in errors[0] and "set trainer.use_cpu=true" in errors[0] and "\n" not in errors[0]


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
    if learns == "all":  # as a user starts it
        file.write_text(yaml.safe_dump(shared.model_dump(mode="json")))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, "-m", "train.pretrain", "--config", str(file)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        _, errors = launching.launch("cpu", 2, tmp_path / "log", pretrain.run, shared)
        assert not errors, errors
    assert len(history(tmp_path / "alone")) == 3
    for one, two in zip(history(tmp_path / "alone"), history(tmp_path / "shared"), strict=True):
        assert ("expert_max_violation" in two) == ("expert_max_violation" in TERMS[learns])
        for term in TERMS[learns]:
            assert two[term] == pytest.approx(one[term], rel=1e-3), term
    loads = [read_expert_load(tmp_path / folder) for folder in ("alone", "shared")]
    assert len(loads[0]) == (0 if learns == "warm-up" else 3)
    assert loads[0] == loads[1]  # counts of both ranks, to the token
    scores = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("alone", "shared")]
    assert scores[0]["eval_tokens"] == scores[1]["eval_tokens"]
    assert scores[1]["eval_loss"] == pytest.approx(scores[0]["eval_loss"], rel=1e-4)
    recalls = [score["eval_index_recall"] for score in scores if "eval_index_recall" in score]
    assert len(recalls) == (2 if learns == "warm-up" else 0)
    assert recalls[1:] == pytest.approx(recalls[:1], rel=1e-3)


def waits_for_sigterm(pid: int) -> bool:
    """Whether a process that is suspended was sent SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("ShdPnd:")[1].split()[0], 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see a signal that is waiting")
def test_a_killed_process_under_the_real_launcher(tiny_recipe, tmp_path):
    """Whose SIGTERM reaches the other one while that is still finding out: one message, then nothing is left."""
    trainer = {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 4, "report_to": [], "use_cpu": True}
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny_recipe(trainer=trainer | {"save_total_limit": 2}).model_dump(mode="json")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", "configuration/accelerate/cpu.yaml"]
    command = [*launch, "-m", "train.pretrain", "--config", str(file)]
    with (tmp_path / "stderr").open("w") as written:
        launcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=written)
    started = [psutil.Process(launcher.pid)]
    try:
        deadline = time.monotonic() + 120
        while not checkpoints(run):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()[-3000:]
            time.sleep(0.05)
        started += started[0].children(recursive=True)
        first, second = (next(p for p in started if p.environ().get("RANK") == rank) for rank in "01")
        first.suspend()  # until the signal is there: else either might be first
        second.kill()
        while not waits_for_sigterm(first.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.resume()
        assert launcher.wait(timeout=90) != 0  # what SIGKILL ends, after 30 s, leaves no message
        left = psutil.wait_procs(started, timeout=5)[1]
    finally:
        for process in started:
            if process.is_running():
                process.kill()
    assert not left
    told = [line for line in (tmp_path / "stderr").read_text().splitlines() if "error: process" in line]
    assert len(told) == 1 and "error: process 0 stops, because another has ended" in told[0], told
    assert told[0].endswith(f"trainer.resume_from_checkpoint=true goes on from '{checkpoints(run)[0]}'")
