r"""Training in FP8 blocks, DeepSeek-V3's recipe (report section 3.3): the products of the linear layers in E4M3, with
scales for small groups of numbers; all else as it was.

  y = Q_1x128(x) Q_128x128(W)^T            forward:  x [tokens, in] in tiles of a token by 128 channels, W in blocks
  dx = Q_1x128(g) Q_128x128(W)             backward: g [tokens, out] likewise
  dW = Q_128x1(g)^T Q_128x1(x)             backward: both in tiles of 128 tokens by one channel
Q rounds to E4M3, in tiles that share one scale: max |x| / 448, or with `ue8m0` the next power of two. Along what is
summed over tiles are 128 long, so that a product scales partial sums of 128 terms, in fp32.

In high precision stay embedding, output head, router, norms, the attention core, the indexer's weights_proj and
eh_proj of multi-token prediction. Weights, gradients and the optimizer's state are ordinary parameters in fp32: a
checkpoint of such a run is one like any other.

Two things are simpler than in the report: x is kept for the backward as it came, not as E4M3 tiles that are rounded a
second time, and the input of the linear layer after attention has no format of its own (E5M6 there).
"""

import functools
import os

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.moe import ExpertsInterface

from modeling_nanodeepseek.experts import GatedExperts, PlainExperts
from modeling_nanodeepseek.export import IN_FP8
from modeling_nanodeepseek.fp8 import rounded
from modeling_nanodeepseek.layers import compute_dtype, once_differentiable

BLOCK = 128
# What DeepSeek's own files hold in FP8, the indexer's projections included, so that what was trained rounded is what is
# deployed rounded; and the projections of the other kind of attention, which those models have not.
LINEARS = IN_FP8 | {"k_proj", "v_proj"}
EXPERTS = {False: "fp8_blocks", True: "fp8_blocks_ue8m0"}  # names of experts implementations, by ue8m0


# -- what is converted -------------------------------------------------------------------------------------------------


def fp8_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose products are in FP8: linear layers, and stacks of experts."""
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear and n.rpartition(".")[2] in LINEARS}
    converted = {n for n, m in model.named_modules() if isinstance(m, Fp8BlockLinear)}
    experts = {n for n, m in model.named_modules() if isinstance(m, (GatedExperts, PlainExperts))}
    return [name for name, _ in model.named_modules() if name in linears | converted | experts]


def convert_to_fp8(model: PreTrainedModel, ue8m0: bool = False) -> PreTrainedModel:
    """The model with the products of `fp8_modules` in FP8; in place, and parameters stay the same objects."""
    for name in fp8_modules(model):
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            model.set_submodule(name, Fp8BlockLinear(linear, ue8m0))
    if model.config.n_routed_experts:
        model.set_experts_implementation(EXPERTS[ue8m0])
    return model


# -- products ----------------------------------------------------------------------------------------------------------


class Fp8Product(torch.autograd.Function):
    """The three products of the module's docstring, emulated: values rounded to E4M3, multiplied in fp32.

    Products of two E4M3 numbers are exact in fp32, so this differs from FP8 units that move their sums into fp32 after
    each 128 terms, as the report's do, by the rounding of fp32 sums alone. On any device; nowhere faster than bf16.

    Arguments: x [tokens, in], weight [out, in], dtype of the result, ue8m0.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype, ue8m0):
        ctx.ue8m0 = ue8m0
        ctx.save_for_backward(x, weight)
        return _product(rounded(x, (1, BLOCK), ue8m0), rounded(weight, (BLOCK, BLOCK), ue8m0).mT, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = rounded(grad, (1, BLOCK), ctx.ue8m0)
            dx = _product(g, rounded(weight, (BLOCK, BLOCK), ctx.ue8m0), x.dtype)
        if ctx.needs_input_grad[1]:
            g = rounded(grad, (BLOCK, 1), ctx.ue8m0)
            dweight = _product(g.mT, rounded(x, (BLOCK, 1), ctx.ue8m0), weight.dtype)
        return dx, dweight, None, None


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In fp32 also inside autocast, which a forward of an autograd.Function sees."""
    with torch.autocast(a.device.type, enabled=False):
        return (a @ b).to(dtype)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, ue8m0: bool = False) -> torch.Tensor:
    """x W^T in FP8, [..., in] -> [..., out], in autocast's dtype where it is on; by torchao's kernels where they can,
    else emulated. This is the one place where that is decided."""
    dtype, rows = compute_dtype(x), x.reshape(-1, x.shape[-1])
    if rows.is_cuda and not ue8m0 and fits_torchao(weight) and torchao_cannot(rows.device) is None:
        y = torchao_product(rows, weight, dtype)
    else:
        y = Fp8Product.apply(rows, weight, dtype, ue8m0)
    return y.unflatten(0, x.shape[:-1])


# -- torchao -----------------------------------------------------------------------------------------------------------


def fits_torchao(weight: torch.Tensor) -> bool:
    """Its kernels know whole blocks only, and no power-of-two scales."""
    return all(size % BLOCK == 0 for size in weight.shape)


def torchao_product(rows: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x W^T by torchao's prototype of the same recipe, forward and backward. Tokens are filled up with rows of zeros,
    which change no tile's largest number."""
    from torchao.prototype.blockwise_fp8_training.linear import fp8_blockwise_mm

    padded = F.pad(rows, (0, 0, 0, -len(rows) % BLOCK)).contiguous()
    return fp8_blockwise_mm.apply(padded, weight, BLOCK)[: len(rows)].to(dtype)


@functools.cache
def torchao_cannot(device: torch.device) -> str | None:
    """Why torchao's kernels are not used on this device, or None: one small product, forward and backward, is tried and
    compared with the emulation."""
    if device.type != "cuda":
        return f"FP8 kernels are for GPUs, not for {device.type}"
    try:
        with torch.random.fork_rng([device]), torch.enable_grad():
            error = _disagreement(device)
    except Exception as reason:  # whatever a prototype on an unknown GPU raises: it is named, and not relied upon
        return f"torchao: {type(reason).__name__}: {reason}"
    return None if error < 0.01 else f"torchao's products differ from the emulation by {error:.1%}"


def _disagreement(device: torch.device) -> float:
    """The largest relative RMS difference between both roads, of the output and the two gradients; bf16 brings 0.002
    to 0.004."""
    operands = [torch.randn(size, device=device, requires_grad=True) for size in ((100, 256), (384, 256))]
    g = torch.randn(100, 384, device=device).bfloat16().float()  # as it comes back through a result in bf16
    results = []
    for road in (lambda x, w: Fp8Product.apply(x, w, x.dtype, False), lambda x, w: torchao_product(x, w, x.dtype)):
        y = road(*operands)
        results.append((y, *torch.autograd.grad(y, operands, g)))
    return max(((b - a).norm() / a.norm()).item() for a, b in zip(*results))


# -- modules -----------------------------------------------------------------------------------------------------------


class Fp8BlockLinear(nn.Linear):
    """A linear layer whose three products are in FP8; weight and bias are those of `linear`, under the same names."""

    def __init__(self, linear: nn.Linear, ue8m0: bool = False):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias, self.ue8m0 = linear.weight, linear.bias, ue8m0
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = fp8_linear(x, self.weight, self.ue8m0)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def fp8_experts(module, hidden_states, top_k_index, top_k_weights, ue8m0: bool = False) -> torch.Tensor:
    """Experts implementation: sum_k w_k Expert_k(u), each expert's rows through the same products as a linear layer's,
    [T, d], [T, K], [T, K] -> [T, d].

    A tile of tokens in dW is of one expert's tokens. The weight w is applied to the input of the second product, which
    it does not change: it is in the scale of the row. An index of E is no expert.
    """
    ups, downs = module.up_weight().unbind(), module.down_proj.unbind()
    sorted_experts, slots = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(sorted_experts, minlength=len(ups) + 1).tolist()
    tokens = (slots // top_k_index.shape[1]).split(counts)
    weights = top_k_weights.flatten()[slots].split(counts)
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    output = torch.zeros_like(hidden_states, dtype=exact)
    if not any(counts[: len(ups)]):  # a graph all the same: other processes wait for these gradients
        output = output + 0.0 * (module.up_weight().sum() + module.down_proj.sum())
    for up, down, rows, w in zip(ups, downs, tokens, weights):
        if len(rows):
            a = module.activate(fp8_linear(hidden_states[rows], up, ue8m0))
            y = fp8_linear(a * w[:, None].to(a.dtype), down, ue8m0)
            output = output.index_add(0, rows, y.to(exact))
    return output.to(hidden_states.dtype)


for _ue8m0, _name in EXPERTS.items():
    ExpertsInterface.register(_name, functools.partial(fp8_experts, ue8m0=_ue8m0))


# -- launching ---------------------------------------------------------------------------------------------------------


def launched_in_fp8() -> bool:
    """Whether accelerate's launch file says `mixed_precision: fp8`."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8"


def trains_in_fp8(precision: str) -> bool:
    """Whether a run's products are in FP8: as its recipe says, or, where that says `auto`, its launch file.

    Raises: ValueError where the two contradict each other, and for a backend that would convert by itself.
    """
    backend = os.environ.get("ACCELERATE_FP8_BACKEND", "AO").upper()
    if launched_in_fp8() and precision in ("bf16", "fp32"):
        raise ValueError(
            f"the launch file says mixed_precision: fp8, the recipe precision: {precision}. Set precision=fp8, or "
            "launch with another file"
        )
    if launched_in_fp8() and backend != "AO":
        raise ValueError(
            f"the launch file says fp8_config.backend: {backend}; FP8 blocks are trained with backend: AO "
            "(configuration/accelerate/fp8.yaml)"
        )
    return precision == "fp8" or launched_in_fp8()


def precision_of(args: TrainingArguments, precision: str) -> str:
    """The precision of a run, in words."""
    outside = "fp32" if args.mixed_precision == "no" else args.mixed_precision.replace("fp8", "bf16")
    return f"fp8, {outside} outside its products" if trains_in_fp8(precision) else outside


def convert_no_further(accelerator: Accelerator):
    """Under `mixed_precision: fp8` accelerate makes every linear layer but the first and the last into torchao's with
    one scale per tensor, eh_proj among them. This model is converted already, by an exact list."""
    if accelerator.ao_recipe_handler is not None:
        accelerator.ao_recipe_handler.module_filter_func = lambda module, name: False


def describe_fp8(model: PreTrainedModel, device: torch.device) -> str:
    """What of a converted model is in FP8, and how it is computed on this device."""
    modules = [model.get_submodule(name) for name in fp8_modules(model)]
    linears = [module for module in modules if isinstance(module, Fp8BlockLinear)]
    whole = sum(fits_torchao(linear.weight) and not linear.ue8m0 for linear in linears)
    reason = torchao_cannot(device)
    how = f"emulated ({reason})" if reason else f"{whole} of the linear layers by torchao, the others emulated"
    return f"FP8: {len(linears)} linear layers, {len(modules) - len(linears)} stacks of experts; {how}"
