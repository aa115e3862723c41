"""What of `parallel.expert` cannot be is one error before anything is shared."""

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin

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


def test_checkpoints_in_parts_are_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT")
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator)
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT in the launch file.*use FULL_STATE_DICT"):
        settle_fsdp2(trainer)
    plugin.set_state_dict_type("FULL_STATE_DICT")
    settle_fsdp2(trainer)
    assert plugin.mixed_precision_policy.param_dtype is None and not plugin.mixed_precision_policy.cast_forward_inputs


def test_one_process_shares_nothing():
    model = tiny_model()
    assert share_experts(model, ParallelSection()) is model
