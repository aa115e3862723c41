"""What processes share by DeepSpeed's ZeRO-3, as one process has it: so a checkpoint is the folder that every other
layout writes and reads.

DeepSpeed is imported where it is used: a run without it needs none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _IncompatibleKeys
from transformers.integrations import deepspeed as integration

from modeling_nanodeepseek.stacking import shape_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def whole_models():
    """Within it from_pretrained reads a whole model in each process, as the launch file's zero3_init_flag says.

    transformers would have it made in parts at once, and those wait for processes whose turn to load comes later.
    """
    reference = integration._hf_deepspeed_config_weak_ref
    settings = reference() if reference is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            integration.set_hf_deepspeed_config(settings)


def is_shared(parameter: nn.Parameter) -> bool:
    """Whether processes hold parts of it; its own shape is then [0], and `shape_of` the whole one's."""
    return hasattr(parameter, "ds_id")


def own_part(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Of a whole tensor (the parameter's shape) the flat piece that belongs here: [n], n the number of elements over
    that of processes, rounded up. The last is filled up with zeros."""
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
    flat = F.pad(tensor.flatten(), (0, size * dist.get_world_size(group) - tensor.numel()))
    return flat.narrow(0, size * dist.get_rank(group), size)


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """A state dict of whole tensors on the CPU, in fp32 where the optimizer steps fp32 copies; empty where it is not to
    be kept. Every process must call."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights, parameters = {}, dict(model.named_parameters())
    for name, parameter in parameters.items():
        weight = safe_get_full_fp32_param(parameter)
        if weight is None:  # it does not learn
            with GatheredParameters([parameter]):
                weight = parameter.detach().clone()
        if keep:
            weights[name] = weight.cpu()
    persistent = model.state_dict().keys()
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return weights | buffers if keep else {}


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> _IncompatibleKeys:
    """As `load_state_dict(strict=False)`, from the same whole weights in every process. Raises: RuntimeError for one of
    another shape."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param

    persistent = model.state_dict().keys()
    here = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    for name in here.keys() & weights.keys():
        if tuple(weights[name].shape) != shape_of(here[name]):
            raise RuntimeError(f"{name} is {list(weights[name].shape)}, not {list(shape_of(here[name]))}")
    for name, tensor in here.items():
        if name not in weights:
            continue
        weight = weights[name].to(tensor.device)
        if not is_shared(tensor):
            tensor.data.copy_(weight)
            continue
        with GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(weight)
        if tensor.requires_grad:
            safe_set_local_fp32_param(tensor, own_part(weight.float(), tensor))
    return _IncompatibleKeys(sorted(here.keys() - weights.keys()), sorted(weights.keys() - here.keys()))


def flat_states(parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, torch.Tensor, dict]]:
    """Each flat piece that DeepSpeed steps: a parameter of it, itself, and the state that the optimizer has of it."""
    zero = parameters[0]._z3_optimizer
    for pieces, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        yield pieces[0], flat, zero.optimizer.state[flat]


def whole_optimizer(groups: list[dict], parameters: list[list[nn.Parameter]], keep: bool) -> dict:
    """The state dict that AdamW has in one process; empty where it is not to be kept. Every process must call.

    Args:
        groups: the optimizer's, whose parameters DeepSpeed has made flat.
        parameters: of each group, as they were.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    everything = [parameter for group in parameters for parameter in group]
    step, state = max(flat["step"] for _, _, flat in flat_states(everything)), {}
    for index, parameter in enumerate(everything):
        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        if keep:
            state[index] = {"step": step.cpu().clone()} | {name: moment.cpu() for name, moment in moments.items()}
    if not keep:
        return {}
    kept, start = [], 0
    for group, members in zip(groups, parameters, strict=True):
        indices = list(range(start, start := start + len(members)))
        kept.append({key: value for key, value in group.items() if key != "params"} | {"params": indices})
    return {"state": state, "param_groups": kept}


def load_optimizer(groups: list[dict], parameters: list[list[nn.Parameter]], state: dict):
    """What `whole_optimizer` gives, or another layout's AdamW, into this one's pieces. Raises: RuntimeError for another
    number of parameters, or moments of other shapes."""
    from deepspeed.utils import safe_set_local_optimizer_state

    everything = [parameter for group in parameters for parameter in group]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group) for group in parameters]:
        raise RuntimeError("the optimizer's state has other groups of parameters than this run")
    for _, flat, held in flat_states(everything):  # as the first step would begin it
        held["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        held |= {name: torch.zeros_like(flat) for name in MOMENTS}
    steps = {}
    for index, parameter in enumerate(everything):
        held = state["state"].get(index, {})  # none of a parameter that never had a gradient
        steps[id(parameter)] = float(held.get("step", 0.0))
        for name in MOMENTS:
            moment = held.get(name, torch.zeros(shape_of(parameter)))
            if tuple(moment.shape) != shape_of(parameter):
                raise RuntimeError(f"{name} is {list(moment.shape)}, not {list(shape_of(parameter))}")
            moment = moment.to(parameter.ds_tensor.device, torch.float32)
            safe_set_local_optimizer_state(parameter, own_part(moment, parameter), name)
    for parameter, _, held in flat_states(everything):
        held["step"].fill_(steps[id(parameter)])
    for group, saved in zip(groups, state["param_groups"]):
        group.update({key: value for key, value in saved.items() if key != "params"})
