"""What stops a run: losses and gradients that are no numbers, named with the step and the module."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Parameters whose gradient (of FSDP, this rank's part of it) holds NaN or infinity."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    if not parts:
        return []
    norms = torch._foreach_norm(list(parts.values()), torch.inf)
    finite = torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite()
    return [name for name, fine in zip(parts, finite.tolist()) if not fine]


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: dict) -> str | None:
    """The innermost module whose output is the first that holds NaN or infinity in a forward on `inputs`; None if none
    does. A dropout or noise may draw other numbers than before."""
    found: list[str] = []

    def look(name: str):
        def hook(module, args, output):
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            bad = any(isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors)
            if bad and not found:
                found.append(f"{name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def check_finite(model: nn.Module, inputs: dict, loss: torch.Tensor, step: int, scaled: bool = False):
    """Raises NonFiniteError if a gradient is not finite, as after a loss that is not.

    scaled: gradients are scaled up for fp16, and a scaler skips steps in which they overflow: only the loss counts.
    """
    names = [] if scaled else non_finite_gradients(model)
    if not (names or (scaled and not loss.isfinite().all())):
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if not loss.isfinite().all():
        module = first_non_finite(model, inputs)
        where = f"first in the output of {module}" if module else "though no module's output is"
        raise NonFiniteError(f"step {step}: the loss is {loss.item()}, {where}. No checkpoint holds this step.")
    raise NonFiniteError(f"step {step}: the loss is {loss.item():.4f}, and gradients are not finite: {shown}.")
