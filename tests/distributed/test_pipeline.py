"""Two processes, each with stages of a model, are one process: loss, every gradient, experts' load, whole weights."""

import pytest
import torch

from modeling_nanodeepseek.balancing import routers
from tests.conftest import rms_ratio, tiny_model, tokens
from tests.distributed import processes
from train.pipelining import SCHEDULES, Pipeline

MTP = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.3}
SPARSE = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8}
CASES = {
    "mtp": MTP,
    "sparse": MTP | SPARSE | {"dsa_stage": "sparse", "sparse_form": "gathered"},
}
ROWS, LENGTH, MICROBATCHES = 2, 23, 4


def packed_batch() -> dict[str, torch.Tensor]:
    """Two documents in every other row, padding in one."""
    ids = tokens(ROWS * MICROBATCHES, LENGTH)
    position_ids = torch.arange(LENGTH).repeat(len(ids), 1)
    position_ids[::2, 9:] = torch.arange(LENGTH - 9)
    attention_mask = torch.ones_like(ids)
    attention_mask[3, 15:] = position_ids[3, 15:] = 0
    labels = ids.masked_fill((position_ids == 0) | (attention_mask == 0), -100)
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids, "attention_mask": attention_mask}


def work(rank: int, world: int) -> list[dict]:
    """Of each case and schedule this process's differences from one process with the same micro-batches."""
    results = []
    for case, settings in CASES.items():
        alone, batch = tiny_model(**settings).train(), packed_batch()
        items = (batch["labels"][:, 1:] != -100).sum()
        losses = []
        for i in range(0, len(batch["labels"]), ROWS):
            part = {name: tensor[i : i + ROWS] for name, tensor in batch.items()}
            losses.append(alone(**part, num_items_in_batch=items).loss)
            losses[-1].backward()
        expected = dict(alone.named_parameters())
        loads = [gate.tokens_per_expert for gate in routers(alone)]
        norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.grad is not None]).item()
        for schedule in SCHEDULES:
            model = tiny_model(**settings).train()
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            pipeline = Pipeline(model, schedule, MICROBATCHES, ROWS, LENGTH)
            report = pipeline.from_last(pipeline.step(batch))
            mine = {id(p) for p in pipeline.part.parameters()}
            pairs = [(expected[n].grad, p.grad) for n, p in model.named_parameters() if id(p) in mine]
            result = {"case": case, "schedule": schedule, "expected": sum(losses).item(), "loss": report["loss"].item()}
            result["same_parts"] = all((a is None) == (b is None) for a, b in pairs)
            result["worst"] = max(rms_ratio(a, b) for a, b in pairs if a is not None and b is not None)
            result["norms"] = norm, pipeline.clip_gradients(None)
            of_experts = [
                torch.equal(gate.tokens_per_expert, load)
                for gate, load in zip(routers(model), loads)
                if load is not None and not gate.weight.is_meta
            ]
            result["loads"] = of_experts
            pipeline.update_expert_bias(0.0, False)
            pipeline.restore()
            after = model.state_dict()
            result["whole"] = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
            results.append(result)
    return results


def test_every_schedule_is_one_process(tmp_path):
    for rank in processes.run(work, tmp_path, seconds=300):
        assert len(rank) == len(CASES) * len(SCHEDULES)
        for result in rank:
            assert result["loss"] == pytest.approx(result["expected"], rel=1e-6), result
            assert result["same_parts"] and result["worst"] < 1e-5, result
            assert result["norms"][1] == pytest.approx(result["norms"][0], rel=1e-5), result
            assert len(result["loads"]) >= 1 and all(result["loads"]) and result["whole"], result
