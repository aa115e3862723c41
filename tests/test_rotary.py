"""Rotation in both layouts and YaRN, against complex arithmetic and published numbers."""

import json
import math

import pytest
import torch

from modeling_nanodeepseek import NanoDeepSeekConfig
from modeling_nanodeepseek.rotary import RotaryEmbedding, rotate, softmax_scale
from tests.conftest import TINY, assert_close, tiny_config

V3_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved):
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    positions = torch.tensor([[0, 3, 17, 500]])
    turns = RotaryEmbedding(config)(torch.zeros(1), positions)
    x = torch.randn(1, 2, 4, 6)
    pairs = x.unflatten(-1, (3, 2)) if interleaved else x.unflatten(-1, (2, 3)).mT
    angles = positions[0, :, None] * 100.0 ** (-2 * torch.arange(3) / 6)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(turned)
    expected = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    assert_close(expected, rotate(x, turns, interleaved), 1e-5)
    wide, shifted = torch.zeros(1, 2, 4, 7), torch.zeros(x.numel() + 1)  # slices with odd strides, at an odd place
    for odd in (wide[..., :6], wide[..., 1:], shifted[1:].view_as(x)):
        odd.copy_(x)
        assert torch.equal(rotate(x, turns, interleaved), rotate(odd, turns, interleaved))
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)(x, turns, interleaved)
    assert_close(expected, compiled, 1e-5, "real arithmetic, under a compiler")


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_distance_alone(interleaved):
    rotary = RotaryEmbedding(tiny_config())
    q, k = torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 1, 6).double()

    def product(query_at: int, key_at: int) -> torch.Tensor:
        turned = [rotate(x, rotary(x, torch.tensor([[at]])), interleaved) for x, at in ((q, query_at), (k, key_at))]
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(product(25, 20), product(105, 100), rtol=1e-4)
    assert not torch.allclose(product(25, 20), product(20, 25), rtol=1e-2)


def test_yarn_frequencies_of_v3():
    config = tiny_config(qk_rope_head_dim=64, max_position_embeddings=163840, rope_parameters=V3_YARN)
    inverse = RotaryEmbedding(config).inv_freq.double()
    expected = {0: 1.0, 9: 0.0749894, 11: 0.0390069, 16: 0.0055, 23: 3.333804e-5, 31: 3.333804e-6}
    for j, value in expected.items():
        assert inverse[j].item() == pytest.approx(value, rel=2e-6), j


@pytest.mark.parametrize("last", [3, 639, 640, 1000, 3])
def test_dynamic_frequencies(last):
    """Beyond `longest` = 640 the base is multiplied by (factor * length / longest - (factor - 1))^(r / (r - 2))."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
    rotary = RotaryEmbedding(tiny_config(rope_parameters=rope))
    rotary(torch.zeros(1), torch.tensor([[2000]]))  # an earlier, longer call leaves no trace
    turns = rotary(torch.zeros(1), torch.tensor([[2, last]]))
    base = 100.0 * (3.0 * max(last + 1, 640) / 640 - 2.0) ** (6 / 4)
    angles = torch.tensor([[[2.0], [last]]], dtype=torch.double) * base ** (-2 * torch.arange(3).double() / 6)
    assert_close(angles.cos(), turns.real, 1e-4)
    assert_close(angles.sin(), turns.imag, 1e-4)


@pytest.mark.parametrize("all_dim, expected", [(1.0, 0.1352337789), (0.707, 0.1147213868), (0.0, 192**-0.5)])
def test_softmax_scale_under_yarn(all_dim, expected):
    rope = V3_YARN | {"mscale": all_dim or 1.0, "mscale_all_dim": all_dim}
    config = tiny_config(max_position_embeddings=163840, rope_parameters=rope)
    assert softmax_scale(config, 192) == pytest.approx(expected, rel=1e-8)


def test_softmax_scale_without_yarn():
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert softmax_scale(config, 16) == 0.25


def test_amplitude_of_unequal_mscale():
    rope = V3_YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}
    rotary = RotaryEmbedding(tiny_config(max_position_embeddings=163840, rope_parameters=rope))
    turns = rotary(torch.zeros(1), torch.tensor([[7]]))
    expected = (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert turns.abs().double() == pytest.approx(expected, rel=1e-6)


def test_angles_stay_fp32_in_bf16():
    """At position 2001 a bf16 position would be 2000, and bf16 frequencies are off by up to 0.4 %."""
    exact, cast = RotaryEmbedding(tiny_config()), RotaryEmbedding(tiny_config()).to(torch.bfloat16)
    x, position = torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[2001]])
    assert cast.inv_freq.dtype == cast(x, position).real.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(exact(x.float(), position), cast(x.to(dtype), position))


@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}])
def test_a_file_of_transformers_4(scaling, tmp_path):
    """rope_theta and rope_scaling on the top level, and a `head_dim` that is none of rotation's: V3.2's files say 64
    or 128 there whatever the rope part is. The frequencies are those of rope_parameters, also after a round trip."""
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    rope.pop("type", None)
    expected = RotaryEmbedding(tiny_config(rope_parameters=rope | {"rope_theta": 500.0})).inv_freq
    if scaling is None:
        assert_close(500.0 ** (-2 * torch.arange(3) / 6), expected, 1e-6)
    values = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    values |= {"model_type": "deepseek_v3", "rope_theta": 500.0, "rope_scaling": scaling, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for _ in range(2):
        config = NanoDeepSeekConfig.from_pretrained(tmp_path)
        assert config.head_dim == 6 and torch.equal(RotaryEmbedding(config).inv_freq, expected)
        config.save_pretrained(tmp_path)
