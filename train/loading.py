"""Any checkpoint to be used as it is: ours or transformers' own, by folder or by its name on the Hub.

What is wrong with it is one ValueError that names it; a folder's own code is never run.
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_nanodeepseek import NanoDeepSeekConfig  # importing the package registers the model with the Auto classes
from modeling_nanodeepseek.checkpoints import refuse_foreign
from modeling_nanodeepseek.saving import finish_saving

from .adapters import base_of_adapter, refuse_adapter

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # from_pretrained's, beside the config's fields


def place(device: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. Raises: ValueError if it cannot be used."""
    try:
        return torch.zeros(1, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def possible_config(model: str, *further: type[Exception]) -> Iterator[None]:
    """What a config refuses of the values it is given is one ValueError of one line, naming the model and the field.

    `further` are errors that are no less, where nothing but a config is read.
    """
    try:
        yield
    except (StrictDataclassError, *further) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error  # without the validator's name
        raise ValueError(f"config of {model!r}: {first_line(reason or error)}") from error


ODD_VALUES = (AttributeError, TypeError)  # of what transformers does not check first: dtype, quantization_config


def load_config(model: str, done: str = "used by itself", ours: bool = False, **overrides: Any) -> PreTrainedConfig:
    """The config of a checkpoint, checked to be one.

    Args:
        done: what is done with a model and cannot be with an adapter, for the message that refuses one.
        ours: read it as NanoDeepSeekConfig, as our classes do: DeepSeek's own and their relatives' too.
        overrides: fields that it has, with other values.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.exists() or model.startswith(("/", ".", "~"))):
        raise ValueError(f"{model!r} is not a folder")
    finish_saving(folder)
    try:
        refuse_adapter(model, done)
        values = PreTrainedConfig.get_config_dict(model)[0]
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(f"{model!r} is not a folder, and not to be had from the Hub: {first_line(error)}") from error
    if not values:
        raise ValueError(f"{model!r} holds no config.json, or an empty one: it is no checkpoint")
    with possible_config(model, ValueError, *ODD_VALUES):
        if ours:
            refuse_foreign(values, model)
        config = (NanoDeepSeekConfig if ours else AutoConfig).from_pretrained(model, trust_remote_code=False)
    with possible_config(model):
        for field in overrides:
            if field not in IMPLEMENTATIONS and not hasattr(config, field):
                close = difflib.get_close_matches(field, [*IMPLEMENTATIONS, *config.to_dict()], n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{field!r} is no field of the config of {model!r}{hint}")
            if field not in IMPLEMENTATIONS:
                setattr(config, field, overrides[field])
        config.validate()
    return config


def load_model(
    model: str, device: str | None = None, dtype: str = "auto", adapters: bool = False, **overrides: Any
) -> PreTrainedModel:
    """The model of a checkpoint, ready for inference; with `adapters` also of an adapter's folder, on its base.

    Raises: ValueError or OSError, naming it, if it has none.
    """
    adapted = adapters and (Path(model).expanduser() / "adapter_config.json").is_file()
    load_config((adapted and base_of_adapter(model)) or model, **overrides)
    where = place(device)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=DTYPES.get(dtype, dtype), trust_remote_code=False, **overrides
    )
    return loaded.to(where).eval()


def load_tokenizer(model: str, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises: ValueError if there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, **settings)
    except Exception as error:  # what tokenizers raises is no more than that, and wrong values end in any
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{model!r} has no tokenizer that can be read: {reason}") from error


def position_limit(config: PreTrainedConfig) -> float:
    """How many tokens a model of this config can attend to."""
    if isinstance(config, NanoDeepSeekConfig):
        return config.position_limit
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
