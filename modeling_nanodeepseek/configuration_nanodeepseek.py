"""NanoDeepSeekConfig: every dimension and toggle of the model, under DeepSeek's official names.

The defaults are DeepSeek-V3's own (report arXiv:2412.19437, section 4.2). A `config.json` published for DeepSeek-V2,
V2-Lite, V3, V3.1 or V3.2 loads as it is, in the layout of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`). Contradictory values are refused when the config is built, with one message that names the field,
its value and what is allowed.
"""

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a family's config.json leaves out because the family's own class supplies it.
FAMILY_DEFAULTS = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "aux_loss_alpha": 0.001,
    },
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v32": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
}

# What rope_parameters must and may hold, by type.
ROPE_FIELDS = {
    "default": ({"rope_type", "rope_theta"}, set()),
    "linear": ({"rope_type", "rope_theta", "factor"}, set()),
    "dynamic": ({"rope_type", "rope_theta", "factor"}, set()),
    "yarn": (
        {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"},
    ),
}

# Keys that published config files and transformers carry beside the fields of a config class.
KNOWN_EXTRA_KEYS = {
    "auto_map", "quantization_config", "torch_dtype", "num_labels", "name_or_path",
    "rope_scaling", "rope_theta", "output_attentions", "attn_implementation", "experts_implementation",
    "per_layer_config", "is_causal", "tie_last_hidden_states", "transformers_weights",
    "trust_remote_code", "loss_type", "mlp_bias", "qk_head_dim",
}  # fmt: skip

# What transformers calls a layer with DSA in `layer_types`: now, and in its first releases with DeepSeek-V3.2.
SPARSE_LAYERS = {"indexed_attention", "deepseek_sparse_attention"}

# How tokens reach experts of other ranks; early releases of transformers mask the router's choice by rank instead.
if hasattr(DistributedConfig, "ep_implementation"):
    EXPERT_DISPATCH = {"layers.*.mlp.experts": "ep_dispatch_experts"}
else:
    EXPERT_DISPATCH = {"layers.*.mlp.gate": "ep_router", "layers.*.mlp.experts": "moe_tp_experts"}


def _names(values) -> str:
    return ", ".join(repr(value) for value in values)


@strict
class NanoDeepSeekConfig(PreTrainedConfig):
    r"""Configuration of a DeepSeek-style decoder.

    Sizes
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width d of the residual stream; with experts a multiple of 8 (grouped GEMM strides).
        intermediate_size: width of the dense feed-forward layers.
        num_hidden_layers: number of decoder layers L.
        max_position_embeddings: longest sequence, in tokens, that positions are meant for.

    Attention
        attention_type: `"mla"` (multi-head latent attention, V2 report section 2.1) or `"gqa"` (grouped-query
            baseline).
        num_attention_heads, num_key_value_heads: query heads H, and key/value heads of the `gqa` baseline. MLA has no
            groups; the second is then H (or absent).
        q_lora_rank: rank of the query latent; `None` projects queries directly (V2-Lite).
        kv_lora_rank: rank dc of the key/value latent, the part of the cache that has no position.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per-head dims dn, dr and dv.
        head_dim: head size of the `gqa` baseline (default hidden_size / heads, rounded down to an even
            number). For MLA it is qk_rope_head_dim, the part that is rotated.
        qk_norm: RMSNorm on the heads of q and k; `gqa` only. MLA normalises its latents instead.
        attention_bias, attention_dropout: biases of the down and output projections; dropout on the attention weights.
        attention_form: `"auto"` chooses expanded or absorbed from the lengths and the backend (`attention.py`);
            `"expanded"` and `"absorbed"` force one. The two are equal in real arithmetic.
        rope_parameters: dict with `rope_type` (`default`, `linear`, `dynamic`, `yarn`), `rope_theta` and that
            type's parameters.
        rope_interleave: rotate the pairs (x0,x1),(x2,x3).. (DeepSeek) instead of the two halves of the vector. MLA
            only; the `gqa` baseline always rotates halves.

    Sparse attention (DSA: V3.2 report section 2.1; MLA with a query latent only)
        index_topk: keys k that each query attends to; `None` builds a model without selection. With at most k keys in
            all, attention is dense.
        index_pattern: `"learned"` (the lightning indexer chooses) or `"fixed"` (no indexer: `index_window` and
            `index_global_tokens` alone, which make up index_topk; a baseline to compare with).
        index_n_heads, index_head_dim: heads and width of the indexer; the first qk_rope_head_dim of the width are
            rotated.
        index_window, index_global_tokens: keys kept whatever their score: the last so many that the query sees, itself
            among them, and the first so many of its document. 0 in DeepSeek's models.
        index_hadamard, index_fp8: rotate the indexer's queries and keys by a Hadamard matrix, and round both to E4M3
            with one power of two as scale, when keys are selected; DeepSeek's deployment does both.
        index_loss_coef: weight of the indexer's KL in the training loss.
        dsa_stage: `"dense"` (the indexer rests), `"warmup"` (dense attention, the indexer alone learns) or `"sparse"`.
            `set_dsa_stage` changes it together with what is frozen.
        sparse_form: how attention over selected keys runs: `"gathered"` (from the chosen latents, absorbed), `"masked"`
            (over all keys) or `"auto"` (`sparse_attention.py`). The two are equal in real arithmetic.

    Feed-forward
        n_routed_experts: routed experts E per MoE layer; `None` builds a dense model.
        n_shared_experts: experts every token passes, fused into one MLP; `None` or 0 for none.
        num_experts_per_tok: routed experts K per token.
        moe_intermediate_size: width m of one expert; a multiple of 8.
        first_k_dense_replace, moe_layer_freq: layer i has experts iff i >= the first and
            i % the second == 0.
        scoring_func: `"sigmoid"` (V3) or `"softmax"` (V2).
        topk_method: `"noaux_tc"` (biased choice, groups scored by their two best experts), `"group_limited_greedy"`
            (groups scored by their best expert) or `"greedy"` (no groups).
        n_group, topk_group: groups of consecutive experts, and how many of them a token may use.
        norm_topk_prob, routed_scaling_factor: whether the K weights are divided by their sum, and their common factor.
        router_noise: standard deviation of Gaussian noise on the scores that choose experts, in training; 0 is off.
        adaptive_expert_threshold: drop chosen experts scoring below this fraction of the token's best one; 0 is off.
        aux_loss_alpha, seq_aux: weight of the sequence-wise balance loss (V3 report eq. 17; 1e-4 there) and its only
            supported scope, the sequence.
        hidden_act: `"silu"` or `"relu2"`.
        gated_mlp: down(act(gate x) * up x) if true, down(act(up x)) if false.

    Multi-token prediction (V3 report section 2.2)
        num_nextn_predict_layers: depth D, modules that each predict one token further; 0 builds none.
        mtp_loss_coef: weight lambda of their mean loss in training with labels, where any of their parameters learns; a
            model built or loaded with 0 has them frozen, as losses of one's own (RL) want it.
        mtp_detach_trunk: their loss reaches the modules alone, not the decoder, the embedding and the head.

    Norms, embeddings, training
        rms_norm_eps, rms_norm_weight: epsilon of every RMSNorm of width d, and whether RMSNorms have a learned weight.
        tie_word_embeddings: share the embedding with the output head.
        initializer_range: standard deviation of the initial weights (0.006 in the reports).
        ep_size, pretraining_tp: carried by official files; they change nothing.

    Raises:
        StrictDataclassError: a field has a wrong type or an impossible value, or contradicts another.
        ValueError: there is no field of that name.
    """

    model_type = "nanodeepseek"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "index_topk_indices",
        "index_recall",
        "ce_loss",
        "balance_loss",
        "index_loss",
        "mtp_loss",
        "mtp_depth_losses",
        "mtp_correct",
        "mtp_targets",
        "mtp_hidden_states",
        "last_hidden_state",
    ]
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
        "decoder_sparse_step": "moe_layer_freq",
    }

    # Who holds what when transformers spreads the model (DistributedConfig). Tensor parallel: each rank a part of the
    # heads and of every feed-forward layer's width, the latents whole. Expert parallel: each rank whole experts.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        **EXPERT_DISPATCH,
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    max_position_embeddings: int = 4096

    attention_type: str = "mla"
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    head_dim: int | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    attention_form: str = "auto"
    rope_parameters: dict | None = None
    rope_interleave: bool = True

    index_topk: int | None = None
    index_pattern: str = "learned"
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_window: int = 0
    index_global_tokens: int = 0
    index_hadamard: bool = False
    index_fp8: bool = False
    index_loss_coef: float | int = 1.0
    dsa_stage: str = "sparse"
    sparse_form: str = "auto"

    n_routed_experts: int | None = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int | None = 8
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    router_noise: float | int = 0.0
    adaptive_expert_threshold: float | int = 0.0
    aux_loss_alpha: float | int = 1e-4
    seq_aux: bool = True
    output_router_logits: bool = False
    hidden_act: str = "silu"
    gated_mlp: bool = True

    rms_norm_eps: float | int = 1e-6
    rms_norm_weight: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.02
    use_cache: bool = True
    num_nextn_predict_layers: int = 0
    mtp_loss_coef: float | int = 0.3
    mtp_detach_trunk: bool = False
    ep_size: int = 1
    pretraining_tp: int = 1
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    # No fields. Of a checkpoint in FP8 blocks that is read: its quantization_config, and whether blocks are to stay.
    fp8_checkpoint = None
    keeps_fp8 = False

    def __post_init__(self, **kwargs: Any):
        family = kwargs.pop("model_type", self.model_type)
        if family in FAMILY_DEFAULTS:
            raise ValueError(
                f"model_type={family!r} is another family's file, with defaults of its own: read it by "
                "NanoDeepSeekConfig.from_pretrained(folder) or NanoDeepSeekConfig.from_dict(values)."
            )
        self.refuse_unknown(kwargs)
        # Derived from other fields; written by transformers into v5-style files, so accepted and recomputed.
        kwargs.pop("qk_head_dim", None)
        if kwargs.pop("mlp_bias", False):
            raise ValueError("mlp_bias=True is not supported: DeepSeek's feed-forward layers have no bias; use False.")
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)
            # transformers keeps the old name beside the new one in what it read from a published file and saves.
            kind = self.rope_parameters.pop("type", None)
            if kind is not None and self.rope_parameters.setdefault("rope_type", kind) != kind:
                raise ValueError(
                    f"rope_parameters has type={kind!r} and rope_type={self.rope_parameters['rope_type']!r}."
                )
        if kwargs.get("rope_scaling") is not None:
            scaling = dict(kwargs["rope_scaling"])
            scaling.setdefault("rope_type", scaling.pop("type", "default"))
            kwargs["rope_scaling"] = scaling
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_type == "mla":
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads // 2 * 2  # rotation needs pairs
        self.n_routed_experts = self.n_routed_experts or None
        self.n_shared_experts = 0 if self.n_shared_experts is None else self.n_shared_experts
        self.n_group = 1 if self.n_group is None else self.n_group
        self.topk_group = 1 if self.topk_group is None else self.topk_group
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._adopt_family(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Reads the contents of a config.json.

        Tools note things of their own in such files, and so does whoever sets a new attribute on a config and saves
        it. In a file of this family a key that resembles no field is therefore kept, with a warning, where the
        constructor would refuse it. One that resembles a field is a slip, and is refused here too.
        """
        values = cls._adopt_family(config_dict)
        keeps_fp8 = kwargs.pop("keeps_fp8", False)
        quantization = values.get("quantization_config")
        fp8 = quantization if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8" else None
        if fp8 is not None:
            # transformers would read such weights itself, and wrongly (`fp8.py`). "auto" would take the blocks' dtype.
            values = {key: value for key, value in values.items() if key != "quantization_config"}
            values["dtype"] = values.get("dtype") or values.pop("torch_dtype", None) or "bfloat16"
        ours = values.get("model_type", cls.model_type) == cls.model_type
        notes = {key: value for key, value in cls._unknown(values).items() if ours and not cls._field_like(key, 0.85)}
        read = super().from_dict({key: value for key, value in values.items() if key not in notes}, **kwargs)
        if notes:
            logger.warning(f"The config holds keys that NanoDeepSeekConfig keeps but does not use: {_names(notes)}.")
        config = read[0] if isinstance(read, tuple) else read
        for key, value in (notes | {"fp8_checkpoint": fp8, "keeps_fp8": keeps_fp8}).items():
            setattr(config, key, value)
        return read

    def to_dict(self) -> dict[str, Any]:
        """What a config.json holds: nothing about how the weights were stored that were read."""
        return {key: value for key, value in super().to_dict().items() if key not in ("fp8_checkpoint", "keeps_fp8")}

    @classmethod
    def _adopt_family(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads a file of DeepSeek V2, V3 or V3.2 as ours, under the defaults that its own class would supply."""
        family = config_dict.get("model_type")
        if family not in FAMILY_DEFAULTS:
            return config_dict
        config_dict = cls._without_layer_types(config_dict)
        # The class and the code named there belong to another implementation; ours must not point at them.
        kept = {key: value for key, value in config_dict.items() if key not in ("architectures", "auto_map")}
        cls.refuse_unknown(kept)  # what we do not know may be a part of the model
        return FAMILY_DEFAULTS[family] | kept | {"model_type": cls.model_type}

    @staticmethod
    def _without_layer_types(config_dict: dict[str, Any]) -> dict[str, Any]:
        """transformers writes out, layer by layer, what our fields say in a number: left out where the two agree."""
        attention, feed_forward = config_dict.get("layer_types"), config_dict.get("mlp_layer_types")
        if attention is not None and not SPARSE_LAYERS.issuperset(attention):
            raise ValueError(f"layer_types={attention!r} is not possible: every layer has DSA ('indexed_attention').")
        if feed_forward is not None:
            dense = feed_forward.count("dense")
            if feed_forward != ["dense"] * dense + ["sparse"] * (len(feed_forward) - dense):
                raise ValueError(f"mlp_layer_types={feed_forward!r} is not possible: dense layers must come first.")
            config_dict = config_dict | {"first_k_dense_replace": dense}
        return {key: value for key, value in config_dict.items() if key not in ("layer_types", "mlp_layer_types")}

    @classmethod
    def refuse_unknown(cls, values: dict[str, Any]):
        """Raises ValueError, naming the field that was probably meant, if a key of `values` is no field."""
        for key, value in cls._unknown(values).items():
            close = cls._field_like(key, similarity=0.6)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"NanoDeepSeekConfig has no field {key!r} (given {value!r}){hint}")

    @classmethod
    def _unknown(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Those of `values` that neither this class nor transformers has a field for."""
        known = {*cls.__dataclass_fields__, *cls.attribute_map, *KNOWN_EXTRA_KEYS, "model_type", "transformers_version"}
        known.update(GenerationConfig._get_default_generation_params())
        return {
            key: value
            for key, value in values.items()
            if not (key.startswith("_") or key in known or isinstance(getattr(cls, key, None), property))
        }

    @classmethod
    def _field_like(cls, key: str, similarity: float) -> str | None:
        """The field whose name resembles `key` most, if by at least that ratio of equal letters."""
        names = [*cls.__dataclass_fields__, *KNOWN_EXTRA_KEYS, *cls.attribute_map]
        close = difflib.get_close_matches(key, names, n=1, cutoff=similarity)
        return close[0] if close else None

    # -- derived -------------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head in MLA: dn + dr."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_indexer(self) -> bool:
        """Whether layers choose the keys they attend to by a lightning indexer of their own."""
        return self.index_topk is not None and self.index_pattern == "learned"

    @property
    def index_width(self) -> int:
        """Numbers that the indexer adds to the cache per token and layer."""
        return self.index_head_dim if self.has_indexer else 0

    @property
    def position_limit(self) -> float:
        """How many positions there are: max_position_embeddings, without an end under `rope_type="dynamic"`, which
        stretches with the sequence."""
        return math.inf if self.rope_parameters["rope_type"] == "dynamic" else self.max_position_embeddings

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` holds routed experts."""
        if self.n_routed_experts is None:
            return False
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    # -- validation: `@strict` calls every `validate_*` when a config is built and when it is saved -----------------

    def _require(self, ok: bool, field: str, allowed: str):
        if not ok:
            raise ValueError(f"{field}={getattr(self, field)!r} is not possible: {allowed}.")

    def _require_one_of(self, field: str, allowed: tuple):
        self._require(getattr(self, field) in allowed, field, f"allowed are {_names(allowed)}")

    def validate_sizes(self):
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"]
        for field in [*positive, "num_attention_heads", "num_key_value_heads", "moe_layer_freq"]:
            self._require(getattr(self, field) >= 1, field, "it must be at least 1")
        for field in self.__dataclass_fields__:
            value = getattr(self, field)
            if isinstance(value, float):
                self._require(math.isfinite(value), field, "it must be a finite number")
        for field in [
            "first_k_dense_replace",
            "num_nextn_predict_layers",
            "mtp_loss_coef",
            "router_noise",
            "aux_loss_alpha",
        ]:
            self._require(getattr(self, field) >= 0, field, "it must be at least 0")
        for field in ["pad_token_id", "bos_token_id", "eos_token_id"]:
            value = getattr(self, field)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            allowed = f"token ids lie in 0..vocab_size-1 = 0..{self.vocab_size - 1}"
            self._require(all(0 <= i < self.vocab_size for i in ids), field, allowed)
        self._require_one_of("hidden_act", ("silu", "relu2"))
        self._require(self.rms_norm_eps > 0, "rms_norm_eps", "it must be above 0")
        self._require(self.initializer_range > 0, "initializer_range", "it must be above 0")

    def validate_attention(self):
        self._require_one_of("attention_type", ("mla", "gqa"))
        self._require_one_of("attention_form", ("auto", "expanded", "absorbed"))
        self._require(0 <= self.attention_dropout < 1, "attention_dropout", "it must lie in [0, 1)")
        rotated = "qk_rope_head_dim" if self.attention_type == "mla" else "head_dim"
        even = getattr(self, rotated) >= 2 and getattr(self, rotated) % 2 == 0
        self._require(even, rotated, "rotation needs an even number, at least 2")
        several = getattr(self, rotated) > 2 or self.rope_parameters["rope_type"] != "dynamic"
        self._require(several, rotated, "rope_type='dynamic' needs at least 4: it rescales all pairs but the first")
        if self.attention_type == "mla":
            for field in ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]:
                self._require(getattr(self, field) >= 1, field, "it must be at least 1")
            self._require(self.q_lora_rank is None or self.q_lora_rank >= 1, "q_lora_rank", "None or at least 1")
            self._require(not self.qk_norm, "qk_norm", "MLA normalises its latents; qk_norm needs attention_type='gqa'")
            same = self.num_key_value_heads == self.num_attention_heads
            self._require(same, "num_key_value_heads", f"MLA has one per head, {self.num_attention_heads}, or None")
        else:
            divides = self.num_attention_heads % self.num_key_value_heads == 0
            self._require(
                divides, "num_key_value_heads", f"it must divide num_attention_heads={self.num_attention_heads}"
            )

    def validate_stage(self):
        self._require_one_of("dsa_stage", ("dense", "warmup", "sparse"))

    def validate_sparse_attention(self):
        self._require_one_of("index_pattern", ("learned", "fixed"))
        self.validate_stage()
        self._require_one_of("sparse_form", ("auto", "gathered", "masked"))
        for field in ["index_window", "index_global_tokens", "index_loss_coef"]:
            self._require(getattr(self, field) >= 0, field, "it must be at least 0")
        learns = self.dsa_stage != "warmup" or self.index_loss_coef > 0
        self._require(learns, "index_loss_coef", "in dsa_stage='warmup' nothing learns but by this loss")
        if self.index_topk is None:
            for field, default in (("index_pattern", "learned"), ("index_window", 0), ("index_global_tokens", 0)):
                unused = "without index_topk every query attends to all keys"
                self._require(getattr(self, field) == default, field, unused)
            none = "there is no indexer to warm up; model.with_indexer(index_topk=...) is the same model with one"
            self._require(self.dsa_stage != "warmup", "dsa_stage", none)
            return
        self._require(self.index_topk >= 1, "index_topk", "it must be at least 1, or None for attention to all keys")
        mla = self.attention_type == "mla"
        self._require(mla, "index_topk", "keys are selected in MLA alone; use attention_type='mla', or None here")
        always = self.index_window + self.index_global_tokens
        larger = "index_window" if self.index_window >= self.index_global_tokens else "index_global_tokens"
        sum_ = f"index_window + index_global_tokens is {always}, and index_topk only {self.index_topk}"
        self._require(always <= self.index_topk, larger, sum_)
        if self.index_pattern == "fixed":
            exact = f"a fixed pattern keeps index_window + index_global_tokens = {always} keys, so it must be {always}"
            self._require(self.index_topk == always, "index_topk", exact)
            self._require(self.dsa_stage != "warmup", "dsa_stage", "a fixed pattern has no indexer to warm up")
            return
        needed = "the indexer reads the query latent; give a rank, or index_topk=None"
        self._require(self.q_lora_rank is not None, "q_lora_rank", needed)
        self._require(self.index_n_heads >= 1, "index_n_heads", "it must be at least 1")
        rotated = f"its first qk_rope_head_dim={self.qk_rope_head_dim} are rotated, so it must be at least that"
        self._require(self.index_head_dim >= self.qk_rope_head_dim, "index_head_dim", rotated)
        power = self.index_head_dim & (self.index_head_dim - 1) == 0
        self._require(power or not self.index_hadamard, "index_head_dim", "index_hadamard=True needs a power of two")

    def validate_rope(self):  # in place of transformers' own, which warns where this refuses
        rope = self.rope_parameters
        rope_type = rope["rope_type"]
        if rope_type not in ROPE_FIELDS:
            raise ValueError(f"rope_type={rope_type!r} is not possible: allowed are {_names(ROPE_FIELDS)}.")
        required, optional = ROPE_FIELDS[rope_type]
        for field in sorted(required - set(rope)):
            raise ValueError(f"rope_parameters lacks {field!r}, which rope_type={rope_type!r} needs.")
        for field in sorted(set(rope) - required - optional):
            allowed = _names(sorted(required | optional))
            raise ValueError(
                f"rope_parameters has no field {field!r} for rope_type={rope_type!r}: allowed are {allowed}."
            )
        for field, value in rope.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            smallest = 1 if field in ("factor", "original_max_position_embeddings") else 0
            positive = field != "rope_theta" or (number and value > 0)
            exempt = field in ("rope_type", "truncate") or value is None and field not in required
            if not exempt and not (number and value >= smallest and positive):
                bound = "above 0" if field == "rope_theta" else f"at least {smallest}"
                raise ValueError(f"rope_parameters[{field!r}]={value!r} is not possible: it must be a number {bound}.")

    def validate_experts(self):
        self._require_one_of("scoring_func", ("sigmoid", "softmax"))
        self._require_one_of("topk_method", ("noaux_tc", "group_limited_greedy", "greedy"))
        self._require(self.seq_aux, "seq_aux", "the balance loss is sequence-wise; only True is supported")
        threshold = self.adaptive_expert_threshold
        self._require(0 <= threshold < 1, "adaptive_expert_threshold", "it must lie in [0, 1); 0 turns it off")
        if self.n_routed_experts is None:
            return
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        for field in ["hidden_size", "moe_intermediate_size"]:
            value = getattr(self, field)
            self._require(value >= 8 and value % 8 == 0, field, "grouped expert GEMMs need a multiple of 8")
        self._require(experts >= 2, "n_routed_experts", "at least 2, or None for a dense model")
        self._require(self.n_shared_experts >= 0, "n_shared_experts", "it must be at least 0")
        self._require(groups >= 1, "n_group", "it must be at least 1")
        if self.topk_method != "greedy":
            self._require(experts % groups == 0, "n_group", f"it must divide n_routed_experts={experts}")
            self._require(1 <= self.topk_group <= groups, "topk_group", f"it must lie in 1..n_group={groups}")
            scored_by_two = self.topk_method == "noaux_tc" and groups > 1
            pairs = not scored_by_two or experts // groups >= 2
            self._require(pairs, "n_group", "groups are scored by their two best experts and need at least 2 each")
        reachable = experts if self.topk_method == "greedy" else experts // groups * self.topk_group
        within = chosen is not None and 1 <= chosen <= reachable
        self._require(within, "num_experts_per_tok", f"it must lie in 1..{reachable}, the experts a token can reach")
        trainable = not (chosen == 1 and self.norm_topk_prob)
        self._require(trainable, "num_experts_per_tok", "one normalised weight is always 1, so the router cannot learn")


__all__ = ["NanoDeepSeekConfig"]
