"""Experts that are stacked in memory and one by one on disk: the names of both, and the hook that translates.

On disk every expert has its own 2-D tensors (`mlp.experts.{e}.gate_proj.weight` [m, d], `up_proj`, `down_proj`); in
memory all experts of a layer are stacked in 3-D (`mlp.experts.gate_up_proj` [E, 2m, d], `down_proj` [E, d, m]).
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(OSError, RuntimeError):
    """A checkpoint that is damaged, incomplete, or of another model. (transformers raises either parent for these.)"""


def listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape; of a parameter that ZeRO-3 has taken away its own."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def expert_keys(module: nn.Module, prefix: str) -> dict[str, list[list[str]]]:
    """Each stacked parameter of an experts module -> per expert, the keys on disk that it is made of."""
    # Of all experts: where processes share them, `num_experts` is how many are held here.
    counts = {parameter: shape_of(getattr(module, parameter))[0] for parameter in module.stacked_names}
    return {
        parameter: [[f"{prefix}{e}.{part}.weight" for part in parts] for e in range(counts[parameter])]
        for parameter, parts in module.stacked_names.items()
    }


def misfits(module: nn.Module, prefix: str, shapes: Shapes) -> list[str]:
    """Per-expert keys under `prefix` of a wrong shape, or of experts that the module does not have."""
    problems = []
    for parameter, experts in expert_keys(module, prefix).items():
        count, rows, columns = shape_of(getattr(module, parameter))
        expected = (rows // len(experts[0]), columns)
        problems += [
            f"{name} is {list(shapes[name])}, not {list(expected)}"
            for expert in experts
            for name in expert
            if shapes.get(name, expected) != expected
        ]
    numbers = {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    extra = sorted(int(number) for number in numbers if number.isdigit() and int(number) >= count)
    if extra:
        problems.append(f"{prefix}{extra[0]} is there, and the model has {count} experts")
    return problems


def absentees(module: nn.Module, prefix: str, present: Iterable[str]) -> list[str]:
    """Per-expert keys that are not `present` although others of the same parameter are."""
    present, absent = set(present), []
    for experts in expert_keys(module, prefix).values():
        names = [name for expert in experts for name in expert]
        missing = [name for name in names if name not in present]
        absent += missing if len(missing) < len(names) else []
    return absent


# Experts modules that were given a part of their experts: keys they have, keys they lack, the hook that stops them.
_partial: "weakref.WeakKeyDictionary[nn.Module, tuple[set[str], list[str], Any]]" = weakref.WeakKeyDictionary()


def awaited_experts(model: nn.Module) -> list[str]:
    """Keys of experts that no `load_state_dict` has brought yet, in layers of which it has brought others."""
    return [name for module in model.modules() if module in _partial for name in _partial[module][1]]


def refuse_to_run(module: nn.Module, args):
    """A forward pre-hook of experts that were loaded in part."""
    absent = _partial[module][1] if module in _partial else []
    if absent:
        raise CheckpointError(
            f"the checkpoint that was loaded lacks experts: {listed(f'{n} is missing' for n in absent)}"
        )


def stack_expert_keys(
    module: nn.Module, state_dict: dict, prefix: str, metadata, strict, missing, unexpected, errors: list[str]
):
    """A load_state_dict pre-hook: replaces per-expert keys under `prefix` by the stacked parameters of `module`.

    A stacked key that is already there is left alone. If all experts of a parameter are absent, load_state_dict
    reports it as missing; if some are, these. With strict=False, as Trainer resumes, that is no error yet, since the
    next shard may bring them; until it does the module refuses to run.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if name.startswith(prefix)}
    whole = {prefix + parameter for parameter in module.stacked_names}
    if not shapes or (whole == shapes.keys() and module not in _partial):  # ZeRO-3's, which have no shape either
        return
    earlier, _, hook = _partial.pop(module, (set(), [], None))
    if hook is not None:
        hook.remove()
    present = earlier | shapes.keys()
    absent = absentees(module, prefix, present)
    missing += absent  # torch tells hooks that it is strict, always
    problems = misfits(module, prefix, shapes)
    errors += problems
    if problems:
        return
    for parameter, experts in expert_keys(module, prefix).items():
        given = [name in shapes for expert in experts for name in expert]
        if all(given):
            stacked = torch.stack([torch.cat([state_dict.pop(name) for name in expert]) for expert in experts])
            state_dict[prefix + parameter] = stacked
        elif any(given):
            stacked = getattr(module, parameter).detach().clone()
            for expert, matrix in zip(experts, stacked):
                for name, piece in zip(expert, matrix.chunk(len(expert))):
                    if name in shapes:
                        piece.copy_(state_dict.pop(name))
            state_dict[prefix + parameter] = stacked
    if absent:
        _partial[module] = present, absent, module.register_forward_pre_hook(refuse_to_run)
