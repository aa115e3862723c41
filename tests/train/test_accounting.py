"""Operations per token with an indexer: written out for V3.2, added up query by query, and counted by torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import tiny_config, tiny_model, tokens
from train.accounting import count_parameters, training_flops_per_token
from train.models import build_config

MODEL, INDEXER = 36_624_596_992, 851_509_248  # V3.2's active matrices: without the indexers', and theirs


def test_v32_matrices():
    counts = count_parameters(build_config("deepseek-v3.2"))
    assert counts["index_matmul"] == INDEXER == 61 * (13_959_424 - 2 * 128)  # without k_norm
    assert counts["active_matmul"] == MODEL + INDEXER
    without = count_parameters(build_config("deepseek-v3.2", index_topk=None))
    assert without["active_matmul"] == MODEL and without["index_matmul"] == 0
    assert without["total"] == 671_026_419_200  # V3
    assert without["mtp"] == 11_610_068_224 and counts["mtp"] == without["mtp"] + 13_959_424


def test_multi_token_prediction_is_a_layer_and_a_head_more():
    config = build_config("deepseek-v3.2", dsa_stage="dense")
    without = build_config("deepseek-v3.2", dsa_stage="dense", num_nextn_predict_layers=0)
    # eh_proj, attention, router, shared and 8 of 256 experts, the head; 81,920 operations for a query and a key
    module = 2 * 7168**2 + 187_107_328 - 2048 + 256 * 7168 + 9 * 44_040_192 + 129_280 * 7168
    expected = 6 * module + 3 * 81_920 * 4096
    assert training_flops_per_token(config, 8192) - training_flops_per_token(without, 8192) == expected
    frozen = build_config("deepseek-v3.2", dsa_stage="dense", mtp_loss_coef=0.0)
    assert training_flops_per_token(frozen, 8192) == training_flops_per_token(without, 8192)


@pytest.mark.parametrize(
    "stage, length, expected",
    [
        # 81,920 operations for a query and a key in all heads, 16,384 in the indexer (V3.2-Exp's dims).
        ("dense", 8192, 6 * MODEL + 3 * 61 * 81_920 * 4096),
        ("warmup", 8192, 2 * MODEL + 61 * 81_920 * 4096 + 4 * INDEXER + 3 * 61 * 16_384 * 4096),
        # 2048 - 2048^2 / 16384 = 1792 keys
        ("sparse", 8192, 6 * MODEL + 3 * 61 * 81_920 * 1792 + 4 * INDEXER + 61 * 16_384 * (4096 + 2 * 1792)),
        ("sparse", 2048, 6 * MODEL + 3 * 61 * 81_920 * 1024 + 4 * INDEXER + 3 * 61 * 16_384 * 1024),
        ("sparse", 1024, 6 * MODEL + 3 * 61 * 81_920 * 512 + 4 * INDEXER + 3 * 61 * 16_384 * 512),
        ("sparse", 131072, 6 * MODEL + 3 * 61 * 81_920 * 2032 + 4 * INDEXER + 61 * 16_384 * (65536 + 2 * 2032)),
    ],
)
def test_v32_by_stage(stage, length, expected):
    assert (
        training_flops_per_token(build_config("deepseek-v3.2", dsa_stage=stage, num_nextn_predict_layers=0), length)
        == expected
    )


def test_figures_of_v32():
    """The same, as numbers: GFLOP per token at 8K and at 128K, sparse and dense."""
    figures = {
        ("dense", 8192): 281.15,
        ("sparse", 8192): 257.69,
        ("dense", 131072): 1202.22,
        ("sparse", 131072): 323.18,
    }
    for (stage, length), gigaflops in figures.items():
        config = build_config("deepseek-v3.2", dsa_stage=stage, num_nextn_predict_layers=0)
        assert training_flops_per_token(config, length) / 1e9 == pytest.approx(gigaflops, abs=0.005)


SPARSE = {"index_topk": 7, "index_n_heads": 2, "index_head_dim": 8, "n_routed_experts": None}


@pytest.mark.parametrize("length", [5, 7, 64])
def test_mean_number_of_keys(length):
    """Query t attends to min(t, k) keys; the formula is below that by k / 2S."""
    config = tiny_config(**SPARSE, index_loss_coef=0.0)
    counts = count_parameters(config)
    matrices = 6 * counts["active_matmul"] - 4 * counts["index_matmul"]  # no backward of the indexer
    scores = 3 * 2 * 2 * 8 * length / 2
    pair = 3 * 3 * 2 * 3 * (10 + 6 + 14)  # passes, layers, 2, heads, widths
    keys = (training_flops_per_token(config, length) - matrices - scores) / pair
    k = min(length, 7)
    assert keys + k / (2 * length) == pytest.approx(sum(min(t, 7) for t in range(1, length + 1)) / length, rel=1e-12)


def test_fixed_pattern_has_no_indexer():
    config = tiny_config(index_topk=7, index_pattern="fixed", index_window=5, index_global_tokens=2)
    counts = count_parameters(config)
    assert counts["index_matmul"] == 0
    attention = 3 * 3 * 2 * 3 * 30 * (7 - 49 / 128)
    assert training_flops_per_token(config, 64) == pytest.approx(6 * counts["active_matmul"] + attention, rel=1e-12)


class WeightProducts(TorchDispatchMode):
    """Adds up the operations of products with a dim of that many tokens: those in weight matrices."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.operations = tokens, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            (rows, inner), (_, columns) = args[0].shape, args[1].shape
            self.operations += 2 * rows * inner * columns * (self.tokens in (rows, inner))
        return function(*args, **kwargs or {})


def test_an_indexers_matrices_cost_four_operations():
    """A forward, and a backward that stops at its inputs; other matrices cost six."""
    ids, fixed = tokens(length=31), {"index_pattern": "fixed", "index_window": 5, "index_global_tokens": 2}
    operations = []
    for pattern in ({}, fixed):
        model = tiny_model(**SPARSE | pattern).train()
        with WeightProducts(ids.numel()) as products:
            model(ids, labels=ids).loss.backward()
        operations.append(products.operations)
    index = count_parameters(tiny_config(**SPARSE))["index_matmul"]
    assert index == 3 * (18 * 16 + 40 * 8 + 40 * 2)
    assert operations[0] - operations[1] == 4 * ids.numel() * index
