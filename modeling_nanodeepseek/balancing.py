"""Auxiliary-loss-free load balancing (arXiv:2408.15664 Algorithm 1; V3 report section 2.1.2).

Every MoE layer's router adds a bias b_i to expert i's score when it chooses. After each optimizer step b_i moves by
gamma towards balance. In a loop of your own:

    loss.backward(); optimizer.step(); optimizer.zero_grad()
    load = update_expert_bias(model, gamma=0.001)

or with Trainer: `Trainer(..., callbacks=[LoadBalancingCallback(gamma=0.001)])`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from .moe import TopkRouter


@dataclass
class ExpertLoad:
    """How the tokens of one optimizer step were spread over the experts.

    Attributes:
        tokens: [layers, E] int64, tokens sent to each expert, summed over ranks and accumulation steps.
        bias: [layers, E], the biases after the update (zeros for a router without).
    """

    tokens: torch.Tensor
    bias: torch.Tensor

    def metrics(self) -> dict[str, float]:
        """Scalars for a log, each the mean over layers unless named otherwise.

        max_violation: max_i load_i / mean load - 1 (0 balanced, E/K - 1 worst); entropy: of the load, divided by ln E
        (1 balanced, 0 one expert); dead_share: share of experts that got no token; bias_range: largest max b - min b.
        """
        tokens, bias = self.tokens.cpu(), self.bias.cpu()  # Apple's GPUs have no float64
        ran = tokens.any(-1)  # modules of multi-token prediction may rest
        load = tokens[ran].double()
        share = load / load.sum(-1, keepdim=True).clamp(min=1)
        experts = load.shape[-1]
        entropy = torch.special.entr(share).sum(-1) / torch.tensor(float(experts)).log()
        return {
            "expert_max_violation": (share.amax(-1) * experts - 1).mean().item(),
            "expert_load_entropy": entropy.mean().item(),
            "expert_dead_share": (load == 0).double().mean().item(),
            "expert_bias_range": (bias[ran].amax(-1) - bias[ran].amin(-1)).amax().item(),
        }


def routers(model: nn.Module) -> list[TopkRouter]:
    """The routers of all MoE layers, in layer order."""
    return [module for module in model.modules() if isinstance(module, TopkRouter)]


@torch.no_grad()
def update_expert_bias(
    model: nn.Module,
    gamma: float = 1e-3,
    centre: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> ExpertLoad | None:
    r"""b_i <- b_i + gamma * sign(mean(c) - c_i), c_i the tokens expert i got since the last call; then forgets c.

    Call it once per optimizer step, after the step, on every rank: counts are summed over all ranks of the default
    process group, and over the forwards in training mode since the last call (accumulation). Forwards in eval mode,
    recomputation under gradient checkpointing and padding are not counted.

    Args:
        model: a NanoDeepSeek model, bare or wrapped (DDP, PEFT).
        gamma: size of the step; 0 freezes the biases and still reports the load. V3: 0.001, then 0 for the last 3 %.
        centre: subtract the mean of the biases afterwards (their common part changes no choice; not in the paper).
        group: the processes that hold these layers, instead of all; those of a pipeline's stages hold others.

    Returns: the load of this step, or None for a model without routed experts or without a counted forward.
    """
    gates = routers(model)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not gates or (not distributed and gates[0].tokens_per_expert is None):
        return None
    experts, device = gates[0].config.n_routed_experts, gates[0].weight.device
    none = torch.zeros(experts, dtype=torch.long, device=device)
    tokens = torch.stack([none if g.tokens_per_expert is None else g.tokens_per_expert.to(device) for g in gates])
    if distributed:
        torch.distributed.all_reduce(tokens, group=group)
        if not tokens.any():
            return None
    signs = (tokens.sum(-1, keepdim=True) - experts * tokens).sign()  # whole numbers: a load at the mean is at it
    biases = []
    for gate, sign in zip(gates, signs):
        gate.tokens_per_expert = None
        bias = gate.e_score_correction_bias
        if bias is None:
            biases.append(torch.zeros(experts, device=device))
            continue
        bias += gamma * sign.to(bias)
        if centre:
            bias -= bias.mean()
        biases.append(bias.clone())
    return ExpertLoad(tokens=tokens, bias=torch.stack(biases))


class LoadBalancingCallback(TrainerCallback):
    """`update_expert_bias` after every optimizer step of a Trainer.

    Args:
        gamma: the step, or a function of the share of training done (0..1), e.g. `lambda done: 0.001 * (done < 0.97)`.
        centre: as in `update_expert_bias`.

    Attributes:
        load: the `ExpertLoad` of the latest step.
    """

    def __init__(self, gamma: float | Callable[[float], float] = 1e-3, centre: bool = False):
        self.gamma = gamma
        self.centre = centre
        self.load: ExpertLoad | None = None

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        gamma = self.gamma(state.global_step / max(state.max_steps, 1)) if callable(self.gamma) else self.gamma
        self.load = update_expert_bias(model, gamma, self.centre)
