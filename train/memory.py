"""Memory that training takes, by formula: nothing is allocated."""

import torch

from modeling_nanodeepseek import NanoDeepSeekConfig
from modeling_nanodeepseek.losses import CHUNK, MIN_ROWS
from modeling_nanodeepseek.sparse_attention import prefers_gathered

from .accounting import build_meta, selects
from .optimizers import parameter_groups
from .recipe import OptimizerSection


def index_numbers(config: NanoDeepSeekConfig) -> int:
    """Numbers that a layer's indexer keeps per token: queries, key, weights, and their gradients by its own loss."""
    if not config.has_indexer or config.dsa_stage == "dense":
        return 0
    return 3 * (config.index_n_heads * config.index_head_dim + config.index_head_dim + config.index_n_heads)


def attention_numbers(config: NanoDeepSeekConfig, length: int, on_cpu: bool) -> float:
    """Numbers that a layer's attention keeps for its backward, per token; its input not counted."""
    H = config.num_attention_heads
    if config.attention_type != "mla":
        # Queries and keys turned and, where they are normed, before; CPUs repeat keys and values for each head.
        keys, before = config.num_key_value_heads, 1 + config.qk_norm
        return (2 * H + 2 * (H if on_cpu else keys) + before * (H + keys)) * config.head_dim + H
    n, r, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    kept = 2 * (config.q_lora_rank or 0) + 2 * (c + r) + H * (n + r) + H * v + H
    index = index_numbers(config)
    gathered = config.sparse_form == "gathered"
    if selects(config) and length > config.index_topk:
        gathered |= config.sparse_form == "auto" and prefers_gathered(length, length, config.index_topk, n, r, v, c)
    if gathered:
        return kept + index + H * (2 * c + 2 * r) + 2 * config.index_topk  # absorbed; the choice is int64
    # Expanded keys and values; blocked attention on CPUs keeps the rotated part once, others the whole key per head.
    return kept + index + H * (n + v) + H * (r if on_cpu else n + r)


def feed_forward_numbers(config: NanoDeepSeekConfig, experts: bool, on_cpu: bool) -> float:
    """Numbers that a layer's MLP, or its experts, keep for the backward, per token; the input not counted."""
    kept = 4 if config.gated_mlp else 3  # gate, up, act, product
    if not experts:
        return kept * config.intermediate_size
    K, m, E = config.num_experts_per_tok, config.moe_intermediate_size, config.n_routed_experts
    router = 4 * E + 6 * K  # logits, scores, chosen ones of both losses; indices are int64
    shared = kept * (config.n_shared_experts or 0) * m
    # CPUs keep what comes out of the first product; grouped GEMMs the sorted rows, and all between the products.
    routed = (2 if config.gated_mlp else 1) * m if on_cpu else 2 * config.hidden_size + (kept + 1) * m
    return router + shared + K * routed


def activation_bytes(
    config: NanoDeepSeekConfig, length: int, itemsize: int = 4, checkpointing: bool = False, on_cpu: bool = False
) -> float:
    r"""Bytes kept for the backward, per token of a sequence of this length.

      kept:          (L + D) [4 (2 d) + a (2 d + attention + feed-forward)] + 2 * 4 d + D a 6 d
      checkpointed:  (L + D) 4 d, and one layer whole, which is being made again
    a is the itemsize: 4 in fp32, 2 where products are in bf16; the residual stream, which the norms keep, is in fp32.
    Counted in the code's own forward (tests/train/test_plan.py compares with what autograd keeps): on a CPU for fp32;
    on GPUs, whose kernels keep other tensors, it is an estimate, as it is for sparse attention.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    depth = config.num_nextn_predict_layers if config.mtp_loss_coef > 0 else 0

    def layer(experts: bool) -> float:
        parts = attention_numbers(config, length, on_cpu) + feed_forward_numbers(config, experts, on_cpu)
        return 4 * 2 * d + itemsize * (2 * d + parts)

    if config.dsa_stage == "warmup":  # the indexers alone learn
        return itemsize * (layers + depth) * index_numbers(config)
    whole = [layer(config.is_moe_layer(index)) for index in range(layers + depth)]
    inside = 4 * d * len(whole) + max(whole) if checkpointing else sum(whole)
    return inside + 2 * 4 * d + depth * (6 * itemsize * d)


def training_bytes(
    config: NanoDeepSeekConfig,
    *,
    length: int,
    batch: int,
    devices: int = 1,
    bf16: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    on_cpu: bool = False,
) -> dict[str, float]:
    r"""Bytes that training holds on each device, by what they are for. P parameters, P_t of them trained, N devices.

      weights     4 P / N: they stay in fp32
      gradients   4 P_t / N
      optimizer   AdamW 8 P_t / N (two moments); Muon 4 for each hidden matrix's number, 8 for the others'
      activations batch * length * `activation_bytes`; batch is the rows of one device
      copies      bf16: 2 P, autocast's copies of the weights (N = 1); under FSDP two gathered layers and the gradients
                  of one, in the dtype of the products
      workspace   logits of a chunk, three times (`losses.py`), and in fp32 the gradients of the head that the
                  cross-entropy makes in the forward; or Muon's, where that is more: a copy of the matrices' updates,
                  and five of the largest stack
    Sharding is FSDP's (everything but activations and copies), evenly. Not counted: what the process itself takes
    (`hardware.runtime_bytes`), and an allocator's gaps.
    """
    model = build_meta(config)
    groups = parameter_groups(model, OptimizerSection(name=optimizer))
    sizes = [(group["muon"], parameter) for group in groups for parameter in group["params"]]
    trained = sum(parameter.numel() for _, parameter in sizes)
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(parameter.numel() for muon, parameter in sizes if muon)
    itemsize = 2 if bf16 else 4
    layer = max(sum(parameter.numel() for parameter in module.parameters()) for module in model.model.layers)
    copies = (2 * total if bf16 else 0) if devices == 1 else 3 * itemsize * layer
    heads = 1 + (config.num_nextn_predict_layers if config.mtp_loss_coef > 0 else 0)
    rows = min(batch * length, max(CHUNK // config.vocab_size, MIN_ROWS))
    workspace = 3 * 4 * rows * config.vocab_size + 4 * heads * config.vocab_size * config.hidden_size
    if matrices:
        stacks: dict[torch.Size, int] = {}
        for muon, parameter in sizes:
            if muon:
                stacks[parameter.shape[-2:]] = stacks.get(parameter.shape[-2:], 0) + parameter.numel()
        workspace = max(workspace, 4 * matrices + 5 * 4 * max(stacks.values()))
    activations = batch * length * activation_bytes(config, length, itemsize, checkpointing, on_cpu)
    return {
        "weights": 4 * total / devices,
        "gradients": 4 * trained / devices,
        "optimizer": (8 * trained - 4 * matrices) / devices,
        "activations": activations,
        "copies": copies,
        "workspace": workspace,
    }
