"""Loading in 8 and 4 bits by transformers' own quantisers: what they cover, and that all paths read their weights.

They replace linear layers, or the weights of these. MLA's absorbed form takes kv_b_proj's weight without calling it.
"""

import copy
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_nanodeepseek.stacking import CheckpointError
from tests.conftest import SPARSE, assert_close, tiny_model, tokens
from train.models import build_config

SIZES = {  # what the CPU kernels of bitsandbytes ask for: multiples of 64
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
KINDS = {"dense": {}, "sparse": SPARSE | {"index_n_heads": 32, "index_head_dim": 64}}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Int8Linear(nn.Module):
    """Stands in for a quantised layer: whole numbers and a scale per row, and no weight that could be multiplied by."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantize(self) -> torch.Tensor:
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


def linears(model) -> dict[str, nn.Module]:
    """What transformers' quantisers take: every linear layer but the head."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}


@torch.no_grad()
def assert_all_paths_read(quantised, dequantised, tolerance: float):
    """Prefill and decoding in each form of attention: with quantised layers as with plain ones of the same weights."""
    ids = tokens(2, 31)
    for form in ("expanded", "absorbed"):
        quantised.config.attention_form = form
        assert_close(dequantised(ids).logits, quantised(ids).logits, tolerance, form)
        cache = quantised(ids[:, :-1], use_cache=True).past_key_values
        step = quantised(ids[:, -1:], past_key_values=cache).logits
        assert_close(dequantised(ids).logits[:, -1:], step, tolerance, f"{form}, cached")
    quantised.config.attention_form = "auto"
    prompt = ids[:1, :9]
    assert torch.equal(dequantised.generate(prompt, **GREEDY), quantised.generate(prompt, **GREEDY))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_stand_in(kind):
    quantised = tiny_model(**SIZES, **KINDS[kind])
    dequantised = copy.deepcopy(quantised)
    for name, layer in linears(quantised).items():
        quantised.set_submodule(name, Int8Linear(layer))
        dequantised.get_submodule(name).weight.data = quantised.get_submodule(name).dequantize()
    assert_all_paths_read(quantised, dequantised, 1e-5)


def saved(folder, kind: str):
    model = tiny_model(**SIZES, **KINDS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.4)  # widths of 128 add up to more
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_torchao(kind, tmp_path):
    """8-bit weights: the Linears stay, their weights are tensors of torchao's own."""
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    dequantised = saved(tmp_path, kind)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for name, layer in linears(quantised).items():
        assert type(layer.weight) is not nn.Parameter, name
        dequantised.get_submodule(name).weight.data = layer.weight.dequantize()
    assert_all_paths_read(quantised, dequantised, 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bitsandbytes(kind, bits, tmp_path):
    """Experts, router and the indexer's fp32 projection keep their bits; kv_b_proj is read where it is absorbed.

    Its 8-bit layers round what they multiply as well, so that no other model has the same logits to the last digits.
    """
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    plain = saved(tmp_path, kind)
    config = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}[bits]
    config = BitsAndBytesConfig(**config)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for name, parameter in quantised.named_parameters():
        covered = name.removesuffix(".weight") in linears(plain) and "weights_proj" not in name
        assert (parameter.dtype in (torch.int8, torch.uint8)) == covered, name
    for ours, reference in zip(quantised.model.layers, plain.model.layers):
        read = ours.self_attn.kv_b_weight(torch.empty(0))
        assert_close(reference.self_attn.kv_b_proj.weight, read, {8: 0.02, 4: 0.15}[bits], "W_kv_b")
    cached = quantised.generate(tokens(1, 9), **GREEDY)
    assert cached.shape == (1, 17) and quantised(tokens()).logits.isfinite().all()


QUANTISERS = {
    "torchao": lambda: TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()),
    "bitsandbytes": lambda: pytest.importorskip("bitsandbytes") and BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_what_is_missing_is_refused(quantiser, tmp_path):
    """Of a plain checkpoint a layer to quantise, one not to, an expert; of one saved quantised the same layers."""
    settings = {"quantization_config": QUANTISERS[quantiser](), "device_map": "cpu"}
    saved(tmp_path / "plain", "dense")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **settings).save_pretrained(tmp_path / "quantised")
    AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")  # whole
    cuts = {
        "plain": [
            "layers.1.self_attn.o_proj.weight",
            "layers.0.input_layernorm.weight",
            "mlp.experts.3.up_proj.weight",
        ],
        "quantised": ["layers.1.self_attn.o_proj._weight", "layers.0.input_layernorm.weight"],
    }
    for folder, parts in cuts.items():
        file = tmp_path / folder / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
        for part in parts:
            save_file({name: tensor for name, tensor in tensors.items() if part not in name}, file, metadata)
            missing = part.replace("_weight", "weight")
            if any(part in name for name in tensors):
                with pytest.raises(CheckpointError, match=f"{re.escape(missing)} is missing"):
                    AutoModelForCausalLM.from_pretrained(tmp_path / folder, **(settings if folder == "plain" else {}))


# As the README says: how much of each size, in per cent, lies in layers that are quantised.
SHARES = {
    "quickstart": 17,
    "small": 17,
    "base": 17,
    "large": 18,
    "v32-small": 61,
    "v32-medium": 81,
    "v32-large": 11,
    "v32-xlarge": 4,
    "v32-full": 1,
    "deepseek-v3.2": 2,
}


@pytest.mark.parametrize("size", SHARES)
def test_shares_of_the_readme(size):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(size, num_nextn_predict_layers=0))
    covered = sum(layer.weight.numel() for layer in linears(model).values())
    assert round(100 * covered / model.num_parameters()) == SHARES[size]
