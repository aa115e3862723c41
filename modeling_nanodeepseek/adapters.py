"""Which parts of a model LoRA (arXiv:2106.09685) adapts, for PEFT's configuration."""

from torch import nn

from .decoder import DecoderBlock
from .modeling_nanodeepseek import NanoDeepSeekPreTrainedModel
from .moe import DeepseekMoE
from .mtp import MultiTokenPredictor

PARTS = ("attention", "mlp", "shared_experts", "experts")


def lora_targets(
    model: NanoDeepSeekPreTrainedModel, parts: tuple[str, ...] | list[str] | None = None, mtp: bool | None = None
) -> dict[str, list[str]]:
    """What LoRA is to adapt in this model, by full names: `LoraConfig(r=8, lora_alpha=16, **lora_targets(model))`.

    Never the router, the indexer, the embedding or the head: which expert and which keys a token gets stays as it was
    trained, and trainers that fuse the loss multiply by the head's weight alone. Stacked routed experts [E, out, in]
    are parameters, not linear layers: PEFT adapts each expert by factors of its own, and knows no dropout for them.

    Args:
        model: a NanoDeepSeek model without an adapter.
        parts: some of `attention` (every projection), `mlp` (of the dense layers), `shared_experts` and `experts`;
            default all that the model has.
        mtp: adapt the modules of multi-token prediction too. The default does so where their loss is in the training
            loss (mtp_loss_coef > 0): without it they are not run in training, and their adapters would not learn.

    Returns: `target_modules` and `target_parameters`.

    Raises: ValueError for a part that the model has not, for modules that do not learn, and in the stage "warmup", in
        which the indexer alone learns.
    """
    if not isinstance(model, NanoDeepSeekPreTrainedModel) or model._hf_peft_config_loaded:
        raise ValueError(f"lora_targets() takes a NanoDeepSeek model without an adapter, not a {type(model).__name__}.")
    config = model.config
    if model.keeps_fp8:
        raise ValueError("LoRA is not possible on weights kept in FP8: load the model without quantization_config.")
    if config.has_indexer and config.dsa_stage == "warmup":
        raise ValueError(
            "LoRA is not possible in dsa_stage='warmup', in which the indexer alone learns: train that without an "
            "adapter, then adapt the model in dsa_stage='sparse'."
        )
    learns_further = model.learns_mtp and config.mtp_loss_coef > 0
    if mtp and not (config.num_nextn_predict_layers and learns_further):
        raise ValueError(
            "mtp=True is not possible: the modules of multi-token prediction do not learn in this model "
            f"(num_nextn_predict_layers={config.num_nextn_predict_layers}, mtp_loss_coef={config.mtp_loss_coef})."
        )
    mtp = learns_further if mtp is None else mtp

    found: dict[str, list[str]] = {part: [] for part in PARTS}
    further: list[str] = []
    for name, block in model.named_modules():
        if not isinstance(block, DecoderBlock) or (isinstance(block, MultiTokenPredictor) and not mtp):
            continue
        for part, names in _of_block(block, name).items():
            found[part] += names
        further += _linears(block, name)  # eh_proj
    there = {part: names for part, names in found.items() if names}
    parts = list(there) if parts is None else list(parts)
    for part in parts:
        if part not in there:
            raise ValueError(f"There is no {part!r} to adapt in this model: parts may be of {', '.join(there)}.")
    modules = [name for part in parts if part != "experts" for name in there[part]] + further
    return {"target_modules": modules, "target_parameters": there["experts"] if "experts" in parts else []}


def _linears(module: nn.Module, name: str) -> list[str]:
    """The linear layers that are children of a module; so not the indexer's, which is a child of the attention."""
    return [f"{name}.{child}" for child, layer in module.named_children() if isinstance(layer, nn.Linear)]


def _of_block(block: DecoderBlock, name: str) -> dict[str, list[str]]:
    """The names in one decoder layer, or module of multi-token prediction, by part."""
    found = {"attention": _linears(block.self_attn, f"{name}.self_attn")}
    if not isinstance(block.mlp, DeepseekMoE):
        return found | {"mlp": _linears(block.mlp, f"{name}.mlp")}
    found["experts"] = [f"{name}.mlp.experts.{parameter}" for parameter in block.mlp.experts.stacked_names]
    if block.mlp.shared_experts is not None:
        found["shared_experts"] = _linears(block.mlp.shared_experts, f"{name}.mlp.shared_experts")
    return found
