"""Runs of a recipe in the processes and the environment that `accelerate launch` makes of a launch file."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from modeling_nanodeepseek.balancing import routers
from modeling_nanodeepseek.losses import is_plain_head
from tests.distributed.processes import SERVER
from tests.small_run import TINY_MODEL
from train import pretrain
from train.recipe import REPOSITORY, Recipe
from train.sharding import local

LAUNCH_FILES = REPOSITORY / "configuration" / "accelerate"
STEPS, ROWS, LENGTH = 4, 8, 32

# Everything that learns is on: experts, the indexer, multi-token prediction. One expert per token, so that equal tokens
# all choose the same; odd numbers of rows, which divide by no number of processes.
MODEL = TINY_MODEL | {
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "q_lora_rank": 11,
    "kv_lora_rank": 13,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "aux_loss_alpha": 0.01,
    "num_nextn_predict_layers": 1,
    "index_topk": 6,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "dsa_stage": "sparse",
    "initializer_range": 0.2,
}


def environment(file: str, world: int) -> dict[str, str]:
    """What `accelerate launch --config_file file --num_processes world` sets for every process."""
    arguments = ["--config_file", str(LAUNCH_FILES / f"{file}.yaml"), "--num_processes", str(world)]
    arguments += ["--main_process_port", "0", "script.py"]
    settings, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in prepare_multi_gpu_env(settings).items() if os.environ.get(name) != value}


def rows() -> Dataset:
    """Of each step's rows the first half is random, and the second one and the same token: attention mixes equal
    values, so in every layer all choose one expert. Processes take consecutive rows: the last has nothing else."""
    ids = torch.randint(3, 300, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, ROWS // 2 :] = torch.arange(3, 3 + STEPS)[:, None, None]
    ids = ids.flatten(0, 1).tolist()
    columns = {"input_ids": ids, "position_ids": [list(range(LENGTH))] * len(ids)}
    return Dataset.from_dict(columns | {"attention_mask": [[1] * LENGTH] * len(ids)}).with_format("torch")


class Watch(TrainerCallback):
    """Of each step: experts that tokens of this process chose, by layer; all processes' counts; the biases here."""

    def __init__(self, trainer, kill_at: int | None = None):
        self.trainer, self.kill_at, self.steps = trainer, kill_at, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.used = [int((gate.tokens_per_expert > 0).sum()) for gate in routers(model)]
        if self.kill_at == state.global_step + 1 and args.process_index == 1:
            Path(args.output_dir, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        biases = [gate.e_score_correction_bias.tolist() for gate in routers(model)]
        self.steps.append((self.used, self.trainer.balancing.load.tokens.tolist(), biases))


def train_on_thirteen(recipe: Recipe) -> list[dict]:
    """The log of a run on 13 of the rows, mixed: two of its steps take rows that are left over, and rows again."""
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    trainer.train_dataset = rows().select(range(0, 26, 2))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return [entry for entry in trainer.state.log_history if "ce_loss" in entry]


def train(recipe: Recipe, kill_at: int | None = None) -> dict:
    """A run on `rows()`: its log, an entry for each step; what `Watch` saw; the evaluation; numbers held here; whether
    the loss goes without the logits."""
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    trainer.train_dataset = rows()
    trainer._get_train_sampler = lambda *args: SequentialSampler(trainer.train_dataset)
    watch = Watch(trainer, kill_at)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    log = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    held = sum(local(parameter).numel() for parameter in trainer.model.parameters())
    result = {"log": log, "steps": watch.steps, "score": trainer.evaluate()["eval_loss"], "held": held}
    return result | {"frugal": is_plain_head(trainer.model.lm_head)}


def killed(recipe: Recipe, step: int):
    """The same, with process 1 killed in a step, as a program: it ends with a message."""
    pretrain.launch(lambda recipe: train(recipe, step), recipe)


def _enter(variables: dict[str, str], rank: int, folder: str, work, args):
    os.environ |= variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {})
    sys.stdout = sys.stderr = open(f"{folder}/{rank}.log", "w")
    try:
        torch.set_num_threads(1)
        torch.save(work(*args), f"{folder}/{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(str(error) if type(error) is SystemExit else traceback.format_exc())
        sys.exit(1)


def launch(file: str, world: int, folder: Path, work, *args, seconds: float = 300) -> tuple[list, dict[int, str]]:
    """`work(*args)` in `world` processes: what each returned, None for one that did not; and errors by rank. Fails, and
    ends them, after `seconds`."""
    folder.mkdir(parents=True)
    variables = {}
    if world > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = environment(file, world) | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = [variables, 0, str(folder), work, args]
    processes = [SERVER.Process(target=_enter, args=(start[0], rank, *start[2:])) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    if hung:
        pytest.fail(f"{file}: of {world} processes {hung} did not end within {seconds} s")
    files = [folder / f"{rank}.pt" for rank in range(world)]
    results = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    return results, {int(path.stem): path.read_text() for path in folder.glob("*.error")}
