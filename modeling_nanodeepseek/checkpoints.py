"""Checkpoints in DeepSeek's layout, read and written; what is checked before and after reading one.

Stacked experts: `from_pretrained` and `save_pretrained` translate by transformers' conversion mapping, registered here;
everything else that loads weights (`load_state_dict`, a Trainer that resumes) by a hook on the experts (`stacking.py`).
"""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import file_exists
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .attention import MultiHeadLatentAttention
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .fp8 import asks_to_keep_fp8, block_of, keep_fp8, layout_problems, names_on_disk, open_slices, weights_of
from .remote_code import save_code
from .saving import finish_saving, replacing
from .stacking import CheckpointError, Shapes, absentees, listed, misfits, shape_of


def register_conversions():
    """Makes transformers stack and split our experts as it does for its own DeepSeek models.

    Repeatable: the installed package and a copy loaded from the Hub may both run it. Ungated experts (`gated_mlp`
    false, no official layout) keep `up_proj` stacked on disk.
    """
    mapping = get_checkpoint_conversion_mapping("deepseek_v3")
    register_checkpoint_conversion_mapping(NanoDeepSeekConfig.model_type, mapping, overwrite=True)


def tensor_shapes(file: str | os.PathLike) -> Shapes:
    """Names and shapes of a safetensors file, from its header; no tensor is read.

    Raises: CheckpointError if the header cannot be read, or the file is shorter or longer than it says.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} is no complete safetensors file ({error}). It was cut short, damaged, or is something "
            "else; restore it or load another checkpoint."
        ) from error


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that `from_pretrained` would read in a local folder, checked; none if it has none.

    Raises: CheckpointError for a damaged file, an index that cannot be read, names absent files or tensors or files
        elsewhere, or pickled weights without safetensors.
    """
    dot = f".{variant}" if variant else ""
    single, index = folder / f"model{dot}.safetensors", folder / f"model.safetensors.index{dot}.json"
    if single.is_file():
        tensor_shapes(single)
        return [single]
    if index.is_file():
        return _indexed_files(index)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        raise CheckpointError(
            f"{str(folder)!r} holds pickled weights ({pickles[0]}), which can run any code when read. Only safetensors "
            "are read; have the weights saved as such by somebody who trusts them."
        )
    return []


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names_by_file: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            names_by_file.setdefault(os.fspath(file), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(index)!r} is no index of weights: it must be a JSON object with a 'weight_map' from tensors to files"
        ) from error
    files = [index.parent / name for name in sorted(names_by_file)]
    for file in files:
        if file.name not in names_by_file:
            raise CheckpointError(f"{str(index)!r} names a file outside its folder: {str(file)!r}")
        if not file.is_file():
            raise CheckpointError(
                f"{str(file)!r} is missing, and {index.name} says it holds {len(names_by_file[file.name])} tensors. "
                "Restore it or load another checkpoint."
            )
        absent = sorted(names_by_file[file.name] - tensor_shapes(file).keys())
        if absent:
            raise CheckpointError(f"{str(file)!r} lacks {listed(absent)}, which {index.name} says it holds")
    return files


def check_config(folder: Path):
    """Raises CheckpointError unless `folder` has the config of a model that these classes can be."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json: it is no checkpoint, or an incomplete one")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(file)!r} must hold a JSON object, and holds a {type(config).__name__}")
    refuse_foreign(config, str(folder))


def refuse_foreign(config: dict, name: str):
    """Raises CheckpointError for the config.json of a model that these classes cannot be."""
    kind = config.get("model_type")
    # Every DeepSeek-V2, V3 or relative of theirs (Kimi K2, ...) has a latent of that rank.
    if kind != NanoDeepSeekConfig.model_type and "kv_lora_rank" not in config:
        raise CheckpointError(
            f"{name!r} holds a model of type {kind!r}; these classes read 'nanodeepseek' and DeepSeek's V2 and "
            "V3. transformers' AutoModelForCausalLM reads the others."
        )


def fp8_settings(folder: Path) -> dict | None:
    """The `quantization_config` of a folder in FP8 blocks; None of any other."""
    file = folder / "config.json"
    settings = json.loads(file.read_text("utf-8")).get("quantization_config") if file.is_file() else None
    return settings if isinstance(settings, dict) and settings.get("quant_method") == "fp8" else None


# Names in the layers of multi-token prediction that stand for the embedding and the head.
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class CheckpointMixin:
    """`from_pretrained` that refuses what it cannot read whole, `save_pretrained` that replaces the old version whole.

    Goes in front of PreTrainedModel.

    Attributes:
        keeps_fp8: whether layers of this model keep FP8, whatever its config was read from.
    """

    keeps_fp8 = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, use_safetensors=None, **kwargs):
        """As in transformers, from safetensors only.

        Raises: CheckpointError, before anything is built, for a local folder that is damaged, incomplete or of another
            kind of model; after reading, for weights that do not fit the config or lack a tensor. A checkpoint of the
            base model may lack the head. `ignore_mismatched_sizes=True` initialises what is missing or does not fit.

        A checkpoint in FP8 blocks (DeepSeek's V3 and later) is dequantised on the way; with
        `quantization_config=FineGrainedFP8Config()` the layers keep FP8, for inference (`fp8.py`).
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False is not possible: weights are read from safetensors only")
        keeps_fp8 = asks_to_keep_fp8(kwargs.get("quantization_config"))
        if keeps_fp8 is not None:
            del kwargs["quantization_config"]
        if isinstance(config, NanoDeepSeekConfig):  # it may have been read elsewhere, and kept FP8 there
            config = copy.deepcopy(config)
            config.keeps_fp8 = bool(keeps_fp8)
        elif keeps_fp8:
            kwargs["keeps_fp8"] = True
        from_files = pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None
        if from_files and kwargs.get("state_dict") is None:
            use_safetensors = True
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if folder.is_dir() and not (folder / "adapter_config.json").is_file():
                if "config.json" in finish_saving(folder) and config is not None:  # what was read is the old one
                    raise CheckpointError(f"an interrupted save into {str(folder)!r} was just finished; load it again")
                if config is None:
                    check_config(folder)
                elif isinstance(config, NanoDeepSeekConfig):
                    config.fp8_checkpoint = fp8_settings(folder)
                weight_files(folder, kwargs.get("variant"))
        return super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, use_safetensors=use_safetensors, **kwargs
        )

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        files = (checkpoint_files or []) if state_dict is None else []
        safe = [file for file in files if Path(file).suffix == ".safetensors"]
        shapes = {name: shape for file in safe for name, shape in tensor_shapes(file).items()}
        if state_dict is None:
            state_dict = fp8_weights(model, files, load_config)
            if state_dict is not None:
                checkpoint_files = None  # what is offloaded to disk would be read from there again, as it lies there
        whole = files and not load_config.ignore_mismatched_sizes and not model._hf_peft_config_loaded
        if whole or model.keeps_fp8:
            problems = expert_problems(model, shapes)
            # What other packages quantised is stored in shapes of theirs.
            problems += [] if load_config.is_quantized else shape_problems(model, shapes)
            refuse(problems, model, load_config)
        if load_config.is_quantized and (model.tp_size or 1) > 1:
            for module in model.modules():
                if isinstance(module, MultiHeadLatentAttention):
                    module.keep_head_mesh()
        # transformers logs a table and goes on, with fresh weights for those missing; here is the place to know better.
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if model._hf_peft_config_loaded:  # an adapter's, for a model that is there: it has none of the model's weights
            if problems := adapter_problems(model, loaded[0]):
                raise CheckpointError(f"the adapter is incomplete, or another model's: {listed(problems)}")
            return loaded
        if whole:
            refuse(loading_problems(model, loaded[0], shapes), model, load_config)
            if others := unequal_copies(model.config, files):
                raise CheckpointError(
                    f"{listed(others)} in {str(load_config.pretrained_model_name_or_path)!r}: here multi-token "
                    "prediction has the model's embedding and head; num_nextn_predict_layers=0 loads the model without "
                    "it"
                )
        model.freeze_for_stage()  # transformers makes new parameters of what it reads
        return loaded

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As in transformers, and with the code (`remote_code.py`), but for an adapter's own files.

        Pushed, by `push_to_hub` too, a repository without a model card gets the one beside the weights that were
        loaded. All or nothing: killed or out of disk, the old version is still there (`saving.py`).
        """
        if self.keeps_fp8:
            raise ValueError(
                "A model that keeps FP8 weights is for inference, and is not saved: the folder it came from is its "
                "saved form. Load it without quantization_config to save it, or export it."
            )
        if not self.should_save_on_this_rank(is_main_process) or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing(save_directory) as stage:
            if not getattr(self, "_hf_peft_config_loaded", False):
                save_code(stage, self.config)
            super().save_pretrained(stage, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir) -> dict[str, float]:
        return {}  # transformers uploads what is newer than these: all of a stage, the code too

    def _upload_modified_files(self, working_dir, repo_id: str, *args, token=None, **kwargs):
        # Of a repository without a model card transformers makes a form to fill in; a run has written a card.
        card = Path(self.name_or_path, "README.md")
        if self.name_or_path and card.is_file() and not file_exists(repo_id, "README.md", token=token):
            shutil.copyfile(card, Path(working_dir, "README.md"))
        return super()._upload_modified_files(working_dir, repo_id, *args, token=token, **kwargs)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Whether this very class was registered for an Auto class. FSDP makes subclasses in a module of torch's, and
        transformers would save that module as the model's code."""
        return super().is_remote_code() and "_auto_class" in vars(cls)


def fp8_weights(model: PreTrainedModel, files: list[str], load_config) -> dict | None:
    """The weights of a checkpoint in FP8 blocks, not read yet; None for any other.

    Raises: CheckpointError where scales and weights do not belong together; ValueError for FP8 of another kind, or if
        the caller wants to keep FP8 that is not there.
    """
    config, folder = model.config, str(load_config.pretrained_model_name_or_path)
    if load_config.is_quantized and config.fp8_checkpoint:
        raise ValueError(
            f"{folder!r} holds FP8 weights, which another quantization_config would read without their scales: load it "
            "without one, save it, and quantize that."
        )
    if load_config.is_quantized or not all(str(file).endswith(".safetensors") for file in files):
        return None
    block = block_of(config.fp8_checkpoint) if config.fp8_checkpoint else None
    if problems := layout_problems(files, block):
        raise CheckpointError(f"the weights in {folder!r} are no FP8 blocks of one kind: {listed(problems)}")
    if block is None:
        if config.keeps_fp8:
            raise ValueError(
                f"{folder!r} holds no FP8 weights to keep, and quantizing on the way is not possible: load it without "
                "FineGrainedFP8Config, and write an FP8 checkpoint of it (export)."
            )
        return None
    if config.keeps_fp8:
        keep_fp8(model, files, block)
    return weights_of(files, block, model)


def refuse(problems: list[str], model: PreTrainedModel, load_config):
    """Raises CheckpointError if there are problems with a checkpoint's weights."""
    if problems:
        anew = "" if model.keeps_fp8 else "ignore_mismatched_sizes=True initialises such weights anew"
        ways = ", and ".join(way for way in (way_out(model, problems), anew) if way)
        raise CheckpointError(
            f"the weights in {str(load_config.pretrained_model_name_or_path)!r} are not those of its config: "
            f"{listed(problems)}. The checkpoint is incomplete or its config.json was changed"
            f"{f' ({ways})' if ways else ''}."
        )


def way_out(model: PreTrainedModel, problems: list[str]) -> str:
    """What to do where the modules of multi-token prediction alone are missing: tools that do not know them drop
    them."""
    first, depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    further = tuple(f"layers.{first + k}." for k in range(depth))
    theirs = depth and all(any(layer in problem for layer in further) for problem in problems)
    return "num_nextn_predict_layers=0 loads the model without multi-token prediction" if theirs else ""


def unequal_copies(config: NanoDeepSeekConfig, files: list[str]) -> list[str]:
    """What of a checkpoint is called a copy of embedding or head, in the layers of multi-token prediction, and is none.

    Copies are read a few rows at a time.
    """
    if not config.num_nextn_predict_layers:
        return []
    slices, found = open_slices(files), []
    prefix = "model." if "model.embed_tokens.weight" in slices else ""
    embedding, head = f"{prefix}embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and head not in slices:
        head = embedding
    for k in range(config.num_nextn_predict_layers):
        layer = f"{prefix}layers.{config.num_hidden_layers + k}"
        for copied, original in zip(COPIES, (embedding, head)):
            if layer + copied in slices and original in slices and not equal(slices[layer + copied], slices[original]):
                found.append(f"{layer + copied} is not a copy of {original}")
    return found


def equal(a, b, rows: int = 8192) -> bool:
    """Whether two slices of safetensors have the same numbers."""
    if a.get_shape() != b.get_shape():
        return False
    parts = (slice(start, start + rows) for start in range(0, a.get_shape()[0], rows))
    return all(torch.equal(a[part].float(), b[part].float()) for part in parts)


def expert_problems(model: PreTrainedModel, shapes: Shapes) -> list[str]:
    """What of a checkpoint's experts does not fit a model that has no weights yet, by headers alone.

    transformers stacks those that it finds in the order of their numbers, and looks at how many there are.
    """
    on_disk, problems = names_on_disk(model, shapes), []
    for owner, module in model.named_modules():
        if hasattr(module, "stacked_names"):
            prefix = f"{on_disk(owner)}."
            problems += misfits(module, prefix, shapes)
            problems += [f"{name} is missing" for name in absentees(module, prefix, shapes)]
    return problems


def shape_problems(model: PreTrainedModel, shapes: Shapes) -> list[str]:
    """Tensors of a checkpoint that have another shape than in a model that has no weights yet."""
    on_disk, problems = names_on_disk(model, shapes), []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        place, expected = on_disk(name), shape_of(tensor)
        if shapes.get(place, expected) != expected:
            problems.append(f"{place} is {list(shapes[place])}, not {list(expected)}")
    return problems


def adapter_problems(model: PreTrainedModel, info) -> list[str]:
    """What transformers found wrong about an adapter that it put into a model, the last of those there."""
    latest, depth = list(model.peft_config)[-1], model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    absent = sorted(name for name in info.missing_keys if "lora_" in name and f".{latest}." in f"{name}.")
    # Of modules of multi-token prediction that the model was loaded without there is nothing to adapt.
    beyond = {name for name in info.unexpected_keys if (layer := LAYER.search(name)) and int(layer[1]) >= depth}
    strange = sorted(name for name in set(info.unexpected_keys) - beyond if "lora_" in name)
    problems = [f"it lacks {listed(absent)}"] if absent else []
    problems += [f"the model has no place for {listed(strange)}"] if strange else []
    return problems + [
        f"{name} is {list(found)}, not {list(expected)}" for name, found, expected in sorted(info.mismatched_keys)
    ]


def loading_problems(model: PreTrainedModel, info, shapes: Shapes) -> list[str]:
    """What transformers found missing, misshapen, not convertible or left over, by the names on disk."""
    prefix = f"{model.base_model_prefix}."
    # A folder of another class may lack this one's head and have its own. The config of a published one names no class
    # of ours; it holds a whole model if its names are that of one.
    heads = {name.split(".")[0] for name in shapes if not name.startswith(prefix)}
    whole = any(name.startswith(prefix) for name in shapes) and heads <= {"lm_head"}
    classes = model.config.architectures or (["NanoDeepSeekForCausalLM"] if whole else [])
    other = type(model).__name__ not in classes
    missing = set(info.missing_keys) - set(model.all_tied_weights_keys)
    if other and hasattr(model, model.base_model_prefix):
        missing = {name for name in missing if name.startswith(prefix)}
    problems = {name: f"{name} is missing" for name in missing}
    for name, found, expected in info.mismatched_keys:
        problems[name] = f"{name} is {list(found)}, not {list(expected)}"
    problems |= {name: f"{name} cannot be put together" for name in info.conversion_errors}
    # A bias or a scale that is not used would be missed. The layer of a module may hold copies of embedding and head.
    # Layers beyond are left out on purpose if they are such modules.
    further = {LAYER.match(n)[0] for n in info.unexpected_keys if LAYER.match(n) and n.endswith(".enorm.weight")}
    depth = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    decoder = {name for name, _ in getattr(model, model.base_model_prefix, model).named_children()}
    for name, layer in ((name, LAYER.match(name)) for name in info.unexpected_keys):
        if layer is None:
            known = other and name.removeprefix(prefix).split(".")[0] not in decoder
        else:
            known = name.endswith(COPIES) if int(layer[1]) < depth else layer[0] in further
        problems |= {} if known else {name: f"{name} has no place in the model"}
    return [problems[name] for name in sorted(problems)]
