"""What stops a run: losses and gradients that are no numbers, named with the step and the module; the end of another
process; a full disk under a thread that writes a log."""

import errno
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from .zero3 import is_shared


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class Stopped(BaseException):
    """SIGTERM. No Exception: nothing between a step and the program takes it for a problem of its own."""


# What gloo, torch's store and NCCL say in a process whose peer is gone. Whatever else they say is a problem of its own.
LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection was likely closed",
    "ncclremoteerror",
    "remote process exit",
    "watchdog caught collective operation timeout",
)


def lost_others(error: RuntimeError) -> bool:
    """Whether this process stops because another has ended: what it was waiting for will not come."""
    return any(text in str(error).lower() for text in LOST)


@contextmanager
def heed_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped, where a launcher has started several processes: when one has ended, torchrun's agent and
    accelerate's send it to the others, and SIGKILL to those that are still there 30 s later."""
    mine = os.getpid()

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != mine:  # forked to read or to tokenise; whoever started it ends it this way
            os.kill(os.getpid(), signal.SIGTERM)
        raise Stopped

    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """The gradient; where processes share it (FSDP2, ZeRO-3), this one's part."""
    if is_shared(parameter):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def non_finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of parameters whose `own_gradient` holds NaN or infinity."""
    grads = {name: own_gradient(parameter) for name, parameter in parameters}
    parts = {name: grad for name, grad in grads.items() if grad is not None and grad.numel()}
    if not parts:
        return []
    norms = torch._foreach_norm(list(parts.values()), torch.inf)
    finite = torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite()
    return [name for name, fine in zip(parts, finite.tolist()) if not fine]


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Takes down the innermost module whose output is the first that holds NaN or infinity, as "name (class)"."""
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
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: dict) -> str | None:
    """What `watch_outputs` finds in a forward on `inputs`; None if nothing. A dropout or noise may draw other numbers
    than before."""
    with watch_outputs(model) as found:
        model(**inputs)
    return found[0] if found else None


def check_finite(accelerator, model: nn.Module, batches: list[tuple[dict, torch.Tensor]], step: int, prepare=dict):
    """Raises NonFiniteError, the same on all processes, if a loss of this step or a gradient is not finite on any.

    Args:
        batches: of this process's micro-batches the inputs, and the loss; as many on each process.
        prepare: puts inputs where the model is.

    For fp16 gradients are scaled up, and a scaler skips steps in which they overflow: then only the losses count.
    """
    model = accelerator.unwrap_model(model)  # which keeps shards
    losses = torch.stack([loss.detach().float() for _, loss in batches])
    names = [] if accelerator.scaler is not None else non_finite_gradients(model.named_parameters())
    wrong = torch.cat([~losses.isfinite(), torch.tensor([bool(names)], device=losses.device)])
    *of_losses, of_gradients = accelerator.reduce(wrong.float(), reduction="sum").tolist()
    if any(of_losses):
        first = next(i for i, count in enumerate(of_losses) if count)
        message = describe_loss(accelerator, model, prepare(batches[first][0]), losses[first].item())
    elif of_gradients:
        names = list(dict.fromkeys(gather_object(names)))  # of shards, each process knows its own
        message = describe_gradients(accelerator.reduce(losses.sum(), reduction="mean").item(), names)
    else:
        return
    raise NonFiniteError(f"step {step}: {message}")


def describe_gradients(loss: float, names: list[str]) -> str:
    """What is told of a finite loss whose gradients are not, for these parameters."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"the loss is {loss:.4f}, and gradients are not finite: {shown}."


def describe_loss(accelerator, model: nn.Module, inputs: dict, loss: float) -> str:
    """What is told of a micro-batch whose loss is not finite on some processes, by the first of these.

    All of them search, whatever their own loss: the forward of a sharded model waits for each.
    """
    module = first_non_finite(model, inputs)
    process = f" on process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
    where = f", first in the output of {module}" if module else ""
    mine = None if math.isfinite(loss) else f"the loss is {loss}{process}{where}. No checkpoint holds this step."
    return next(message for message in gather_object([mine]) if message)


def disk_is_full(error: BaseException) -> bool:
    """Whether it says that no space is left, on the disk or of a user's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disks_of_threads() -> Iterator[None]:
    """A full disk under a thread (TensorBoard's writer is one) is the run's error, and no traceback besides. The writer
    passes its error on at its next call only, and the last call has no next one."""
    found, before = [], threading.excepthook

    def hook(told):
        found.append(told.exc_value) if disk_is_full(told.exc_value) else before(told)

    threading.excepthook = hook
    try:
        yield
        if found:
            raise found[0]
    finally:
        threading.excepthook = before
