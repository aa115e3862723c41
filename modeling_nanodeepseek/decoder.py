"""The decoder layer: what is built for each entry of `config`, and the two residual steps it makes."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import GroupedQueryAttention, MultiHeadLatentAttention
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import RMSNorm, build_mlp
from .moe import DeepseekMoE
from .sparse_attention import DeepseekSparseAttention


def build_attention(config: NanoDeepSeekConfig, layer_idx: int) -> nn.Module:
    """The attention that `config.attention_type` and `config.index_topk` ask for."""
    if config.attention_type == "gqa":
        return GroupedQueryAttention(config, layer_idx)
    return (MultiHeadLatentAttention if config.index_topk is None else DeepseekSparseAttention)(config, layer_idx)


class DecoderBlock(GradientCheckpointingLayer):
    """x += Attention(norm x); x += FeedForward(norm x). Shapes: [B, T, d] -> [B, T, d]."""

    def __init__(self, config: NanoDeepSeekConfig, layer_idx: int):
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekMoE(config) if moe else build_mlp(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NanoDeepSeekDecoderLayer(DecoderBlock):
    """A layer of the decoder. Of a class of its own: by it transformers finds the layers whose outputs are
    `hidden_states`, and a module that predicts further tokens (`mtp.py`) is none of them."""
