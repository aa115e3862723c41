"""The lightning indexer of DeepSeek Sparse Attention: its scores, the choice of keys, and the loss it learns from.

Letters of the shape suffixes: B batch, T query tokens, C queries of a chunk, S keys (cached ones included), j indexer
heads, i their width, K = index_topk, d hidden, q = q_lora_rank, H attention heads.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .layers import Fp32Linear, exactly, once_differentiable
from .masks import Visibility
from .rotary import rotate

# What is formed of a chunk of queries holds about so many numbers; on CPUs that is what a core's caches hold.
CHUNK_NUMBERS = {"cpu": 2**21, "cuda": 2**27}
BLOCK_NUMBERS = 2**18  # products of queries and keys formed at a time on CPUs: 1 MB

INVISIBLE = -1 << 63  # ranks below every score
NONE = 2**31 - 1  # sorts behind every position
LOWEST = torch.finfo(torch.float).min  # of the scores of visible keys


def chunks(tokens: int, numbers_per_token: int, device: torch.device, least: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of parts of `tokens` tokens, each of a size that suits the device, and at least of `least`."""
    budget = CHUNK_NUMBERS.get(device.type, 2**24)
    if tokens * numbers_per_token <= budget or tokens == 1:
        # Not by the loop below, for a compiler: of a loop it makes a graph for one size alone, and decoding another
        # at every token.
        yield 0, tokens
        return
    size = max(least, budget // numbers_per_token)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x times the orthonormal Hadamard matrix of its last dim, a power of two: [..., n] -> [..., n].

    Dot products stay what they are; outliers are spread over all n numbers, which rounding to FP8 wants.
    """
    n = x.shape[-1]
    half = 1
    while half < n:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x * n**-0.5


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x rounded to E4M3 with one scale per vector, a power of two (UE8M0) not below max |x| / 448; same dtype."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4)
    bits = (largest / torch.finfo(torch.float8_e4m3fn).max).view(torch.int32)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float)  # up to a power of two: carried into the exponent
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def index_scores(q_BCji: torch.Tensor, w_BCj: torch.Tensor, k_BSi: torch.Tensor) -> torch.Tensor:
    """I_ts = sum_j w_tj ReLU(q_tj . k_s) in fp32 (fp64 for fp64), [B, C, S] (V3.2 report eq. 1)."""
    exact = torch.promote_types(q_BCji.dtype, torch.float32)
    q_Bxi, w_BC1j = q_BCji.to(exact).flatten(1, 2), w_BCj.to(exact)[..., None, :]

    def scores_of(keys_BNi: torch.Tensor) -> torch.Tensor:
        products_BxN = F.relu(q_Bxi @ keys_BNi.to(exact).mT, inplace=not torch.is_grad_enabled())
        return (w_BC1j @ products_BxN.unflatten(1, q_BCji.shape[1:3])).squeeze(-2)

    if k_BSi.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return scores_of(k_BSi)  # and not in one block: a compiler would make a graph for each number of keys
    block = max(256, BLOCK_NUMBERS // max(1, q_Bxi.shape[0] * q_Bxi.shape[1]))  # what is reread stays in the cache
    if k_BSi.shape[1] <= block:
        return scores_of(k_BSi)
    return torch.cat([scores_of(keys_BNi) for keys_BNi in k_BSi.split(block, dim=1)], dim=-1)


def select_keys(scores_BCS: torch.Tensor, topk: int) -> torch.Tensor:
    """The `topk` keys of each row with the highest scores, in order of position: int32 [B, C, topk].

    Minus infinity is the score of a key that is not visible: rows with fewer visible ones end in -1. Equal scores (in
    fp32): the later key wins, in every path and on every device. NaN is the lowest score of all.
    """
    chosen_BCK = None
    if scores_BCS.device.type == "cpu" and not torch.compiler.is_compiling():
        chosen_BCK = _select_untied(scores_BCS.float(), topk)
    return _select_ranked(scores_BCS.float(), topk) if chosen_BCK is None else chosen_BCK


def _select_untied(scores_BCS: torch.Tensor, topk: int) -> torch.Tensor | None:
    """`select_keys` by comparing with each row's last chosen score; None if others are equal to it, or for NaN. numpy
    partitions with AVX-512 or AVX2, many times as fast as torch's topk."""
    S = scores_BCS.shape[-1]
    scores = scores_BCS.numpy().reshape(-1, S)
    highest = np.partition(scores, S - topk, axis=-1)[:, S - topk :]  # the last chosen first; NaN is among them
    positions = np.flatnonzero(scores >= np.maximum(highest[:, :1], LOWEST))
    counts = np.bincount(positions // S, minlength=len(scores))
    if counts.max(initial=0) > topk or np.isnan(highest).any():
        return None
    if len(positions) == len(scores) * topk:
        indices = (positions % S).astype(np.int32)
    else:
        indices = np.full((len(scores), topk), -1, dtype=np.int32)
        indices[np.arange(topk) < counts[:, None]] = positions % S
    return torch.from_numpy(indices).view(*scores_BCS.shape[:-1], topk)


def _select_ranked(scores_BCS: torch.Tensor, topk: int) -> torch.Tensor:
    """`select_keys` by one int64 per key that sorts as (score, position): its upper half the score's bits, which a flip
    makes sort as an integer, its lower half the position."""
    scores_BCS = scores_BCS.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=-torch.inf)
    bits = (scores_BCS + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    bits = ((bits >> 31) & 0x7FFFFFFF) ^ bits
    position_S = torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)
    ranked = torch.stack((position_S.expand_as(bits), bits), dim=-1).view(torch.int64).squeeze(-1)
    ranked = ranked.masked_fill_(scores_BCS < LOWEST, INVISIBLE)
    if scores_BCS.device.type == "cpu" and not torch.compiler.is_compiling():
        ranked.numpy().partition(ranked.shape[-1] - topk, axis=-1)
        best = ranked[..., -topk:]
    else:
        best = ranked.topk(topk, dim=-1, sorted=False).values
    chosen = best.int().masked_fill_(best == INVISIBLE, NONE)  # the lower half
    chosen = chosen.sort(dim=-1).values
    return chosen.masked_fill_(chosen == NONE, -1)


def always_kept(visible_BCS: torch.Tensor, window: int, first: int) -> torch.Tensor:
    """The last `window` and the `first` keys that each query sees."""
    rank_BCS = visible_BCS.cumsum(-1)  # of each visible key among them, from 1
    return visible_BCS & ((rank_BCS <= first) | (rank_BCS > rank_BCS[..., -1:] - window))


class KeySelector(nn.Module):
    """Chooses the keys of each query, chunk by chunk: scores of all queries are never held.

    Arguments of forward: q [B, T, j, i], w [B, T, j], k [B, S, i] as the indexer gives them (a fixed pattern reads
    none of their numbers); who sees whom; (B, T). -> indices [B, T, min(K, S)], int32, ascending, then -1 where a query
    sees fewer. The model records them under `index_topk_indices`.
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.config, self.learned = config, config.has_indexer
        self.heads = config.index_n_heads if self.learned else 1

    @torch.no_grad()
    @exactly
    def forward(self, q_BTji, w_BTj, k_BSi, visibility: Visibility, shape: tuple[int, int]) -> torch.Tensor:
        B, T = shape
        topk = min(self.config.index_topk, visibility.keys)
        window, first = self.config.index_window, self.config.index_global_tokens
        indices_BTK = None
        for start, stop in chunks(T, B * self.heads * visibility.keys, k_BSi.device, least=16):
            end = visibility.end(stop)
            if self.learned:
                scores_BCS = index_scores(q_BTji[:, start:stop], w_BTj[:, start:stop], k_BSi[:, :end])
            else:
                scores_BCS = torch.full((B, stop - start, end), -torch.inf, device=k_BSi.device)
            if window + first > 0:
                visible_BCS = visibility.rows(start, stop, k_BSi.device)
                scores_BCS.masked_fill_(always_kept(visible_BCS, window, first), torch.inf)
            visibility.hide(scores_BCS, start, stop)
            chosen_BCK = select_keys(scores_BCS, min(topk, end))
            if stop - start == T and end >= topk:
                return chosen_BCK
            if indices_BTK is None:
                # In one tensor: small ones kept between the scores of growing lengths would leave holes in the heap,
                # each too small for the next scores (1.3 GB at 32K tokens instead of 73 MB).
                indices_BTK = chosen_BCK.new_full((B, T, topk), -1)
            indices_BTK[:, start:stop, : chosen_BCK.shape[-1]] = chosen_BCK
        return indices_BTK


class LightningIndexer(nn.Module):
    r"""Scores every key for every query by a few narrow heads (V3.2 report section 2.1, eq. 1; DeepSeek's code).

      I_ts = i^-0.5 sum_j w_tj ReLU(q_tj . k_s)        w_t = j^-0.5 W_weights h_t, of either sign
      q_t = W_q cQ_t in heads        k_s = LayerNorm(W_k h_s), one for all heads
    cQ is MLA's query latent after its norm, h the attention's input. The first qk_rope_head_dim numbers of q and k are
    rotated, in halves (x_n, x_{n + r/2}), where MLA rotates pairs. The weights are computed in fp32. Inputs are
    detached: the indexer learns from its own loss alone.

    Parameter names are DeepSeek's: wq_b, wk, k_norm, weights_proj.

    Shapes: hidden [B, T, d], cQ [B, T, q] -> q [B, T, j, i], w [B, T, j] in fp32 with both factors in it, k [B, T, i].
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.heads, self.width, self.r = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = Fp32Linear(config.hidden_size, self.heads, bias=False)
        self.deployed = [f for f, on in ((hadamard, config.index_hadamard), (round_to_fp8, config.index_fp8)) if on]

    def forward(self, hidden_BTd, c_q_BTq, turns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_BTd, c_q_BTq = hidden_BTd.detach(), c_q_BTq.detach()
        q_BTji = self.wq_b(c_q_BTq).unflatten(-1, (self.heads, self.width))
        k_BT1i = self.k_norm(self.wk(hidden_BTd)).unsqueeze(2)
        both_BTxi = torch.cat((q_BTji, k_BT1i), dim=2)
        rope, rest = both_BTxi.split([self.r, self.width - self.r], dim=-1)
        rope = rotate(rope.transpose(1, 2), turns, interleaved=False).transpose(1, 2)
        q_BTji, k_BT1i = torch.cat((rope, rest), dim=-1).split([self.heads, 1], dim=2)
        return q_BTji, self.weights_proj(hidden_BTd) * (self.heads * self.width) ** -0.5, k_BT1i[:, :, 0]

    @torch.no_grad()
    def as_deployed(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys as they are scored when keys are selected: turned and rounded, where the config says so."""
        for change in self.deployed:
            x = change(x)
        return x


class _IndexLoss(torch.autograd.Function):
    """sum_t weight_t KL_t, its gradients taken chunk by chunk in the forward, so that no chunk's scores are kept.

    `kl_of_chunk(q, w, k, start, stop)` gives the KL of queries start..stop, [B, C].
    """

    @staticmethod
    def forward(ctx, q_BTji, w_BTj, k_BSi, weight_BT, size: int, kl_of_chunk: Callable):
        k = k_BSi.detach().requires_grad_()
        grad_q, grad_w, grad_k = torch.zeros_like(q_BTji), torch.zeros_like(w_BTj), torch.zeros_like(k)
        total = weight_BT.new_zeros((), dtype=torch.promote_types(q_BTji.dtype, torch.float32))
        for start, stop in chunks(q_BTji.shape[1], size, q_BTji.device):
            # Without the hooks of a checkpoint around this layer, which would run it again for each chunk.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                q, w = (x[:, start:stop].detach().requires_grad_() for x in (q_BTji, w_BTj))
                loss = (weight_BT[:, start:stop] * kl_of_chunk(q, w, k, start, stop)).sum()
                grad_q[:, start:stop], grad_w[:, start:stop], part = torch.autograd.grad(loss, (q, w, k))
            grad_k += part
            total += loss.detach()
        ctx.save_for_backward(grad_q, grad_w, grad_k)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None, None


def kl_divergence(target_BCS: torch.Tensor, scores_BCS: torch.Tensor, visible_BCS: torch.Tensor) -> torch.Tensor:
    """KL(target || softmax of the visible scores), [B, C]; 0 for a query that sees nothing."""
    log_q = scores_BCS.masked_fill(~visible_BCS, torch.finfo(scores_BCS.dtype).min).log_softmax(-1)
    return (torch.xlogy(target_BCS, target_BCS) - target_BCS * log_q).sum(-1)


class IndexerObjective(nn.Module):
    r"""What the indexer learns (V3.2 report section 2.1.1); the model records it under `index_loss`.

      p_t = 1/H sum_h softmax attention of head h        loss = sum_t weight_t KL(p_t || softmax I_t)
    over all visible keys in the warm-up, over the selected ones in the sparse stage (the attention's softmax too). p
    has no gradient.

    Arguments of forward: the indexer's q, w, k (before rounding); weight [B, T]; `target(start, stop)`, p of those
    queries [B, C, N] and which of the N keys are visible; indices [B, T, N] of the keys that N counts, -1 for none, or
    None if they are the first N of all.
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.heads = max(config.index_n_heads, config.num_attention_heads)

    @exactly
    def forward(self, q_BTji, w_BTj, k_BSi, weight_BT, target: Callable, indices_BTN: torch.Tensor | None = None):
        def kl_of_chunk(q, w, k, start, stop):
            p_BCN, visible_BCN = target(start, stop)
            if indices_BTN is None:
                scores_BCN = index_scores(q, w, k[:, : p_BCN.shape[-1]])
            else:
                scores_BCN = selected_scores(q, w, k, indices_BTN[:, start:stop])
            return kl_divergence(p_BCN, scores_BCN, visible_BCN)

        keys = k_BSi.shape[1] if indices_BTN is None else indices_BTN.shape[2]
        size = len(q_BTji) * keys * self.heads
        if not torch.is_grad_enabled():
            parts = [
                (weight_BT[:, a:b] * kl_of_chunk(q_BTji[:, a:b], w_BTj[:, a:b], k_BSi, a, b)).sum()
                for a, b in chunks(q_BTji.shape[1], size, q_BTji.device)
            ]
            return torch.stack(parts).sum()
        return _IndexLoss.apply(q_BTji, w_BTj, k_BSi, weight_BT, size, kl_of_chunk)


class IndexerRecall(nn.Module):
    """The share of the dense attention's mass, averaged over heads, that lies on the selected keys: [B, T], NaN for
    queries that see no more keys than are selected. The model records it under `index_recall`.

    Arguments of forward: `target` as in `IndexerObjective`, over all keys; indices [B, T, K].
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.heads = config.num_attention_heads

    @torch.no_grad()
    @exactly
    def forward(self, target: Callable, indices_BTK: torch.Tensor, keys: int) -> torch.Tensor:
        B, T, _ = indices_BTK.shape
        recall_BT = torch.full((B, T), float("nan"), device=indices_BTK.device)
        for start, stop in chunks(T, B * self.heads * keys, indices_BTK.device):
            p_BCS, visible_BCS = target(start, stop)
            chosen = indices_BTK[:, start:stop]
            # A chunk's keys end where its queries' do; what lies beyond is -1.
            mass_BCK = p_BCS.gather(-1, chosen.clamp(0, p_BCS.shape[-1] - 1).long()).masked_fill(chosen < 0, 0.0)
            some = visible_BCS.sum(-1) > (chosen >= 0).sum(-1)
            recall_BT[:, start:stop] = torch.where(some, mass_BCK.sum(-1), float("nan"))
        return recall_BT


def selected_scores(q_BCji, w_BCj, k_BSi, indices_BCK: torch.Tensor) -> torch.Tensor:
    """`index_scores` of selected keys alone, [B, C, K]; of no meaning where the index is -1."""
    exact = torch.promote_types(q_BCji.dtype, torch.float32)
    row_B11 = torch.arange(len(k_BSi), device=k_BSi.device)[:, None, None] * k_BSi.shape[1]
    k_BCKi = F.embedding(indices_BCK.clamp(min=0) + row_B11, k_BSi.flatten(0, 1)).to(exact)
    products_BCjK = F.relu(q_BCji.to(exact) @ k_BCKi.mT)
    return (w_BCj.to(exact)[..., None, :] @ products_BCjK).squeeze(-2)
