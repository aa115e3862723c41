"""Two processes whose clocks differ stop at the same step, by rank 0's time."""

from types import SimpleNamespace

import torch

from tests.distributed import processes
from train.trainer import Clock


def work(rank: int, world: int) -> list[tuple[float, bool]]:
    args = SimpleNamespace(world_size=world, device=torch.device("cpu"))
    control, clock, seen = SimpleNamespace(should_training_stop=False), Clock(max_seconds=100.0), []
    for seconds in (10.0, 40.0, 100.0) if rank == 0 else (10.0, 200.0, 20.0):
        clock.spent = seconds
        clock.on_step_begin(args, None, control)
        clock.on_step_end(args, None, control)
        seen.append((clock.spent, control.should_training_stop))
    return seen


def test_ranks_stop_together(tmp_path):
    first, second = processes.run(work, tmp_path)
    assert first == second
    assert [stop for _, stop in first] == [False, False, True]
