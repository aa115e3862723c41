"""Adapters told from models, where a folder or a name is given."""

import json
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file


def base_of_adapter(model: str) -> str | None:
    """The model that an adapter's folder (or Hub name) is for; None for a model's.

    Raises: OSError if there is neither.
    """
    if PreTrainedConfig.get_config_dict(model)[0]:  # a model; it may have an adapter beside it
        return None
    file = find_adapter_config_file(model)
    return json.loads(Path(file).read_text("utf-8")).get("base_model_name_or_path") if file else None


def refuse_adapter(model: str, done: str):
    """Raises: ValueError for an adapter where a model is needed; `done` is what a model is."""
    base = base_of_adapter(model)
    if base is not None:
        raise ValueError(
            f"{model!r} is no model but a LoRA adapter for {base!r}, and cannot be {done}. Give the folder of a merged "
            "model: import modeling_nanodeepseek; peft.AutoPeftModelForCausalLM.from_pretrained"
            f"({model!r}).merge_and_unload().save_pretrained(folder), with the tokenizer beside it (train.finetune "
            "saves both where lora.merge=true)"
        )
