"""Native DeepSeek checkpoints: what transformers' own classes and inference engines read.

    export_native(model, "out", fp8=True, tokenizer=tokenizer)

writes `deepseek_v32` (a model with an indexer) or `deepseek_v3` in the published layout: per-expert keys, the layers of
multi-token prediction with their copies of embedding and head, indexer, FP8 blocks with their scales, sharded, with an
index, and a config.json under the published keys.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .fp8 import BLOCK, SCALE, grid, quantize
from .saving import replacing
from .stacking import expert_keys, listed

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM"}
# Linear layers that official checkpoints hold in FP8, by the last part of their names.
IN_FP8 = {
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "wq_b", "wk",
}  # fmt: skip
SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_nextn_predict_layers", "num_attention_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor",
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "n_group", "topk_group",
    "num_experts_per_tok", "norm_topk_prob", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "attention_bias", "attention_dropout", "scoring_func", "topk_method", "aux_loss_alpha",
)  # fmt: skip
INDEX_FIELDS = ("index_topk", "index_n_heads", "index_head_dim")


class ExportError(ValueError):
    """The model has a part that the native architecture has not."""


def foreign_parts(config: NanoDeepSeekConfig, sparse: bool) -> list[str]:
    """What of a config the native architectures cannot express, each with the reason."""
    blocked = "vLLM drops the biases of a native model without a word"
    wrong = {
        "attention_bias": config.attention_bias and blocked,
        "moe_layer_freq": config.moe_layer_freq != 1 and "native models have experts in every layer behind the first",
        "attention_type": config.attention_type != "mla" and "native models have multi-head latent attention only",
        "gated_mlp": not config.gated_mlp and "native feed-forward layers are gated (gate_proj, up_proj, down_proj)",
        "hidden_act": config.hidden_act != "silu" and "inference engines have SiLU only",
        "rms_norm_weight": not config.rms_norm_weight and "native norms have a weight",
        "adaptive_expert_threshold": config.adaptive_expert_threshold > 0
        and "native routers use num_experts_per_tok experts for every token",
        "rope_interleave": not config.rope_interleave and "native models rotate interleaved pairs",
        "rope_parameters": config.rope_parameters["rope_type"] not in ("default", "yarn")
        and "inference engines know YaRN alone",
    }
    if config.n_routed_experts:
        native = config.scoring_func == "sigmoid" and config.topk_method == "noaux_tc"
        wrong["scoring_func"] = not native and "native V3 routers score by sigmoid and choose by a bias (noaux_tc)"
    if sparse:
        wrong |= {
            "index_topk": config.index_topk is None and "deepseek_v32 selects keys in every layer; use deepseek_v3",
            "index_pattern": config.index_pattern != "learned" and "native models select by the indexer alone",
            "index_window": config.index_window > 0 and "native models keep no window",
            "index_global_tokens": config.index_global_tokens > 0 and "native models keep no first tokens",
            "index_fp8": config.index_fp8 and "transformers' native model scores in full precision",
            "dsa_stage": config.dsa_stage != "sparse"
            and "deepseek_v32 attends to selected keys: set_dsa_stage('sparse')",
        }
    return [f"{field}={getattr(config, field)!r}: {reason}" for field, reason in wrong.items() if reason]


def native_config(config: NanoDeepSeekConfig, architecture: str, dtype: torch.dtype) -> dict:
    """The config.json of the published checkpoints, for this model.

    Raises: ExportError, with every part that the architecture cannot express.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is not possible: it is one of {', '.join(ARCHITECTURES)}.")
    sparse = architecture == "deepseek_v32"
    if reasons := foreign_parts(config, sparse):
        raise ExportError(f"The model cannot be expressed as {architecture}: {'; '.join(reasons)}.")
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    values = {field: getattr(config, field) for field in SAME_FIELDS + (INDEX_FIELDS if sparse else ())}
    # A field that is None here has a number there, which is not used: a model without experts, a token it has not.
    values = {field: value for field, value in values.items() if value is not None or field == "q_lora_rank"}
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **values,
        "num_key_value_heads": config.num_attention_heads,
        "tie_word_embeddings": False,  # a tied head is written out: not every engine ties
        "first_k_dense_replace": min(config.first_k_dense_replace, layers) if config.n_routed_experts else layers,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "pretraining_tp": 1,
        "seq_aux": True,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def native_tensors(model: PreTrainedModel, sparse: bool) -> dict[str, torch.Tensor]:
    """Official names -> the model's tensors; experts are views of the stacked ones, and so nothing is copied."""
    config, tensors = model.config, dict(model.state_dict())
    for owner, module in model.named_modules():
        if hasattr(module, "stacked_names"):
            for parameter, experts in expert_keys(module, f"{owner}.").items():
                stacked = tensors.pop(f"{owner}.{parameter}")
                for names, matrix in zip(experts, stacked):
                    tensors |= dict(zip(names, matrix.chunk(len(names))))
    if not sparse:
        tensors = {name: tensor for name, tensor in tensors.items() if ".indexer." not in name}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}"
        tensors |= {f"{layer}.embed_tokens.weight": embedding, f"{layer}.shared_head.head.weight": head}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def in_fp8(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in IN_FP8


def misread_blocks(tensors: dict[str, torch.Tensor]) -> list[str]:
    """FP8 matrices of which transformers would take other blocks: it divides a matrix's rows by those of its scales.
    Where that leaves a rest it stops, as on the official 576 rows; where it does not, it is wrong without a word."""
    found = []
    for name, tensor in tensors.items():
        for width, blocks, block in zip(tensor.shape, grid(tensor.shape, BLOCK), BLOCK) if in_fp8(name) else ():
            if blocks > 1 and width % blocks == 0 and width != blocks * block:
                found.append(
                    f"{name} is {list(tensor.shape)}, and {width} would be taken for {blocks} x {width // blocks}"
                )
    return found


def unread_blocks(tensors: dict[str, torch.Tensor]) -> list[str]:
    """FP8 matrices at which transformers' own reading stops: their rows or columns leave a rest."""
    return [
        name
        for name, tensor in tensors.items()
        if in_fp8(name) and any(width % blocks for width, blocks in zip(tensor.shape, grid(tensor.shape, BLOCK)))
    ]


@dataclass(frozen=True)
class Form:
    """How tensors are stored.

    Attributes:
        dtype: of what is not FP8. Router biases stay fp32 (bf16 cannot hold their steps), and norms where they are.
        fp8, ue8m0: see `export_native`.
        fp32_norms: as in the published V3.2.
    """

    dtype: torch.dtype
    fp8: bool
    ue8m0: bool
    fp32_norms: bool

    def plain_dtype(self, name: str) -> torch.dtype:
        exact = name.endswith("e_score_correction_bias") or (self.fp32_norms and "norm" in name)
        return torch.promote_types(self.dtype, torch.float32) if exact else self.dtype

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor as it is stored, with its scales if it has any."""
        if self.fp8 and in_fp8(name):
            weight, scale_inv = quantize(tensor, ue8m0=self.ue8m0)
            return {name: weight.cpu().contiguous(), name + SCALE: scale_inv.cpu().contiguous()}
        return {name: tensor.to(device="cpu", dtype=self.plain_dtype(name), copy=True).contiguous()}

    def nbytes(self, name: str, tensor: torch.Tensor) -> int:
        if self.fp8 and in_fp8(name):
            rows, columns = grid(tensor.shape, BLOCK)
            return tensor.numel() + 4 * rows * columns
        return tensor.numel() * self.plain_dtype(name).itemsize


def export_native(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    architecture: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    ue8m0: bool = False,
    tokenizer=None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a NanoDeepSeekForCausalLM as a native DeepSeek checkpoint; a folder that holds one is replaced whole.

    Args:
        architecture: "deepseek_v32" (the default for a model that selects keys, in the stage "sparse") or
            "deepseek_v3", which leaves an indexer out and attends to all keys.
        dtype: of what is not FP8.
        fp8: projections in e4m3 blocks of 128 x 128 with fp32 scales, as published; `ue8m0`: powers of two.
        tokenizer: saved beside, with its chat template.
        max_shard_bytes: of one file; memory for one file is what exporting needs beside the model.

    Raises: ExportError, before anything is written, for what the architecture cannot express, for adapters that are not
        merged, for weights that are quantised or elsewhere, and with fp8 for widths whose blocks other readers take
        otherwise; SaveError if the files cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    adapted = [name for name in model.state_dict() if "lora_" in name or ".base_layer." in name]
    if adapted:
        raise ExportError(f"The model holds an adapter ({adapted[0]}): merge it first (merge_and_unload()).")
    if "NanoDeepSeekForCausalLM" not in {kind.__name__ for kind in type(model).__mro__}:  # a folder's code has its own
        raise ExportError(f"{type(model).__name__} is not exported: native checkpoints hold a NanoDeepSeekForCausalLM.")
    config = model.config
    if model.keeps_fp8 or getattr(model, "is_quantized", False):
        raise ExportError("The model's weights are quantised: load it without quantization_config first.")
    elsewhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if elsewhere:
        raise ExportError(f"{elsewhere[0]} is offloaded: load the model without device_map first.")
    if ue8m0 and not fp8:
        raise ValueError("ue8m0=True is about the scales of FP8 blocks: it needs fp8=True.")
    selects = config.index_topk is not None and config.dsa_stage == "sparse"
    architecture = architecture or ("deepseek_v32" if selects else "deepseek_v3")
    sparse = architecture == "deepseek_v32"
    settings = native_config(config, architecture, dtype)
    if fp8:
        settings["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
        }  # fmt: skip
        if ue8m0:
            settings["quantization_config"]["scale_fmt"] = "ue8m0"
    tensors = native_tensors(model, sparse)
    if fp8 and (wrong := misread_blocks(tensors)):
        raise ExportError(
            f"In FP8 this model would be misread: {listed(wrong)}. Fill blocks of {BLOCK[0]}, or export in bf16."
        )
    if fp8 and (stops := unread_blocks(tensors)):
        warnings.warn(
            f"transformers' own classes do not read FP8 blocks that are not full: {listed(stops)}. This package does; "
            "so do engines that take the published checkpoints, which have them too. bf16 is read by all.",
            stacklevel=2,
        )
    with replacing(folder) as stage:
        write_shards(stage, tensors, max_shard_bytes, Form(dtype, fp8, ue8m0, fp32_norms=sparse))
        (stage / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    return Path(folder)


def write_shards(stage: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int, form: Form):
    """Files of at most that size (or one tensor), formed one after the other, and the index of more than one."""
    shards, sizes = [[]], [0]
    for name, tensor in tensors.items():
        size = form.nbytes(name, tensor)
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {}
        for name in names:
            stored |= form.stored(name, tensors[name])
        save_file(stored, stage / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
