"""TensorBoard, W&B (offline) and trackio (local) hold after a run what the run logged, our own terms included."""

import json
import os
import sqlite3
import struct
import subprocess
import sys

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small_run import TINY_MODEL
from train import pretrain
from train.recipe import REPOSITORY

SPARSE = {"q_lora_rank": 16, "index_topk": 4, "index_n_heads": 3, "index_head_dim": 8, "num_nextn_predict_layers": 1}
MODEL = {"config": "small", "overrides": TINY_MODEL | SPARSE}
OURS = {
    "ce_loss", "balance_loss", "index_kl", "mtp_loss_1", "mtp_accuracy_1", "expert_max_violation",
    "expert_max_violation/layer_1", "expert_bias_range/layer_2", "grad_norm/experts", "grad_norm/indexer",
    "tokens_per_second", "flop_utilisation", "seconds_left",
}  # fmt: skip


def logged(history: list[dict]) -> dict[tuple[int, str], float]:
    """What the trackers are to hold of the training steps: (step, term) -> value."""
    entries = {(e["step"], key): value for e in history if "ce_loss" in e for key, value in e.items() if key != "step"}
    assert {key for _, key in entries} >= OURS and {step for step, _ in entries} == {2, 4}
    return entries


def test_tensorboard(tiny_recipe, tmp_path):
    recipe = tiny_recipe(model=MODEL, trainer={"max_steps": 4})
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    trainer.train()
    (file,) = (tmp_path / "run").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for (step, key), value in logged(trainer.state.log_history).items():
        held = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert held[step] == pytest.approx(value, rel=1e-6), key


def wandb_history(file) -> dict[int, dict[str, float]]:
    """The rows of an offline run's file: after a header of 7 bytes LevelDB's log format, a protobuf each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, rows = file.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a block's rest is too small for a record
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/ce_loss" in row:
                rows[int(row["train/global_step"])] = {key: json.loads(value) for key, value in row.items()}
    return rows


def test_wandb_and_trackio(tiny_recipe, tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    recipe = tiny_recipe(model=MODEL, trainer={"max_steps": 4, "report_to": ["wandb", "trackio"]})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "train.pretrain", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=os.environ | places)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"run"}  # what is evaluated at the end included
    rows = [json.loads(metrics) for _, metrics in rows]
    assert any("eval/bits_per_byte" in row for row in rows)
    trackio = {row["train/global_step"]: row for row in rows if "train/ce_loss" in row}
    wandb = wandb_history(file)
    for (step, key), value in logged(state["log_history"]).items():
        for tracker in (wandb, trackio):
            assert tracker[step][f"train/{key}"] == pytest.approx(value, rel=1e-9), key
