"""Stacked routed experts and how they are computed.

Letters of the shape suffixes: T tokens, d hidden, E experts, K experts per token, m expert width, n tokens of one
expert. An index of E in a choice means "no expert": that slot computes nothing.

`config._experts_implementation` chooses, through transformers' interface: `sorted_mm` (ours, the default), `eager` (the
loop to read), transformers' `grouped_mm`, `batched_mm` and the rest. They agree to rounding.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ExpertsInterface

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import asked_gradients, compute_dtype, once_differentiable
from .stacking import stack_expert_keys

DEFAULT_EXPERTS = "sorted_mm"
# Up to how many choices (tokens by experts of each) single rows are multiplied one by one. Measured on a core: 0.5
# times the time of sorted rows for 1 x 2 choices, 0.6 for 2 x 2, 0.8 for 4 x 4 and 8 x 4, 1.1 for 16 x 2.
FEW_CHOICES = 24


def _per_expert(counts: list[int], *rows: torch.Tensor):
    """(expert, its part of each of `rows`) for every expert that has tokens; the last count is of dropped slots."""
    start = 0
    for expert, count in enumerate(counts[:-1]):
        if count:
            yield expert, *(r.narrow(0, start, count) for r in rows)
            start += count


def _one_by_one(hidden_Td, weights_TK, up_Exd, down_Edm, tokens, slots, counts, activate, keep=None) -> torch.Tensor:
    """The forward of `_SortedExperts`; `keep` is called with each expert's h."""
    weights = weights_TK.flatten().index_select(0, slots).to(hidden_Td.dtype)
    total_Td = torch.zeros_like(hidden_Td, dtype=torch.promote_types(hidden_Td.dtype, torch.float32))
    for e, rows, w in _per_expert(counts, tokens, weights):
        h = hidden_Td.index_select(0, rows) @ up_Exd[e].T
        if keep is not None:
            keep(h)
        y = (activate(h) * w[:, None]) @ down_Edm[e].T
        total_Td.index_add_(0, rows, y.to(total_Td.dtype))
    return total_Td.to(hidden_Td.dtype)


class _SortedExperts(torch.autograd.Function):
    """sum_k w_k Expert_k(u), one expert after the other, with a backward that keeps little and copies little.

    For expert e with tokens x [n, d], weights w [n]:   h = x Wup_e^T    a = act(h)    y = (w a) Wdown_e^T
    Backward from g = dL/dy:   da = w (g Wdown_e)    dw = <g Wdown_e, a>    dWdown_e = g^T (w a)
                               dh = act'(h) da       dWup_e = dh^T x        dx = dh Wup_e
    Kept for backward are h and the inputs; x and a are made again, a GEMM never is. The weight is applied to a, which
    is narrower than y, and y is never kept. Sums over a token's experts are in fp32 (fp64 for fp64).

    Arguments: hidden [T, d], weights [T, K], up [E, 2m or m, d], down [E, d, m]; tokens [T K] and slots [T K], the
    token and the place in [T K] of each row when rows are sorted by expert; counts: rows of each expert, the last entry
    those without one; activate: h [n, 2m or m] -> a [n, m], elementwise.
    """

    @staticmethod
    def forward(ctx, hidden_Td, weights_TK, up_Exd, down_Edm, tokens, slots, counts, activate):
        kept = []
        output = _one_by_one(hidden_Td, weights_TK, up_Exd, down_Edm, tokens, slots, counts, activate, kept.append)
        ctx.counts, ctx.activate = counts, activate
        ctx.save_for_backward(hidden_Td, weights_TK, up_Exd, down_Edm, tokens, slots, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_Td):
        hidden_Td, weights_TK, up_Exd, down_Edm, tokens, slots, *pre_activations = ctx.saved_tensors
        weights = weights_TK.flatten().index_select(0, slots).to(hidden_Td.dtype)
        need_hidden, _, need_up, need_down = asked_gradients(ctx)[:4]
        grad_hidden_Td = torch.zeros_like(hidden_Td, dtype=torch.promote_types(hidden_Td.dtype, torch.float32))
        grad_weights = torch.zeros_like(weights)
        # Every expert with tokens writes its part; the others' must be zero.
        grad_up_Exd = torch.zeros_like(up_Exd) if need_up else None
        grad_down_Edm = torch.zeros_like(down_Edm) if need_down else None
        grad_Td = grad_Td.to(hidden_Td.dtype)
        for (e, rows, w, gw), h in zip(_per_expert(ctx.counts, tokens, weights, grad_weights), pre_activations):
            g = grad_Td.index_select(0, rows)
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                a = ctx.activate(leaf)
            da = g @ down_Edm[e]
            gw.copy_((da * a.detach()).sum(-1))
            if need_down:
                torch.mm(g.T, a.detach() * w[:, None], out=grad_down_Edm[e])
            (dh,) = torch.autograd.grad(a, leaf, da.mul_(w[:, None]))
            if need_up:
                torch.mm(dh.T, hidden_Td.index_select(0, rows), out=grad_up_Exd[e])
            if need_hidden:
                grad_hidden_Td.index_add_(0, rows, (dh @ up_Exd[e]).to(grad_hidden_Td.dtype))
        grad_weights_TK = torch.zeros_like(weights_TK)
        grad_weights_TK.view(-1).index_copy_(0, slots, grad_weights.to(grad_weights_TK.dtype))
        grad_hidden_Td = grad_hidden_Td.to(hidden_Td.dtype)
        return grad_hidden_Td, grad_weights_TK, grad_up_Exd, grad_down_Edm, None, None, None, None


def _grouped_mm(x: torch.Tensor, weight_Eab: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows x [N, a], sorted by expert, each times its expert's [a, b]. torch compiles its own for bf16 alone; what
    transformers registers for the others is a loop over experts, one node in a graph."""
    if torch.compiler.is_compiling() and weight_Eab.dtype != torch.bfloat16:
        return torch.ops.transformers.grouped_mm_fallback(x, weight_Eab, ends)
    return F.grouped_mm(x, weight_Eab, offs=ends)


def _grouped(hidden_Td, weights_TK, up_Exd, down_Edm, sorted_experts, tokens, slots, activate, drops: bool):
    """The same by two grouped GEMMs over all rows: for GPUs, and for torch.compile, which cannot follow row counts."""
    experts = torch.arange(1, len(up_Exd) + 1, device=hidden_Td.device)
    ends = torch.searchsorted(sorted_experts, experts).to(torch.int32)
    x = hidden_Td[tokens]
    w = weights_TK.flatten()[slots].to(x.dtype)
    dropped = (sorted_experts == len(up_Exd))[:, None] if drops else None
    if drops:
        # The kernels leave rows without an expert as they found them, forward and backward.
        x, w = x.masked_fill(dropped, 0.0), w.masked_fill(dropped[:, 0], 0.0)
    h = _grouped_mm(x, up_Exd.mT, ends)
    if drops:
        h = h.masked_fill(dropped, 0.0)
    y = _grouped_mm(activate(h) * w[:, None], down_Edm.mT, ends)
    if drops:
        y = y.masked_fill(dropped, 0.0)
    y_TKd = y[slots.argsort()].unflatten(0, weights_TK.shape)
    return y_TKd.sum(1, dtype=torch.promote_types(y.dtype, torch.float32)).to(hidden_Td.dtype)


def _few_tokens(hidden_Td, weights_TK, up_Exd, down_Edm, indices_TK, activate) -> torch.Tensor:
    """The same for a few tokens, as in decoding: nothing to sort, gather or scatter, and few operations."""
    total_Td = torch.zeros_like(hidden_Td, dtype=torch.promote_types(hidden_Td.dtype, torch.float32))
    rows, sums = hidden_Td.split(1), total_Td.split(1)
    choices = zip(indices_TK.tolist(), weights_TK.tolist(), rows, sums)
    chosen = [(e, w, x, y) for es, ws, x, y in choices for e, w in zip(es, ws) if e < len(up_Exd)]
    if chosen:
        a = activate(torch.cat([torch.mm(x_1d, up_Exd[e].T) for e, _, x_1d, _ in chosen]))
        for a_1m, (e, w, _, y_1d) in zip(a.split(1), chosen):
            y_1d.add_(torch.mm(a_1m, down_Edm[e].T), alpha=w)
    return total_Td.to(hidden_Td.dtype)


def run_experts(hidden_Td, weights_TK, up_Exd, down_Edm, indices_TK, activate, alone=True) -> torch.Tensor:
    """The forward without gradients. Of `up` and `down` it takes only the matrices of chosen experts, up[e].

    alone: a few tokens may take the road that rounds otherwise than a training step does.
    """
    if alone and indices_TK.numel() <= FEW_CHOICES:
        return _few_tokens(hidden_Td, weights_TK, up_Exd, down_Edm, indices_TK, activate)
    return _one_by_one(hidden_Td, weights_TK, up_Exd, down_Edm, *_by_expert(indices_TK, len(up_Exd)), activate)


def prefers_grouped(hidden_Td: torch.Tensor, up_Exd: torch.Tensor, down_Edm: torch.Tensor) -> bool:
    """Whether grouped GEMMs run: on GPUs and under torch.compile, where the sizes meet their alignment
    of 16 bytes; they take no fp64."""
    aligned = all(size * hidden_Td.itemsize % 16 == 0 for size in (*up_Exd.shape[1:], *down_Edm.shape[1:]))
    return aligned and hidden_Td.dtype != torch.float64 and (hidden_Td.is_cuda or torch.compiler.is_compiling())


def sorted_mm(module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """Our experts implementation: every token's row sorted by expert, then GEMMs in the dtype of autocast.

    On CPUs one GEMM per expert (`_SortedExperts`), on GPUs and under torch.compile grouped GEMMs (`_grouped`). Shapes:
    [T, d], [T, K], [T, K] -> [T, d].
    """
    activate, dtype = module.activate, compute_dtype(hidden_states)
    hidden, up, down = (tensor.to(dtype) for tensor in (hidden_states, module.up_weight(), module.down_proj))
    operands = hidden, top_k_weights, up, down
    with torch.autocast(hidden.device.type, enabled=False):
        if prefers_grouped(hidden, up, down):
            output = _grouped(*operands, *_sort(top_k_index), activate, drops=module._is_expert_parallel)
        elif torch.is_grad_enabled():
            output = _SortedExperts.apply(*operands, *_by_expert(top_k_index, module.num_experts), activate)
        else:
            output = run_experts(*operands, top_k_index, activate, alone=not module.training)
    return output.to(hidden_states.dtype)


def _sort(indices_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All T K choices sorted by expert: the experts, their tokens, and their places in [T K]."""
    sorted_experts, slots = indices_TK.flatten().sort(stable=True)
    return sorted_experts, slots // indices_TK.shape[1], slots


def _by_expert(indices_TK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens and places of all choices sorted by expert, and how many each expert has; the last count is of none."""
    sorted_experts, tokens, slots = _sort(indices_TK)
    return tokens, slots, torch.bincount(sorted_experts, minlength=experts + 1).tolist()


def by_the_module(module, *args) -> torch.Tensor:
    """What transformers finds under our name: of whichever copy of this file the module is. A package and a copy loaded
    from the Hub, of another version, both register theirs, and the last one stays."""
    return module.sorted_mm(*args)


ExpertsInterface.register(DEFAULT_EXPERTS, by_the_module)


class _Experts(nn.Module):
    """What both kinds of stacked experts share: sizes, the loop to read, and reading per-expert checkpoints."""

    stacked_names: dict[str, tuple[str, ...]]  # parameter -> the per-expert keys it is made of, in order

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        # Its `forward` is called, without hooks: it runs once for each expert that has tokens, and ZeRO-3, which counts
        # modules that run, ends where processes count differently.
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        # Trainer resumes through plain load_state_dict, where transformers' own conversion does not reach.
        self.register_load_state_dict_pre_hook(stack_expert_keys)

    def sorted_mm(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        return sorted_mm(self, hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_Td: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """sum_k w_k Expert_k(u), expert by expert: the reference that the other implementations are tested against."""
        output_Td = torch.zeros_like(hidden_Td, dtype=torch.promote_types(hidden_Td.dtype, weights_TK.dtype))
        for e in range(self.num_experts):
            token, slot = (indices_TK == e).nonzero(as_tuple=True)
            y = F.linear(self.activate(F.linear(hidden_Td[token], self.up_weight()[e])), self.down_proj[e])
            output_Td = output_Td.index_add(0, token, (y * weights_TK[token, slot, None]).to(output_Td.dtype))
        return output_Td.to(hidden_Td.dtype)


@use_experts_implementation
class GatedExperts(_Experts):
    r"""E gated MLPs, stacked: gate_up_proj [E, 2m, d] (gate rows, then up rows), down_proj [E, d, m].

    Shapes: hidden [T, d], indices [T, K], weights [T, K] -> [T, d].
    """

    stacked_names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def up_weight(self) -> torch.Tensor:
        return self.gate_up_proj

    def activate(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn.forward(gate) * up


@use_experts_implementation(has_gate=False)
class PlainExperts(_Experts):
    """E ungated MLPs, stacked: up_proj [E, m, d], down_proj [E, d, m]. Shapes as in `GatedExperts`."""

    stacked_names = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__(config)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def up_weight(self) -> torch.Tensor:
        return self.up_proj

    def activate(self, h: torch.Tensor) -> torch.Tensor:
        return self.act_fn.forward(h)
