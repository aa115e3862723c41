"""Formulas of bubbles, the cut into stages, and what is refused."""

import re

import pytest
import torch

from train import pipeline, pretrain
from train.pipelining import bubble, check_microbatches, check_torch, split_layers, stages_of


def test_bubbles_of_the_report():
    # V3 report table 2 at F=1, B=2, W=1, F&B=3, eight stages
    times = {"forward": 1, "backward": 2, "weight": 1, "pair": 3}
    assert bubble("1f1b", 8, **times) == 21
    assert bubble("zb1p", 8, **times) == 7
    assert bubble("dualpipev", 8, **times) == 6
    assert bubble("zbv", 8, **times) == 0


def test_stages_of_a_v():
    assert [stages_of(rank, 4, "dualpipev") for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [stages_of(rank, 4, "1f1b") for rank in range(4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    "layers, further, stages, sizes",
    [(4, 0, 2, [2, 2]), (4, 1, 4, [1, 1, 1, 1]), (61, 1, 4, [15, 16, 16, 14]), (5, 3, 2, [4, 1])],
)
def test_even_cut(layers, further, stages, sizes):
    assert [len(part) for part in split_layers(layers, further, stages)] == sizes
    parts = split_layers(layers, further, stages)
    assert [i for part in parts for i in part] == list(range(layers))


def test_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\] does not cut 4 decoder layers into 2 stages"):
        split_layers(4, 0, 2, [3, 2])
    with pytest.raises(ValueError, match="3 decoder layers"):
        split_layers(3, 0, 4)
    with pytest.raises(ValueError, match="at least 4 micro-batches.*there are 3"):
        check_microbatches("dualpipev", 3, stages=4, ranks=2)
    with pytest.raises(ValueError, match="multiple of the 2 processes"):
        check_microbatches("zb1p", 5, stages=2, ranks=2)


def test_split_backward_of_an_old_torch_is_refused(tiny_recipe, monkeypatch):
    check_torch("1f1b")
    for version, schedule in (("2.12.1", "zbv"), ("2.11.0+cpu", "zb1p")):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        check_torch("1f1b")
        with pytest.raises(ValueError, match=rf"'{schedule}' needs torch 2.13.*{re.escape(version)}"):
            check_torch(schedule)
        recipe = tiny_recipe(pipeline={"schedule": schedule})
        with pytest.raises(ValueError, match=rf"'{schedule}' needs torch 2.13"):  # before any data is read
            pipeline.check(recipe, pretrain.training_arguments(recipe))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cpu"))
    check_torch("zbv")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainer": {"eval_strategy": "steps"}}, 'trainer.eval_strategy="steps" is not possible.*only "no"'),
        ({"trainer": {"save_strategy": "epoch"}}, 'trainer.save_strategy="epoch" is not possible.*"no" or "steps"'),
        ({"trainer": {"resume_from_checkpoint": True}}, "trainer.resume_from_checkpoint=true is not possible"),
        ({"trainer": {"eval_on_start": True, "eval_strategy": "no"}}, "trainer.eval_on_start=true is not possible"),
        (
            {"trainer": {"data_seed": 5}},
            "trainer.data_seed=5 is not possible.*only null: rows are shuffled",
        ),
        ({"trainer": {"train_sampling_strategy": "sequential"}}, 'strategy="sequential" is not.*only "random"'),
        ({"trainer": {"neftune_noise_alpha": 5.0}}, "trainer.neftune_noise_alpha=5.0 is not possible"),
        ({"trainer": {"debug": "underflow_overflow"}}, "trainer.debug=.*is not possible"),
        ({"trainer": {"save_on_each_node": True}}, "trainer.save_on_each_node=true is not possible"),
        ({"trainer": {"fsdp": "full_shard"}}, r"combined with no sharding \(trainer.fsdp\)"),
        ({"trainer": {"include_num_input_tokens_seen": True}}, 'input_tokens_seen="all" is not possible'),
        ({"data": {"streaming": True, "validation_documents": 2}}, "data.streaming is not possible"),
        ({"parallel": {"expert": 2}}, "parallel.expert=2 is not possible"),
        ({"precision": "fp8"}, "precision='fp8' is not possible"),
        ({}, "several processes: torchrun"),
    ],
)
def test_what_a_pipeline_does_not_honour(changes, message, tiny_recipe):
    recipe = tiny_recipe(**changes)
    with pytest.raises(ValueError, match=message):
        pipeline.check(recipe, pretrain.training_arguments(recipe))


def test_pretraining_does_not_spread_layers(tiny_recipe):
    with pytest.raises(ValueError, match="section pipeline is for torchrun.*leave it out"):
        pretrain.run(tiny_recipe(pipeline={"schedule": "zbv"}))
