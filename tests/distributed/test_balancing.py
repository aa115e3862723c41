"""Two processes (gloo): the biases move by the summed counts and are the same on both, under DDP."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from modeling_nanodeepseek import update_expert_bias
from modeling_nanodeepseek.balancing import routers
from tests.conftest import tiny_model, tokens


def work(rank: int, world: int, file: str, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    model = DistributedDataParallel(tiny_model().train())
    trajectory = []
    for step in range(3):
        ids = tokens(4, 15, seed=step).chunk(world)[rank]
        model(ids, labels=ids).loss.backward()
        load = update_expert_bias(model, gamma=0.01)
        model.zero_grad()
        trajectory.append((load.tokens, load.bias))
    results[rank] = [(t.tolist(), b.tolist()) for t, b in trajectory]
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2])
def test_counts_are_summed_over_ranks(world, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (world, str(tmp_path / "store"), results), nprocs=world)
        ranks = [results[rank] for rank in range(world)]
    single = tiny_model().train()
    for step in range(3):
        single(tokens(4, 15, seed=step))
        load = update_expert_bias(single, gamma=0.01)
        for rank in ranks:
            assert rank[step][0] == load.tokens.tolist()
            assert torch.equal(torch.tensor(rank[step][1]), load.bias)
    assert len(routers(single)) == 2
