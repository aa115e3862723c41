"""The stages in which DeepSeek Sparse Attention is trained: what learns in each, and how a dense model gets an indexer.
(And whether multi-token prediction learns: there is one place that freezes.)

V3.2 report section 2.1: a model trained with dense attention; a warm-up in which attention stays dense and the indexer
alone learns; sparse training of everything.
"""

import copy

import torch

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import is_quantized


class SparseStages:
    """Methods of the models. Goes in front of PreTrainedModel."""

    learns_indexer = False  # whether the class computes the indexer's loss
    learns_mtp = False  # and multi-token prediction's

    def set_dsa_stage(self, stage: str):
        """Enters a stage: sets `config.dsa_stage`, and what requires gradients.

        `dense`: all but the indexer; `warmup`: the indexer alone; `sparse`: everything. Parameters that were frozen by
        hand are not spared: freeze, or add an adapter, afterwards. Stop and set it between optimizer steps; an
        optimizer made before does not know what was unfrozen since.

        Raises: ValueError for a stage that this model cannot enter.
        """
        changed = copy.deepcopy(self.config)
        changed.dsa_stage = stage
        changed.validate_sparse_attention()
        if stage == "sparse" and self.config.index_topk is None:
            raise ValueError(
                "dsa_stage='sparse' is not possible: this model selects no keys. Give it an indexer by "
                "model.with_indexer(index_topk=...) and train that in dsa_stage='warmup' first."
            )
        self.config.dsa_stage = stage
        self.requires_grad_(True)
        self.freeze_for_stage()

    def freeze_for_stage(self):
        """Takes the gradients of what does not learn in the config's stage, or never: an indexer or a module of
        multi-token prediction without its loss. Where they have it, indexer and modules learn (again)."""
        # A parameter without a gradient would stop DDP, and an optimizer's weight decay would still move it.
        config, stage = self.config, self.config.dsa_stage
        if self.keeps_fp8:
            self.requires_grad_(False)
            return
        trains_indexer = self.learns_indexer and stage != "dense" and config.index_loss_coef > 0
        trains_mtp = self.learns_mtp and config.mtp_loss_coef > 0
        further = tuple(f"layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
        for name, parameter in self.named_parameters():
            of_mtp = any(layer in name for layer in further)
            if is_quantized(parameter):
                continue  # it cannot learn
            elif of_mtp and not trains_mtp:
                parameter.requires_grad_(False)
            elif ".indexer." in name:
                parameter.requires_grad_(trains_indexer)
            elif config.index_topk is not None and trains_indexer and stage == "warmup":
                parameter.requires_grad_(False)
            elif of_mtp:
                parameter.requires_grad_(True)

    def with_indexer(self, index_topk: int, **fields):
        """This model with a fresh indexer in every layer, in the stage `warmup`: a new model that shares its weights.

        Adapters and gradient checkpointing go on afterwards.

        Args:
            index_topk: keys that each query will attend to.
            fields: other fields of the config that begin with `index_`.

        Raises: ValueError if it has one; the config's own errors.
        """
        if self.config.has_indexer:
            raise ValueError(f"The model has an indexer already, with index_topk={self.config.index_topk}.")
        for field in fields:
            if not field.startswith("index_"):
                raise ValueError(f"with_indexer() takes the config's fields that begin with 'index_', not {field!r}.")
        NanoDeepSeekConfig.refuse_unknown(fields)
        settings = {"index_pattern": "learned", "index_window": 0, "index_global_tokens": 0, "dsa_stage": "warmup"}
        settings |= {"index_topk": index_topk} | fields
        config = NanoDeepSeekConfig.from_dict(self.config.to_dict() | settings)
        config._attn_implementation = self.config._attn_implementation
        config._experts_implementation = self.config._experts_implementation
        model = type(self)(config)
        missing, unexpected = model.load_state_dict(self.state_dict(), strict=False, assign=True)
        if unexpected or any(".indexer." not in name for name in missing):
            raise ValueError(
                f"The weights are not those of the config alone ({[*missing, *unexpected][:3]} ...): merge or unload "
                "an adapter first, or add it afterwards."
            )
        model.tie_weights()
        for name, module in model.named_modules():
            if name.endswith(".indexer"):
                module.to(self.device, self.dtype)
                module.weights_proj.to(torch.float32 if self.dtype.itemsize < 4 else self.dtype)
        for module in model.modules():  # what no checkpoint holds, such as rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                if name in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(self.device))
        model.generation_config = copy.deepcopy(self.generation_config)
        model.freeze_for_stage()
        return model.train(self.training)
