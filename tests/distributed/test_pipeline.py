"""Two processes, each with stages of a model, are one process: loss, every gradient, experts' load, whole weights; and
so is a recipe's run."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.balancing import routers
from tests.conftest import EARLIER_TORCH, assert_same, rms_ratio, tiny_model, tokens
from tests.distributed.launching import launch
from tests.distributed.test_faults import message_of
from tests.small_run import TINY_MODEL
from tests.train.test_faults import Poison
from train import pipeline as spread
from train import pretrain
from train.pipelining import SCHEDULES, Pipeline
from train.recipe import Recipe

MTP = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.3}
SPARSE = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8}
CASES = {
    "mtp": MTP,
    "sparse": MTP | SPARSE | {"dsa_stage": "sparse", "sparse_form": "gathered"},
    "warmup": MTP | SPARSE | {"dsa_stage": "warmup"},
    "tied": {"num_hidden_layers": 4, "tie_word_embeddings": True},
}
SCHEDULES_OF = {"mtp": tuple(SCHEDULES), "sparse": tuple(SCHEDULES), "warmup": ("zbv",), "tied": ("1f1b",)}
if EARLIER_TORCH:  # which train/pipelining.py then refuses all others for
    SCHEDULES_OF = dict.fromkeys(CASES, ("1f1b",))
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


def differences() -> list[dict]:
    """Of each case and schedule, between this process's part and one process with the same micro-batches."""
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
        for schedule in SCHEDULES_OF[case]:
            model = tiny_model(**settings).train()
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            pipeline = Pipeline(model, schedule, MICROBATCHES, ROWS, LENGTH)
            report = pipeline.from_last(pipeline.step(batch))
            mine = {id(p) for p in pipeline.part.parameters()}
            pairs = [(expected[n].grad, p.grad) for n, p in model.named_parameters() if id(p) in mine]
            result = {"case": case, "schedule": schedule, "expected": sum(losses).item(), "loss": report["loss"].item()}
            result["same_parts"] = all((a is None) == (b is None) for a, b in pairs)
            result["worst"] = max(rms_ratio(a, b) for a, b in pairs if a is not None and b is not None)
            result["norms"] = norm, pipeline.gradient_norm()
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


# Two stages on each process, so that the layers of one are not neighbours; of the data 4 steps' rows, so that the six
# steps cross an epoch.
RUN = {
    "model": {
        "config": "small",
        "overrides": TINY_MODEL
        | SPARSE
        | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.01, "q_lora_rank": 11}
        | {"initializer_range": 0.2, "dsa_stage": "sparse"},
    },
    "balance": {"gamma": 0.05},
}
STEPS = {"max_grad_norm": 0.5, "logging_steps": 2, "use_cpu": True, "report_to": []}
STEPS |= {"save_strategy": "steps", "save_steps": 4}
TERMS = ("loss", "ce_loss", "balance_loss", "index_kl", "mtp_loss_1", "grad_norm", "learning_rate")


class Keep(TrainerCallback):
    """Takes what the output folder holds after four steps elsewhere: the model that a pipeline has saved is replaced at
    the end."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4 and args.process_index == 0:
            shutil.copytree(args.output_dir, f"{args.output_dir}-4")


def run(recipe: Recipe, build) -> dict:
    """A run on 4 steps' rows: its log, its score, and the logits of its model."""
    kept = []

    def fewer_rows(recipe):
        kept.append(build(recipe))
        kept[0].train_dataset = kept[0].train_dataset.select(range(32))
        kept[0].add_callback(Keep())
        return kept[0]

    score = pretrain.run(recipe, fewer_rows)
    trainer = kept[0]
    log = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    return {"log": log, "score": score["eval_loss"], "logits": logits(trainer.model), "load": load(trainer)}


def load(trainer) -> tuple[list, list]:
    return trainer.balancing.load.tokens.tolist(), trainer.balancing.load.bias.tolist()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens(2, 12, vocab=300)).logits


def spoil_gradient(model):
    model.model.layers[1].self_attn.o_proj.weight.register_hook(lambda grad: grad * float("nan"))


def spoil_output(model):
    model.model.layers[3].mlp.experts.register_forward_hook(lambda module, args, output: output * float("nan"))


def spoiled(recipe: Recipe) -> list[str]:
    """What ends runs in which a gradient of the first stage, or an output of the last one, is no number."""
    messages = []
    for spoil in (spoil_gradient, spoil_output):
        trainer = spread.build(recipe)
        trainer.add_callback(Poison(2, spoil))
        messages.append(message_of(trainer.train))
    return messages


def spread_work(recipe: Recipe, one_stage: Recipe) -> dict:
    """In each process: a recipe's run, then `differences` and `spoiled`."""
    return {"run": run(recipe, spread.build), "differences": differences(), "spoiled": spoiled(one_stage)}


def alone_build(recipe: Recipe):
    return pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))


def test_two_processes_are_one(tiny_recipe, tmp_path):
    section = {"schedule": "1f1b" if EARLIER_TORCH else "dualpipev"}
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings = RUN | {"trainer": STEPS | rows}
    shared = tiny_recipe(output_dir=str(tmp_path / "shared"), pipeline=section, **settings)
    unsaved = settings | {"trainer": settings["trainer"] | {"save_strategy": "no"}}
    one_stage = tiny_recipe(output_dir=str(tmp_path / "spoiled"), pipeline={"schedule": "1f1b"}, **unsaved)
    found, errors = launch("ddp", 2, tmp_path / "results", spread_work, shared, one_stage)
    assert not errors, errors
    gradient, output = found[0]["spoiled"]
    assert found[1]["spoiled"] == [gradient, output]
    named = r"gradients are not finite: model\.layers\.1\.self_attn\.o_proj\.weight\."
    assert re.fullmatch(rf"step 2: the loss is \d+\.\d+, and {named}", gradient), gradient
    where = "first in the output of model.layers.3.mlp.experts (GatedExperts)"
    assert output == f"step 2: the loss is nan, {where}. No checkpoint holds this step."
    for process in found:
        assert len(process["differences"]) == sum(map(len, SCHEDULES_OF.values()))
        for result in process["differences"]:
            assert result["loss"] == pytest.approx(result["expected"], rel=1e-6), result
            assert result["same_parts"] and result["worst"] < 1e-5, result
            assert result["norms"][1] == pytest.approx(result["norms"][0], rel=1e-5), result
            assert all(result["loads"]) and bool(result["loads"]) == (result["case"] != "warmup"), result
            assert result["whole"], result

    one = run(tiny_recipe(output_dir=str(tmp_path / "alone"), **settings), alone_build)
    for two in (process["run"] for process in found):
        assert len(one["log"]) == len(two["log"]) == 3
        for expected, entry in zip(one["log"], two["log"]):
            for term in TERMS:
                assert entry[term] == pytest.approx(expected[term], rel=2e-4), term
            assert expected.keys() - entry.keys() == {k for k in expected if k.startswith("grad_norm/")}
        assert two["load"][0] == one["load"][0]  # counts of the last step, to the token
        assert torch.tensor(two["load"][1]).allclose(torch.tensor(one["load"][1]), atol=1e-6)
        assert two["score"] == pytest.approx(one["score"], rel=1e-4)
        saved = logits(NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "shared"))
        assert_same(saved, two["logits"])
        assert rms_ratio(one["logits"], two["logits"]) < 1e-3
    # What each has saved on the way, at the fourth step.
    expected, middle = (load_file(tmp_path / f / "model.safetensors") for f in ("alone/checkpoint-4", "shared-4"))
    last = load_file(tmp_path / "shared" / "model.safetensors")
    assert expected.keys() == middle.keys() == last.keys()
    for name, tensor in expected.items():
        assert rms_ratio(tensor, middle[name]) < 1e-3, name
    assert max(rms_ratio(tensor, last[name]) for name, tensor in expected.items()) > 1e-2
