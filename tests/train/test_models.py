"""The sizes that ship: their parameters to the unit, and a training step of each at a drastically reduced size."""

import math

import pytest
import torch

from modeling_nanodeepseek import NanoDeepSeekConfig
from tests.conftest import tokens
from train.accounting import build_meta, count_parameters
from train.models import build_config, build_model, model_files, variants

# parameters() of the model, what a token meets, and the router biases that both of the other counts include.
COUNTS = {
    "quickstart": (11_033_216, 4_840_112, 3 * 16),
    "small": (44_323_968, 38_425_748, 5 * 4),
    "base": (312_013_056, 156_299_608, 11 * 8),
    "large": (2_236_211_712, 933_880_504, 23 * 8),
    "v32-small": (130_279_680, 130_279_680, 0),
    "v32-medium": (349_706_240, 349_706_240, 0),
    "v32-large": (9_057_527_808, 2_451_500_928, 30 * 64),
    "v32-xlarge": (97_561_591_808, 10_739_504_896, 46 * 128),
    "v32-full": (948_490_625_024, 44_307_750_144, 61 * 256),
    "deepseek-v3.2": (671_877_929_216, 38_403_822_336, 58 * 256),
}
# layers, width, heads, context, experts, index_topk, index heads, index_head_dim
SHAPES = {
    "v32-small": (12, 768, 12, 8 * 1024, None, None, 6, 64),
    "v32-medium": (24, 1024, 16, 16 * 1024, None, 2048, 8, 64),
    "v32-large": (32, 2048, 32, 32 * 1024, 64, 2048, 16, 128),
    "v32-xlarge": (48, 4096, 48, 64 * 1024, 128, 2048, 24, 128),
    "v32-full": (64, 8192, 64, 128 * 1024, 256, 2048, 32, 128),
    "deepseek-v3.2": (61, 7168, 128, 163840, 256, 2048, 64, 128),
}


def test_every_file_is_counted_here():
    assert set(model_files()) == set(COUNTS)


def by_hand(config: NanoDeepSeekConfig, experts: int) -> int:
    """Parameters with so many experts per layer, router biases included: written from the shapes of the reports."""
    d, H, m = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    q, c = config.q_lora_rank, config.kv_lora_rank
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    queries = d * H * (n + r) if q is None else d * q + q + q * H * (n + r)
    attention = queries + d * (c + r) + c + c * H * (n + v) + H * v * d
    if config.index_topk is not None:
        j, i = config.index_n_heads, config.index_head_dim
        attention += q * j * i + d * i + 2 * i + d * j
    total = 2 * config.vocab_size * d + d
    for layer in range(config.num_hidden_layers):
        E = config.n_routed_experts
        dense = 3 * d * config.intermediate_size
        moe = config.is_moe_layer(layer) and E * d + E + 3 * d * m * (experts + config.n_shared_experts)
        total += attention + 2 * d + (moe or dense)
    return total


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_to_the_unit(name):
    config = build_config(name)
    parameters, active, biases = COUNTS[name]
    counts = count_parameters(config)
    further = counts["mtp"] - (config.n_routed_experts if counts["mtp"] else 0)  # the router's bias is a buffer
    assert sum(parameter.numel() for parameter in build_meta(config).parameters()) == parameters + further
    assert (counts["total"], counts["active"]) == (parameters + biases, active)
    assert counts["total"] == by_hand(config, config.n_routed_experts or 0)
    assert counts["active"] == by_hand(config, config.num_experts_per_tok)


@pytest.mark.parametrize("name", SHAPES)
def test_the_second_family(name):
    config = build_config(name)
    layers, width, heads, context, experts, topk, index_heads, index_width = SHAPES[name]
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert (config.n_routed_experts, config.index_topk) == (experts, topk)
    assert (config.index_n_heads, config.index_head_dim) == (index_heads, index_width)
    rope = config.rope_parameters  # trained at 4096 tokens and stretched, as V3 was
    assert rope["factor"] * rope["original_max_position_embeddings"] == config.max_position_embeddings == context
    if experts:  # as in V3, a token of an expert layer passes through as wide a network as a dense layer's
        passed = config.num_experts_per_tok + config.n_shared_experts
        assert passed * config.moe_intermediate_size == config.intermediate_size


def test_variants_select_no_keys():
    """They name what is left of the model; selection of keys is none of it, and grouped queries cannot have it."""
    assert all(build_config("v32-large", variant).index_topk is None for variant in variants())
    assert build_config("v32-xlarge", "dense_transformer").head_dim == 84  # 4096 / 48 is odd
    assert build_config("v32-large", "dense_transformer").head_dim == 64


REDUCED = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "initializer_range": 0.05,
}
INDEXER = {"index_topk": 9, "index_n_heads": 2, "index_head_dim": 16}
EXPERTS = {"n_routed_experts": 16, "moe_intermediate_size": 16, "first_k_dense_replace": 1}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_at_a_reduced_size(name):
    """Every parameter learns, the indexer's too, and a step down the gradient lowers the loss by what it promises."""
    config = build_config(name)
    sparse, moe = config.index_topk is not None, config.n_routed_experts is not None
    sizes = REDUCED | (INDEXER if sparse else {}) | (EXPERTS if moe else {})
    model = build_model(name, **sizes).double().train()
    ids = tokens(length=31)
    outputs = model(ids, labels=ids, output_index_topk_indices=sparse)
    assert outputs.ce_loss.item() == pytest.approx(math.log(97), rel=0.05)
    terms = outputs.ce_loss
    if moe:
        terms = terms + config.aux_loss_alpha * outputs.balance_loss
    if config.num_nextn_predict_layers:
        assert outputs.mtp_loss.item() == pytest.approx(math.log(97), rel=0.1)
        terms = terms + config.mtp_loss_coef * outputs.mtp_loss
    if sparse:
        terms = terms + outputs.index_loss
        assert outputs.index_loss > 1e-4
        for chosen in outputs.index_topk_indices:
            assert chosen.shape == (2, 31, 9)
            assert [(chosen[0, t] >= 0).sum().item() for t in (0, 7, 8, 30)] == [1, 8, 9, 9]
    else:
        assert outputs.index_loss is None
    assert outputs.loss.item() == pytest.approx(terms.item(), rel=1e-12)
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    # Small enough a step that the same keys and experts are chosen again.
    rate, promised = 1e-6, sum(parameter.grad.square().sum().item() for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    again = model(ids, labels=ids).loss.item()
    # The two losses have their own parameters, but the indexer's target moves with the model: 1 % is allowed for it.
    assert outputs.loss.item() - again == pytest.approx(rate * promised, rel=1e-2)
