"""How several processes share a model, beyond what the launch file's own engine does."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.distributed import DistributedConfig

from modeling_nanodeepseek import NanoDeepSeekForCausalLM

from .recipe import ParallelSection


def shard_on_cpu(trainer: Trainer):
    """Turns on the FSDP that the launch file asks for where accelerate leaves it off without a word: on CPUs, which
    torch's FSDP2 serves as well."""
    state = trainer.accelerator.state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not wanted or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()  # reads the launch file's settings
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: {plugin.fsdp_version} in the launch file: on CPUs only 2 is possible")
    state.fsdp_plugin = plugin
    # As accelerate itself ends: the one is a copy of the other, made anew by whoever asks.
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def settle_fsdp2(trainer: Trainer):
    """Leaves casts to autocast under FSDP2, as without it. accelerate would have it cast parameters, inputs and outputs
    to bf16: routers too, the number of targets that the loss is divided by, and the losses.

    Raises: ValueError for checkpoints in parts, since a model in parts is nothing that from_pretrained reads; for
    accelerate's activation checkpointing, which recomputes under other random numbers, and its loading by one process,
    which stops at buffers; and before torch 2.13 for evaluating before the end with multi-token prediction, which uses
    the head by itself: in evaluation that leaves FSDP's group of the last norm and the head half done there.
    """
    if not (trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2):
        return
    plugin, args = trainer.accelerator.state.fsdp_plugin, trainer.args
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type: {plugin.state_dict_type.name} in the launch file would save no model that "
            "from_pretrained reads: use FULL_STATE_DICT"
        )
    for setting, way in (
        ("activation_checkpointing", "set it to false, and trainer.gradient_checkpointing=true in the recipe"),
        ("cpu_ram_efficient_loading", "set it to false there, since accelerate takes it for true"),
    ):
        if getattr(plugin, setting):
            raise ValueError(f"fsdp_{setting}: true, by the launch file, is not possible: {way}")
    strategy, at_start = args.eval_strategy.value, args.eval_on_start
    predicts, evaluates = trainer.model.config.num_nextn_predict_layers, strategy != "no" or at_start
    if predicts and evaluates and Version(torch.__version__) < Version("2.13"):
        raise ValueError(
            f"trainer.eval_strategy={strategy} and eval_on_start={at_start} with multi-token prediction under FSDP2 "
            f"need torch 2.13, and this is {torch.__version__}: set them to no and false, the end is evaluated in any "
            "case"
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def share_experts(model: NanoDeepSeekForCausalLM, section: ParallelSection) -> NanoDeepSeekForCausalLM:
    """The model spread over all processes by transformers: experts over groups of `section.expert` processes, which
    send each other tokens; all else, and what of the experts several groups hold alike, by FSDP2.

    Every process must call, with the same weights. Raises: ValueError where this cannot be.
    """
    world, size, experts = int(os.environ.get("WORLD_SIZE", "1")), section.expert, model.config.n_routed_experts
    if size == 1:
        return model
    if not hasattr(DistributedConfig(), "ep_size"):
        raise ValueError("parallel.expert needs a transformers whose DistributedConfig has ep_size (5.23 has)")
    if world % size:
        raise ValueError(f"parallel.expert={size} does not divide the {world} processes (accelerate's num_processes)")
    if not experts or experts % size:
        raise ValueError(f"parallel.expert={size} does not divide the model's {experts} experts")
    if model.config.adaptive_expert_threshold > 0:
        raise ValueError(
            f"parallel.expert={size} with adaptive_expert_threshold={model.config.adaptive_expert_threshold} is not "
            "possible: how many experts a token gets must be fixed"
        )
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(
                f"parallel.expert={size} shares the model by itself: use a launch file without {engine}, such as "
                "configuration/accelerate/fsdp2_ep.yaml"
            )
    settings = DistributedConfig(fsdp_size=world, ep_size=size)
    settings, _, mesh = type(model).prepare_distribute_model(settings)
    return type(model).maybe_distribute_model(model, settings, mesh)
