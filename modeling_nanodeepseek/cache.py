"""LatentCache: the compressed cache that `generate()` uses.

Multi-head latent attention stores one vector per token and layer, [normalised latent ; rotated rope key], of
kv_lora_rank + qk_rope_head_dim numbers (V2 report section 2.1.3; V3: 576 numbers, 1152 bytes in bf16, against 40960
for the expanded keys and values). Attention writes it through `Cache.update` as the *keys*, with values of width 0, so
every cache of transformers can hold it too; this one grows without copying itself at each token.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_nanodeepseek import NanoDeepSeekConfig

# Of the length, when the reserve is used up: on average each row is copied at most 1 / (GROWTH - 1) = 4 times.
GROWTH = 1.25
RESERVE = 64  # tokens, at least


class GrowingLayer(DynamicLayer):
    """One layer's states [B, heads, S, width], kept in a buffer longer than S so that most updates copy only news."""

    def __init__(self, **kwargs):
        super().__init__()
        self._buffers: list[torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states [B, heads, T, width] and returns all of them, [B, heads, S + T, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            # Attention saves what it read for backward; a buffer written in place would change it afterwards.
            return super().update(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if not self._owns_buffers() or self._buffers[0].shape[-2] < length:
            self._reserve(key_states, value_states, length)
        for buffer, new in zip(self._buffers, (key_states, value_states)):
            buffer[..., past:length, :].copy_(new)
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)
        return self.keys, self.values

    def _owns_buffers(self) -> bool:
        """Whether `keys` still is a view of the buffer; reorder, select, repeat and offload replace it by a copy."""
        if self._buffers is None:
            return False
        return self.keys.untyped_storage().data_ptr() == self._buffers[0].untyped_storage().data_ptr()

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, length: int):
        past = self.get_seq_length()
        capacity = max(int(past * GROWTH), length + RESERVE)
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
            if past:
                buffer[..., :past, :].copy_(old)
            buffers.append(buffer)
        self._buffers = buffers

    def reset(self):
        """Forgets everything; the next update starts anew."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False

    def nbytes(self) -> int:
        """Bytes of the states held; the reserve is not counted."""
        return sum(states.nbytes for states in (self.keys, self.values) if states is not None)

    def reserved_nbytes(self) -> int:
        """Bytes of memory taken, the reserve included."""
        return sum(buffer.nbytes for buffer in self._buffers) if self._owns_buffers() else self.nbytes()


class LatentCache(Cache):
    r"""The latents of every layer of one batch.

    Built by `generate()` and by `forward(use_cache=True)`; to continue from it, pass it as `past_key_values`.

    Args:
        config: the model's config; its number of layers is taken from it.

    Example:
        >>> cache = LatentCache(model.config)
        >>> logits = model(input_ids, past_key_values=cache).logits
        >>> cache.nbytes()  # V3, batch 1, 1000 tokens, bf16: 1000 * 61 * 576 * 2
        70272000
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__(layers=[GrowingLayer() for _ in range(config.num_hidden_layers)])

    def nbytes(self) -> int:
        """Bytes held: batch * length * layers * (kv_lora_rank + qk_rope_head_dim) * bytes per number."""
        return sum(layer.nbytes() for layer in self.layers)

    def reserved_nbytes(self) -> int:
        """Bytes taken from the allocator: of the longest state so far, up to GROWTH times that and 64 tokens more."""
        return sum(layer.reserved_nbytes() for layer in self.layers)
