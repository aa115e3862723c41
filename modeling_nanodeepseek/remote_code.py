"""The code that a saved model carries, so that it loads where this package is not installed.

    model.save_pretrained("my_model")
    AutoModelForCausalLM.from_pretrained("my_model", trust_remote_code=True)    # with transformers alone

Beside the weights lie the files of this library that the model is made of, and `auto_map` in config.json says which
class each Auto class finds in them. Every save writes them, about 250 KB: a folder that depended on a switch thrown
when it was saved could not be moved later. Where the package is installed the Auto classes take it and never read
these files.
"""

import shutil
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .licence import APACHE_2_0

MODELING = "modeling_nanodeepseek"
LICENSE = "LICENSE-CODE"  # of the code; the weights beside it may have another, whose file is not ours to replace

# All that the package registers, whichever class is saved: a classifier may start from a language model's weights.
AUTO_MAP = {
    "AutoConfig": "configuration_nanodeepseek.NanoDeepSeekConfig",
    "AutoModel": f"{MODELING}.NanoDeepSeekModel",
    "AutoModelForCausalLM": f"{MODELING}.NanoDeepSeekForCausalLM",
    "AutoModelForSequenceClassification": f"{MODELING}.NanoDeepSeekForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODELING}.NanoDeepSeekForTokenClassification",
}


def code_files() -> list[Path]:
    """The model's file and all that it imports from this folder, be it the package's or one that a model was loaded
    from."""
    modeling = Path(__file__).with_name(f"{MODELING}.py")
    return sorted({modeling, *map(Path, get_relative_import_files(modeling))})


def save_code(folder: Path, config: PreTrainedConfig):
    """Copies the code and its licence into `folder`, and names its classes in `config.auto_map`; entries of other
    classes stay."""
    for file in code_files():
        shutil.copyfile(file, folder / file.name)
    (folder / LICENSE).write_text(APACHE_2_0, "utf-8")
    config.auto_map = (getattr(config, "auto_map", None) or {}) | AUTO_MAP
