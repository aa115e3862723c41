"""Starts the processes of transformers' distributed tests: gloo on a CPU, with an end to waiting.

In place of its tests/distributed_testing_utils.py, under the same names. Processes are forked from a server that has
imported everything once: a test then costs a second instead of two interpreters that import torch and transformers.
"""

import functools
import multiprocessing
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.processes import wait_for

SECONDS = 180


def start_rank_processes(function, args: tuple = (), nprocs: int = 2):
    """`function(rank, *args)` in `nprocs` processes; raises what one of them raised."""
    multiprocessing.set_forkserver_preload(["tests.conformance.suite"])
    wait_for(
        mp.start_processes(_alone, (function, *args), nprocs=nprocs, join=False, start_method="forkserver"), SECONDS
    )


def _alone(rank: int, function, *args):
    torch.set_num_threads(1)
    function(rank, *args)


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in a group of 2 processes."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                start_rank_processes(_in_group, (world_size, f"{folder}/store", function, args), world_size)

        return run

    return decorate


def _in_group(rank: int, world_size: int, store: str, function, args: tuple):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


PROCESS_HELPERS = {
    "run_distributed": run_distributed,
    "_start_rank_processes": start_rank_processes,
    "_get_distributed_backend": lambda: "gloo",
    "_get_distributed_device_type": lambda: "cpu",
    "_get_rank_device": lambda rank: torch.device("cpu"),
    "_set_rank_device": lambda rank: None,
}
