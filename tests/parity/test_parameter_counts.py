"""Parameters of DeepSeek's published models to the unit, from config files as published, built on the meta device."""

import json
import math

import pytest

from modeling_nanodeepseek import NanoDeepSeekConfig
from train.accounting import build_meta, count_parameters
from train.models import build_config

SHARED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
OFFICIAL = {
    "v2-lite": V2
    | {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "v2": V2
    | {
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "topk_group": 3,
        "n_routed_experts": 160,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_hidden_layers": 60,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy",
    },
    "v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
# Its own file was not at hand: V3's dimensions, as the V3.2-Exp report says, and its inference code's indexer.
OFFICIAL["v3.2"] = OFFICIAL["v3"] | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
}
TOTAL = {"v2-lite": 15_706_484_224, "v2": 235_741_434_880, "v3": 671_026_419_200, "v3.2": 671_877_944_064}
ACTIVE = {"v2-lite": 2_661_150_208, "v2": 21_375_800_320, "v3": 37_552_297_472, "v3.2": 38_403_822_336}
BIASES = {"v2-lite": 0, "v2": 0, "v3": 58 * 256, "v3.2": 58 * 256}  # the router's: buffers, yet in the published counts
MTP = {"v2-lite": 0, "v2": 0, "v3": 11_610_068_224, "v3.2": 11_624_027_648}  # without copies of embedding and head

INDEXER = {
    "wq_b.weight": (8192, 1536),
    "wk.weight": (128, 7168),
    "k_norm.weight": (128,),
    "k_norm.bias": (128,),
    "weights_proj.weight": (64, 7168),
}


def official_config(name: str, tmp_path, **changes) -> NanoDeepSeekConfig:
    (tmp_path / "config.json").write_text(json.dumps(SHARED | OFFICIAL[name] | changes))
    return NanoDeepSeekConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name, tmp_path):
    config = official_config(name, tmp_path)
    counts = count_parameters(config)
    assert counts["total"] == TOTAL[name]
    assert counts["active"] == ACTIVE[name]
    assert counts["mtp"] == MTP[name]
    biases = BIASES[name] + (256 if MTP[name] else 0)
    assert sum(parameter.numel() for parameter in build_meta(config).parameters()) == TOTAL[name] + MTP[name] - biases


def test_the_file_that_ships_means_the_official_one(tmp_path):
    official, ours = official_config("v3.2", tmp_path), build_config("deepseek-v3.2")
    for field in NanoDeepSeekConfig.__dataclass_fields__:
        if field not in ("dtype", "transformers_version"):  # the weights' on disk, and who wrote the file
            assert getattr(ours, field) == getattr(official, field), field


def test_the_indexer_of_v32(tmp_path):
    """13,959,424 parameters in each layer, those with dense feed-forward too; router biases are no parameters."""
    model = build_meta(official_config("v3.2", tmp_path, num_nextn_predict_layers=0))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 671_877_929_216
    for layer in range(61):
        prefix = f"model.layers.{layer}.self_attn.indexer."
        assert {name.removeprefix(prefix): s for name, s in shapes.items() if name.startswith(prefix)} == INDEXER
    assert sum(math.prod(shape) for shape in INDEXER.values()) == 13_959_424


@pytest.mark.parametrize("name", OFFICIAL)
def test_v5_style_file_means_the_same(name, tmp_path):
    """`rope_parameters` instead of rope_theta and rope_scaling, as transformers 5 writes them."""
    old = official_config(name, tmp_path)
    scaling = dict(OFFICIAL[name]["rope_scaling"])
    rope = {"rope_type": scaling.pop("type"), "rope_theta": 10000.0, **scaling}
    values = {k: v for k, v in (SHARED | OFFICIAL[name]).items() if k not in ("rope_theta", "rope_scaling")}
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_parameters": rope, "head_dim": 64}))
    new = NanoDeepSeekConfig.from_pretrained(tmp_path)
    assert new.rope_parameters == old.rope_parameters | {"rope_theta": 10000.0}
    assert {**new.to_dict(), "rope_parameters": 0} == {**old.to_dict(), "rope_parameters": 0}


def test_official_files_are_read_under_their_own_defaults(tmp_path):
    """transformers 5 leaves out what its DeepseekV2Config fixes: softmax scores."""
    values = {
        k: v
        for k, v in (SHARED | OFFICIAL["v2-lite"]).items()
        if k not in ("scoring_func", "topk_method", "norm_topk_prob")
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = NanoDeepSeekConfig.from_pretrained(tmp_path)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert config.model_type == "nanodeepseek"
    assert config.architectures is None and not hasattr(config, "auto_map")
