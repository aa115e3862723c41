"""Functions run in several processes of a gloo group, with an end to waiting.

The processes are forked from one that has imported everything (a forkserver): importing costs more than the tests.
"""

import gc
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from tests.conftest import EARLIER_TORCH

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed.launching"])


def _enter(rank: int, world: int, store: str, work, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results[rank] = work(rank, world)
    # DDP's reducer must be gone before its process group is: its destructor otherwise waits for the group's thread,
    # which waits for the interpreter lock.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    halves = [placement for placement in tensor.placements if hasattr(placement, "split_factor")]
    if not (EARLIER_TORCH and halves):
        return tensor.full_tensor()
    # Each half of a stacked matrix is split of itself, which this torch can do but not undo.
    part = tensor.to_local().detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    chunks = zip(*(part.chunk(halves[0].split_factor, halves[0].dim) for part in parts))
    return torch.cat([chunk for group in chunks for chunk in group], halves[0].dim)


def wait_for(context: mp.ProcessContext, seconds: float):
    """Until the processes have ended; raises what one of them raised. Fails, and ends them, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{len(context.processes)} processes did not end within {seconds} s")


def run(work, tmp_path, world: int = 2, seconds: float = 120) -> list:
    """`work(rank, world)` in `world` processes; their results by rank. Fails, and ends them, after `seconds`."""
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (world, str(tmp_path / "store"), work, results)
        wait_for(mp.start_processes(_enter, arguments, nprocs=world, join=False, start_method="forkserver"), seconds)
        return [results[rank] for rank in range(world)]
