"""Multi-head latent attention in its two equal forms, and the grouped-query baseline.

Letters of the shape suffixes: B batch, T query tokens, S keys (cached ones included), H heads, n = qk_nope_head_dim,
r = qk_rope_head_dim, v = v_head_dim, c = kv_lora_rank, l = c + r (what the cache holds), d hidden.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocked_attention import blocked_attention
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import RMSNorm, is_quantized
from .rotary import rotate, softmax_scale


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling * q k^T + mask) v, with the weights returned: the reference for every other backend.

    Shapes: query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], mask [B, 1, T, S] additive or
    boolean (True is visible) or None ->
    [B, T, H, Dv] and weights [B, H, T, S]. The softmax is in fp32 (fp64 for fp64 inputs).
    """
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = (query @ key.mT) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def sum_gradient(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """x, the same on all ranks of `mesh`; its gradient is the sum of theirs.

    Where heads are spread over ranks (tensor parallel), each sees the gradient of its own heads alone. kv_b_proj's
    forward adds them up for the latents it is given, but the absorbed form uses its weight alone.
    """
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def backend_of(config: NanoDeepSeekConfig) -> str:
    """The attention backend's name; a layer built without a model has been given none.

    Continuous batching has names of its own for some, which write and read its cache and are else the same.
    """
    return (config._attn_implementation or "eager").removeprefix("paged|")


def prefers_expanded(T: int, S: int, n: int, v: int, c: int) -> bool:
    """The one place that chooses between the two forms of MLA, by multiply-adds.

    Per head, with T queries on S keys whose latents are expanded anew at each call: expanded S c (n+v) + T S (n+r+v),
    absorbed T c (n+v) + T S (2c+r). Expanded is cheaper iff (1/T - 1/S) < (2c-n-v) / (c (n+v)). Training and prefill
    (T = S) are expanded; for V3's dims decoding is absorbed below about 170 queries at a time.
    """
    return (1 / T - 1 / S) * c * (n + v) < 2 * c - n - v


# Heads of the absorbed form hold c + r numbers, and kernels have limits: FlashAttention 2 and 3 end at 256, which is
# taken for flex as well. A backend that is not named is shown the expanded form, unless the config forces the other.
WIDEST_ABSORBED_HEAD = {"eager": math.inf, "sdpa": math.inf, "flex_attention": 256, "flash": 256}


def widest_absorbed_head(backend: str) -> float:
    """Up to which width of the cached vector `attention_form="auto"` may absorb under this backend."""
    return WIDEST_ABSORBED_HEAD.get("flash" if "flash" in backend else backend, 0)


class MultiHeadLatentAttention(nn.Module):
    r"""MLA (V2 report section 2.1 and appendix C; V3 report section 2.1.1).

    For token t, head i, with cQ = RMSNorm(W_q_a h) and cKV = RMSNorm(latent part of W_kv_a h):
      [qC_i ; qR_i] = W_q_b cQ        kR = RoPE(rope part of W_kv_a h), one for all heads        qR_i <- RoPE(qR_i)
      [kC_i ; v_i] = W_kv_b cKV       logit_ts = scale * (qC_ti . kC_si + qR_ti . kR_s), causal softmax over s
      output = W_o concat_i sum_s a_tsi v_si
    Expanded, kC and v are formed. Absorbed, W_kv_b's key rows are folded into the query and its value rows into the
    output, so that all heads attend to the cached vector [cKV ; kR] itself: attention with one key/value head of dim
    l, whose value is the first c dims of the key. Both forms use the same scale, (n+r)^-0.5 * g^2.

    Parameter names and row layouts are DeepSeek's: q_b_proj per head [n ; r], kv_b_proj per head [n ; v],
    kv_a_proj_with_mqa [c ; r].

    Shapes: hidden_states [B, T, d] -> ([B, T, d], attention weights [B, H, T, S] if the backend gives them).
    """

    # Read by transformers' attention backends: causal if no mask is given, one key head per query head.
    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: NanoDeepSeekConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.n, self.r, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.c, self.q_lora_rank = config.kv_lora_rank, config.q_lora_rank
        self.scaling = softmax_scale(config, config.qk_head_dim)
        self.attention_dropout = config.attention_dropout
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias

        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, learned=config.rms_norm_weight)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.c + self.r, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.c, learned=config.rms_norm_weight)
        self.kv_b_proj = nn.Linear(self.c, heads * (self.n + self.v), bias=False)
        self.o_proj = nn.Linear(heads * self.v, hidden, bias=bias)
        self.kept_mesh: DeviceMesh | None = None  # see `keep_head_mesh`

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape
        q_nope_BHTn, q_rope_BHTr = self.query(self.query_latent(hidden_states), position_embeddings)
        latent_B1Sl = self.latent(hidden_states, position_embeddings)
        if past_key_values is not None:
            # The latent is the whole state: it is cached as the keys, with values of width 0.
            latent_B1Sl, _ = past_key_values.update(latent_B1Sl, latent_B1Sl[..., :0], self.layer_idx)

        operands = q_nope_BHTn, q_rope_BHTr, latent_B1Sl
        output_BTHv, weights_BHTS = self.attend_latents(*operands, attention_mask, **kwargs)
        return self.o_proj(output_BTHv.reshape(B, T, -1)), weights_BHTS

    def attend_latents(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, attention_mask, **kwargs):
        """Attention to all keys in the form that `expands` chooses: [B, T, H, v], weights as the backend gives them."""
        # Continuous batching's cache is written and read by the backend: in the form that attends to the latents.
        expands = "cache" not in kwargs and self.expands(q_nope_BHTn.shape[2], latent_B1Sl.shape[2])
        attend = self.attend_expanded if expands else self.attend_absorbed
        return attend(q_nope_BHTn, q_rope_BHTr, latent_B1Sl, attention_mask, **kwargs)

    def expands(self, T: int, S: int) -> bool:
        """Whether T queries on S keys run expanded: as `config.attention_form` says, else by cost and by backend."""
        form, backend, width = self.config.attention_form, backend_of(self.config), self.c + self.r
        if form == "auto":
            return width > widest_absorbed_head(backend) or prefers_expanded(T, S, self.n, self.v, self.c)
        if form == "absorbed" and "flash" in backend and width > widest_absorbed_head(backend):
            raise ValueError(
                f"attention_form='absorbed' is not possible with {backend!r}, whose heads hold at most 256 numbers: "
                f"kv_lora_rank + qk_rope_head_dim is {width}. Use attention_form='auto', or attn_implementation='sdpa'."
            )
        return form == "expanded"

    def query_latent(self, hidden_states) -> torch.Tensor:
        """[B, T, d] -> cQ, normalised, [B, T, q_lora_rank]; without that rank the hidden states themselves."""
        return hidden_states if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(hidden_states))

    def query(self, c_q, turns) -> tuple[torch.Tensor, torch.Tensor]:
        """cQ -> the part without position [B, H, T, n] and the rotated part [B, H, T, r]."""
        q_BTx = self.q_proj(c_q) if self.q_lora_rank is None else self.q_b_proj(c_q)
        q_BHTx = q_BTx.unflatten(-1, (-1, self.n + self.r)).transpose(1, 2)
        q_nope_BHTn, q_rope_BHTr = q_BHTx.split([self.n, self.r], dim=-1)
        return q_nope_BHTn, rotate(q_rope_BHTr, turns, self.config.rope_interleave)

    def latent(self, hidden_states, turns) -> torch.Tensor:
        """[B, T, d] -> what the cache holds, [cKV ; kR], as one head: [B, 1, T, l]."""
        kv_BTc, k_rope_BTr = self.kv_a_proj_with_mqa(hidden_states).split([self.c, self.r], dim=-1)
        k_rope_B1Tr = rotate(k_rope_BTr[:, None], turns, self.config.rope_interleave)
        return torch.cat((self.kv_a_layernorm(kv_BTc)[:, None], k_rope_B1Tr), dim=-1)

    def attend_expanded(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, attention_mask, **kwargs):
        """Attention on per-head keys [kC ; kR] and values, expanded from the latents."""
        kv_B1Sc, k_rope_B1Sr = latent_B1Sl.split([self.c, self.r], dim=-1)
        kv_BHSx = self.kv_b_proj(kv_B1Sc[:, 0]).unflatten(-1, (-1, self.n + self.v)).transpose(1, 2)
        if self.trains_on_cpu(q_nope_BHTn, attention_mask) and self.looks_back(kwargs):
            operands = q_nope_BHTn, q_rope_BHTr, kv_BHSx, k_rope_B1Sr[:, 0]
            return blocked_attention(*operands, attention_mask, self.scaling), None
        k_nope_BHSn, value_BHSv = kv_BHSx.split([self.n, self.v], dim=-1)
        query = torch.cat((q_nope_BHTn, q_rope_BHTr), dim=-1)
        key = torch.cat((k_nope_BHSn, k_rope_B1Sr.expand(-1, k_nope_BHSn.shape[1], -1, -1)), dim=-1)
        if query.device.type == "cpu" and self.v < self.n + self.r:
            # torch's fused CPU kernel takes equal widths only; without it the whole score matrix is formed.
            value_BHSv = F.pad(value_BHSv, (0, self.n + self.r - self.v))
        output_BTHx, weights_BHTS = self.attend(query, key, value_BHSv, attention_mask, **kwargs)
        return output_BTHx[..., : self.v], weights_BHTS

    def trains_on_cpu(self, query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Where blocked attention stands in for torch's kernel: the same result, with a faster backward.

        By `training`, not by whether gradients are wanted now: a reentrant checkpoint's first pass wants none, and must
        round as the second does, or tokens may take other experts there.
        """
        return (
            self.training
            and backend_of(self.config) == "sdpa"
            and query.device.type == "cpu"
            and query.shape[2] > 1
            and (attention_mask is None or attention_mask.dtype == torch.bool)
            and not self.attention_dropout
            and not torch.compiler.is_compiling()
        )

    def looks_back(self, kwargs: dict) -> bool:
        """Whether a mask of None means that tokens see only earlier ones; `is_causal` may say otherwise."""
        causal = kwargs.get("is_causal")
        return getattr(self.config, "is_causal", True) if causal is None else causal

    def attend_absorbed(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, attention_mask, **kwargs):
        """Attention on the latents, which are the keys and values of every head."""
        w_Hxc, latent_B1Sl = self.absorbing_weights(latent_B1Sl)
        query_BHTl = torch.cat((q_nope_BHTn @ w_Hxc[:, : self.n], q_rope_BHTr), dim=-1)
        folds = backend_of(self.config) in ("eager", "sdpa")
        attend = self.attend_folded if folds else self.attend
        # The value is the key: its first c columns are what we want, the last r columns are dropped afterwards.
        output_BTHl, weights_BHTS = attend(query_BHTl, latent_B1Sl, latent_B1Sl, attention_mask, **kwargs)
        output_BHTc = output_BTHl[..., : self.c].transpose(1, 2)
        return (output_BHTc @ w_Hxc[:, self.n :].mT).transpose(1, 2), weights_BHTS

    def absorbing_weights(self, latent_B1Sl) -> tuple[torch.Tensor, torch.Tensor]:
        """W_kv_b by heads, [H, n + v, c], and the latents as they may be used beside it (see `sum_gradient`)."""
        w_Hxc = self.kv_b_weight(latent_B1Sl).unflatten(0, (-1, self.n + self.v))
        if (mesh := self.head_mesh()) is not None:
            kv_B1Sc, k_rope_B1Sr = latent_B1Sl.split([self.c, self.r], dim=-1)
            latent_B1Sl = torch.cat((sum_gradient(kv_B1Sc, mesh), k_rope_B1Sr), dim=-1)
        return w_Hxc, latent_B1Sl

    def head_mesh(self) -> DeviceMesh | None:
        """The ranks that the heads are spread over (tensor parallelism); None where each rank has all."""
        weight = getattr(self.kv_b_proj, "weight", None)
        return weight.device_mesh if isinstance(weight, DTensor) else self.kept_mesh

    def keep_head_mesh(self):
        """For quantised weights, before they are read: they are local tensors, put in the place of the DTensor."""
        mesh = self.head_mesh()
        self.kept_mesh = mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh

    def attend_folded(self, query_BHTl, key_B1Sl, value_B1Sl, attention_mask, **kwargs):
        """H heads on one key head as H T rows of one head, for backends that would copy the keys for each head.

        The mask is a tensor here, [B, 1 or H, T, S] or None; block masks and lengths know tokens by their row.
        """
        B, H, T, _ = query_BHTl.shape
        S = key_B1Sl.shape[2]
        causal = self.looks_back(kwargs)
        kwargs.pop("is_causal", None)
        if attention_mask is None and T > 1 and causal:
            # transformers leaves the mask out when the queries are the first T positions (S > T in a static cache).
            attention_mask = torch.ones(T, S, dtype=torch.bool, device=query_BHTl.device).tril()[None, None]
        if attention_mask is not None and (T > 1 or attention_mask.shape[1] > 1):
            attention_mask = attention_mask.expand(-1, H, -1, -1).reshape(-1, 1, H * T, attention_mask.shape[-1])
        output_Bx1l, weights_B1xS = self.attend(
            query_BHTl.reshape(B, 1, H * T, -1), key_B1Sl, value_B1Sl, attention_mask, is_causal=False, **kwargs
        )
        weights_BHTS = None if weights_B1xS is None else weights_B1xS.reshape(B, H, T, -1)
        return output_Bx1l.reshape(B, H, T, -1).transpose(1, 2), weights_BHTS

    def attend(self, query, key, value, attention_mask, **kwargs):
        """The backend named by `config._attn_implementation`; scale and dropout of this layer."""
        backend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        return backend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)

    def kv_b_weight(self, like: torch.Tensor) -> torch.Tensor:
        """W_kv_b [H (n+v), c] as it acts, also where an adapter (LoRA) or a quantised layer replaces the Linear, or its
        weight is elsewhere until it is called (offloaded); of this rank's heads, where heads are spread over several.
        """
        weight = getattr(self.kv_b_proj, "weight", None)
        held = type(self.kv_b_proj) is nn.Linear and weight.device == like.device
        if held and isinstance(weight, DTensor):
            return weight.to_local()
        if held and not is_quantized(weight):  # torchao keeps the Linear and wraps its weight
            return weight
        return self.kv_b_proj(torch.eye(self.c, dtype=like.dtype, device=like.device)).mT


class GroupedQueryAttention(nn.Module):
    r"""Grouped-query attention (arXiv:2305.13245), the baseline MLA is measured against; QK-norm is optional.

    Each of the Hkv = num_key_value_heads keys and values serves H / Hkv query heads; scale head_dim^-0.5 (times g^2
    under YaRN). The cache holds 2 * Hkv * head_dim numbers per token.

    Shapes: hidden_states [B, T, d] -> ([B, T, d], weights [B, H, T, S] if the backend gives them).
    """

    is_causal = True

    def __init__(self, config: NanoDeepSeekConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = softmax_scale(config, config.head_dim)
        self.attention_dropout = config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)
        norm = (lambda: RMSNorm(self.head_dim, learned=config.rms_norm_weight)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape

        def heads(projection: nn.Linear) -> torch.Tensor:
            return projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query = rotate(self.q_norm(heads(self.q_proj)), position_embeddings, interleaved=False)
        key = rotate(self.k_norm(heads(self.k_proj)), position_embeddings, interleaved=False)
        value = heads(self.v_proj)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        backend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = backend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(output.reshape(B, T, -1)), weights
