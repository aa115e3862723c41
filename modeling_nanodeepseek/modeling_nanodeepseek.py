"""NanoDeepSeekModel and NanoDeepSeekForCausalLM: the decoder, its outputs and its loss.

A forward: input_ids -> embedding -> L times [norm -> attention -> + ; norm -> MLP or MoE -> +] -> norm -> lm_head.
In training, multi-token prediction's modules go on from there (`mtp.py`).
Which modules a layer is made of is decided when it is built, from the config.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import GroupedQueryAttention, MultiHeadLatentAttention
from .balancing import ExpertLoad, update_expert_bias
from .cache import LatentCache
from .checkpoints import CheckpointMixin, register_conversions
from .checks import check_indices, check_inputs, check_length, check_whole_text
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .decoder import NanoDeepSeekDecoderLayer
from .experts import DEFAULT_EXPERTS, GatedExperts, PlainExperts
from .generation import LatentGenerationMixin
from .indexer import IndexerObjective, IndexerRecall, KeySelector
from .layers import RMSNorm
from .losses import Head, is_plain_head, linear_cross_entropy
from .masks import masks, real_token_mask
from .moe import TopkRouter, sequence_balance_loss
from .mtp import MtpLoss, MultiTokenPredictor, all_further, mtp_loss
from .rotary import RotaryEmbedding
from .stages import SparseStages

logger = logging.get_logger(__name__)

REENTRANT = (
    "The {} has no gradient under reentrant gradient checkpointing; enable it with "
    "gradient_checkpointing_kwargs={{'use_reentrant': False}}, or set {}."
)
LOST = (
    "In training the model is called without labels, so these are not in the loss: {}. NanoDeepSeekForCausalLM adds "
    "them where it is given labels. With TRL's SFTTrainer put `modeling_nanodeepseek.ModelLoss` in front of it; where "
    "they are not wanted, set their factors in the config to 0."
)


@dataclass
class NanoDeepSeekCausalLMOutput(ModelOutput):
    """What `NanoDeepSeekForCausalLM` returns.

    Attributes:
        loss: in training ce_loss + mtp_loss_coef * mtp_loss + aux_loss_alpha * balance_loss + index_loss_coef *
            index_loss; in evaluation ce_loss. Given labels only.
        ce_loss: next-token cross-entropy in nats, the mean over targets (or their sum / num_items_in_batch).
        balance_loss: the sequence-wise balance loss before its factor; in training with labels and experts only.
        index_loss: the KL of the indexers, summed over layers, the mean over targets' queries; in training with labels
            while the indexers learn.
        mtp_loss: multi-token prediction's cross-entropy, the mean over its modules; in training while they learn.
        mtp_depth_losses, mtp_correct, mtp_targets: [D], of each module its loss, how many targets were its likeliest
            token, and how many there were.
        mtp_hidden_states: with `output_mtp_hidden_states`, of each module [B, T, d]; the head makes logits of them.
        last_hidden_state: with `output_last_hidden_state`, [B, T, d], what the head was given.
        index_topk_indices: with `output_index_topk_indices`, per layer the keys selected, [B, T, K], -1 for none.
        index_recall: with `output_index_recall`, per layer [B, T], the share of the dense attention's mass on them.
            Both None where no keys are selected (no index_topk, or dsa_stage="dense").
        logits: [B, T, vocab_size]; None in training with labels, where they are not all formed (see `skip_logits`).
        past_key_values, hidden_states, attentions, router_logits: as in transformers.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    ce_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    index_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    mtp_depth_losses: torch.Tensor | None = None
    mtp_correct: torch.Tensor | None = None
    mtp_targets: torch.Tensor | None = None
    mtp_hidden_states: tuple[torch.Tensor, ...] | None = None
    last_hidden_state: torch.Tensor | None = None
    index_topk_indices: tuple[torch.Tensor, ...] | None = None
    index_recall: tuple[torch.Tensor, ...] | None = None


@dataclass
class NanoDeepSeekModelOutput(MoeModelOutputWithPast):
    """What `NanoDeepSeekModel` returns; mtp_hidden_states as in `NanoDeepSeekCausalLMOutput`."""

    mtp_hidden_states: tuple[torch.Tensor, ...] | None = None


def loss_arguments(kwargs: dict) -> dict:
    """What a caller's keyword arguments say about the cross-entropy."""
    return {name: kwargs[name] for name in ("shift_labels", "num_items_in_batch", "ignore_index") if name in kwargs}


def target_weights(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """[B, T], 1 over the number of targets (in the optimizer's whole batch) where a token predicts one, else 0."""
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    real = (targets != ignore_index).float()
    return real / (real.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class NanoDeepSeekPreTrainedModel(SparseStages, CheckpointMixin, PreTrainedModel):
    """What transformers needs to know to load, save, shard, checkpoint and observe the model."""

    config: NanoDeepSeekConfig
    config_class = NanoDeepSeekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoDeepSeekDecoderLayer", "MultiTokenPredictor"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "indexer.weights_proj"]
    _can_record_outputs = {
        "hidden_states": NanoDeepSeekDecoderLayer,
        "attentions": [
            OutputRecorder(MultiHeadLatentAttention, index=1),
            OutputRecorder(GroupedQueryAttention, index=1),
        ],
        "router_logits": OutputRecorder(TopkRouter, index=0),
        "index_topk_indices": OutputRecorder(KeySelector),
        "index_loss": OutputRecorder(IndexerObjective),
        "index_recall": OutputRecorder(IndexerRecall),
    }

    # transformers and its tests find these two out by searching this file's text for
    # `ALL_ATTENTION_FUNCTIONS.get_interface(` and `@use_experts_implementation`: see attention.py and experts.py.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def post_init(self):
        super().post_init()
        if not self.config.has_indexer:  # transformers wants no names there of modules that are not
            self._keep_in_fp32_modules_strict.discard("indexer.weights_proj")
        if not self.config.num_nextn_predict_layers:  # accelerate's FSDP refuses names of layers that are not there
            self._no_split_modules = set(self._no_split_modules) - {"MultiTokenPredictor"}
        self.freeze_for_stage()

    def update_expert_bias(self, gamma: float = 1e-3, centre: bool = False) -> ExpertLoad | None:
        """`balancing.update_expert_bias`, for whoever has the model and not the package."""
        return update_expert_bias(self, gamma, centre)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or DEFAULT_EXPERTS)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, (GatedExperts, PlainExperts)):
            for stacked in module.stacked_names:
                init.normal_(getattr(module, stacked), mean=0.0, std=std)


class NanoDeepSeekModel(NanoDeepSeekPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        # Multi-token prediction's modules are further layers, as on disk; the decoder's loop ends before them.
        further = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(NanoDeepSeekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers.extend(MultiTokenPredictor(config, i) for i in further)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.head_adds_losses = False  # whether this is part of a model that adds losses to the cross-entropy
        self.post_init()

    def post_init(self):
        super().post_init()
        # The config's plans name every toggle's modules; transformers warns of an entry that no module answers to.
        built = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in [*self.named_modules(), *self.named_parameters()]}
        for plan in ("_tp_plan", "_ep_plan"):
            setattr(self, plan, {name: style for name, style in getattr(self, plan).items() if name in built})

    def new_cache(self) -> Cache:
        """An empty cache of the kind this model writes: latents for MLA, keys and values for GQA."""
        return LatentCache(self.config) if self.config.attention_type == "mla" else DynamicCache(config=self.config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        index_topk_indices: tuple[torch.Tensor, ...] | None = None,
        output_mtp_hidden_states: bool = False,
        adds_losses: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NanoDeepSeekModelOutput:
        r"""
        Args:
            input_ids: [B, T], or else `inputs_embeds` [B, T, d].
            attention_mask: [B, S] of 0 (padding) and 1, S counting cached tokens too; or a prepared 4-D mask.
            position_ids: [B, T]. Without cached tokens, documents packed into a row are told apart by positions that
                start anew (`masks.py`); they do not see each other.
            past_key_values: a cache to read and extend.
            use_cache: return a cache; ignored in training unless one is passed.
            index_topk_indices: per layer the keys to attend to, [B, T, any], -1 for none, instead of those its indexer
                would choose: a replay of what `output_index_topk_indices` returned. They must be visible
                (a key of the future is not refused), and none twice.
            output_mtp_hidden_states: run multi-token prediction's modules too, on the whole text without a cache. They
                choose keys by their own indexers, in a replay too; what is recorded of them follows the layers'.
            adds_losses: the caller adds the losses beyond cross-entropy to its own. Where a model with a head has such
                losses and nobody adds them in training, a warning says so, once.

        Raises: ValueError for both or neither of ids and embeddings, for an id outside the vocabulary (on a CPU; an
            accelerator would have to wait for the answer), and for a mask, positions or a cache that do not belong
            to this input and model (`checks.py`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
        if inputs_embeds is None:
            self._check_token_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        own_mask = None if "cache" in kwargs else attention_mask  # continuous batching's covers keys in its own cache
        check_inputs(self.config, inputs_embeds, own_mask, position_ids, past_key_values)
        check_indices(self.config, inputs_embeds, past_key_values, index_topk_indices)
        if output_mtp_hidden_states:
            check_whole_text(past_key_values, "multi-token prediction")
        if self.head_adds_losses and not adds_losses:
            self._warn_of_lost_losses()
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        mask, kwargs = masks(self.config, inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = self.new_cache()

        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        # `assistant_early_exit` lowers num_hidden_layers for its drafts.
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if index_topk_indices is not None:
                kwargs["index_topk_indices"] = index_topk_indices[i]
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states, further = self.norm(hidden_states), ()
        if output_mtp_hidden_states:
            kwargs |= {"attention_mask": mask, "position_embeddings": position_embeddings, "position_ids": position_ids}
            further = self._predict_all_further(hidden_states, inputs_embeds, **kwargs)
        if self.training and torch.is_grad_enabled() and self.config.dsa_stage != "warmup":
            self._count_expert_load(real_token_mask(attention_mask, hidden_states.shape[1]), also_further=bool(further))
        return NanoDeepSeekModelOutput(
            last_hidden_state=hidden_states, past_key_values=past_key_values, mtp_hidden_states=further or None
        )

    @property
    def predictors(self) -> list[MultiTokenPredictor]:
        """Multi-token prediction's modules: the last layers, whatever a trainer has wrapped them in."""
        return list(self.layers[len(self.layers) - self.config.num_nextn_predict_layers :])

    def further_losses(self) -> dict[str, str]:
        """The losses beyond cross-entropy that something here learns from, in this stage: name in the output -> field
        of the config that weighs it."""
        config, trained = self.config, [name for name, p in self.named_parameters() if p.requires_grad]
        routed = any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        predictors = tuple(f"layers.{layer}." for layer in range(config.num_hidden_layers, len(self.layers)))
        learns = {
            "balance_loss": ("aux_loss_alpha", routed and config.dsa_stage != "warmup"),
            "index_loss": ("index_loss_coef", config.dsa_stage != "dense" and any(".indexer." in n for n in trained)),
            "mtp_loss": (
                "mtp_loss_coef",
                config.dsa_stage != "warmup" and any(n.startswith(predictors) for n in trained),
            ),
        }
        return {loss: field for loss, (field, some) in learns.items() if some and getattr(config, field) > 0}

    def _warn_of_lost_losses(self):
        """Says once which losses a trainer loses in training that calls this, or asks for logits, and makes its own."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        lost = [f"{loss} ({field}={getattr(self.config, field)})" for loss, field in self.further_losses().items()]
        if lost:
            logger.warning_once(LOST.format(", ".join(lost)))

    def _predict_all_further(self, hidden_states, inputs_embeds, index_topk_indices=None, **kwargs):
        """`all_further`, by this model's modules; they choose keys of their own."""
        return all_further(self.predictors, hidden_states, inputs_embeds, self.config.mtp_detach_trunk, **kwargs)

    def predict_further(self, module, hidden_states, tokens, position_ids, attention_mask, cache) -> torch.Tensor:
        """One module on states [B, T, d] and the tokens [B, T] that it reads with them, after what its cache holds."""
        embeds = self.embed_tokens(tokens)
        mask, kwargs = masks(self.config, embeds, attention_mask, position_ids, cache)
        turns = self.rotary_emb(embeds, position_ids)
        kwargs |= {"attention_mask": mask, "position_embeddings": turns, "position_ids": position_ids}
        return module(hidden_states, embeds, past_key_values=cache, **kwargs)

    def _check_token_ids(self, input_ids: torch.LongTensor):
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
            return
        low, high = (int(edge) for edge in input_ids.aminmax())
        size = self.embed_tokens.num_embeddings
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(f"Token id {wrong} is outside the vocabulary: ids lie in 0..{size - 1}.")

    def _count_expert_load(self, real_tokens: torch.Tensor | None, also_further: bool):
        # Here and not in the router: gradient checkpointing runs routers a second time, this method never.
        for layer in self.layers if also_further else self.layers[: self.config.num_hidden_layers]:
            for module in layer.modules():  # an adapter may wrap a router
                if isinstance(module, TopkRouter):
                    module.count(real_tokens)


class NanoDeepSeekForCausalLM(NanoDeepSeekPreTrainedModel, LatentGenerationMixin):
    """The decoder with its output head, and the training loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    learns_indexer = learns_mtp = True

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__(config)
        self.model = NanoDeepSeekModel(config)
        self.model.head_adds_losses = True
        self.vocab_size = config.vocab_size
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        # Of multi-token prediction's layers official checkpoints hold copies of the embedding and the head. The whole
        # layer is named, because transformers' own MtpModel finds its tensors by this.
        beyond = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\." for layer in beyond]
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NanoDeepSeekCausalLMOutput:
        r"""As `NanoDeepSeekModel.forward`, and

        Args:
            labels: [B, T], the input ids with -100 where nothing is to be learned; shifted here.
            logits_to_keep: compute the logits of the last so many tokens only, or of these positions; 0 is all.
            skip_logits: with labels, compute the loss without ever holding all the logits, and return None for them.
                The default does so in training, except for return_dict=False, where a place is known by its number. A
                head that is more than a product with its weight (an adapter, a quantised or tensor-parallel one), a
                loss function of your own and torch.compile need the logits, and get them.
            output_mtp_hidden_states: run multi-token prediction's modules and return their states; without labels too.
            output_last_hidden_state: return what the head was given.
            num_items_in_batch: targets in the whole optimizer batch; every loss term is then a sum divided by it, so
                that micro-batches add up to the batch. Trainer passes it.

        Raises: also ValueError for a sequence beyond max_position_embeddings; where positions are given, on a CPU.
        """
        check_length(self.config, inputs_embeds if input_ids is None else input_ids, position_ids, past_key_values)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        skip_logits = self.training and return_dict if skip_logits is None else skip_logits
        wanted = self.model.further_losses() if self.training and labels is not None else {}
        balanced, indexed, further = "balance_loss" in wanted, "index_loss" in wanted, self._wants_mtp(labels)
        shows_routing = kwargs.get("output_router_logits", self.config.output_router_logits)
        if balanced:
            kwargs["output_router_logits"] = True
        shows_further = kwargs.pop("output_mtp_hidden_states", False)
        if indexed:
            check_whole_text(past_key_values, "the indexer's loss")
            kwargs |= {"output_index_loss": True, "index_loss_weight": target_weights(labels, **kwargs)}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_mtp_hidden_states=further or shows_further,
            adds_losses=labels is not None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = loss = ce_loss = balance_loss = index_loss = None
        if labels is not None and self._skips_logits(skip_logits, logits_to_keep):
            loss = ce_loss = linear_cross_entropy(hidden_states, self.lm_head, labels, **loss_arguments(kwargs))
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None and ce_loss is None:
            loss = ce_loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        if balanced:
            balance_loss = self._balance_loss(outputs.router_logits, labels, attention_mask, **kwargs)
            loss = loss + self.config.aux_loss_alpha * balance_loss
        if indexed:
            index_loss = self._index_loss(outputs.index_loss)
            loss = loss + self.config.index_loss_coef * index_loss
        predicted = MtpLoss()
        if further and self.config.dsa_stage != "warmup":
            places = {"attention_mask": attention_mask, "position_ids": position_ids}
            predicted = self._mtp_loss(outputs.mtp_hidden_states, labels, **places, **kwargs)
            loss = loss + self.config.mtp_loss_coef * predicted.mtp_loss
        layers = self.config.num_hidden_layers  # what is recorded of further modules follows theirs
        output = NanoDeepSeekCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions and outputs.attentions[:layers],
            router_logits=self._of_decoder(outputs.router_logits) if shows_routing else None,
            ce_loss=ce_loss,
            balance_loss=balance_loss,
            index_loss=index_loss,
            mtp_loss=predicted.mtp_loss,
            mtp_depth_losses=predicted.mtp_depth_losses,
            mtp_correct=predicted.mtp_correct,
            mtp_targets=predicted.mtp_targets,
            mtp_hidden_states=outputs.mtp_hidden_states if shows_further else None,
            last_hidden_state=hidden_states if kwargs.get("output_last_hidden_state") else None,
            index_topk_indices=(outputs.get("index_topk_indices") or ())[:layers] or None,
            index_recall=(outputs.get("index_recall") or ())[:layers] or None,
        )
        return output if return_dict else output.to_tuple()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        """transformers resizes a head into a torch Linear."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = Head  # with all that it is marked with
        super().set_output_embeddings(new_embeddings)

    def _skips_logits(self, wanted: bool, logits_to_keep: int | torch.Tensor) -> bool:
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        possible = is_plain_head(self.lm_head) and self.loss_function is ForCausalLMLoss
        return wanted and whole and possible and not torch.compiler.is_compiling()

    def _wants_mtp(self, labels: torch.Tensor | None) -> bool:
        """While its modules learn, or (in the warm-up) their indexers; so none of their parameters goes unused."""
        if not self.training or labels is None:  # asked for every token that is decoded
            return False
        return any(p.requires_grad for module in self.model.predictors for p in module.parameters())

    def _mtp_loss(self, states: tuple[torch.Tensor, ...], labels, **kwargs) -> MtpLoss:
        if torch.is_grad_enabled() and not states[-1].requires_grad:
            raise ValueError(REENTRANT.format("loss of multi-token prediction", "mtp_detach_trunk=False"))
        return mtp_loss(states, self.lm_head, labels, detached=self.config.mtp_detach_trunk, **kwargs)

    def _of_decoder(self, router_logits: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Without those of multi-token prediction's modules."""
        return router_logits[: sum(self.config.is_moe_layer(i) for i in range(self.config.num_hidden_layers))]

    def _index_loss(self, losses: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses):
            raise ValueError(REENTRANT.format("indexer's loss", "index_loss_coef=0"))
        return sum(losses)

    def _balance_loss(
        self,
        router_logits,
        labels,
        attention_mask,
        shift_labels=None,
        num_items_in_batch=None,
        ignore_index=-100,
        **kwargs,
    ):
        """The sequences' balance losses, each weighted by its share of the batch's targets."""
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        targets_per_sequence = (targets != ignore_index).sum(-1).float()
        total = targets_per_sequence.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        real_tokens = real_token_mask(attention_mask, labels.shape[-1])
        if torch.is_grad_enabled() and not any(logits.requires_grad for logits in router_logits):
            frozen = not any(layer.weight.requires_grad for layer in self.modules() if isinstance(layer, TopkRouter))
            if not frozen:
                raise ValueError(REENTRANT.format("balance loss", "aux_loss_alpha=0"))
        return sequence_balance_loss(router_logits, self.config, targets_per_sequence / total, real_tokens)


# The generic heads' forward is used and their __init__ is not: it asks AutoModel for the decoder, which does not know a
# config whose code was loaded from a checkpoint's folder.


class NanoDeepSeekForSequenceClassification(GenericForSequenceClassification, NanoDeepSeekPreTrainedModel):
    """The decoder with a linear layer on each sequence's last token that is not padding: [B, T] -> [B, num_labels].

    The loss is that of `config.problem_type` alone, without the balance loss; the loss-free balancing of
    `update_expert_bias` works here too.
    """

    def __init__(self, config: NanoDeepSeekConfig):
        NanoDeepSeekPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = NanoDeepSeekModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class NanoDeepSeekForTokenClassification(GenericForTokenClassification, NanoDeepSeekPreTrainedModel):
    """The decoder with dropout (0.1) and a linear layer on every token: [B, T] -> [B, T, num_labels].

    The loss is the cross-entropy alone, as in `NanoDeepSeekForSequenceClassification`.
    """

    def __init__(self, config: NanoDeepSeekConfig):
        NanoDeepSeekPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = NanoDeepSeekModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


register_conversions()

__all__ = [
    "NanoDeepSeekCausalLMOutput",
    "NanoDeepSeekForCausalLM",
    "NanoDeepSeekForSequenceClassification",
    "NanoDeepSeekForTokenClassification",
    "NanoDeepSeekModel",
    "NanoDeepSeekPreTrainedModel",
]
