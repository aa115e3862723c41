"""The optimizer: parameter groups stated in one place, Muon for hidden matrices, AdamW for everything else."""

import functools

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw  # the functional form that torch.optim.AdamW calls

from modeling_nanodeepseek.moe import GatedExperts

from .hardware import multiplies_bf16
from .recipe import OptimizerSection
from .sharding import local, on_whole_matrices, rows_group


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Moves each matrix of a stack [N, r, c] towards U V^T of its singular value decomposition.

    torch.optim.Muon's quintic Newton-Schulz iteration, X <- aX + (bA + cA^2) X with A = X X^T, on all matrices at once,
    and in fp32 where bf16 is not native: torch's own takes one matrix at a time, always in bf16 (1.8 times the time on
    a CPU without AMX: `benchmarks/training_choices.py`).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.to(torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X if wide else X.mT).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon and AdamW as one optimizer, so that Trainer, its schedulers and its checkpoints see one.

    A group with `muon=True` takes the steps of torch.optim.Muon (Jordan et al. 2024; arXiv:2502.16982), which refuses
    stacks, on the matrices a parameter holds: [E, out, in] is E matrices, and with `row_blocks=2` (`gate_up_proj`) each
    is a gate and an up matrix. Other groups take the steps of torch.optim.AdamW (arXiv:1711.05101), by its own kernel.

    Where processes share the parameters (FSDP2, expert parallelism) each steps its part. Experts are whole there; of
    other matrices each process holds some rows, and each orthogonalizes some whole matrices for all.

    Args:
        groups: dicts with `params`, and `lr`, `weight_decay`, `muon`, `row_blocks` where the defaults do not serve.
        betas, eps: of AdamW.
        momentum, ns_steps: of Muon; Nesterov momentum, and its number of Newton-Schulz iterations.
    """

    def __init__(self, groups: list[dict], *, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, ns_steps=5):
        # `fused`: a resume then puts the count of steps beside the parameter, where the kernel wants it.
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "row_blocks": 1, "fused": True}
        super().__init__(groups, defaults | {"betas": betas, "eps": eps, "momentum": momentum, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon_step if group["muon"] else self._adamw_step)(group)
        return loss

    def _muon_step(self, group: dict):
        # Matrices of one shape, spread over the same processes, are orthogonalized at once.
        stacks: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param.grad)
            grad, momentum = local(param.grad), local(state["momentum_buffer"])
            momentum.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"])  # Nesterov
            rows, columns = param.shape[-2] // group["row_blocks"], param.shape[-1]
            spread = rows_group(param) if isinstance(param, DTensor) and param.ndim == 2 else None
            # [E, blocks * out, in] -> E * blocks matrices; a 2-D parameter is a stack of one.
            matrices = update.reshape(-1, rows, columns) if spread is None else update[None]
            stacks.setdefault((rows, columns, spread), []).append((local(param), matrices))
        for (rows, columns, spread), entries in stacks.items():
            params, parts = zip(*entries)
            function = functools.partial(orthogonalize, steps=group["ns_steps"])
            if spread is not None:
                function = functools.partial(on_whole_matrices, function, rows=rows, group=spread)
            updates = function(torch.cat(parts)).split([len(part) for part in parts])
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            for param, update in zip(params, updates):
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.reshape(param.shape), alpha=-lr)

    def _adamw_step(self, group: dict):
        params = [param for param in group["params"] if param.grad is not None]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        adamw(
            [local(param) for param in params],
            [local(param.grad) for param in params],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict]:
    """The groups, named: every trainable parameter is in exactly one.

    `matrices` and `gate_up` (the fused experts, two matrices each): hidden weights of 2 and 3 dims; `embedding`;
    `head` (unless tied to the embedding); `router`; `scalars`: norm weights, biases and the indexer's weights_proj.
    Rows of the latter and of the router are single directions (of a head's weight, of an expert) rather than a map.
    Only matrices decay.
    """
    kinds = ("matrices", "gate_up", "embedding", "head", "router", "scalars")
    names: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    fused = {id(m.gate_up_proj) for m in model.modules() if isinstance(m, GatedExperts)}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param is embedding:
            kind = "embedding"
        elif param is head:
            kind = "head"
        elif id(param) in fused:
            kind = "gate_up"
        elif name.endswith(".gate.weight"):
            kind = "router"
        elif param.ndim >= 2 and not name.endswith(".weights_proj.weight"):
            kind = "matrices"
        else:
            kind = "scalars"
        names[kind].append(param)
    muon_groups = section.name == "muon"
    rates = {"embedding": section.embedding_lr, "head": section.head_lr, "scalars": section.scalar_lr}
    rates["router"] = section.scalar_lr if section.router_lr is None else section.router_lr
    groups = []
    for kind, params in names.items():
        matrix = kind in ("matrices", "gate_up")
        group = {"name": kind, "params": params, "lr": rates.get(kind, section.matrix_lr)}
        group |= {"weight_decay": section.weight_decay if matrix else 0.0, "muon": muon_groups and matrix}
        groups.append(group | {"row_blocks": 2 if kind == "gate_up" else 1})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> MuonAdamW:
    """The optimizer of a recipe for this model."""
    return MuonAdamW(
        parameter_groups(model, section),
        betas=section.betas,
        eps=section.eps,
        momentum=section.momentum,
        ns_steps=section.ns_steps,
    )
