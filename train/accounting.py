"""Counting: parameters, and floating-point operations per token."""

import torch

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM


def build_meta(config: NanoDeepSeekConfig) -> NanoDeepSeekForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return NanoDeepSeekForCausalLM(config)


def count_parameters(config: NanoDeepSeekConfig) -> dict[str, int]:
    """Parameters of the model a config describes, counted on the meta device, router biases included.

    Returns: `total`; `active`, those a token meets (K of E experts); `active_matmul`, active without the input
    embedding's lookup (an untied one), norms and biases: what costs multiplications.
    """
    model = build_meta(config)
    counts = {"total": 0, "active": 0, "active_matmul": 0}
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for name, tensor in [*model.named_parameters(), *biases.items()]:
        used = tensor.numel()
        if ".mlp.experts." in name:
            used = used // config.n_routed_experts * config.num_experts_per_tok
        lookup = name == "model.embed_tokens.weight" and not config.tie_word_embeddings
        counts["total"] += tensor.numel()
        counts["active"] += used
        counts["active_matmul"] += used if tensor.ndim >= 2 and not lookup else 0
    return counts


def training_flops_per_token(config: NanoDeepSeekConfig, sequence_length: int) -> float:
    """Multiply-adds * 2 of forward and backward (3 forwards) for one token, causal attention included.

    6 * (active matrix parameters) + 3 * 2 * H * (key width + value width) * T/2 per layer.
    """
    if config.attention_type == "mla":
        width = config.qk_head_dim + config.v_head_dim
    else:
        width = 2 * config.head_dim
    attention = 3 * config.num_hidden_layers * config.num_attention_heads * width * sequence_length
    return 6 * count_parameters(config)["active_matmul"] + attention
