"""Two processes, one of which computes what is no number: both stop at that step by one message, and none waits.

FSDP2 is tried without Trainer: accelerate knows FSDP on accelerators alone, and on CPUs wraps by DDP without a word.
"""

import functools
import os
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.conftest import tiny_model, tokens
from tests.distributed import processes
from tests.train.test_faults import Poison
from tests.train.test_trainer import build
from train.faults import NonFiniteError, check_finite
from train.recipe import Recipe


def spoil_output(model):
    model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: output * float("nan"))


def spoil_gradient(model):
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))


LOSS = "the loss is nan on process 1, first in the output of model.layers.1.mlp.experts (GatedExperts). No checkpoint "
EXPECTED = {
    spoil_output: f"step 3: {LOSS}holds this step.",
    spoil_gradient: "and gradients are not finite: model.norm.weight.",
}


def message_of(call) -> str:
    try:
        call()
    except NonFiniteError as error:
        return str(error)
    return "nothing stopped it"


def trained(recipe: Recipe, rank: int, spoil) -> str:
    """What ends a run by Trainer, which wraps by DDP."""
    trainer = build(recipe)
    if rank == 1:
        trainer.add_callback(Poison(3, spoil))
    message = message_of(trainer.train)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel" and trainer.state.global_step == 2
    return message


def sharded(rank: int, spoil) -> str:
    """What ends a step of a model in shards, of two micro-batches."""
    model, batches = tiny_model(aux_loss_alpha=0.3).train(), []
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    if rank == 1 and spoil is spoil_output:
        spoil(model)
    for ids in tokens(4, 13, seed=rank).chunk(2):
        inputs = {"input_ids": ids, "labels": ids}
        loss = model(**inputs).loss
        loss.backward()
        batches.append((inputs, loss))
    grad = model.model.norm.weight.grad
    assert isinstance(grad, DTensor)
    if rank == 1 and spoil is spoil_gradient:
        grad.to_local().fill_(float("inf"))  # in one process's part of it
    return message_of(lambda: check_finite(Accelerator(cpu=True), model, batches, step=3))


def work(rank: int, world: int, recipe: str) -> list[str]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    recipe = Recipe.model_validate_json(Path(recipe).read_text())
    told = [trained(recipe, rank, spoil) for spoil in EXPECTED]
    return told + [sharded(rank, spoil) for spoil in EXPECTED]


def test_one_stops_all(tiny_recipe, tmp_path):
    recipe = tiny_recipe(trainer={"report_to": [], "use_cpu": True, "logging_steps": 100})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    first, second = processes.run(functools.partial(work, recipe=str(tmp_path / "recipe.json")), tmp_path)
    assert first == second
    for told, expected in zip(first, [*EXPECTED.values()] * 2, strict=True):
        assert told.startswith("step 3: the loss is ") and told.endswith(expected), first
