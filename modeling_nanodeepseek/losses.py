"""Next-token cross-entropy that never holds all the logits at once."""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import compute_dtype, once_differentiable, without_autocast

# Logits held at a time, in numbers: 1024 tokens of a vocabulary of 8192, 32 MiB in fp32.
CHUNK = 2**23
MIN_ROWS = 128  # fewer tokens at a time would make the matrix products slow
# Modules whose hooks do nothing but gather a weight before a forward and leave it after.
GATHERING = ("torch.distributed.fsdp.", "deepspeed.")


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


class Head(nn.Linear):
    """The output layer. `forward(x)` are the logits of x; `forward(x, targets)` is what `_SummedCrossEntropy` makes of
    them, a part of the forward because FSDP and ZeRO-3 have the weight whole there and nowhere else.

    Args:
        detached: the weight gets no gradient.
    """

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None, detached: bool = False):
        if targets is None:
            return super().forward(hidden_states)
        dtype, weight = compute_dtype(hidden_states), self.weight.detach() if detached else self.weight
        return _SummedCrossEntropy.apply(hidden_states.to(dtype), weight.to(dtype), targets)


def is_plain_head(head: nn.Module) -> bool:
    """Whether calling `head` is nothing but a product with its weight: no adapter, no quantisation, and no hook or
    sharding but FSDP's and ZeRO-3's."""
    kinds = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    gathered = hooks and all(getattr(hook, "__module__", "").startswith(GATHERING) for hook in hooks)
    return bool(
        getattr(type(head), "forward", None) is Head.forward
        and "forward" not in vars(head)
        and head.bias is None
        and (gathered or (not hooks and type(head.weight) is nn.Parameter))
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
        head: the output layer.
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

    From the hidden states where the head `is_plain_head`; any other head, and torch.compile, gets all its logits.

    Args:
        hidden_states: [B, T, d]; targets: [B, T], ignore_index for none.
        detached: the head gets no gradient.
    """
    if targets.shape != hidden_states.shape[:-1]:
        right = list(hidden_states.shape[:-1])
        raise ValueError(f"Labels have the shape {list(targets.shape)}: it must be the input's, {right}.")
    targets = targets.flatten().to(hidden_states.device)
    if not is_plain_head(head) or torch.compiler.is_compiling():
        parameters = {name: p.detach() for name, p in head.named_parameters()} if detached else {}
        logits = torch.func.functional_call(head, parameters, (hidden_states,)) if detached else head(hidden_states)
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return total, (logits.argmax(-1) == targets).sum()
    kept = (targets != ignore_index).nonzero()[:, 0]
    hidden, targets, size = hidden_states.flatten(0, -2).index_select(0, kept), targets[kept], head.out_features
    if targets.device.type == "cpu" and len(targets) and not 0 <= targets.min() <= targets.max() < size:
        wrong = targets[(targets < 0) | (targets >= size)][0]
        raise ValueError(f"Label {int(wrong)} is outside the vocabulary: labels lie in 0..{size - 1}.")
    return head(hidden, targets, detached)
