"""DeepSeek's architecture, whole and trainable, inside the Hugging Face ecosystem.

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .adapters import lora_targets
from .balancing import ExpertLoad, LoadBalancingCallback, update_expert_bias
from .cache import Fp8LatentCache, LatentCache
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .modeling_nanodeepseek import (
    NanoDeepSeekCausalLMOutput,
    NanoDeepSeekForCausalLM,
    NanoDeepSeekForSequenceClassification,
    NanoDeepSeekForTokenClassification,
    NanoDeepSeekModel,
    NanoDeepSeekPreTrainedModel,
)
from .trainers import ModelLoss

__version__ = "0.1.0"

AutoConfig.register(NanoDeepSeekConfig.model_type, NanoDeepSeekConfig, exist_ok=True)
AutoModel.register(NanoDeepSeekConfig, NanoDeepSeekModel, exist_ok=True)
AutoModelForCausalLM.register(NanoDeepSeekConfig, NanoDeepSeekForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NanoDeepSeekConfig, NanoDeepSeekForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NanoDeepSeekConfig, NanoDeepSeekForTokenClassification, exist_ok=True)

__all__ = [
    "ExpertLoad",
    "Fp8LatentCache",
    "LatentCache",
    "LoadBalancingCallback",
    "ModelLoss",
    "NanoDeepSeekCausalLMOutput",
    "NanoDeepSeekConfig",
    "NanoDeepSeekForCausalLM",
    "NanoDeepSeekForSequenceClassification",
    "NanoDeepSeekForTokenClassification",
    "NanoDeepSeekModel",
    "NanoDeepSeekPreTrainedModel",
    "lora_targets",
    "update_expert_bias",
]
