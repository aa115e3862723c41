"""What of `parallel.expert` cannot be is one error before anything is shared."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from tests.conftest import EARLIER_TRANSFORMERS, tiny_model
from train.parallel import settle_fsdp2, share_experts
from train.recipe import ParallelSection


@pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="its DistributedConfig has no ep_size")
@pytest.mark.parametrize("size, variables, message", [
    (3, {"WORLD_SIZE": "4"}, "parallel.expert=3 does not divide the 4 processes"),
    (2, {}, "parallel.expert=2 does not divide the 1 processes"),
    (16, {"WORLD_SIZE": "16"}, "parallel.expert=16 does not divide the model's 8 experts"),
    (2, {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, "use a launch file without FSDP"),
    (2, {"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true"}, "use a launch file without DEEPSPEED"),
])  # fmt: skip
def test_impossible_expert_parallelism(size, variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        share_experts(tiny_model(), ParallelSection(expert=size))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="parallel.expert=2 with adaptive_expert_threshold=0.9 is not possible"):
        share_experts(tiny_model(adaptive_expert_threshold=0.9), ParallelSection(expert=2))


@pytest.fixture
def fsdp2(monkeypatch):
    """As much of a trainer under FSDP2 as is asked for there."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = FullyShardedDataParallelPlugin(state_dict_type="FULL_STATE_DICT")
    return SimpleNamespace(
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)),
        args=TrainingArguments(eval_strategy="steps", eval_steps=1, use_cpu=True),
        model=tiny_model(num_nextn_predict_layers=1),
    )


def test_checkpoints_in_parts_are_refused(fsdp2):
    plugin = fsdp2.accelerator.state.fsdp_plugin
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT in the launch file.*use FULL_STATE_DICT"):
        settle_fsdp2(fsdp2)
    plugin.set_state_dict_type("FULL_STATE_DICT")
    fsdp2.args.eval_strategy = IntervalStrategy.NO  # on every torch
    settle_fsdp2(fsdp2)
    assert plugin.mixed_precision_policy.param_dtype is None and not plugin.mixed_precision_policy.cast_forward_inputs


@pytest.mark.parametrize("setting, way", [
    ("activation_checkpointing", "trainer.gradient_checkpointing=true in the recipe"),
    ("cpu_ram_efficient_loading", "set it to false there"),
])  # fmt: skip
def test_what_accelerate_would_do_wrong_is_refused(fsdp2, setting, way):
    setattr(fsdp2.accelerator.state.fsdp_plugin, setting, True)
    with pytest.raises(ValueError, match=f"fsdp_{setting}: true, by the launch file, is not possible: .*{way}"):
        settle_fsdp2(fsdp2)


@pytest.mark.parametrize("version, change, refused", [
    ("2.12.1", {}, "eval_strategy=steps and eval_on_start=False.* need torch 2.13, and this is 2.12.1"),
    ("2.12.1", {"eval_strategy": IntervalStrategy.NO, "eval_on_start": True}, "and eval_on_start=True"),
    ("2.12.1", {"eval_strategy": IntervalStrategy.NO}, None),
    ("2.12.1", {"num_nextn_predict_layers": 0}, None),
    ("2.13.0+cpu", {}, None),
])  # fmt: skip
def test_evaluating_before_the_end_on_an_earlier_torch(fsdp2, version, change, refused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    for name, value in change.items():
        setattr(fsdp2.model.config if name.startswith("num_") else fsdp2.args, name, value)
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        settle_fsdp2(fsdp2)


def test_one_process_shares_nothing():
    model = tiny_model()
    assert share_experts(model, ParallelSection()) is model
