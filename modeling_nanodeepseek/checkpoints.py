"""DeepSeek's layout of a checkpoint on disk, and ours in memory.

On disk every expert has its own 2-D tensors (`mlp.experts.{e}.gate_proj.weight` [m, d], `up_proj`, `down_proj`); in
memory all experts of a layer are stacked in 3-D (`mlp.experts.gate_up_proj` [E, 2m, d], `down_proj` [E, d, m]).
`from_pretrained` and `save_pretrained` translate by transformers' conversion mapping, registered here; everything else
that loads weights (`load_state_dict`, a Trainer that resumes) by a hook on the experts module.
"""

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_nanodeepseek import NanoDeepSeekConfig


def register_conversions():
    """Makes transformers stack and split our experts as it does for its own DeepSeek models.

    Repeatable: the installed package and a copy loaded from the Hub may both run it. Ungated experts (`gated_mlp`
    false, no official layout) keep `up_proj` stacked on disk.
    """
    mapping = get_checkpoint_conversion_mapping("deepseek_v3")
    register_checkpoint_conversion_mapping(NanoDeepSeekConfig.model_type, mapping, overwrite=True)


def stack_expert_keys(module: nn.Module, state_dict: dict, prefix: str, *args):
    """A load_state_dict pre-hook: replaces per-expert keys under `prefix` by the stacked parameters of `module`.

    A stacked key that is already there is left alone. Experts missing from the checkpoint are left to
    load_state_dict, which reports them.
    """
    for parameter, parts in module.stacked_names.items():
        names = [[f"{prefix}{e}.{part}.weight" for part in parts] for e in range(module.num_experts)]
        if all(name in state_dict for expert in names for name in expert):
            stacked = torch.stack([torch.cat([state_dict.pop(name) for name in expert]) for expert in names])
            state_dict[prefix + parameter] = stacked
