"""Rotary position embedding in DeepSeek's two layouts, with YaRN.

Frequencies come from transformers' own RoPE functions (the YaRN there agrees with the V3 code to the last bit); what
is ours is the application: both layouts by one function, in fp32. A rope key looks as it does in DeepSeek's own cache.
"""

import math

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import Fp32Buffers


class RotaryEmbedding(Fp32Buffers):
    r"""e^{i t theta_j} for position t, theta_j = base^(-2j/r), j < r/2 (RoFormer, arXiv:2104.09864 eq. 15).

    r is `config.head_dim`: qk_rope_head_dim for MLA, the whole head for GQA. YaRN (arXiv:2309.00071) replaces theta,
    and scales the result where its two mscales differ. Dynamic NTK replaces the base, by one that grows with the
    longest position of the call beyond max_position_embeddings; tokens cached already keep the angles of their call.

    Shapes: position_ids [B, T] -> [B, T, r/2], complex of two fp32.
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self._frequencies()
        # Two names, not persistent: transformers refills exactly these after building a model on the meta device.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        default = self.rope_type == "default"
        compute = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        return compute(self.config)

    def _apply(self, fn, recurse=True):
        on_meta = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        if on_meta and not self.inv_freq.is_meta:  # to_empty() fills nothing, and no checkpoint holds them
            for buffer in (self.inv_freq, self.original_inv_freq):
                buffer.copy_(self._frequencies()[0])
        return self

    @staticmethod
    def compute_default_rope_parameters(config: NanoDeepSeekConfig, **kwargs) -> tuple[torch.Tensor, float]:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`x` gives the device alone; angles stay fp32, because bf16 cannot hold a position beyond 256 exactly."""
        inv_freq = self.inv_freq
        if self.rope_type == "dynamic":
            # Computed anew, where transformers keeps the longest call's: a call then depends on its own tokens alone.
            inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, x.device, seq_len=position_ids.max() + 1)
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        return torch.complex(angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling)


def rotate(x: torch.Tensor, turns: torch.Tensor, interleaved: bool) -> torch.Tensor:
    r"""Rotates pair j of x by its angle: (a, b) -> (a cos - b sin, b cos + a sin), the product (a + bi) e^{i angle}.

    Pairs are (x[2j], x[2j+1]) if `interleaved` (DeepSeek's attention), else (x[j], x[j+r/2]) (DeepSeek's indexer, GQA);
    the result has them in the same places.

    Shapes: x [B, H, T, r]; turns [B, T, r/2] -> [B, H, T, r], dtype of x; arithmetic in fp32 (fp64 for fp64).
    """
    turns = turns[:, None]
    if not interleaved and not torch.compiler.is_compiling():  # compilers do better on real numbers
        turned = torch.complex(*x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)) * turns
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
    if interleaved and not torch.compiler.is_compiling():
        pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
        if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
            pairs = pairs.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an odd offset
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * turns.real - second * turns.imag, second * turns.real + first * turns.imag
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def softmax_scale(config: NanoDeepSeekConfig, head_dim: int) -> float:
    r"""head_dim^-0.5 * g^2, with g = 0.1 * mscale_all_dim * ln(factor) + 1 under YaRN and 1 without (V3 code; spec of
    the report, section 4.3). For V3 (192, factor 40, mscale_all_dim 1) it is 0.1352337789."""
    rope = config.rope_parameters
    mscale, factor = rope.get("mscale_all_dim") or 0, rope.get("factor") or 1
    g = 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
    return head_dim**-0.5 * g * g
