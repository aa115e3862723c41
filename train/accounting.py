"""Counting: parameters, floating-point operations per token, bytes of the cache."""

import math

import torch

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.cache import FP8_BLOCK


def build_meta(config: NanoDeepSeekConfig) -> NanoDeepSeekForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return NanoDeepSeekForCausalLM(config)


def count_parameters(config: NanoDeepSeekConfig) -> dict[str, int]:
    """Parameters of the model a config describes, counted on the meta device, router biases included.

    Those biases, E per MoE layer, are buffers: `model.parameters()` has them not, the published totals do.

    Multi-token prediction's modules are counted apart, as the reports do.

    Returns: `total`; `active`, those a token meets (K of E experts, the whole indexer); `active_matmul`, active without
    the input embedding's lookup (an untied one), norms and biases: what costs multiplications; `index_matmul`, the
    indexers' share of that; `mtp`, `mtp_matmul` and `mtp_index_matmul`, the modules' total and what costs
    multiplications there, without their indexers and these alone.
    """
    model = build_meta(config)
    counts = {
        "total": 0,
        "active": 0,
        "active_matmul": 0,
        "index_matmul": 0,
        "mtp": 0,
        "mtp_matmul": 0,
        "mtp_index_matmul": 0,
    }
    further = tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for name, tensor in [*model.named_parameters(), *biases.items()]:
        used = tensor.numel()
        if ".mlp.experts." in name:
            used = used // config.n_routed_experts * config.num_experts_per_tok
        lookup = name == "model.embed_tokens.weight" and not config.tie_word_embeddings
        multiplied = used if tensor.ndim >= 2 and not lookup else 0
        if name.startswith(further):
            counts["mtp"] += tensor.numel()
            counts["mtp_index_matmul" if ".indexer." in name else "mtp_matmul"] += multiplied
            continue
        counts["total"] += tensor.numel()
        counts["active"] += used
        counts["active_matmul"] += multiplied
        counts["index_matmul"] += multiplied if ".indexer." in name else 0
    return counts


def selects(config: NanoDeepSeekConfig) -> bool:
    """Whether queries attend to chosen keys alone."""
    return config.index_topk is not None and config.dsa_stage == "sparse"


def mean_keys(config: NanoDeepSeekConfig, length: int) -> float:
    """N = k - k^2 / 2S, k = min(S, index_topk): the keys that a query of a text of S tokens attends to, in the mean."""
    k = min(length, config.index_topk) if selects(config) else length
    return k - k * k / (2 * length)


def pair_width(config: NanoDeepSeekConfig) -> int:
    """Multiply-adds of a query with a key and its value, per head, keys and values expanded."""
    return config.qk_head_dim + config.v_head_dim if config.attention_type == "mla" else 2 * config.head_dim


def training_flops_per_token(config: NanoDeepSeekConfig, sequence_length: int) -> float:
    r"""Multiply-adds * 2 of forward and backward for one token of a sequence of S, in the config's `dsa_stage`.

      model:   2 P (M + L H (key width + value width) N)        N = k - k^2 / 2S, k = min(S, index_topk)
      indexer: 4 I + 2 L j i (S/2 + 2 N)
    M and I are the active matrix parameters without the indexer's and the indexer's; L layers, H heads, j and i the
    indexer's heads and their width. N is the mean number of keys that a query attends to, causally: k = S without
    selection and in the stages `dense` and `warmup`, which gives S/2. P counts passes, each worth a forward: 3, or 1 in
    `warmup`, where the model has no backward. The indexer scores all S/2 keys and learns from the N; nothing flows back
    into its inputs, so its matrices cost 2 I in the backward, not 4. It rests in `dense`; with index_loss_coef = 0 it
    has no backward. D modules of multi-token prediction that learn are D layers more, their eh_proj, and D times the
    head (which rests in `warmup`, where their indexers alone learn).

    These are the operations that the equations need, so that runs compare. Left out: what a form of attention adds
    (gathered latents cost 2c + r per head and key where n + r + v is counted, a mask computes hidden keys too, the
    loss forms scores and p anew), activation checkpointing, and all that is no matrix product: softmax, norms, routing,
    the choice of keys, and the sum over the indexer's heads, 1/i of its scores. The mean of min(t, k) is larger than N
    by k / 2S. Documents packed into a row are counted as one sequence.
    """
    S, counts = sequence_length, count_parameters(config)
    indexes = config.has_indexer and config.dsa_stage != "dense"
    learns = indexes and config.index_loss_coef > 0
    keys, width = mean_keys(config, S), pair_width(config)
    passes = 1 if learns and config.dsa_stage == "warmup" else 3
    depth = config.num_nextn_predict_layers if config.mtp_loss_coef > 0 else 0
    pairs = (config.num_hidden_layers + depth) * config.num_attention_heads * width * keys
    heads = 0 if config.dsa_stage == "warmup" else depth * config.vocab_size * config.hidden_size
    further = counts["mtp_matmul"] + heads if depth else 0
    flops = 2 * passes * (counts["active_matmul"] - counts["index_matmul"] + pairs + further)
    if indexes:
        scores = (config.num_hidden_layers + depth) * config.index_n_heads * config.index_head_dim
        matrices = counts["index_matmul"] + (counts["mtp_index_matmul"] if depth else 0)
        flops += 2 * (matrices + scores * S / 2)
        flops += 2 * (matrices + scores * 2 * keys) if learns else 0
    return flops


def cache_bytes(config: NanoDeepSeekConfig, itemsize: int = 2) -> int:
    """What `generate()` keeps per token, in all layers: the latent, rotated key and indexer's key, or keys and values.

    itemsize: bytes per number, 2 in bf16.
    """
    if config.attention_type == "mla":
        width = config.kv_lora_rank + config.qk_rope_head_dim + config.index_width
    else:
        width = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * width * itemsize


def fp8_cache_bytes(config: NanoDeepSeekConfig, index_in_fp8: bool = False) -> int:
    """The same with MLA's latents in FP8, an fp32 scale per 128 numbers, and rope keys in bf16 (`Fp8LatentCache`).

    index_in_fp8: the indexer's keys too, as DeepSeek deploys V3.2: one scale each; ours keeps them in bf16.
    """
    if config.attention_type != "mla":
        raise ValueError(f"the FP8 cache is for attention_type='mla', not {config.attention_type!r}")
    index = config.index_width
    latent = config.kv_lora_rank + 4 * math.ceil(config.kv_lora_rank / FP8_BLOCK) + 2 * config.qk_rope_head_dim
    return config.num_hidden_layers * (latent + (index + 4 * bool(index) if index_in_fp8 else 2 * index))


def prefill_flops_per_token(config: NanoDeepSeekConfig, length: int) -> float:
    r"""Operations of reading a prompt of S tokens, per token:  2 (M - V d + L H (key width + value width) N)
    and with an indexer 2 (I + L j i S/2); letters and what is left out as in `training_flops_per_token`.

    V d is the head, which sees the last token alone. Modules of multi-token prediction rest.
    """
    counts, layers = count_parameters(config), config.num_hidden_layers
    pairs = layers * config.num_attention_heads * pair_width(config) * mean_keys(config, length)
    flops = 2 * (counts["active_matmul"] - counts["index_matmul"] - config.vocab_size * config.hidden_size + pairs)
    if config.has_indexer and selects(config):
        scores = layers * config.index_n_heads * config.index_head_dim * length / 2
        flops += 2 * (counts["index_matmul"] + scores)
    return flops


def decode_flops_per_token(config: NanoDeepSeekConfig, context: int) -> float:
    r"""Operations of one token after S others, from the cache:  2 (M + L H (2c + r) N), N = min(S, index_topk) keys in
    the absorbed form of MLA (kv_b_proj's, folded into query and output, are in M), and with an indexer 2 (I + L j i S).
    GQA has twice its head's width for 2c + r.
    """
    counts, layers = count_parameters(config), config.num_hidden_layers
    mla = config.attention_type == "mla"
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim if mla else 2 * config.head_dim
    keys = min(context, config.index_topk) if selects(config) else context
    flops = 2 * (counts["active_matmul"] - counts["index_matmul"] + layers * config.num_attention_heads * width * keys)
    if config.has_indexer and selects(config):
        flops += 2 * (counts["index_matmul"] + layers * config.index_n_heads * config.index_head_dim * context)
    return flops
