"""Two processes whose clocks differ stop at the same step, by rank 0's time."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.trainer import Clock


def work(rank: int, file: str, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    control, clock, seen = SimpleNamespace(should_training_stop=False), Clock(max_seconds=100.0), []
    for seconds in (10.0, 40.0, 100.0) if rank == 0 else (10.0, 200.0, 20.0):
        clock.spent = seconds
        clock.on_step_begin(args, None, control)
        clock.on_step_end(args, None, control)
        seen.append((clock.spent, control.should_training_stop))
    results[rank] = seen
    dist.destroy_process_group()


def test_ranks_stop_together(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (str(tmp_path / "store"), results), nprocs=2)
        ranks = [results[0], results[1]]
    assert ranks[0] == ranks[1]
    assert [stop for _, stop in ranks[0]] == [False, False, True]
