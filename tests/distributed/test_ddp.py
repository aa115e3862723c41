"""Two processes under DDP as Trainer wraps a model, one of them with all its tokens on one expert."""

import torch
from torch.nn.parallel import DistributedDataParallel

from modeling_nanodeepseek import update_expert_bias
from modeling_nanodeepseek.balancing import routers
from tests.conftest import checkpoint_activations, rms_ratio, tiny_model, tokens
from tests.distributed import processes


def build():
    return tiny_model(num_experts_per_tok=1, norm_topk_prob=False, aux_loss_alpha=0.3).train()


def batch(rank: int, step: int) -> torch.Tensor:
    """On rank 1 the same token everywhere: attention mixes equal values, so all rows are equal in every layer."""
    return torch.full((2, 15), 3 + step) if rank else tokens(2, 15, seed=step)


def work(rank: int, world: int) -> list[tuple[list[int], float]]:
    """Of each step, with gradient checkpointing and without: experts used here per layer; the worst gradient's error
    against one process, which has both ranks' batches."""
    results = []
    for checkpointing in (False, True):
        alone, model = build(), build()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=False)
        # Trainer's choice: with checkpointing, a parameter without a gradient stops DDP at the next step.
        parallel = DistributedDataParallel(model, find_unused_parameters=not checkpointing)
        for step in range(3):
            parallel(batch(rank, step), labels=batch(rank, step)).loss.backward()
            used = [int((gate.tokens_per_expert > 0).sum()) for gate in routers(model)]
            for other in range(world):
                (alone(batch(other, step), labels=batch(other, step)).loss / world).backward()
            pairs = zip(alone.parameters(), model.parameters(), strict=True)
            results.append((used, max(rms_ratio(a.grad, b.grad) for a, b in pairs)))
            update_expert_bias(model, gamma=0.01)
            with torch.no_grad():
                alone.load_state_dict(model.state_dict())
            alone.zero_grad()
            model.zero_grad()
    return results


def test_a_rank_with_a_single_expert(tmp_path):
    first, second = processes.run(work, tmp_path)
    assert len(first) == len(second) == 6
    for (spread, error), (single, same) in zip(first, second):
        assert min(spread) > 3 and single == [1, 1]
        assert error < 1e-5 and same < 1e-5


def step_beside(alone, parallel, rank: int, world: int, step: int):
    """A forward and backward of this rank's batch under DDP, and of all ranks' in one process: this rank's output in
    both, and the pairs of parameters that learn."""
    batches = [tokens(2, 23, seed=2 * step + other) for other in range(world)]
    output = parallel(batches[rank], labels=batches[rank])
    output.loss.backward()
    outputs = [alone(ids, labels=ids) for ids in batches]
    (sum(o.loss for o in outputs) / world).backward()
    learning = [(name, p) for name, p in alone.named_parameters() if p.requires_grad]
    return output, outputs[rank], [(p, parallel.module.get_parameter(name)) for name, p in learning]


def stage_work(rank: int, world: int) -> list[tuple[float, float, float, bool]]:
    """Of each stage, with gradient checkpointing and without: this rank's KL and one process's, which has both ranks'
    batches; the worst gradient's error against it; whether the router biases moved. What is frozen is not waited for,
    in no step. Warm-up counts no tokens: there is no load to report, and its biases rest, also where they are centred.
    """
    results = []
    for stage in ("warmup", "sparse"):
        for checkpointing in (False, True):
            settings = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8, "dsa_stage": stage}
            alone, model = (tiny_model(**settings, aux_loss_alpha=0.3).train() for _ in range(2))
            if checkpointing:
                checkpoint_activations(model, use_reentrant=False)
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            for step in range(2):
                output, expected, pairs = step_beside(alone, parallel, rank, world, step)
                assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
                worst = max(rms_ratio(a.grad, b.grad) for a, b in pairs)
                before = torch.stack([gate.e_score_correction_bias.clone() for gate in routers(model)])
                load = update_expert_bias(model, gamma=0.5, centre=True)
                assert (load is None) == (stage == "warmup")
                moved = not torch.equal(before, torch.stack([gate.e_score_correction_bias for gate in routers(model)]))
                results.append((output.index_loss.item(), expected.index_loss.item(), worst, moved))
                with torch.no_grad():
                    for a, b in pairs:
                        b -= 0.1 * a.grad
                    alone.load_state_dict(model.state_dict())
                alone.zero_grad()
                model.zero_grad()
    return results


def test_stages_of_sparse_training(tmp_path):
    for rank in processes.run(stage_work, tmp_path):
        assert len(rank) == 8
        assert [moved for *_, moved in rank] == [False] * 4 + [True] * 4
        for kl, expected, error, _ in rank:
            assert abs(kl - expected) < 1e-5 * expected and error < 1e-5


def mtp_work(rank: int, world: int) -> list[tuple[float, list, list]]:
    """With selected keys, of each stage and of a detached trunk: the worst gradient's error against one process, which
    has both ranks' batches; the modules' losses here and there. Nothing is unused, and nothing waited for."""
    results = []
    for changes in (
        {"dsa_stage": "warmup"},
        {"dsa_stage": "sparse"},
        {"mtp_detach_trunk": True},
        {"mtp_loss_coef": 0.0},
    ):
        settings = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8, "num_nextn_predict_layers": 2} | changes
        for checkpointing in (False, True):
            alone, model = (tiny_model(**settings).train() for _ in range(2))
            if checkpointing:
                checkpoint_activations(model, use_reentrant=False)
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            for step in range(2):
                output, expected, pairs = step_beside(alone, parallel, rank, world, step)
                worst = max(rms_ratio(a.grad, b.grad) for a, b in pairs)
                losses = (o.mtp_depth_losses for o in (output, expected))
                results.append((worst, *([] if x is None else x.tolist() for x in losses)))
                update_expert_bias(model, gamma=0.01)
                with torch.no_grad():
                    alone.load_state_dict(model.state_dict())
                alone.zero_grad()
                model.zero_grad()
    return results


def test_multi_token_prediction(tmp_path):
    for rank in processes.run(mtp_work, tmp_path):
        assert len(rank) == 16
        assert [len(own) for _, own, _ in rank] == [0] * 4 + [2] * 8 + [0] * 4
        for error, own, expected in rank:
            assert error < 1e-5 and all(abs(a - b) < 1e-5 * b for a, b in zip(own, expected, strict=True))
