"""Runs of a recipe in the processes and the environment that `accelerate launch` makes of a launch file.

The processes are forked from one that has imported everything (a forkserver): importing costs more than the runs.
"""

import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import TrainerCallback

from train.hardware import use_threads
from train.pretrain import build_trainer, training_arguments
from train.recipe import REPOSITORY, Recipe

LAUNCH_FILES = REPOSITORY / "configuration" / "accelerate"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed.launching"])


def environment(file: str, world: int) -> dict[str, str]:
    """What `accelerate launch --config_file file --num_processes world` sets for every process."""
    arguments = ["--config_file", str(LAUNCH_FILES / f"{file}.yaml"), "--num_processes", str(world), "script.py"]
    return {
        name: value
        for name, value in prepare_multi_gpu_env(
            _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
        ).items()
        if os.environ.get(name) != value
    }


class Loads(TrainerCallback):
    """Keeps each step's load of the experts."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        load = self.balancing.load
        self.seen.append((load.tokens.tolist(), load.bias.tolist()))


def trained(recipe: Recipe, prepare=None) -> dict:
    """Of a run: its log (a list of dicts, an entry for each step), and of each step the load here."""
    use_threads(recipe.threads)
    trainer = build_trainer(recipe, training_arguments(recipe))
    loads = Loads()
    loads.balancing = trainer.balancing
    trainer.add_callback(loads)
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    score = trainer.evaluate()
    trainer.save_model(_internal_call=True)
    log = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    kinds = sorted({type(parameter.data).__name__ for parameter in trainer.model.parameters()})
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in trainer.model.parameters())
    return {"log": log, "loads": loads.seen, "score": score, "kinds": kinds, "held": held}


def _enter(variables: dict[str, str], rank: int, folder: str, work, args):
    os.environ |= variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {})
    try:
        torch.set_num_threads(1)
        torch.save(work(*args), f"{folder}/{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def launch(file: str, world: int, folder: Path, work, *args, seconds: float = 120) -> list:
    """`work(*args)` in `world` processes; their results by rank. Fails, and ends them, after `seconds`."""
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = environment(file, world) if world > 1 else {}
    if world > 1:
        variables |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(port)}
    processes = [
        SERVER.Process(target=_enter, args=(variables, rank, str(folder), work, args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    if hung or errors:
        pytest.fail(f"{file}, {world} processes: {f'{hung} did not end within {seconds} s' if hung else ''}\n{errors}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
