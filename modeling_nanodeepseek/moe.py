"""DeepSeekMoE: router, stacked experts, shared experts, and the sequence-wise balance loss.

Letters of the shape suffixes: T tokens (batch and sequence flattened), d hidden, E routed experts, K experts per token,
m expert width, B sequences. An index of E in a choice means "no expert": that slot computes nothing.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_nanodeepseek import NanoDeepSeekConfig
from .experts import GatedExperts, PlainExperts
from .layers import Fp32Buffers, build_mlp


def softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    """V2's scores: a distribution over the experts."""
    return logits_TE.softmax(-1)


# Functions by name, not lambdas: routers keep theirs, and a model must pickle.
SCORING_FUNCS = {"sigmoid": torch.sigmoid, "softmax": softmax}


def two_best(scores_TGe: torch.Tensor) -> torch.Tensor:
    """V3's score of a group of experts: the sum of its two best (report section 2.1.2; K/M = 2 there)."""
    return scores_TGe.topk(2, dim=-1).values.sum(-1)


def best(scores_TGe: torch.Tensor) -> torch.Tensor:
    """V2's score of a group of experts: its best one (V2 report section 2.2.2)."""
    return scores_TGe.amax(-1)


GROUP_SCORES = {"noaux_tc": two_best, "group_limited_greedy": best, "greedy": None}


class TopkRouter(Fp32Buffers):
    r"""Chooses K experts per token and their weights (V3 report eq. 12-16; V2 report section 2.2).

      s = sigmoid(W_g u) (or softmax), in fp32           choice = s + b
      groups: score each of n_group groups of consecutive experts, keep the topk_group best, -inf elsewhere
      chosen = top-K of choice                           w_i = s_i / sum_chosen s * routed_scaling_factor
    The bias b (`e_score_correction_bias`) enters the choice alone, never the weights. It is state, not a parameter:
    `balancing.py` moves it; it stays fp32 whatever the model is cast to, because bf16 cannot hold steps of 0.001.

    `last_choice` is the choice of the latest forward, [T, K]; the model reads it to count each expert's load.

    Shapes: hidden_states [..., d] -> logits [T, E] fp32, weights [T, K] fp32, indices [T, K].
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        biased = config.topk_method == "noaux_tc"
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32) if biased else None  # in a bf16 model too
        self.register_buffer("e_score_correction_bias", bias_E)
        self.score = SCORING_FUNCS[config.scoring_func]
        limited = config.topk_group < config.n_group
        self.group_score = GROUP_SCORES[config.topk_method] if limited else None
        self.last_choice: torch.Tensor | None = None
        # Tokens sent to each expert since the last bias update: not a buffer, or DDP would overwrite it by rank 0's.
        self.tokens_per_expert: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        hidden_Td = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(hidden_Td.device.type, enabled=False):
            logits_TE = F.linear(hidden_Td.float(), self.weight.float())
        scores_TE = self.score(logits_TE)
        indices_TK = self.choose(scores_TE.detach())
        weights_TK = scores_TE.gather(1, indices_TK)
        if config.adaptive_expert_threshold > 0:
            dropped_TK = weights_TK < config.adaptive_expert_threshold * weights_TK.amax(-1, keepdim=True)
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
            indices_TK = indices_TK.masked_fill(dropped_TK, config.n_routed_experts)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        self.last_choice = indices_TK
        return logits_TE, weights_TK * config.routed_scaling_factor, indices_TK

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The K experts of each token by biased (and, in training, noisy) score within its best groups."""
        config = self.config
        choice_TE = scores_TE if self.e_score_correction_bias is None else scores_TE + self.e_score_correction_bias
        if self.training and config.router_noise > 0:
            choice_TE = choice_TE + config.router_noise * torch.randn_like(choice_TE)
        if self.group_score is not None:
            choice_TGe = choice_TE.unflatten(-1, (config.n_group, -1))
            kept_TM = self.group_score(choice_TGe).topk(config.topk_group, dim=-1, sorted=False).indices
            closed_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter(1, kept_TM, False)
            # -inf, not 0: with a negative bias a choice below 0 would lose to a masked expert.
            choice_TE = choice_TGe.masked_fill(closed_TG[..., None], float("-inf")).flatten(-2)
        return choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def count(self, attention_mask: torch.Tensor | None = None):
        """Adds `last_choice` to `tokens_per_expert` [E]; with a mask [B, S] of 0 and 1, real tokens only."""
        experts, choice_TK = self.config.n_routed_experts, self.last_choice
        weights_TK = torch.ones_like(choice_TK, dtype=torch.float)
        if attention_mask is not None:
            weights_TK = weights_TK * attention_mask.reshape(-1, 1).to(weights_TK)
        # fp32 counts are exact up to 2^24 tokens per forward; the running sum is int64. Slot E collects the dropped.
        counts_E = torch.zeros(experts + 1, device=choice_TK.device)
        counts_E = counts_E.scatter_add(0, choice_TK.flatten(), weights_TK.flatten())[:experts].long()
        self.tokens_per_expert = counts_E if self.tokens_per_expert is None else self.tokens_per_expert + counts_E


class DeepseekMoE(nn.Module):
    """y = sum_{chosen} w_i Expert_i(u) + Shared(u) (V3 report eq. 12); shared experts are one MLP of width Ns * m.

    Shapes: [B, T, d] -> [B, T, d].
    """

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.gate = TopkRouter(config)
        self.experts = (GatedExperts if config.gated_mlp else PlainExperts)(config)
        # transformers' name for "some indices are E": its grouped and batched forms then skip those slots.
        self.experts._is_expert_parallel = config.adaptive_expert_threshold > 0
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = build_mlp(config, shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights_TK, indices_TK = self.gate(hidden_states)
        hidden_Td = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = self.experts(hidden_Td, indices_TK, weights_TK).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


def sequence_balance_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: NanoDeepSeekConfig,
    sequence_weights: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Complementary sequence-wise auxiliary loss (V3 report eq. 17-20), summed over MoE layers.

      s'_it = s_it / sum_j s_jt             P_i = 1/T sum_t s'_it
      f_i = E/(K T) sum_t 1[i in top-K of s_t]     L = sum_i f_i P_i
    "Top-K" is of the raw scores, without bias or group limit, as printed; f carries no gradient. Uniform scores with
    balanced counts give L = 1 per layer and sequence.

    Args:
        router_logits: one [B*T, E] per MoE layer.
        sequence_weights: [B], how much each sequence counts. The model passes its share of the batch's target tokens,
            so that micro-batches of any size add up to the whole batch.
        token_mask: [B, T] of 0 and 1; padding neither counts nor contributes.

    Returns: the scalar sum over layers of the weighted sum over sequences, not yet multiplied by alpha.
    """
    B, K = sequence_weights.shape[0], config.num_experts_per_tok
    total = sequence_weights.new_zeros((), dtype=torch.float)
    for logits_xE in router_logits:
        scores_BTE = SCORING_FUNCS[config.scoring_func](logits_xE.float()).unflatten(0, (B, -1))
        chosen_BTE = torch.zeros_like(scores_BTE).scatter(-1, scores_BTE.detach().topk(K, dim=-1).indices, 1.0)
        mask_BT1 = torch.ones_like(scores_BTE[..., :1]) if token_mask is None else token_mask[..., None].to(scores_BTE)
        length_B1 = mask_BT1.sum(1).clamp(min=1)
        share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        P_BE = (share_BTE * mask_BT1).sum(1) / length_B1
        f_BE = (chosen_BTE * mask_BT1).sum(1) * (config.n_routed_experts / K) / length_B1
        total = total + ((f_BE * P_BE).sum(-1) * sequence_weights).sum()
    return total
