"""DeepSeek Sparse Attention: multi-head latent attention to the keys that a lightning indexer selects.

Letters of the shape suffixes: as in attention.py, and K selected keys per query, C queries of a chunk, N rows (a batch
and its queries flattened), j indexer heads, i their width.
"""

import torch
from transformers.cache_utils import Cache

from .attention import MultiHeadLatentAttention, backend_of
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .indexer import IndexerObjective, IndexerRecall, KeySelector, LightningIndexer, chunks
from .layers import exactly, once_differentiable
from .masks import Visibility, own_mask

# What a multiply-add on gathered latents costs, in multiply-adds of dense attention (measured, docs/log.md).
GATHER_COST = 3.0


def prefers_gathered(T: int, S: int, K: int, n: int, r: int, v: int, c: int) -> bool:
    """The one place that chooses how T queries attend to K selected ones of S keys, by multiply-adds per head.

    From gathered latents, absorbed: T K (2c+r) + T c (n+v). Over all keys with a mask: the cheaper of absorbed,
    T S (2c+r) + T c (n+v), and expanded, T S (n+r+v) + S c (n+v).
    """
    gathered = GATHER_COST * T * K * (2 * c + r) + T * c * (n + v)
    masked = min(T * S * (2 * c + r) + T * c * (n + v), T * S * (n + r + v) + S * c * (n + v))
    return gathered < masked


def _weights(query_NHl, keys_NKl, hidden_N1K: torch.Tensor | None) -> torch.Tensor:
    """softmax over the selected keys, [N, H, K]; the query is scaled already. Zeros for a query without keys."""
    scores_NHK = torch.bmm(query_NHl, keys_NKl.mT)
    if hidden_N1K is None:
        return scores_NHK.softmax(-1, dtype=torch.promote_types(scores_NHK.dtype, torch.float32))
    scores_NHK = scores_NHK.masked_fill_(hidden_N1K, torch.finfo(scores_NHK.dtype).min)
    weights_NHK = scores_NHK.softmax(-1, dtype=torch.promote_types(scores_NHK.dtype, torch.float32))
    return weights_NHK.masked_fill_(hidden_N1K, 0.0)


@exactly
def _attend(query_NHl, latent_Ml, indices_NK, c: int, wants_p: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of `_SelectedAttention`."""
    output_NHc = query_NHl.new_empty(*query_NHl.shape[:2], c)
    p_NK = query_NHl.new_empty(indices_NK.shape if wants_p else 0, dtype=torch.float)
    for start, stop, keys_NKl, hidden_N1K in _gathered(latent_Ml, indices_NK, query_NHl.dtype):
        weights_NHK = _weights(query_NHl[start:stop], keys_NKl, hidden_N1K)
        torch.bmm(weights_NHK.to(keys_NKl.dtype), keys_NKl[..., :c], out=output_NHc[start:stop])
        if wants_p:
            torch.mean(weights_NHK, dim=1, dtype=torch.float, out=p_NK[start:stop])
    return output_NHc, p_NK


class _SelectedAttention(torch.autograd.Function):
    """Attention of each row's H queries to K vectors of `latent`, whose first c numbers are the values.

      s = q . L[i_k]    a = softmax_k s    o = sum_k a_k L[i_k][:c]    p = 1/H sum_h a
    Backward: da = do . V^T    ds = a (da - sum_k a da)    dq = ds L    dL[i_k] += ds^T q + [a^T do ; 0]
    In chunks of rows; the weights are made again in the backward: of size N K only the indices and p are kept.

    Arguments: query [N, H, l], scaled; latent [M, l], the rows of all sequences; indices [N, K] into it, -1 for none;
    c; whether p is wanted. -> o [N, H, c], p [N, K] (or empty).
    """

    @staticmethod
    def forward(ctx, query_NHl, latent_Ml, indices_NK, c: int, wants_p: bool):
        output_NHc, p_NK = _attend(query_NHl, latent_Ml, indices_NK, c, wants_p)
        ctx.c = c
        ctx.save_for_backward(query_NHl, latent_Ml, indices_NK)
        ctx.mark_non_differentiable(p_NK)
        return output_NHc, p_NK

    @staticmethod
    def backward(ctx, grad_NHc, _):
        return _gradients(ctx, grad_NHc)


@once_differentiable
def _gradients(ctx, grad_NHc):
    query_NHl, latent_Ml, indices_NK = ctx.saved_tensors
    grad_query_NHl = torch.empty_like(query_NHl)
    exact = torch.promote_types(latent_Ml.dtype, torch.float32)
    grad_latent_Ml = torch.zeros_like(latent_Ml, dtype=exact)
    for start, stop, keys_NKl, hidden_N1K in _gathered(latent_Ml, indices_NK, query_NHl.dtype):
        query, grad = query_NHl[start:stop], grad_NHc[start:stop]
        weights_NHK = _weights(query, keys_NKl, hidden_N1K)
        da_NHK = torch.bmm(grad, keys_NKl[..., : ctx.c].mT).to(weights_NHK.dtype)
        ds_NHK = weights_NHK * (da_NHK - (weights_NHK * da_NHK).sum(-1, keepdim=True))
        ds_NHK, weights_NHK = ds_NHK.to(query.dtype), weights_NHK.to(query.dtype)
        torch.bmm(ds_NHK, keys_NKl, out=grad_query_NHl[start:stop])
        grad_keys_NKl = torch.bmm(ds_NHK.mT, query)
        grad_keys_NKl[..., : ctx.c] += torch.bmm(weights_NHK.mT, grad)
        rows = indices_NK[start:stop].clamp(min=0).flatten()
        grad_latent_Ml.index_add_(0, rows, grad_keys_NKl.flatten(0, 1).to(exact))
    return grad_query_NHl, grad_latent_Ml.to(latent_Ml.dtype), None, None, None


def _gathered(latent_Ml: torch.Tensor, indices_NK: torch.Tensor, dtype: torch.dtype):
    """(first and last row, their selected latents [N, K, l], which of them are none [N, 1, K] or None) by chunks."""
    N, K = indices_NK.shape
    for start, stop in chunks(N, K * latent_Ml.shape[1], latent_Ml.device):
        indices = indices_NK[start:stop]
        hidden = indices < 0
        if latent_Ml.device.type == "cpu" and not torch.compiler.is_compiling() and not hidden.any():
            hidden = None
        else:
            indices = indices.clamp(min=0)
        keys_NKl = latent_Ml.index_select(0, indices.flatten()).view(stop - start, K, latent_Ml.shape[1]).to(dtype)
        yield start, stop, keys_NKl, None if hidden is None else hidden[:, None]


def _rows(latent_BSl: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All sequences' vectors as [M, l], and how many lie between the first ones of two sequences.

    A cache's states are the first S rows of longer buffers: flattened, they would be copied at every token.
    """
    B, S, width = latent_BSl.shape
    if B == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return latent_BSl.flatten(0, 1), S
    apart, rest = divmod(latent_BSl.stride(0), width)
    if rest or apart < S or latent_BSl.stride()[1:] != (width, 1):
        return latent_BSl.flatten(0, 1), S
    return latent_BSl.as_strided(((B - 1) * apart + S, width), (width, 1)), apart


def attend_selected(query_BTHl, latent_BSl, indices_BTK, c: int, wants_p: bool = False):
    """Attention of each query to its selected latents, in the dtype of fp32 at least on CPUs, where bf16 is slower.

    Shapes: query [B, T, H, l], scaled; latent [B, S, l]; indices [B, T, K], -1 for none -> [B, T, H, c], and the mean
    of the heads' weights, p [B, T, K] or None.
    """
    B, T, K = indices_BTK.shape
    dtype = query_BTHl.dtype
    if query_BTHl.device.type == "cpu":
        query_BTHl = query_BTHl.to(torch.promote_types(dtype, torch.float32))
    latent_Ml, apart = _rows(latent_BSl)
    if B > 1:
        first_B11 = torch.arange(B, device=indices_BTK.device)[:, None, None] * apart
        indices_BTK = torch.where(indices_BTK < 0, -1, indices_BTK + first_B11)
    operands = query_BTHl.flatten(0, 1), latent_Ml, indices_BTK.flatten(0, 1), c, wants_p
    output_NHc, p_NK = (_SelectedAttention.apply if torch.is_grad_enabled() else _attend)(*operands)
    return output_NHc.unflatten(0, (B, T)).to(dtype), p_NK.unflatten(0, (B, T)) if wants_p else None


def mask_of(indices_BTK: torch.Tensor, keys: int) -> torch.Tensor:
    """Selected indices as a mask [B, 1, T, S]; True is selected."""
    mask = indices_BTK.new_zeros(*indices_BTK.shape[:2], keys + 1, dtype=torch.bool)
    return mask.scatter_(-1, indices_BTK.long() % (keys + 1), True)[:, None, :, :keys]  # -1 falls beyond the last key


class DeepseekSparseAttention(MultiHeadLatentAttention):
    r"""MLA in which each query attends to the K keys its indexer scores highest, the same for all heads (V3.2 report
    section 2.1). With at most K keys it is MLA itself.

    `config.dsa_stage` says what it does: dense attention (`dense`), dense attention while the indexer learns
    (`warmup`), or attention to selected keys (`sparse`). The indexer's keys are cached as the values of the cache, so
    whatever is done to a cache is done to them.

    Further arguments of forward:
        visibility: who sees whom; without it what attention_mask says, or causal.
        index_topk_indices: keys to attend to instead of those the indexer would choose, [B, T, any], -1 for none.
        index_loss_weight: [B, T], how much each query's KL counts in the indexer's loss; without it there is none.
    """

    def __init__(self, config: NanoDeepSeekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = LightningIndexer(config) if config.has_indexer else None
        self.selector = KeySelector(config)
        self.objective = IndexerObjective(config) if config.has_indexer else None
        self.recall = IndexerRecall(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        visibility: Visibility | None = None,
        index_topk_indices: torch.Tensor | None = None,
        index_loss_weight: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.config.dsa_stage == "dense":
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        B, T, _ = hidden_states.shape
        c_q = self.query_latent(hidden_states)
        queries = self.query(c_q, position_embeddings)
        latent_B1Sl = self.latent(hidden_states, position_embeddings)
        index = self.indexer(hidden_states, c_q, position_embeddings) if self.indexer else None
        keys_B1Si = self.indexer.as_deployed(index[2])[:, None] if self.indexer else latent_B1Sl[..., :0]
        if past_key_values is not None:
            keys_B1Si = keys_B1Si.to(latent_B1Sl.dtype)  # a static cache has one dtype; autocast made two
            latent_B1Sl, keys_B1Si = past_key_values.update(latent_B1Sl, keys_B1Si, self.layer_idx)

        S = latent_B1Sl.shape[2]
        if visibility is None:  # a layer by itself, as transformers' MtpModel runs it
            visibility = Visibility(S, S - T, mask=None if attention_mask is None else own_mask(attention_mask))
        given, measured = index_topk_indices is not None, kwargs.get("output_index_recall", False)
        dense = self.config.dsa_stage == "warmup" or (S <= self.config.index_topk and not given)
        if given:
            indices_BTK = index_topk_indices
        elif not dense or measured or kwargs.get("output_index_topk_indices", False):
            q_BTji = self.indexer.as_deployed(index[0]) if self.indexer else None
            indices_BTK = self.selector(q_BTji, index and index[1], keys_B1Si[:, 0], visibility, (B, T))
        if dense:
            output_BTHv, weights_BHTS = self.attend_latents(*queries, latent_B1Sl, attention_mask, **kwargs)
        else:
            wants_p = index_loss_weight is not None
            output_BTHv, weights_BHTS, p_BTK = self.attend_sparse(*queries, latent_B1Sl, indices_BTK, wants_p, **kwargs)
        if measured:
            self.recall(self.dense_target(*queries, latent_B1Sl, visibility), indices_BTK, S)
        if index_loss_weight is not None and dense:
            self.objective(*index, index_loss_weight, self.dense_target(*queries, latent_B1Sl, visibility))
        elif index_loss_weight is not None:
            self.objective(*index, index_loss_weight, self.selected_target(p_BTK, indices_BTK), indices_BTK)
        return self.o_proj(output_BTHv.reshape(B, T, -1)), weights_BHTS

    def attend_sparse(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, indices_BTK, wants_p: bool, **kwargs):
        """Attention to the selected keys: [B, T, H, v], weights as the backend gives them, and p [B, T, K] or None."""
        operands, T, S = (q_nope_BHTn, q_rope_BHTr, latent_B1Sl), q_nope_BHTn.shape[2], latent_B1Sl.shape[2]
        if self.gathers(T, S, indices_BTK.shape[2]):
            output_BTHv, p_BTK = self.attend_gathered(*operands, indices_BTK, wants_p)
            return output_BTHv, None, p_BTK
        output_BTHv, weights_BHTS = self.attend_latents(*operands, mask_of(indices_BTK, S), **kwargs)
        # A query without keys gets nothing, where backends would give it the mean of all.
        output_BTHv = output_BTHv.masked_fill((indices_BTK < 0).all(-1)[..., None, None], 0.0)
        with torch.no_grad():
            p_BTK = self.attend_gathered(*operands, indices_BTK, True)[1] if wants_p else None
        return output_BTHv, weights_BHTS, p_BTK

    def gathers(self, T: int, S: int, K: int) -> bool:
        """Whether T queries read K gathered latents each, or all S keys under a mask: as `config.sparse_form` says,
        else by cost. Only eager and sdpa take such masks; eager is the form to read, and gives all keys' weights."""
        form, backend = self.config.sparse_form, backend_of(self.config)
        masks = backend in ("eager", "sdpa")
        drops = self.training and self.attention_dropout > 0
        if (form == "masked" and not masks) or (drops and (form == "gathered" or not masks)):
            raise ValueError(
                f"sparse_form={form!r} with attention_dropout={self.attention_dropout} is not possible under "
                f"{backend!r}: gathered attention drops nothing, and masks need attn_implementation='sdpa' or 'eager'."
            )
        if form == "auto" and masks and (drops or backend == "eager"):
            return False
        gathered = form == "auto" and (not masks or prefers_gathered(T, S, K, self.n, self.r, self.v, self.c))
        return gathered or form == "gathered"

    def attend_gathered(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, indices_BTK, wants_p: bool):
        """In the absorbed form, for so many queries at a time that their absorbed vectors stay few."""
        w_Hxc, latent_B1Sl = self.absorbing_weights(latent_B1Sl)
        outputs, ps = [], []
        B, H, T, _ = q_nope_BHTn.shape
        for start, stop in chunks(T, B * H * latent_B1Sl.shape[3], latent_B1Sl.device):
            q_nope, q_rope = q_nope_BHTn[:, :, start:stop], q_rope_BHTr[:, :, start:stop]
            query_BHCl = torch.cat((q_nope @ w_Hxc[:, : self.n], q_rope), dim=-1) * self.scaling
            indices = indices_BTK[:, start:stop]
            output_BCHc, p = attend_selected(query_BHCl.transpose(1, 2), latent_B1Sl[:, 0], indices, self.c, wants_p)
            outputs.append((output_BCHc.transpose(1, 2) @ w_Hxc[:, self.n :].mT).transpose(1, 2))
            ps.append(p)
        if len(outputs) == 1:
            return outputs[0], ps[0]
        return torch.cat(outputs, dim=1), torch.cat(ps, dim=1) if wants_p else None

    def selected_target(self, p_BTK, indices_BTK):
        """p of a chunk of queries on their selected keys, for `IndexerObjective`."""
        p_BTK = self.mean_over_ranks(p_BTK)
        return lambda start, stop: (p_BTK[:, start:stop], indices_BTK[:, start:stop] >= 0)

    @torch.no_grad()
    def dense_target(self, q_nope_BHTn, q_rope_BHTr, latent_B1Sl, visibility: Visibility):
        """p of a chunk of queries on all keys they see, for `IndexerObjective` and `IndexerRecall`."""
        kv_B1Sc, k_rope_B1Sr = latent_B1Sl.split([self.c, self.r], dim=-1)
        kv_BHSx = self.kv_b_proj(kv_B1Sc[:, 0]).unflatten(-1, (-1, self.n + self.v)).transpose(1, 2)
        exact = torch.promote_types(latent_B1Sl.dtype, torch.float32)
        k_rope_BHSr = k_rope_B1Sr.expand(-1, kv_BHSx.shape[1], -1, -1)
        key_BHSx = torch.cat((kv_BHSx[..., : self.n], k_rope_BHSr), dim=-1).to(exact)
        query_BHTx = torch.cat((q_nope_BHTn, q_rope_BHTr), dim=-1).to(exact) * self.scaling

        @torch.no_grad()
        def target(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            end, hidden_BCS = visibility.end(stop), ~visibility.rows(start, stop, latent_B1Sl.device)
            scores_BHCS = query_BHTx[:, :, start:stop] @ key_BHSx[:, :, :end].mT
            scores_BHCS = scores_BHCS.masked_fill_(hidden_BCS[:, None], torch.finfo(exact).min)
            p_BCS = scores_BHCS.softmax(-1).mean(1).masked_fill_(hidden_BCS, 0.0)
            return self.mean_over_ranks(p_BCS), ~hidden_BCS

        return target

    def mean_over_ranks(self, p: torch.Tensor) -> torch.Tensor:
        """The mean over all heads, where tensor parallelism gives each rank a part of them."""
        if (mesh := self.head_mesh()) is not None:
            torch.distributed.all_reduce(p, group=mesh.get_group())
            p /= mesh.size()
        return p
