"""Expanded multi-head latent attention on a CPU, in blocks of query rows.

The keys' rope part is one for all heads and never copied to each; only columns that a block can see are computed;
scores exist for one block at a time, forward and backward, so memory grows with the length and not with its square.

Letters of the shape suffixes as in attention.py: B batch, T queries, S keys, H heads, n and r the parts of a head
without and with position, v value, x = n + v.
"""

import torch

from .layers import once_differentiable, without_autocast

ROWS = 128  # queries of a block: its scores, 8 heads by 512 keys, are 2 MiB in fp32


def visible_columns(mask_BHTS: torch.Tensor | None, row: int, start: int, end: int, S: int) -> tuple[int, int]:
    """The first column that any query in start:end of a row may see, and one past the last."""
    if mask_BHTS is None:
        return 0, min(end, S)
    mask = mask_BHTS[row % len(mask_BHTS), :, start:end]
    columns = mask.flatten(0, 1).any(0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)


def hide(scores_HRC: torch.Tensor, mask_BHTS: torch.Tensor | None, row: int, start: int, left: int):
    """Writes -inf where a query must not look. Without a mask query t sees the keys 0..t."""
    rows, columns = scores_HRC.shape[1:]
    if mask_BHTS is not None:
        visible = mask_BHTS[row % len(mask_BHTS), :, start : start + rows, left : left + columns]
        scores_HRC.masked_fill_(~visible, float("-inf"))
    elif columns > start:
        corner = torch.ones(rows, columns - start, dtype=torch.bool).triu(1)
        scores_HRC[..., start:].masked_fill_(corner, float("-inf"))


class _BlockedAttention(torch.autograd.Function):
    """See `blocked_attention`. Backward (FlashAttention, arXiv:2205.14135 section B.2) makes the scores again:
    P = exp(scores - logsumexp), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q."""

    @staticmethod
    @without_autocast
    def forward(ctx, q_nope_BHTn, q_rope_BHTr, kv_BHSx, k_rope_BSr, mask_BHTS, scale):
        B, H, T, n = q_nope_BHTn.shape
        S = kv_BHSx.shape[2]
        output_BTHv = q_nope_BHTn.new_zeros(B, T, H, kv_BHSx.shape[-1] - n)  # queries that see nothing get zeros
        logsumexp_BHT1 = q_nope_BHTn.new_empty(B, H, T, 1)
        for row, start, end, left, right in _blocks(B, T, S, mask_BHTS):
            k_nope, value = kv_BHSx[row, :, left:right, :n], kv_BHSx[row, :, left:right, n:]
            scores = _scores(q_nope_BHTn, q_rope_BHTr, k_nope, k_rope_BSr, row, start, end, left, right, scale)
            hide(scores, mask_BHTS, row, start, left)
            # For a query that sees nothing the maximum is raised from -inf and the sum from zero: again zeros.
            maximum = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            weights = scores.sub_(maximum).exp_()
            norm = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).tiny)
            torch.div(torch.bmm(weights, value), norm, out=output_BTHv[row, start:end].transpose(0, 1))
            torch.add(maximum, norm.log(), out=logsumexp_BHT1[row, :, start:end])
        ctx.save_for_backward(q_nope_BHTn, q_rope_BHTr, kv_BHSx, k_rope_BSr, mask_BHTS, output_BTHv, logsumexp_BHT1)
        ctx.scale = scale
        return output_BTHv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHv):
        return *_gradients(grad_BTHv, ctx.scale, *ctx.saved_tensors), None, None


def _gradients(grad_BTHv, scale, q_nope_BHTn, q_rope_BHTr, kv_BHSx, k_rope_BSr, mask_BHTS, output_BTHv, logsumexp_BHT1):
    B, H, T, n = q_nope_BHTn.shape
    # Zeros where no block writes: queries that see nothing, keys that nobody sees. Keys gather from several blocks.
    grad_q_nope, grad_q_rope = torch.zeros_like(q_nope_BHTn), torch.zeros_like(q_rope_BHTr)
    grad_kv = torch.zeros_like(kv_BHSx)
    grad_k_rope = torch.zeros_like(k_rope_BSr)
    delta_BHT1 = (grad_BTHv * output_BTHv).sum(-1).transpose(1, 2)[..., None]
    for row, start, end, left, right in _blocks(B, T, kv_BHSx.shape[2], mask_BHTS):
        k_nope, value = kv_BHSx[row, :, left:right, :n], kv_BHSx[row, :, left:right, n:]
        k_rope, q_rope = k_rope_BSr[row, left:right], q_rope_BHTr[row, :, start:end].reshape(-1, k_rope_BSr.shape[-1])
        g = grad_BTHv[row, start:end].transpose(0, 1)
        scores = _scores(q_nope_BHTn, q_rope_BHTr, k_nope, k_rope_BSr, row, start, end, left, right, scale)
        hide(scores, mask_BHTS, row, start, left)
        weights = scores.sub_(logsumexp_BHT1[row, :, start:end]).exp_()
        ds = torch.bmm(g, value.mT).sub_(delta_BHT1[row, :, start:end]).mul_(weights).mul_(scale)
        grad_kv[row, :, left:right, n:] += torch.bmm(weights.mT, g)
        grad_kv[row, :, left:right, :n] += torch.bmm(ds.mT, q_nope_BHTn[row, :, start:end])
        grad_q_nope[row, :, start:end] = torch.bmm(ds, k_nope)
        ds = ds.view(-1, right - left)
        grad_q_rope[row, :, start:end] = (ds @ k_rope).view(H, end - start, -1)
        grad_k_rope[row, left:right].addmm_(ds.T, q_rope)
    return grad_q_nope, grad_q_rope, grad_kv, grad_k_rope


def _blocks(B: int, T: int, S: int, mask_BHTS: torch.Tensor | None):
    """(row of the batch, first and last query, first and last key) of every block with something to see."""
    for row in range(B):
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            left, right = visible_columns(mask_BHTS, row, start, end, S)
            if right:
                yield row, start, end, left, right


def _scores(q_nope_BHTn, q_rope_BHTr, k_nope, k_rope_BSr, row, start, end, left, right, scale) -> torch.Tensor:
    """scale * (q_nope k_nope^T + q_rope k_rope^T) of one block, [H, rows, columns]."""
    q_nope, q_rope = q_nope_BHTn[row, :, start:end], q_rope_BHTr[row, :, start:end]
    H, rows = q_nope.shape[:2]
    scores = (q_rope.reshape(H * rows, -1) @ k_rope_BSr[row, left:right].T).view(H, rows, -1)
    return scores.baddbmm_(q_nope, k_nope.mT, beta=scale, alpha=scale)


def blocked_attention(
    q_nope_BHTn: torch.Tensor,
    q_rope_BHTr: torch.Tensor,
    kv_BHSx: torch.Tensor,
    k_rope_BSr: torch.Tensor,
    mask_BHTS: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    r"""softmax(scale (q_nope k_nope^T + q_rope k_rope^T)) v, with kv = [k_nope ; v], -> [B, T, H, v].

    Args:
        mask_BHTS: True is visible, [B or 1, H or 1, T, S]; None lets query t see the keys 0..t.

    Columns that no query of a block sees cost nothing, so documents packed into a row cost what they would cost alone.
    Differentiable once in the four operands. bf16 and fp16 are computed in fp32, scores and sums included.
    """
    exact = torch.promote_types(q_nope_BHTn.dtype, torch.float32)
    operands = (tensor.to(exact) for tensor in (q_nope_BHTn, q_rope_BHTr, kv_BHSx, k_rope_BSr))
    return _BlockedAttention.apply(*operands, mask_BHTS, scale).to(kv_BHSx.dtype)
