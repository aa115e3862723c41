"""Weights in FP8 blocks, as DeepSeek publishes V3 and later: their numbers, their checkpoints, layers that keep them.

  X.weight [out, in] in e4m3      X.weight_scale_inv [ceil(out / 128), ceil(in / 128)] in fp32
  W_ij = weight_ij * scale_inv[i // 128, j // 128]
(V3 report section 3.3.2. Despite its name the scale multiplies.) Blocks at the edges are partial: 576 rows have five
rows of scales, the last for 64. With `scale_fmt` "ue8m0" (V3.1 and later) scales are powers of two.

transformers takes the block's size from the quotient of the two shapes, which fails on partial blocks (the projection
of 576 rows in every layer) or takes another size without a word. So reading is ours: `weights_of` shows a checkpoint to
transformers' loader as if it held plain weights, and dequantises each when it is read.
"""

from collections.abc import Callable

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import FineGrainedFP8Config

from .experts import GatedExperts, run_experts
from .layers import Fp32Buffers

E4M3 = torch.float8_e4m3fn
BLOCK = (128, 128)
SCALE = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0", "U8")  # bytes are the exponents of powers of two
# Not kept in FP8: the absorbed attention reads this one as a matrix, at every token.
DEQUANTIZED_LINEARS = ("kv_b_proj",)


# -- numbers -----------------------------------------------------------------------------------------------------------


def grid(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """How many blocks, the partial ones included, cover a matrix."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def blocks_of(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., rows, columns] -> fp32 blocks [..., R, b, C, b], the partial ones at the edges filled up with zeros."""
    rows, columns = grid(x.shape, block)
    edges = columns * block[1] - x.shape[-1], rows * block[0] - x.shape[-2]
    padded = F.pad(x.float(), (0, edges[0], 0, edges[1])) if any(edges) else x.float()
    return padded.unflatten(-1, (columns, block[1])).unflatten(-3, (rows, block[0]))


def scale_of(blocks: torch.Tensor, ue8m0: bool = False) -> torch.Tensor:
    """max |x| / 448 of each block [..., R, b, C, b], or the next power of two: [..., R, 1, C, 1]. NaN and infinity give
    a scale that is none; a block of zeros, or of numbers whose scale would be subnormal, has the scale 1."""
    largest, e4m3 = blocks.abs().amax((-3, -1), keepdim=True), torch.finfo(E4M3).max
    scale = torch.where(largest < e4m3 * torch.finfo(torch.float32).tiny, 1.0, largest / e4m3)
    return scale.log2().ceil().exp2() if ue8m0 else scale


def quantize(
    weight: torch.Tensor, block: tuple[int, int] = BLOCK, ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [..., out, in] -> e4m3 of the same shape, and fp32 scales [..., *grid]: amax of the block / 448.

    With ue8m0 a scale is the next power of two that is not below. A block of zeros has the scale 1.
    """
    blocks = blocks_of(weight, block)
    scale = scale_of(blocks, ue8m0)
    quantized = (blocks / scale).flatten(-4, -3).flatten(-2)
    return quantized[..., : weight.shape[-2], : weight.shape[-1]].to(E4M3), scale[..., 0, :, 0]


def rounded(x: torch.Tensor, block: tuple[int, int] = BLOCK, ue8m0: bool = False) -> torch.Tensor:
    """The numbers that e4m3 blocks hold of x [..., rows, columns], in fp32: dequantize(*quantize(x)), to the bit.

    Widened by shifts, because torch's own cast takes 20 times as long on a CPU: e4m3 and fp16 differ in the width of
    the exponent and its bias, 7 and 15, so the same bits mean 2^-8 of the number, subnormal ones too. NaN, the one
    exception, is in the scale already.
    """
    block = min(block[0], x.shape[-2]), min(block[1], x.shape[-1])  # nothing to fill up where one is enough
    blocks = blocks_of(x, block)
    scale = scale_of(blocks, ue8m0)
    bits = (blocks / scale).to(E4M3).view(torch.int8).to(torch.int16)
    wide = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float()
    return wide.mul_(scale * 256).flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int] = BLOCK, dtype=torch.float32):
    """weight_ij * scale_inv[i // b, j // b], formed in fp32: [..., out, in] in `dtype`."""
    spread = scale_inv.repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    spread = spread.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    return weight.float().mul_(spread).to(dtype)


def scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales as fp32, from any form they are stored in: bytes are the exponents of powers of two, biased by 127."""
    return (stored.float() - 127).exp2() if stored.dtype == torch.uint8 else stored.float()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def asks_to_keep_fp8(quantization_config) -> bool | None:
    """Whether `from_pretrained` is to keep FP8, of what it was given as quantization_config; None: that is about other
    things. Raises ValueError for settings that would not be followed."""
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "fp8":
        quantization_config = FineGrainedFP8Config.from_dict(quantization_config)
    if not isinstance(quantization_config, FineGrainedFP8Config):
        return None
    given, default = quantization_config.to_dict(), FineGrainedFP8Config().to_dict()
    given["weight_block_size"] = tuple(given["weight_block_size"] or ())
    said = {key for key in given if key not in ("dequantize", "quant_method") and given[key] != default.get(key)}
    if said:
        raise ValueError(
            f"FineGrainedFP8Config({', '.join(f'{key}={given[key]!r}' for key in sorted(said))}) is not possible: "
            "dequantize alone is the caller's to choose, the rest is the checkpoint's."
        )
    return not quantization_config.dequantize


def block_of(settings: dict) -> tuple[int, int]:
    """The block's size, from a `quantization_config`. Raises ValueError for FP8 of another kind."""
    block = settings.get("weight_block_size")
    kinds = {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
    wrong = {key: settings[key] for key, kind in kinds.items() if settings.get(key, kind) != kind}
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        wrong["weight_block_size"] = block
    if wrong:
        raise ValueError(
            f"quantization_config has {', '.join(f'{key}={value!r}' for key, value in wrong.items())}: of FP8 "
            "checkpoints those in e4m3 blocks are read, weight_block_size=[rows, columns], activation_scheme='dynamic'."
        )
    return tuple(block)


def layout_problems(files: list[str], block: tuple[int, int] | None) -> list[str]:
    """What cannot be right about the FP8 tensors of some files, from their headers. block: None if there should be
    none."""
    kinds = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                piece = opened.get_slice(name)
                kinds[name] = piece.get_dtype(), tuple(piece.get_shape())
    fp8 = {name: shape for name, (dtype, shape) in kinds.items() if dtype.startswith("F8_E") and dtype != "F8_E8M0"}
    if block is None:
        return [f"{name} is FP8, and config.json has no quantization_config" for name in sorted(fp8)]
    problems = [f"{name} is {kinds[name][0]}, not F8_E4M3" for name in sorted(fp8) if kinds[name][0] != "F8_E4M3"]
    problems += [f"{name} is {list(shape)}, no matrix" for name, shape in sorted(fp8.items()) if len(shape) != 2]
    problems += [f"{name} is FP8 and has no {name}{SCALE}" for name in sorted(fp8) if name + SCALE not in kinds]
    for name in sorted(name for name in kinds if name.endswith(SCALE)):
        (dtype, shape), weight = kinds[name], name.removesuffix(SCALE)
        if dtype not in SCALE_DTYPES:
            problems.append(f"{name} is {dtype}, not one of {', '.join(SCALE_DTYPES)}")
        elif weight not in fp8:
            problems.append(f"{name} has no FP8 {weight.rpartition('.')[2]} beside it")
        elif len(fp8[weight]) == 2 and shape != (expected := grid(fp8[weight], block)):
            problems.append(f"{name} is {list(shape)}, not {list(expected)}: blocks of {list(block)}")
    return problems


class LazyTensor:
    """A tensor that is formed when it is indexed, in the form in which safetensors shows one it has not read yet."""

    def __init__(self, shape, read):
        self.shape, self.read = list(shape), read

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index) -> torch.Tensor:
        return self.read()[index]


def plain(weight, scale_inv, block: tuple[int, int]) -> LazyTensor:
    """A dequantised weight, in fp32."""
    return LazyTensor(weight.get_shape(), lambda: dequantize(weight[...], scales(scale_inv[...]), block))


def joined(pieces: list[list], shape: tuple[int, ...], form) -> LazyTensor:
    """A tensor of this shape, of the `form` of each of pieces[e][part]: all experts', or the one piece of a layer."""
    return LazyTensor(shape, lambda: torch.cat([form(part[...]) for expert in pieces for part in expert]).view(shape))


def weights_of(files: list[str], block: tuple[int, int], model: nn.Module) -> dict:
    """Names -> tensors not read yet, of a checkpoint with FP8 blocks.

    Weights are dequantised when read, into fp32, one by one. Those of the model's `Fp8Linear` and `Fp8Experts` come as
    they are, the experts' stacked, under the model's names.
    """
    slices = open_slices(files)
    shown, on_disk = {}, names_on_disk(model, slices)
    for owner, module in model.named_modules():
        if isinstance(module, (Fp8Linear, Fp8Experts)):
            for buffer, pieces in module.names_on_disk(on_disk(owner)).items():
                parts = [[slices.pop(name) for name in expert] for expert in pieces]
                form = scales if buffer.endswith(SCALE) else lambda part: part
                shown[f"{owner}.{buffer}"] = joined(parts, getattr(module, buffer).shape, form)
    for name, piece in slices.items():
        if name + SCALE in slices:
            shown[name] = plain(piece, slices[name + SCALE], block)
        elif not name.endswith(SCALE):
            shown[name] = piece
    return shown


def open_slices(files: list[str]) -> dict:
    """Names -> safetensors' slices; a slice keeps its file open."""
    slices = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        slices |= {name: opened.get_slice(name) for name in opened.keys()}
    return slices


def names_on_disk(model: nn.Module, present) -> Callable[[str], str]:
    """Names of modules and parameters -> their names in a checkpoint that has those `present`: one of the base model
    lacks the prefix of the full one."""
    prefix, whole = f"{model.base_model_prefix}.", hasattr(model, model.base_model_prefix)
    shown = prefix if any(name.startswith(prefix) for name in present) else ""
    return lambda name: shown + name.removeprefix(prefix) if name.startswith(prefix) or not whole else name


# -- layers that keep FP8, for inference -------------------------------------------------------------------------------


class Fp8Linear(Fp32Buffers):
    """A linear layer whose weight stays in FP8 blocks and is dequantised, into the input's dtype, for each
    product: half the memory of bf16, not the time. [..., in] -> [..., out]. The weight is a buffer: it does not learn.
    """

    def __init__(self, linear: nn.Linear, block: tuple[int, int]):
        super().__init__()
        self.in_features, self.out_features, self.block = linear.in_features, linear.out_features, block
        shape = linear.weight.shape
        self.register_buffer("weight", torch.empty(shape, dtype=E4M3))
        self.register_buffer("weight" + SCALE, torch.empty(grid(shape, block), dtype=torch.float32))
        self.bias = linear.bias

    @staticmethod
    def names_on_disk(owner: str) -> dict[str, list[list[str]]]:
        """Each buffer -> the tensors it is made of."""
        return {name: [[f"{owner}.{name}"]] for name in ("weight", "weight" + SCALE)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantize(self.weight, self.weight_scale_inv, self.block, x.dtype), self.bias)


class Fp8Stack:
    """Matrices of all experts in FP8 blocks; one is dequantised when it is asked for: stack[e] [parts * rows, columns].

    weight [E, parts * rows, columns], scale_inv [E, parts * ceil(rows / b), ceil(columns / b)].
    """

    def __init__(self, weight, scale_inv, block: tuple[int, int], parts: int, dtype: torch.dtype):
        self.weight, self.scale_inv = (tensor.unflatten(1, (parts, -1)) for tensor in (weight, scale_inv))
        self.block, self.dtype = block, dtype

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, e: int) -> torch.Tensor:
        return dequantize(self.weight[e], self.scale_inv[e], self.block, self.dtype).flatten(0, 1)


class Fp8Experts(Fp32Buffers):
    """`GatedExperts` whose weights stay in FP8 blocks; only chosen experts are dequantised, one at a time."""

    stacked_names = GatedExperts.stacked_names

    def __init__(self, experts: GatedExperts, block: tuple[int, int]):
        super().__init__()
        self.num_experts, self.block, self.activate = experts.num_experts, block, experts.activate
        for name, parts in self.stacked_names.items():
            E, rows, columns = getattr(experts, name).shape
            self.register_buffer(name, torch.empty(E, rows, columns, dtype=E4M3))
            down, across = grid((rows // len(parts), columns), block)
            self.register_buffer(name + SCALE, torch.empty(E, len(parts) * down, across, dtype=torch.float32))

    def names_on_disk(self, owner: str) -> dict[str, list[list[str]]]:
        """Each buffer -> per expert, the tensors it is made of."""
        return {
            name + end: [[f"{owner}.{e}.{part}.weight{end}" for part in parts] for e in range(self.num_experts)]
            for name, parts in self.stacked_names.items()
            for end in ("", SCALE)
        }

    def stack(self, name: str, dtype: torch.dtype) -> Fp8Stack:
        weight, scale_inv = getattr(self, name), getattr(self, name + SCALE)
        return Fp8Stack(weight, scale_inv, self.block, len(self.stacked_names[name]), dtype)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        if hidden_states.requires_grad:
            raise ValueError("Experts kept in FP8 do not train: load the checkpoint without quantization_config.")
        up, down = (self.stack(name, hidden_states.dtype) for name in self.stacked_names)
        with torch.no_grad():
            return run_experts(hidden_states, top_k_weights, up, down, top_k_index, self.activate)


def keep_fp8(model: nn.Module, files: list[str], block: tuple[int, int]):
    """Replaces, in a model without weights yet, the layers that are FP8 in `files` by such as keep it."""
    present = open_slices(files).keys()
    on_disk = names_on_disk(model, present)
    for owner, module in list(model.named_modules()):
        parent, _, name = owner.rpartition(".")
        kind = Fp8Linear if type(module) is nn.Linear and name not in DEQUANTIZED_LINEARS else None
        kind = Fp8Experts if isinstance(module, GatedExperts) else kind
        if kind is not None:
            with torch.device("meta"):
                keeping = kind(module, block)
            names = keeping.names_on_disk(on_disk(owner))
            if all(part in present for pieces in names.values() for expert in pieces for part in expert):
                setattr(model.get_submodule(parent), name, keeping)
    model.keeps_fp8 = True
    model._can_compile_fullgraph = False  # which experts are dequantised is known when they are chosen
