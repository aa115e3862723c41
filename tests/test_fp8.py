"""The numbers of FP8 blocks, against a loop over the blocks."""

import pytest
import torch

from modeling_nanodeepseek.fp8 import dequantize, grid, quantize, rounded
from tests.conftest import rms_ratio

BLOCK = (8, 12)


@pytest.mark.parametrize("shape", [(16, 24), (9, 13), (7, 5), (3, 17, 30)])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_against_the_definition(shape, ue8m0):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape) ** 4
    quantized, scale = quantize(weight, BLOCK, ue8m0)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == weight.shape
    assert scale.dtype == torch.float32 and tuple(scale.shape) == shape[:-2] + grid(shape, BLOCK)
    back = dequantize(quantized, scale, BLOCK)
    matrices = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (weight, quantized, scale, back)))
    for w, q, s, b in matrices:
        for i in range(s.shape[0]):
            for j in range(s.shape[1]):
                at = slice(8 * i, 8 * i + 8), slice(12 * j, 12 * j + 12)
                expected = w[at].abs().max() / 448
                if ue8m0:
                    assert expected <= s[i, j] < 2 * expected and s[i, j].log2() % 1 == 0
                else:
                    assert s[i, j] == expected
                assert torch.equal(q[at].float(), (w[at] / s[i, j]).to(torch.float8_e4m3fn).float())
                assert torch.equal(b[at], q[at].float() * s[i, j])
    assert rms_ratio(weight, back) < 0.04  # three bits of mantissa: at most 1/16 of each number


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(20, 20)
    weight[:8, :12] = 3.0
    quantized, scale = quantize(weight, BLOCK)
    assert torch.equal(dequantize(quantized, scale, BLOCK), weight) and scale[1, 1] == 1


def test_what_was_quantized_once_stays_as_it_is():
    """Powers of two: a checkpoint read and written again in bf16 between is the same, to the bit."""
    torch.manual_seed(0)
    quantized, scale = quantize(torch.randn(40, 30), BLOCK, ue8m0=True)
    in_bf16 = dequantize(quantized, scale, BLOCK, torch.bfloat16)
    again, scale_again = quantize(in_bf16, BLOCK, ue8m0=True)
    assert torch.equal(again.float(), quantized.float()) and torch.equal(scale, scale_again)


@pytest.mark.parametrize("block", [(8, 12), (1, 12), (8, 1), (128, 128)])
def test_rounding_in_one_pass_is_quantising_and_back(block):
    """To the bit: every E4M3 number of both signs, subnormal ones too, partial blocks, scales at the edge of fp32."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(448.0)
    x = torch.cat((every.view(16, 16), torch.randn(21, 16) * torch.logspace(-44, 30, 21)[:, None], torch.zeros(9, 16)))
    for ue8m0 in (False, True):
        assert torch.equal(rounded(x, block, ue8m0), dequantize(*quantize(x, block, ue8m0), block))
    assert torch.equal(rounded(every.view(1, -1), (1, 256)), every.view(1, -1))
    x[3, 5], x[40, 2] = float("nan"), float("inf")
    bad = ~rounded(x, block).isfinite()
    assert bad[3, 5] and bad[40, 2] and not (block == (1, 12) and bad[[0, 10]].any())
