"""Next-token cross-entropy that never holds all the logits at once."""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import compute_dtype, once_differentiable, without_autocast

# Logits held at a time, in numbers: 1024 tokens of a vocabulary of 8192, 32 MiB in fp32.
CHUNK = 2**23
MIN_ROWS = 128  # fewer tokens at a time would make the matrix products slow


class _SummedCrossEntropy(torch.autograd.Function):
    r"""sum_i -log softmax(W x_i)[y_i], with the gradients made in the same pass: d/dlogits = softmax - onehot.

    Chunk by chunk of tokens: logits, loss, gradient of the logits in place, its products with W and x. The products are
    three, as in plain backpropagation; what is kept for backward are the gradients of x and W instead of the logits.
    The softmax, the sum and W's gradient are in fp32 (fp64 for fp64).

    Shapes: hidden [N, d], weight [V, d], targets [N] in 0..V-1 -> the sum, and how many targets are likeliest; scalars.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, hidden, weight, targets):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        rows = max(CHUNK // len(weight), MIN_ROWS)
        for start in range(0, len(hidden), rows):
            x, y = hidden[start : start + rows], targets[start : start + rows, None]
            logits = (x @ weight.T).to(exact)
            logits -= logits.amax(-1, keepdim=True)
            of_targets = logits.gather(1, y)
            total -= of_targets.sum()
            correct += (of_targets == 0).sum()  # the largest
            softmax = logits.exp_()
            norm = softmax.sum(-1, keepdim=True)
            total += norm.log().sum()
            softmax /= norm
            grad = softmax.scatter_add_(1, y, torch.full_like(norm, -1.0)).to(x.dtype)
            if need_hidden:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if need_weight and exact == x.dtype:
                grad_weight.addmm_(grad.T, x)
            elif need_weight:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(saved if saved is None else (saved * grad).to(saved.dtype) for saved in ctx.saved_tensors), None


def is_plain_linear(head: nn.Module) -> bool:
    """Whether calling `head` is nothing but a product with its weight: no adapter, hook, sharding or quantisation."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.bias is None
        and "forward" not in vars(head)
        and not any(hooks)
    )


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Linear,
    labels: torch.LongTensor | None = None,
    shift_labels: torch.LongTensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    r"""Mean over targets of -log softmax(W h_t)[label_{t+1}] in nats, as transformers' loss, from the hidden states.

    Tokens without a target (the last of each row, prompts under a mask) cost nothing: no logits are made for them.

    Args:
        hidden_states: [B, T, d]; under autocast the products run in its dtype.
        head: the output layer, `is_plain_linear`.
        labels: [B, T], shifted here; or `shift_labels` [B, T], shifted already.
        num_items_in_batch: divide the sum by this instead of by the number of targets.

    Raises: ValueError for labels of another shape than the input's, or (on a CPU) outside the vocabulary.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    total, _ = summed_cross_entropy(hidden_states, head, shift_labels, ignore_index)
    items = (shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(total.device) if torch.is_tensor(items) else items)


def summed_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    ignore_index: int = -100,
    detached: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over targets of -log softmax(head(h))[target], and how many targets are likeliest.

    From the hidden states where the head `is_plain_linear`; any other head, and torch.compile, gets all its logits.

    Args:
        hidden_states: [B, T, d]; targets: [B, T], ignore_index for none.
        detached: the head gets no gradient.
    """
    if targets.shape != hidden_states.shape[:-1]:
        right = list(hidden_states.shape[:-1])
        raise ValueError(f"Labels have the shape {list(targets.shape)}: it must be the input's, {right}.")
    targets = targets.flatten().to(hidden_states.device)
    if not is_plain_linear(head) or torch.compiler.is_compiling():
        parameters = {name: p.detach() for name, p in head.named_parameters()} if detached else {}
        logits = torch.func.functional_call(head, parameters, (hidden_states,)) if detached else head(hidden_states)
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return total, (logits.argmax(-1) == targets).sum()
    kept = (targets != ignore_index).nonzero()[:, 0]
    hidden, weight, targets = hidden_states.flatten(0, -2).index_select(0, kept), head.weight, targets[kept]
    if targets.device.type == "cpu" and len(targets) and not 0 <= targets.min() <= targets.max() < len(weight):
        wrong = targets[(targets < 0) | (targets >= len(weight))][0]
        raise ValueError(f"Label {int(wrong)} is outside the vocabulary: labels lie in 0..{len(weight) - 1}.")
    dtype = compute_dtype(hidden)
    return _SummedCrossEntropy.apply(hidden.to(dtype), (weight.detach() if detached else weight).to(dtype), targets)
