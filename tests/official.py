"""Checkpoints as DeepSeek publishes them, small: written tensor by tensor from the list of official keys and shapes,
under a config.json in the published form, without any code of ours."""

import json

import torch
from safetensors.torch import save_file

YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Widths that neither fill blocks of 128 nor divide by their number, as the official 576 rows of kv_a_proj_with_mqa.
SHARED = {
    "vocab_size": 97, "hidden_size": 272, "intermediate_size": 280, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 262,
    "q_lora_rank": 260, "qk_rope_head_dim": 16, "qk_nope_head_dim": 54, "v_head_dim": 31, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5, "hidden_act": "silu", "max_position_embeddings": 640, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "rope_scaling": YARN, "attention_bias": False, "attention_dropout": 0.0, "seq_aux": True,
    "aux_loss_alpha": 0.001, "ep_size": 1, "pretraining_tp": 1, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.02,
    "transformers_version": "4.33.1",
}  # fmt: skip
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}  # fmt: skip
FAMILIES = {
    "v2-lite": SHARED | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
    },
    "v3": SHARED | V3,
    "v3.2": SHARED | V3 | {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_topk": 5,
        "index_n_heads": 23, "index_head_dim": 22,
    },
}  # fmt: skip
FAMILIES["v3.1"] = FAMILIES["v3"]
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every key of a published checkpoint (spec 1.1, 2.2, 3.2, 4.1)."""
    d, V, H, c = (config[key] for key in ("hidden_size", "vocab_size", "num_attention_heads", "kv_lora_rank"))
    n, r, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q, layers = config["q_lora_rank"], config["num_hidden_layers"]
    named = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,), "lm_head.weight": (V, d)}
    for number in range(layers + config.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{number}"
        named |= {f"{layer}.{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = {
            "kv_a_proj_with_mqa.weight": (c + r, d),
            "kv_a_layernorm.weight": (c,),
            "kv_b_proj.weight": (H * (n + v), c),
            "o_proj.weight": (d, H * v),
        }
        if q is None:
            attention["q_proj.weight"] = (H * (n + r), d)
        else:
            attention |= {"q_a_proj.weight": (q, d), "q_a_layernorm.weight": (q,), "q_b_proj.weight": (H * (n + r), q)}
        if "index_topk" in config:
            heads, width = config["index_n_heads"], config["index_head_dim"]
            attention |= {
                "indexer.wq_b.weight": (heads * width, q),
                "indexer.wk.weight": (width, d),
                "indexer.k_norm.weight": (width,),
                "indexer.k_norm.bias": (width,),
                "indexer.weights_proj.weight": (heads, d),
            }
        named |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        widths = {"mlp": config["intermediate_size"]}
        if number >= config["first_k_dense_replace"]:
            m, E = config["moe_intermediate_size"], config["n_routed_experts"]
            widths = {f"mlp.experts.{e}": m for e in range(E)} | {"mlp.shared_experts": config["n_shared_experts"] * m}
            named[f"{layer}.mlp.gate.weight"] = (E, d)
            if config["topk_method"] == "noaux_tc":
                named[f"{layer}.mlp.gate.e_score_correction_bias"] = (E,)
        for name, width in widths.items():
            named |= {f"{layer}.{name}.{part}_proj.weight": (width, d) for part in ("gate", "up")}
            named[f"{layer}.{name}.down_proj.weight"] = (d, width)
        if number >= layers:
            named |= {f"{layer}.{name}.weight": (d,) for name in ("enorm", "hnorm", "shared_head.norm")}
            named[f"{layer}.eh_proj.weight"] = (d, 2 * d)
            named |= {f"{layer}.{name}.weight": (V, d) for name in ("embed_tokens", "shared_head.head")}
    return named


def is_fp8(name: str) -> bool:
    """All projections but eh_proj, and the indexer's two larger matrices (census of the published V3.2)."""
    return (name.endswith("_proj.weight") or name.endswith(("mqa.weight", "wq_b.weight", "wk.weight"))) and not (
        name.endswith(("eh_proj.weight", "weights_proj.weight"))
    )


def block_scales(shape: tuple[int, int], powers: bool) -> torch.Tensor:
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 2e-3 + 1e-4
    return scale.log2().ceil().exp2() if powers else scale


def write(folder, family: str, fp8: str | None = None, shards: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Writes a checkpoint and returns what its weights are, in fp32. fp8: None, "float" or "ue8m0" scales."""
    torch.manual_seed(seed)
    config, stored, meant = FAMILIES[family], {}, {}
    for name, shape in shapes(config).items():
        if name.endswith(("embed_tokens.weight", "shared_head.head.weight")) and ".layers." in name:
            original = "lm_head.weight" if "shared_head" in name else "model.embed_tokens.weight"
            stored[name] = stored[original].clone()
        elif fp8 and is_fp8(name):
            weight = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            scale = block_scales(shape, powers=fp8 == "ue8m0")
            stored |= {name: weight, f"{name}_scale_inv": scale}
            meant[name] = weight.float()
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    meant[name][128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scale[i, j]
        else:
            mean, std = (1.0, 0.2) if "norm" in name and not name.endswith("bias") else (0.0, 0.1)
            exact = name.endswith("e_score_correction_bias") or ("norm" in name and "index_topk" in config)
            kept = torch.float32 if exact else torch.bfloat16
            stored[name] = (torch.randn(shape) * std + mean).bfloat16().to(kept)
            meant[name] = stored[name].float()
    if fp8:
        config = config | {"quantization_config": QUANTIZATION | ({"scale_fmt": "ue8m0"} if fp8 == "ue8m0" else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(stored), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        part = {name: stored[name] for name in names[number::shards]}  # a weight and its scales in different files
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return meant
