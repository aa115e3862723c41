"""The optimizer: parameter groups stated in one place, Muon for hidden matrices, AdamW for everything else."""

import torch
from torch import nn
from torch.optim._muon import muon
from torch.optim.adamw import adamw

from modeling_nanodeepseek.moe import GatedExperts

from .recipe import OptimizerSection


class MuonAdamW(torch.optim.Optimizer):
    r"""torch's Muon and torch's AdamW as one optimizer, so that Trainer, its schedulers and its checkpoints see one.

    A group with `muon=True` takes Muon steps (Jordan et al. 2024; arXiv:2502.16982), each parameter as the matrices it
    holds: a stack [E, out, in] is E matrices, and `gate_up_proj` is cut into its gate and up halves first, since an
    orthogonalised sum of two maps is not two orthogonalised maps. Other groups take AdamW steps (arXiv:1711.05101).

    Args:
        groups: dicts with `params`, `lr`, `weight_decay` and `muon`; Muon groups may have `parts`, a dict from a
            parameter to the number of equal row blocks that are matrices of their own.
    """

    def __init__(self, groups: list[dict], *, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, ns_steps=5):
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "row_blocks": 1}
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
        params, grads, momenta = [], [], []
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param.grad)
            for views, tensor in ((params, param), (grads, param.grad), (momenta, state["momentum_buffer"])):
                matrices = tensor.unbind() if tensor.ndim == 3 else [tensor]
                views += [block for matrix in matrices for block in matrix.chunk(group["row_blocks"])]
        muon(
            params,
            grads,
            momenta,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=True,
            ns_coefficients=(3.4445, -4.7750, 2.0315),
            ns_steps=group["ns_steps"],
            eps=1e-7,
            adjust_lr_fn=None,
            has_complex=False,
        )

    def _adamw_step(self, group: dict):
        params = [param for param in group["params"] if param.grad is not None]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        adamw(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
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
    `head` (unless tied to the embedding); `scalars`: norm weights, biases and the router, whose rows are single
    directions rather than a map. Only matrices decay.
    """
    names: dict[str, list[nn.Parameter]] = {key: [] for key in ("matrices", "gate_up", "embedding", "head", "scalars")}
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
        elif param.ndim >= 2 and not name.endswith(".gate.weight"):
            kind = "matrices"
        else:
            kind = "scalars"
        names[kind].append(param)
    muon_groups = section.name == "muon"
    rates = {"embedding": section.embedding_lr, "head": section.head_lr, "scalars": section.scalar_lr}
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
