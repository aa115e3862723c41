"""One call to any model size, with toggles.

build_model("small")                                   # configuration/models/small.json, fresh weights
build_model("base", variant="dense_transformer")       # its plain Transformer twin
build_model("small", num_hidden_layers=2)              # any config field
"""

import json
from pathlib import Path

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.checkpoints import refuse_foreign

CONFIGURATION = Path(__file__).resolve().parent.parent / "configuration"


def model_files() -> dict[str, Path]:
    """The sizes that ship, by name."""
    return {path.stem: path for path in sorted((CONFIGURATION / "models").glob("*.json"))}


def variants() -> dict[str, dict]:
    """The named sets of toggles of `configuration/variants.json`."""
    return json.loads((CONFIGURATION / "variants.json").read_text())


def build_config(model: str, variant: str | None = None, **toggles) -> NanoDeepSeekConfig:
    """The config of a size.

    Args:
        model: a name (`small`) or the path of a config.json.
        variant: `dense_transformer`, `mla_only`, `moe_only`: toggles by name.
        toggles: config fields that override both.

    Raises: ValueError if there is no such model or variant, OSError for another kind of model; the config's own errors
    for impossible fields.
    """
    path = model_files().get(model, Path(model).expanduser())
    if not path.is_file():
        raise ValueError(f"model {model!r} is neither a file nor one of {', '.join(model_files())}")
    known = variants()
    if variant is not None and variant not in known:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(known)}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model {str(path)!r} must hold a JSON object, and holds a {type(values).__name__}")
    if "model_type" in values:
        refuse_foreign(values, str(path))
    changes = known.get(variant, {}) | toggles
    if changes.get("attention_type", values.get("attention_type")) != values.get("attention_type"):
        values.pop("head_dim", None)  # derived from the other kind of attention
    NanoDeepSeekConfig.refuse_unknown(changes)  # a file may hold notes of other tools, an argument may not
    return NanoDeepSeekConfig.from_dict(values | changes)


def build_model(model: str, variant: str | None = None, **toggles) -> NanoDeepSeekForCausalLM:
    """A model of that size with fresh weights; arguments as for `build_config`."""
    return NanoDeepSeekForCausalLM(build_config(model, variant, **toggles))
