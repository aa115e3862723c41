"""Gradient norms by part of the model, for the log."""

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The decoder layer that a parameter or module belongs to, by its name."""
    found = LAYER.search(f".{name}.")
    return None if found is None else int(found[1])


def part_of(name: str, parameter: torch.Tensor, layers: int) -> str:
    """Which part of the model a parameter is of; layers from `layers` on are multi-token prediction's."""
    if (layer_of(name) or 0) >= layers:
        return "mtp"
    for mark, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        (".indexer.", "indexer"),
        (".mlp.gate.", "router"),
        (".mlp.experts.", "experts"),
    ):
        if mark in name:
            return part
    return "matrices" if parameter.ndim >= 2 else "scalars"


@torch.no_grad()
def gradient_norms(model: nn.Module, scale: float = 1.0) -> dict[str, float]:
    """The 2-norm of each part's gradients, `grad_norm/<part>`; their squares add up to that of the whole.

    Parts: embedding, head, router, experts, indexer, mtp, matrices (the other weights of 2 dims), scalars (norms and
    biases). Call it before gradients are clipped, on every rank: norms of sharded gradients (DTensor) are summed over
    the ranks that share them. Gradients that lie elsewhere (DeepSpeed) have no entry.

    Args:
        scale: what the gradients are multiplied by (fp16's loss scale).
    """
    parts: dict[tuple, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None  # a sum is within one
            part = part_of(name, parameter, model.config.num_hidden_layers)
            parts.setdefault((part, mesh), []).append(parameter.grad)
    squares: dict[str, torch.Tensor] = {}
    for (part, _), gradients in parts.items():
        norm = nn.utils.get_total_norm(gradients)
        square = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float() ** 2
        squares[part] = squares[part] + square if part in squares else square
    if not squares:
        return {}
    norms = torch.stack(list(squares.values())).sqrt() / scale
    return dict(zip((f"grad_norm/{part}" for part in squares), norms.tolist()))
