"""Who sees whom: the causal mask of each attention backend, with padding and packed documents kept apart.

transformers builds the mask; what is ours is to find the documents where it does not look for them.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from .cache import LatentCache
from .configuration_nanodeepseek import NanoDeepSeekConfig


def real_token_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The part of a 2-D padding mask [B, S] that is about the last `length` tokens, [B, length]; None without one."""
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    return attention_mask[:, -length:] if is_padding_mask else None


def packed_documents(position_ids: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Which document of its row each token belongs to, [B, T] counted from 0; None if no row holds two (a compiler
    cannot ask).

    Without padding a document starts wherever positions do not go up by one. Beside padding, which callers count or
    skip as they like, it starts at a real token whose position is not above that of the real token before it.
    """
    if real_tokens is None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    else:
        real = real_tokens.bool()
        columns = torch.arange(position_ids.shape[1], device=position_ids.device)
        last_real = columns.expand_as(real).masked_fill(~real, -1).cummax(-1).values[:, :-1]
        before = position_ids.expand_as(real).gather(1, last_real.clamp(min=0))
        starts = real[:, 1:] & (last_real >= 0) & (position_ids[:, 1:] <= before)
    documents = F.pad(starts.cumsum(-1), (1, 0))
    return documents if torch.compiler.is_compiling() or documents[:, -1].any() else None


def flash_lengths(documents: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """What flash kernels take instead of a mask: where each run of equal numbers in [B, T] starts, rows joined."""
    changes = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = changes.flatten().nonzero().flatten()
    edges = F.pad(starts, (0, 1), value=documents.numel()).to(torch.int32)
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def prepared_mask(mask, config: NanoDeepSeekConfig, inputs_embeds: torch.Tensor):
    """A mask that the caller made, [B, 1, T, S], additive or boolean (True is visible), as the backend takes it.

    Raises: ValueError under flash attention, which has no such mask.
    """
    if is_flash_attention_requested(config):
        raise ValueError(
            f"{config._attn_implementation!r} takes no 4-D mask (given {tuple(mask.shape)}): it masks padding by a 2-D "
            "attention_mask and packed documents by position_ids. Or use attn_implementation='sdpa'."
        )
    if config._attn_implementation == "flex_attention" and isinstance(mask, torch.Tensor):
        if mask.dtype == torch.bool:  # flex adds what it is given
            mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(~mask, float("-inf"))
        mask = mask.expand(len(inputs_embeds), -1, -1, -1)
    return mask


def causal_mask(
    config: NanoDeepSeekConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    **kwargs,
):
    """The mask that the backend takes, and `kwargs` with the lengths of packed documents where flash needs them.

    transformers looks for packed documents only without a padding mask and a cache, so a mask without padding and a
    cache without tokens are left out (nothing else depends on them). It does not look beside padding, nor for flash in
    more than one row; there, this does, except under torch.compile.
    """
    B, T, _ = inputs_embeds.shape
    settings = {"config": config, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
    if attention_mask is not None and real_token_mask(attention_mask, T) is None:
        return prepared_mask(attention_mask, config, inputs_embeds), kwargs
    if torch.compiler.is_compiling():
        return create_causal_mask(attention_mask=attention_mask, past_key_values=past_key_values, **settings), kwargs

    if isinstance(past_key_values, (LatentCache, DynamicCache)) and past_key_values.get_seq_length() == 0:
        past_key_values = None
    if past_key_values is None and attention_mask is not None and attention_mask.all():
        attention_mask = None
    flash, documents = is_flash_attention_requested(config), None
    if past_key_values is None and ("cu_seq_lens_q" not in kwargs if flash else attention_mask is not None):
        documents = packed_documents(position_ids, real_token_mask(attention_mask, T))
    if documents is not None and flash:
        # Padding becomes a document of its own: what its tokens see is of no consequence.
        runs = documents if attention_mask is None else 2 * documents + attention_mask.long()
        return None, kwargs | flash_lengths(runs.expand(B, -1))
    if documents is not None:
        settings["and_mask_function"] = lambda b, h, q, k: documents[b, q] == documents[b, k]
    return create_causal_mask(attention_mask=attention_mask, past_key_values=past_key_values, **settings), kwargs


def masks(config: NanoDeepSeekConfig, inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs):
    """The mask of a forward (`causal_mask`), None where all layers select their keys, and `kwargs` with what these
    layers need to know, `visibility`."""
    given = inputs_embeds, attention_mask, position_ids, past_key_values
    if config.index_topk is None or config.dsa_stage == "dense":
        return causal_mask(config, *given, **kwargs)
    if not (getattr(config, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]):
        raise ValueError("is_causal=False is not possible with index_topk: the indexer selects among earlier keys.")
    seen = visibility(config, *given)
    if config.dsa_stage == "sparse" and seen.keys > config.index_topk:
        return None, kwargs | {"visibility": seen}
    mask, kwargs = causal_mask(config, *given, **kwargs)
    return mask, kwargs | {"visibility": seen}


@dataclass(frozen=True)
class Visibility:
    """Who sees whom, without a tensor of all queries by all keys: for attention that never forms all scores.

    Query t of a call has the key `past + t`. It sees the keys up to its own that are no padding and of its document.

    Attributes:
        keys: how many keys S there are; of a static cache its capacity.
        past: how many of them precede the call's tokens; a tensor with static caches on accelerators.
        real: [B, S], True where a key is no padding; None if none is.
        documents: [B, T], the document of each token; None if no row holds two. Without cached tokens only.
        mask: [B or 1, T, S], what the caller says instead of all this (True is visible).
    """

    keys: int
    past: int | torch.Tensor = 0
    real: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def end(self, stop: int) -> int:
        """How many of the first keys the queries before `stop` can see."""
        return self.keys if self.mask is not None or not isinstance(self.past, int) else self.past + stop

    def rows(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Queries start..stop on the keys that they can see, [B or 1, stop - start, end(stop)]; True is visible."""
        if self.mask is not None:
            return self.mask[:, start:stop]
        end = self.end(stop)
        own = torch.arange(start, stop, device=device) + self.past
        visible = (torch.arange(end, device=device) <= own[:, None])[None]
        if self.real is not None:
            visible = visible & self.real[:, None, :end]
        if self.documents is not None:
            visible = visible & (self.documents[:, start:stop, None] == self.documents[:, None, :end])
        return visible

    def hide(self, scores_BCS: torch.Tensor, start: int, stop: int):
        """Sets the scores of queries start..stop, [B, stop - start, end(stop)], to minus infinity at keys they do not
        see."""
        if self.real is None and self.documents is None and self.mask is None and isinstance(self.past, int):
            if stop - start == 1:  # as in decoding: keys up to `end` are its own or precede it
                return
            # What precedes the first of them is seen by all.
            later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=scores_BCS.device).triu_(1)
            scores_BCS[..., self.past + start :].masked_fill_(later, -torch.inf)
        else:
            scores_BCS.masked_fill_(~self.rows(start, stop, scores_BCS.device), -torch.inf)


def visibility(
    config: NanoDeepSeekConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
) -> Visibility:
    """The same as `causal_mask`, for attention to selected keys.

    Raises: ValueError for a mask of the caller's own that differs between heads or has other values than 0 and minus
    infinity (or the dtype's lowest): keys are chosen once for all heads, or not at all.
    """
    T = inputs_embeds.shape[1]
    keys = T if past_key_values is None else past_key_values.get_mask_sizes(T, 0)[0]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if isinstance(past, torch.Tensor):
        # A static cache counts in place, layer by layer, and rows are made when a layer asks for them.
        known = past.device.type == "cpu" and not torch.compiler.is_compiling()
        past = int(past) if known else past.clone()
    if attention_mask is not None and real_token_mask(attention_mask, T) is None:
        return Visibility(keys, past, mask=own_mask(attention_mask))
    real = documents = None
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]))
        real = None if not torch.compiler.is_compiling() and real.all() else real
    if isinstance(past, int) and past == 0:
        documents = packed_documents(position_ids, None if real is None else real_token_mask(attention_mask, T))
    return Visibility(keys, past, real, documents)


def own_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask that the caller made, [B or 1, 1, T, S], boolean or additive, as a boolean one [B or 1, T, S]."""
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"Selected keys cannot be masked by a {type(mask).__name__}: give a tensor [batch or 1, 1, queries, keys]."
        )
    if mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}: with index_topk keys are chosen once for all heads, so "
            "the second dim must be 1."
        )
    if mask.dtype == torch.bool:
        return mask[:, 0]
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and mask.device.type == "cpu" and not ((mask == 0) | hidden).all():
        raise ValueError(
            "attention_mask holds values between 0 and minus infinity: with index_topk a key is visible or it is not."
        )
    return ~hidden[:, 0]
