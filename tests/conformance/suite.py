"""The two test classes, fed by one tester. Not named test_*: collected only where `report.py` names it."""

import functools
import unittest
import unittest.mock

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.deepseek_v3 import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)

import modeling_nanodeepseek as ours
from modeling_nanodeepseek.checkpoints import CheckpointMixin
from modeling_nanodeepseek.rotary import RotaryEmbedding

from .upstream import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from .upstream.generation.test_utils import GenerationTesterMixin
from .upstream.test_configuration_common import ConfigTester
from .upstream.test_modeling_common import ModelTesterMixin, ids_tensor
from .upstream.test_training_mixin import TrainingTesterMixin

# The tests look a class's kind (has it labels, and of which shape?) up by name in the tables of transformers' own
# models. Without these entries most of them would pass over ours in silence.
modeling_auto.MODEL_MAPPING_NAMES["nanodeepseek"] = "NanoDeepSeekModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nanodeepseek"] = "NanoDeepSeekForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["nanodeepseek"] = "NanoDeepSeekForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["nanodeepseek"] = "NanoDeepSeekForTokenClassification"

# transformers runs its distributed tests on chosen models only; None runs them on every model that has a plan.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
# Up to 8 processes however few cores there are: they are tiny, and the tests are then the same on every machine.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8

# Multiples of 8, which grouped GEMMs need in half precision; one dense layer and one with experts, which is as many
# layers as the tests allow; the vocabulary is odd, as the tensor-parallel tests want it. As in every published model
# 2 kv_lora_rank > qk_nope_head_dim + v_head_dim: our attention is then expanded in training and absorbed in decoding.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class ModelTester:
    """What the tests ask for: a config, a batch, and the classes of one family."""

    is_training = True
    batch_size, seq_length = 3, 8
    num_hidden_layers, hidden_size = SIZES["num_hidden_layers"], SIZES["hidden_size"]
    num_attention_heads, vocab_size = SIZES["num_attention_heads"], SIZES["vocab_size"]

    def __init__(self, parent: "Conformance"):
        self.parent = parent
        self.config_class = parent.config_class
        self.base_model_class, self.causal_lm_class, *heads = parent.all_model_classes
        self.sequence_classification_class, self.token_classification_class = heads

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**SIZES | self.parent.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        input_ids = ids_tensor(shape, self.vocab_size - 3) + 3  # no padding, beginning or end in the middle
        # Row i ends in i tokens of padding: unlike a lower triangle, no row is one token long.
        lengths = self.seq_length - torch.arange(self.batch_size)
        attention_mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask.to(input_ids.device)}


class Conformance(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
):
    config_class: type[PreTrainedConfig]
    all_model_classes: tuple[type[PreTrainedModel], ...]  # base, causal LM, sequence and token classification
    settings: dict[str, float] = {}  # config fields beside SIZES
    # Tells the age of a model by a copyright line that our files do not have.
    test_can_init_all_missing_weights_before_2023 = True
    # An expert that no token chose has no gradient in the batch.
    test_all_params_have_gradient = False

    def setUp(self):
        super().setUp()
        self.model_tester = ModelTester(self)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, **SIZES).run_common_tests()


class NanoDeepSeek(Conformance, unittest.TestCase):
    config_class = ours.NanoDeepSeekConfig
    all_model_classes = (
        ours.NanoDeepSeekModel,
        ours.NanoDeepSeekForCausalLM,
        ours.NanoDeepSeekForSequenceClassification,
        ours.NanoDeepSeekForTokenClassification,
    )

    def test_model_weights_reload_no_missing_tied_weights(self):
        # Ours refuses a checkpoint that lacks weights, in words (tests/test_saving.py), unless told to make new ones.
        lenient = functools.partial(CheckpointMixin.from_pretrained.__func__, ignore_mismatched_sizes=True)
        with unittest.mock.patch.object(CheckpointMixin, "from_pretrained", classmethod(lenient)):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_model_rope_scaling_frequencies(self):
        # The test wants cosine and sine; ours are the two parts of one complex number.
        complex_forward = RotaryEmbedding.forward

        def forward(rotary, x, position_ids):
            turns = complex_forward(rotary, x, position_ids)
            return turns.real, turns.imag

        with unittest.mock.patch.object(RotaryEmbedding, "forward", forward):
            super().test_model_rope_scaling_frequencies()

    def test_tp_generation_quantized(self):
        # A rank quantises its part of a row by that part's largest number. Where a row is split (o_proj, down_proj) its
        # parts round otherwise than the whole, which is all that differs (tests/distributed/test_quantisation.py), and
        # greedy texts of random weights part at the first near tie. So every part is given the row's largest number.
        save = PreTrainedModel.save_pretrained

        def save_level(model, *args, **kwargs):
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parts = parameter.data.unflatten(-1, (self.tensor_parallel_size, -1))
                    parts[..., 0] = parameter.data.abs().amax(-1, keepdim=True)
            return save(model, *args, **kwargs)

        with unittest.mock.patch.object(PreTrainedModel, "save_pretrained", save_level):
            super().test_tp_generation_quantized()

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        # The balance loss refuses reentrant checkpointing in words (tests/test_modeling.py); the rest must work.
        self.settings = {"aux_loss_alpha": 0.0}
        super().test_training_gradient_checkpointing_use_reentrant_true()


class DeepseekV3(Conformance, unittest.TestCase):
    config_class = DeepseekV3Config
    all_model_classes = (
        DeepseekV3Model,
        DeepseekV3ForCausalLM,
        DeepseekV3ForSequenceClassification,
        DeepseekV3ForTokenClassification,
    )
