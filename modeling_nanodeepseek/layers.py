"""The small parts every layer is made of: RMSNorm and the dense feed-forward layer."""

import functools

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_nanodeepseek import NanoDeepSeekConfig

CPU_MULTIPLIES_BF16 = torch.cpu._is_amx_tile_supported()  # asked once: a compiler cannot


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype matrix products on `x` should run in: x's own, or autocast's where it is on.

    For the modules autocast does not see into. On a CPU without bf16 matrix units (AMX) fp32 products are both faster
    and more exact than bf16 ones: autocast's bf16 is left aside there.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x.dtype
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype == torch.bfloat16 and not CPU_MULTIPLIES_BF16:
        return x.dtype
    return dtype


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether these are a quantiser's numbers: integers (bitsandbytes), or a tensor of its own that passes for floating
    ones (torchao)."""
    wraps = hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)
    return wraps or not weight.is_floating_point()


def without_autocast(function):
    """For the forward of an autograd.Function whose operands already have the dtype they should have."""

    @functools.wraps(function)
    def run(ctx, x: torch.Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *args)

    return run


def exactly(function):
    """For what autocast must leave in its operands' dtype: rounded scores of keys tie, and choose others."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def once_differentiable(backward):
    """For the backward of an autograd.Function: no autocast, and no gradient of the gradient. Of several outputs the
    first alone has a gradient.

    torch's decorator of that name raises only if the second backward passes through; torch.autograd.grad may go around
    it, and then lacks a part without a word.
    """

    @functools.wraps(backward)
    def run(ctx, grad: torch.Tensor, *of_other_outputs):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not possible through the fast training path: gradients of gradients need "
                "model.eval(), attn_implementation='eager' and experts_implementation='eager'."
            )
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


def asked_gradients(ctx) -> list[bool]:
    """Which inputs' gradients are asked of the backward that runs now, for the tensors of an autograd.Function whose
    tensors come first; ctx.needs_input_grad says which ever are. A pipeline that splits the backward runs each node
    twice, for the inputs and for the weights."""
    asked = []
    for (node, _), needed in zip(ctx.next_functions, ctx.needs_input_grad):
        try:
            asked.append(needed and torch._C._will_engine_execute_node(node))
        except RuntimeError:  # torch does not say it of a leaf whose gradient torch.autograd.grad returns: it is asked
            asked.append(True)
    return asked


class Fp32Buffers(nn.Module):
    """A module whose own buffers keep their dtype under `.to(bfloat16)`, `.half()` and the like; devices still change.

    For state that a cast would ruin: a router bias that moves by 0.001, rotary frequencies.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class Fp32Linear(nn.Linear):
    """A linear layer whose product is in fp32 (fp64 for fp64) whatever its weight and its input are, under autocast
    too. [..., in] -> [..., out] in that dtype."""

    @exactly
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(exact), self.weight.to(exact), None if self.bias is None else self.bias.to(exact))


class _WeightedRMSNorm(torch.autograd.Function):
    """The same on a CPU, in a third of the passes over memory.

    Backward is LayerNorm's with a mean of zero, which torch has fused: it lacks only a term, because there the mean
    depends on x:  dx = rstd (w g - xhat mean(w g xhat)) = dx_LayerNorm + rstd mean(w g).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_().div_(x.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return weight * (x * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        grad, x_, weight_ = (tensor.to(rstd.dtype) for tensor in (grad, x, weight))
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x_, weight.shape, torch.zeros_like(rstd), rstd, weight_, None, [True, True, False]
        )
        dx.addcmul_((grad @ weight_).div_(x.shape[-1]).unsqueeze(-1), rstd)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class RMSNorm(nn.Module):
    r"""Root mean square normalisation (arXiv:1910.07467, eq. 4).

    y = weight * x / sqrt(mean(x^2) + eps), the mean over the last dim. Statistics are taken in fp32
    (fp64 for fp64); the result is cast back before the weight is applied, as transformers does.

    Args:
        dim: width of the last dim.
        eps: added to the mean square.
        learned: with `False` there is no weight (y = x / rms(x)).

    Shapes: x [..., dim] -> [..., dim], same dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-6, learned: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if learned else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By `training`, not by whether gradients are wanted now: a reentrant checkpoint's first pass wants none, and
        # must round as the second does, or tokens may take other experts there.
        if self.weight is not None and self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _WeightedRMSNorm.apply(x, self.weight, self.eps)
        normed = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return normed if self.weight is None else self.weight * normed

    def extra_repr(self) -> str:
        return f"eps={self.eps}, learned={self.weight is not None}"


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), no biases; SwiGLU (arXiv:2002.05202, eq. 6) when act is silu. [..., d] -> [..., d]"""

    def __init__(self, config: NanoDeepSeekConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(act(up(x))), no biases; Primer's layer (arXiv:2109.08668) when act is relu2. [..., d] -> [..., d]"""

    def __init__(self, config: NanoDeepSeekConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def build_mlp(config: NanoDeepSeekConfig, intermediate_size: int) -> nn.Module:
    """The dense feed-forward layer that `config.gated_mlp` asks for."""
    return (GatedMLP if config.gated_mlp else PlainMLP)(config, intermediate_size)
