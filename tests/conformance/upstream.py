"""transformers' fetched tests as a package: `from .upstream.test_modeling_common import ModelTesterMixin`.

The sdist holds tests/test_*.py and nothing below or beside them. Where those files import something that is not there,
a stand-in takes its place, as small as it can be: it adds no test and removes none. A process that unpickles a function
of these modules imports this package first, and so gets the same stand-ins.
"""

import sys
import types

from .fetch import tests_folder
from .ranks import PROCESS_HELPERS

FOLDER = tests_folder()
__path__ = [str(FOLDER)]

# Fields that every config of transformers has, at values that are not their defaults; ours, in place of its table.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
    "pad_token_id": 7,
    "bos_token_id": 8,
    "eos_token_id": 9,
    "tie_word_embeddings": True,
}

STAND_INS = {
    # Mixins whose tests the sdist lacks: empty classes, so that the classes that inherit from them can be built.
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "test_expert_parallel_mixin": {"ExpertParallelTesterMixin": type("ExpertParallelTesterMixin", (), {})},  # < 5.23
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
    "distributed_testing_utils": PROCESS_HELPERS,
}

for name, contents in STAND_INS.items():
    if not (FOLDER / (name.replace(".", "/") + ".py")).exists():
        module = types.ModuleType(f"{__name__}.{name}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module
