"""Two processes (gloo): the biases move by the summed counts and are the same on both, under DDP."""

import torch
from torch.nn.parallel import DistributedDataParallel

from modeling_nanodeepseek import update_expert_bias
from tests.conftest import tiny_model, tokens
from tests.distributed import processes


def work(rank: int, world: int) -> list[tuple[list, list]]:
    model = DistributedDataParallel(tiny_model().train())
    trajectory = []
    for step in range(3):
        ids = tokens(4, 15, seed=step).chunk(world)[rank]
        for part in ids.chunk(2):  # DDP broadcasts rank 0's buffers before each forward: counts must not be one
            model(part, labels=part).loss.backward()
        load = update_expert_bias(model, gamma=0.01)
        model.zero_grad()
        trajectory.append((load.tokens.tolist(), load.bias.tolist()))
    return trajectory


def test_counts_are_summed_over_ranks(tmp_path):
    ranks = processes.run(work, tmp_path)
    single = tiny_model().train()
    for step in range(3):
        single(tokens(4, 15, seed=step))
        load = update_expert_bias(single, gamma=0.01)
        for rank in ranks:
            assert rank[step][0] == load.tokens.tolist()
            assert torch.equal(torch.tensor(rank[step][1]), load.bias)
