"""What a forward checks of its inputs: one clear error for each that cannot be right.

Called once per forward. Shapes and lengths cost nothing; values are read on a CPU alone, because an accelerator would
have to wait for the answer; a compiled forward checks nothing.
"""

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from .cache import GrowingLayer
from .configuration_nanodeepseek import NanoDeepSeekConfig


def check_inputs(
    config: NanoDeepSeekConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
):
    """Raises ValueError for a cache, a mask or positions that do not belong to this model and this input."""
    if torch.compiler.is_compiling():
        return
    config.validate_stage()  # the one field that is meant to change, and may be set by hand
    B, T, _ = inputs_embeds.shape
    S = T
    if past_key_values is not None:
        check_cache(config, past_key_values, B)
        S = past_key_values.get_mask_sizes(T, 0)[0]  # of a static cache its capacity
    if isinstance(attention_mask, torch.Tensor):
        check_mask(config, attention_mask, B, T, S, cached_tokens(past_key_values))
    if position_ids is not None and tuple(position_ids.shape) not in ((1, T), (B, T)):
        raise ValueError(f"position_ids has the shape {list(position_ids.shape)}: it must be [{B} or 1, {T}].")


def check_indices(
    config: NanoDeepSeekConfig,
    inputs_embeds: torch.Tensor,
    past_key_values: Cache | None,
    indices: tuple[torch.Tensor, ...] | None,
):
    """Raises ValueError for a replay of selected keys that does not belong to this model and this input."""
    if indices is None or torch.compiler.is_compiling():
        return
    if config.index_topk is None or config.dsa_stage != "sparse":
        raise ValueError("index_topk_indices are given, and this model selects no keys (index_topk, dsa_stage).")
    B, T, _ = inputs_embeds.shape
    S = T if past_key_values is None else past_key_values.get_mask_sizes(T, 0)[0]
    if not isinstance(indices, (tuple, list)):
        raise ValueError(f"index_topk_indices is a {type(indices).__name__}: it must be a tuple, a tensor per layer.")
    if len(indices) != config.num_hidden_layers:
        raise ValueError(f"index_topk_indices has {len(indices)} layers: it must have {config.num_hidden_layers}.")
    for chosen in indices:
        if not isinstance(chosen, torch.Tensor) or chosen.dtype == torch.bool:
            raise ValueError(f"index_topk_indices holds {type(chosen).__name__}: it must hold tensors of integers.")
        if chosen.ndim != 3 or chosen.shape[:2] != (B, T) or chosen.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"index_topk_indices holds {list(chosen.shape)} of {chosen.dtype}: it must hold int32 or int64, "
                f"[batch, queries, keys] = [{B}, {T}, any]."
            )
        if chosen.device.type == "cpu" and chosen.numel() and not -1 <= int(chosen.min()) <= int(chosen.max()) < S:
            raise ValueError(
                f"index_topk_indices holds {int(chosen.min())}..{int(chosen.max())}: keys are 0..{S - 1}, -1 is none."
            )
        ordered = chosen.sort(-1).values if chosen.device.type == "cpu" else chosen[..., :0]
        if ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any():
            raise ValueError("index_topk_indices holds a key twice for one query: it would count twice, if gathered.")


def check_whole_text(past_key_values: Cache | None, reader: str):
    """Raises ValueError for cached tokens where something has to see the whole text, or to learn from it."""
    past = 0 if torch.compiler.is_compiling() else cached_tokens(past_key_values)
    if past:
        raise ValueError(
            f"The cache holds {past} tokens, and {reader} needs the whole text in one call: train without "
            "past_key_values, or without it (index_loss_coef=0, mtp_loss_coef=0)."
        )


def check_drafting(generation_config: GenerationConfig):
    """Raises ValueError for settings of generate() under which drafted text would not be plain text."""
    refused = {
        "num_beams": generation_config.num_beams not in (None, 1),
        "stop_strings": generation_config.stop_strings is not None,
        "max_time": generation_config.max_time is not None,
        "guidance_scale": generation_config.guidance_scale not in (None, 1),
        "assistant_ensemble_weight": getattr(generation_config, "assistant_ensemble_weight", None) is not None,
        "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": generation_config.assistant_early_exit is not None,
    }
    for field, wrong in refused.items():
        if wrong:
            raise ValueError(
                f"use_mtp=True with {field}={getattr(generation_config, field)!r} is not possible: drafts are for "
                "greedy decoding and sampling, which end by eos_token_id or their length."
            )


def check_length(
    config: NanoDeepSeekConfig,
    tokens: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
):
    """Raises ValueError for positions at or above max_position_embeddings (which YaRN's factor is already part of),
    unless they have no limit.

    For the language model alone: whoever studies what rotation does beyond it has the decoder without a head.
    `tokens` are ids [B, T] or embeddings [B, T, d]. Positions that are given decide, whatever the length: a row of
    packed documents may be longer.
    """
    limit = config.position_limit
    if torch.compiler.is_compiling() or tokens is None:
        return
    if position_ids is None:
        length = (cached_tokens(past_key_values) or 0) + tokens.shape[1]
        if length > limit:
            raise ValueError(f"The sequence has {length} tokens, and max_position_embeddings is {limit}.")
    elif position_ids.device.type == "cpu" and position_ids.numel() and (highest := int(position_ids.max())) >= limit:
        raise ValueError(f"Position {highest} is beyond max_position_embeddings={limit}: the last is {limit - 1}.")


def cached_tokens(cache: Cache | None) -> int | None:
    """How many tokens a cache holds; None if that is known to an accelerator alone, as with a static cache."""
    past = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if isinstance(past, torch.Tensor):
        return int(past) if past.device.type == "cpu" else None
    return past


def check_cache(config: NanoDeepSeekConfig, cache: Cache, batch: int):
    """The number of layers, what each holds per token, and the batch."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: it must be a Cache of transformers.")
    if not cache.layers and cache.layer_class_to_replicate is not None:
        return  # a DynamicCache without a config adds its layers when they are written
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"The cache is another model's: it has {len(cache.layers)} layers, and this model num_hidden_layers="
            f"{config.num_hidden_layers}."
        )
    layer = cache.layers[0]
    if isinstance(layer, GrowingLayer):
        shape = layer.state_shape()
    else:  # transformers' own; quantised ones hold no such tensor
        shape = layer.keys.shape if isinstance(layer.keys, torch.Tensor) and layer.keys.ndim == 4 else None
    if shape is None:
        return
    if config.attention_type == "mla":
        heads, width = 1, config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads, width = config.num_key_value_heads, config.head_dim
    if heads % shape[1] != 0 or shape[3] != width:  # with tensor parallelism a rank holds some of the heads
        raise ValueError(
            f"The cache is another model's: per token and layer it holds {shape[1]} x {shape[3]} numbers as keys, and "
            f"this model writes {heads} x {width}."
        )
    if config.attention_type == "mla":
        check_indexer_keys(config, layer.values)
    if shape[0] != batch:
        raise ValueError(
            f"The cache holds a batch of {shape[0]}, and the input is a batch of {batch}: they must be equal "
            "(batch_repeat_interleave and batch_select_indices change the cache's)."
        )


def check_indexer_keys(config: NanoDeepSeekConfig, values: torch.Tensor):
    """What a cache holds as values, [B, 1, S, width]: keys of the indexer, or nothing while it rests."""
    width = 0 if config.dsa_stage == "dense" else config.index_width
    if values.shape[-1] == width:
        return
    if values.shape[-1] == 0:
        wrong = "holds no keys of the indexer: it was filled by a model without one, or in dsa_stage='dense'"
    elif width == 0:
        wrong = "holds keys of an indexer: it was filled by a model with one, or not in dsa_stage='dense'"
    else:
        wrong = f"is another model's: its keys of the indexer hold {values.shape[-1]} numbers, not {width}"
    raise ValueError(f"The cache {wrong}. Begin with a fresh cache, and read the text anew.")


def check_mask(config: NanoDeepSeekConfig, mask: torch.Tensor, B: int, T: int, S: int, past: int | None):
    """A padding mask [B, past + T], or a mask of one's own, [B or 1, heads or 1, T, S], boolean or floating."""
    shape = tuple(mask.shape)
    cached = "" if past in (0, None) else f" ({past} of them cached)"
    if mask.ndim == 2:
        # A static cache also takes a mask as long as itself.
        if shape[0] != B or (past is not None and shape[1] not in (past + T, S)):
            right = f"[{B}, {S if past is None else past + T}]"
            raise ValueError(
                f"attention_mask has the shape {list(shape)}: it must be [batch, tokens{cached}] = {right}."
            )
    elif mask.ndim == 4:
        heads = config.num_attention_heads
        if shape[0] not in (1, B) or shape[1] not in (1, heads) or shape[2:] != (T, S):
            raise ValueError(
                f"attention_mask has the shape {list(shape)}: it must be [batch or 1, heads or 1, queries, keys"
                f"{cached}] = [{B} or 1, {heads} or 1, {T}, {S}]."
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention_mask is 4-D and of {mask.dtype}: it must be boolean (True is visible) or floating (added "
                "to the scores)."
            )
    else:
        raise ValueError(f"attention_mask has {mask.ndim} dims, {list(shape)}: it must have 2 or 4.")
