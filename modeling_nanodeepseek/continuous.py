"""Continuous batching: MLA's latents in transformers' paged cache.

That cache holds keys and values of config.num_key_value_heads heads of config.head_dim numbers, and the attention
backend writes and reads it. Absorbed, MLA is attention with one such head of kv_lora_rank + qk_rope_head_dim numbers
whose value is its key: the cache then holds each latent twice, as key and as value.
"""

import copy

from transformers.generation import ContinuousMixin
from transformers.modeling_utils import PreTrainedModel

from .attention import backend_of
from .configuration_nanodeepseek import NanoDeepSeekConfig


class PagedConfig:
    """A model's config, but for the heads that its paged cache has; what is set here is set there."""

    def __init__(self, config: NanoDeepSeekConfig):
        self.__dict__["config"] = config
        self.__dict__["num_key_value_heads"] = 1
        self.__dict__["head_dim"] = config.kv_lora_rank + config.qk_rope_head_dim

    @property
    def __class__(self):  # transformers asks configs what they are
        return type(self.config)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["config"], name)

    def __setattr__(self, name: str, value):
        setattr(self.config, name, value)

    def get_text_config(self, *args, **kwargs) -> "PagedConfig":
        return self


def check_continuous_batching(config: NanoDeepSeekConfig):
    """Raises ValueError for what the paged cache cannot hold."""
    if config.index_topk is not None and config.dsa_stage != "dense":
        raise ValueError(
            f"Continuous batching is not possible with index_topk={config.index_topk}: its cache holds no keys of an "
            "indexer. Use generate(), or dsa_stage='dense'."
        )
    if config.attention_type == "mla" and backend_of(config) not in ("eager", "sdpa"):
        raise ValueError(
            f"Continuous batching of MLA is not possible with {backend_of(config)!r}: use attn_implementation='sdpa'."
        )


def start_continuous_batching(model: PreTrainedModel, *args, **kwargs):
    """A `ContinuousBatchingManager` of this model: see `ContinuousMixin.init_continuous_batching`.

    Raises: ValueError for a model that selects keys, for MLA with another backend than sdpa and eager; from the
    manager's `add_request` for a prompt beyond max_position_embeddings. What would run beyond it ends there.
    """
    check_continuous_batching(model.config)
    limit = model.config.position_limit
    if model.config.attention_type == "mla":
        model = copy.copy(model)  # another hull around the same modules
        model.config = PagedConfig(model.config)
        model._supports_flash_attn = False  # else, where flash is installed, transformers would change to it
    manager = ContinuousMixin.init_continuous_batching(model, *args, **kwargs)
    add = manager.add_request

    def add_request(input_ids, request_id=None, max_new_tokens=None, **kwargs):
        if len(input_ids) > limit:
            raise ValueError(f"The prompt has {len(input_ids)} tokens, and max_position_embeddings is {limit}.")
        given = (max_new_tokens, manager.generation_config.max_new_tokens, limit + 1)
        wanted = next(number for number in given if number is not None)
        possible = min(wanted, limit + 1 - len(input_ids))  # the last token is never fed
        return add(input_ids, request_id=request_id, max_new_tokens=possible, **kwargs)

    manager.add_request = add_request
    return manager
