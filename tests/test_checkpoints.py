"""DeepSeek's layout on disk, stacked experts in memory, by every road weights are loaded."""

import pytest
import torch
from safetensors import safe_open

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.conftest import tiny_config, tiny_model, tokens


def keys_on_disk(folder) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_tensor(key).shape) for key in file.keys()}


def test_official_names_and_shapes_on_disk(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    keys = keys_on_disk(tmp_path)
    attention = {
        "q_a_proj.weight": (18, 40),
        "q_a_layernorm.weight": (18,),
        "q_b_proj.weight": (48, 18),
        "kv_a_proj_with_mqa.weight": (28, 40),
        "kv_a_layernorm.weight": (22,),
        "kv_b_proj.weight": (72, 22),
        "o_proj.weight": (40, 42),
    }
    expected = {"model.embed_tokens.weight": (97, 40), "lm_head.weight": (97, 40), "model.norm.weight": (40,)}
    for n in range(3):
        layer = f"model.layers.{n}"
        expected |= {f"{layer}.{norm}.weight": (40,) for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{layer}.self_attn.{key}": shape for key, shape in attention.items()}
        widths = {"": 56} if n == 0 else {"shared_experts.": 48} | {f"experts.{e}.": 24 for e in range(8)}
        for part, width in widths.items():
            expected |= {f"{layer}.mlp.{part}{name}_proj.weight": (width, 40) for name in ("gate", "up")}
            expected[f"{layer}.mlp.{part}down_proj.weight"] = (40, width)
        if n > 0:
            expected |= {f"{layer}.mlp.gate.weight": (8, 40), f"{layer}.mlp.gate.e_score_correction_bias": (8,)}
    assert keys == expected


def official_state_dict(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize("overrides", [{}, {"gated_mlp": False, "hidden_act": "relu2"}], ids=["gated", "plain"])
def test_plain_load_state_dict_restores_every_expert(overrides, tmp_path):
    """What a resuming Trainer calls; transformers' own models silently keep fresh experts here."""
    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path)
    fresh = tiny_model(seed=7, **overrides)
    result = fresh.load_state_dict(official_state_dict(tmp_path), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_missing_expert_is_reported(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = official_state_dict(tmp_path)
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*model.layers.1.mlp.experts.gate_up_proj"):
        tiny_model().load_state_dict(weights)


def test_save_load_save_is_bit_equal(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert first == second
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_equals_the_original(dtype, tmp_path):
    """Built on the meta device: rotary frequencies and router biases must be there, the biases in fp32."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert read.dtype == dtype
    for (name, a), (_, b) in zip(model.named_buffers(), read.named_buffers()):
        assert b.dtype == torch.float32 and torch.equal(a, b), name
    assert torch.equal(model.to(dtype)(tokens()).logits, read(tokens()).logits)


def test_tied_embeddings_are_stored_once(tmp_path):
    model = NanoDeepSeekForCausalLM(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in keys_on_disk(tmp_path)
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert torch.equal(model.eval()(tokens()).logits, read(tokens()).logits)
