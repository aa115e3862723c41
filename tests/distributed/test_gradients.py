"""Norms of gradients that FSDP2 spreads over two processes are those of the whole model."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.conftest import tiny_model, tokens
from tests.distributed import processes
from train.gradients import gradient_norms


def work(rank: int, world: int) -> tuple[dict, dict, int]:
    alone, sharded, ids = tiny_model().train(), tiny_model().train(), tokens()
    mesh = init_device_mesh("cpu", (world,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (alone, sharded):
        model(ids, labels=ids).loss.backward()
    pieces = sum(isinstance(parameter.grad, DTensor) for parameter in sharded.parameters())
    dist.barrier()
    return gradient_norms(alone), gradient_norms(sharded), pieces


def test_sharded_gradients(tmp_path):
    for alone, sharded, pieces in processes.run(work, tmp_path):
        assert pieces > 20 and len(alone) == 6
        assert sharded == pytest.approx(alone, rel=1e-4)
