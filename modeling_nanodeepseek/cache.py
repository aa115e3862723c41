"""LatentCache: the compressed cache that `generate()` uses, and its FP8 form.

Multi-head latent attention stores one vector per token and layer, [normalised latent ; rotated rope key], of
kv_lora_rank + qk_rope_head_dim numbers (V2 report section 2.1.3; V3: 576 numbers, 1152 bytes in bf16, against 40960
for the expanded keys and values). Attention writes it through `Cache.update` as the *keys*; the *values* are the
lightning indexer's keys where there is one, of index_head_dim numbers, and else of width 0. So every cache of
transformers can hold both, and what is done to a cache is done to both; these ones grow without copying themselves at
each token.
"""

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_nanodeepseek import NanoDeepSeekConfig

# Of the length, when the reserve is used up: on average each row is copied at most 1 / (GROWTH - 1) = 4 times.
GROWTH = 1.25
RESERVE = 64  # tokens, at least

FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128  # numbers that share a scale


def new_buffer(states: torch.Tensor, capacity: int, columns: bool) -> torch.Tensor:
    """Room for states like these, [B, heads, capacity, width], in memory row by row or column by column.

    Columns are for the indexer's keys: few queries meet them in half the time, because BLAS copies rows to turn them.
    """
    B, heads, _, width = states.shape
    if columns:
        return states.new_empty(B, heads, width, capacity).mT
    return states.new_empty(B, heads, capacity, width)


class GrowingLayer(DynamicLayer):
    """One layer's states [B, heads, S, width], the first S rows of buffers that are longer, so that most updates copy
    only news. `keys` and `values` are views of the buffers; rows past S are free to be written. The values' buffer
    lies in columns in memory (`new_buffer`).
    """

    def __init__(self, **kwargs):
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._length = 0
        self._writable = False  # a buffer may be saved by autograd, or be someone else's tensor: only ours are written
        super().__init__()

    def _view(self, index: int) -> torch.Tensor | None:
        buffer = self._buffers[index]
        return None if buffer is None else buffer.narrow(-2, 0, self._length)

    def _replace(self, index: int, states: torch.Tensor | None):
        self._buffers[index], self._writable = states, False
        self._length = 0 if states is None else states.shape[-2]

    keys = property(lambda self: self._view(0), lambda self, states: self._replace(0, states))
    values = property(lambda self: self._view(1), lambda self, states: self._replace(1, states))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states [B, heads, T, width] and returns all of them, [B, heads, S + T, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self._length, key_states.shape[-2]
        if torch.is_grad_enabled():
            # Attention saves what it read for backward; a buffer written in place would change it afterwards.
            both = (self.keys, key_states), (self.values, value_states)
            self._buffers, self._writable = [torch.cat(states, dim=-2) for states in both], False
        else:
            if not self._has_room(past + new):
                self._reserve(key_states, value_states, past + new)
            for buffer, states in zip(self._buffers, (key_states, value_states)):
                buffer.narrow(-2, past, new).copy_(states)
        self._length = past + new
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        if not self._writable or length > self._buffers[0].shape[-2]:
            return False
        # Tensors made in inference mode cannot be written outside it: generate() may continue what such a call began.
        # (A compiler cannot ask; it would refuse such a tensor.)
        asks = not torch.compiler.is_compiling()
        return not (asks and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled())

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, length: int):
        past = self._length
        capacity = max(int(past * GROWTH), length + RESERVE)
        for index, states in enumerate((key_states, value_states)):
            buffer = new_buffer(states, capacity, columns=index == 1)
            if past:
                buffer.narrow(-2, 0, past).copy_(self._view(index))
            self._buffers[index] = buffer
        self._writable = True

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int):
        """Forgets the last `-tokens_to_remove` tokens; their rows are written again. Raises ValueError above 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is not possible: give minus the number of tokens to remove.")
        self._length = max(0, self._length + tokens_to_remove)

    # Of the whole buffers, so that they keep their reserve: beam search reorders at every token.

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self._on_batch(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int):
        self._on_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        self._on_batch(lambda buffer: buffer[indices, ...])

    def _on_batch(self, operation):
        if self.is_initialized:
            keys, values = self._buffers
            self._buffers = [operation(keys), operation(values.mT).mT]  # of dim 0 alone: the columns stay columns

    def reset(self):
        """Forgets everything; the next update starts anew, with any batch size."""
        self.keys = self.values = None
        self.is_initialized = False

    def state_shape(self) -> tuple[int, int, int, int] | None:
        """[B, heads, S, width] of the states that `update` takes and returns; None until the first."""
        return tuple(self.keys.shape) if self.is_initialized else None

    def nbytes(self) -> int:
        """Bytes of the states held; the reserve is not counted."""
        return sum(states.nbytes for states in (self.keys, self.values) if states is not None)

    def reserved_nbytes(self) -> int:
        """Bytes of memory taken, the reserve included."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)


class Fp8Layer(GrowingLayer):
    r"""One layer's latents in FP8: per token one row of bytes, [latent in E4M3 ; scales in fp32 ; rope key in bf16].

    Each FP8_BLOCK = 128 consecutive numbers of the latent (the last block may be shorter) share the scale
    max |x| / 448: x ~ scale * E4M3(x / scale). A row is bytes, so that all that `GrowingLayer` does to rows holds here,
    and nothing is quantised twice. V3: 512 + 4 * 4 + 64 * 2 = 656 bytes.

    Args:
        c, r: kv_lora_rank and qk_rope_head_dim.
    """

    def __init__(self, c: int, r: int):
        self.c, self.r = c, r
        self.blocks = -(-c // FP8_BLOCK)
        super().__init__()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends latents [B, 1, T, c + r]; returns all, dequantised, in their dtype. The new ones are returned as
        they were rounded too: a result must not depend on the chunks in which a text arrived."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError(
                "Rounding to FP8 has no gradient: call the model under torch.no_grad(), or use a LatentCache."
            )
        if key_states.shape[-1] != self.c + self.r:
            raise ValueError(
                f"This Fp8LatentCache was made for {self.c} + {self.r} numbers per token, and the model writes "
                f"{key_states.shape[-1]}: build it from the model's own config."
            )
        rows, values = super().update(self.pack(key_states), value_states)
        return self.unpack(rows, key_states.dtype), values

    def _in_blocks(self, latent: torch.Tensor) -> torch.Tensor:
        return F.pad(latent.float(), (0, self.blocks * FP8_BLOCK - self.c)).unflatten(-1, (self.blocks, FP8_BLOCK))

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Latents [..., c + r] -> rows of bytes [..., c + 4 * blocks + 2 r]."""
        latent, rope = states.split([self.c, self.r], dim=-1)
        latent = self._in_blocks(latent)
        # The floor keeps a block of zeros from dividing by zero; numbers that small are zero in any case.
        scale = (latent.abs().amax(-1) / torch.finfo(FP8).max).clamp(min=1e-30)
        codes = (latent / scale[..., None]).flatten(-2)[..., : self.c].to(FP8)
        return torch.cat([part.contiguous().view(torch.uint8) for part in (codes, scale, rope.bfloat16())], dim=-1)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of bytes [..., c + 4 * blocks + 2 r] -> latents [..., c + r] in `dtype`."""
        codes, scale, rope = rows.split([self.c, 4 * self.blocks, 2 * self.r], dim=-1)
        # Clones: four or two bytes are one number only where they are aligned.
        scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float)
        rope = rope.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        latent = (self._in_blocks(codes.view(FP8)) * scale[..., None]).flatten(-2)[..., : self.c]
        return torch.cat((latent.to(dtype), rope.to(dtype)), dim=-1)

    def state_shape(self) -> tuple[int, int, int, int] | None:
        return (*self.keys.shape[:3], self.c + self.r) if self.is_initialized else None


def check_offloading():
    """Raises ValueError where a cache cannot be offloaded."""
    if not torch.cuda.is_available():
        raise ValueError(
            "Offloading keeps a GPU's cache in the CPU's memory, and there is no CUDA device here: leave out "
            "offloading=True, or cache_implementation='offloaded' or 'offloaded_static'."
        )


class LatentCache(Cache):
    r"""The latents of every layer of one batch.

    With an indexer, its keys lie beside them. Built by `generate()` and by `forward(use_cache=True)`; to continue from
    it, pass it as `past_key_values`.

    Args:
        config: the model's config; its number of layers is taken from it.
        offloading: keep the layers in the CPU's memory and fetch each ahead of its turn; needs a CUDA device. Also
            `generate(cache_implementation="offloaded")`.

    Raises: ValueError for offloading without a CUDA device.

    Example:
        >>> cache = LatentCache(model.config)
        >>> logits = model(input_ids, past_key_values=cache).logits
        >>> cache.nbytes()  # V3, batch 1, 1000 tokens, bf16: 1000 * 61 * 576 * 2
        70272000
    """

    def __init__(self, config: NanoDeepSeekConfig, offloading: bool = False):
        if offloading:
            check_offloading()
        layers = [self.new_layer(config) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)

    def new_layer(self, config: NanoDeepSeekConfig) -> GrowingLayer:
        return GrowingLayer()

    def nbytes(self) -> int:
        """Bytes held: batch * length * layers * bytes per number * (kv_lora_rank + qk_rope_head_dim, and index_head_dim
        with an indexer)."""
        return sum(layer.nbytes() for layer in self.layers)

    def reserved_nbytes(self) -> int:
        """Bytes taken from the allocator: of the longest state so far, up to GROWTH times that and 64 tokens more."""
        return sum(layer.reserved_nbytes() for layer in self.layers)


class Fp8LatentCache(LatentCache):
    r"""A LatentCache that holds its latents in FP8 (E4M3, one fp32 scale per 128 numbers) and its rope keys in bf16.

    V3: 656 bytes per token and layer instead of 1152. An indexer's keys stay in the model's dtype. What it saves is
    memory held between calls: attention computes in the model's dtype, on states dequantised anew at each call, so no
    bytes are saved in moving and no time is won.
    Each latent is off by 2.6 % of its RMS; docs/log.md has what that does to logits.

    Give it to `forward` or `generate` as `past_key_values`; `generate(cache_implementation="quantized",
    cache_config={"backend": "fp8"})` builds one, and so does a generation_config with these two fields.

    Args:
        config: the model's config, with attention_type "mla".
        offloading: as in `LatentCache`.

    Raises: ValueError for a config without latents, and when gradients would have to flow through the cache.
    """

    def new_layer(self, config: NanoDeepSeekConfig) -> GrowingLayer:
        if config.attention_type != "mla":
            raise ValueError(
                f"Fp8LatentCache holds latents, and attention_type={config.attention_type!r} has none: use a "
                "DynamicCache, or attention_type='mla'."
            )
        return Fp8Layer(config.kv_lora_rank, config.qk_rope_head_dim)
