"""Multi-token prediction: modules that predict further tokens, their loss, and drafts for `generate(use_mtp=True)`.

V3 report section 2.2. Letters of the shape suffixes: B batch, T tokens, d hidden, D modules. Modules are counted from
k = 1; module k sees the tokens up to t_{i+k} and predicts t_{i+k+1}, at the position i of the token t_i.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator

from .cache import GrowingLayer, LatentCache
from .configuration_nanodeepseek import NanoDeepSeekConfig
from .decoder import DecoderBlock
from .layers import RMSNorm
from .losses import summed_cross_entropy
from .masks import packed_documents, real_token_mask


class SharedHead(nn.Module):
    """What stands before the output head, which is the model's own: a norm. Named as in official checkpoints."""

    def __init__(self, config: NanoDeepSeekConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)


class MultiTokenPredictor(DecoderBlock):
    r"""Module k of multi-token prediction (V3 report eq. 21-23), the layer `num_hidden_layers + k - 1` of a checkpoint.

      h'_i = M_k [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h^{k-1}_i)]    h^k = RMSNorm(Layer_k(h'))    P^k = Head(h^k)
    h^0 is the decoder's output after its last norm. The embedding comes first, as released weights want it (the report
    prints it second); embedding and head are the model's. Official names: enorm, hnorm, eh_proj, shared_head.norm.

    Shapes: h^{k-1} [B, T, d], embeddings of the tokens k further [B, T, d] -> h^k [B, T, d].
    """

    def __init__(self, config: NanoDeepSeekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # False in transformers' MtpModel alone: it makes decoder layers 0..D-1 by the type of the last layer here, and
        # combines states and embeddings itself.
        self.combines = layer_idx >= config.num_hidden_layers
        if self.combines:
            self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)
            self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_weight)
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
            self.shared_head = SharedHead(config)

    def forward(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        if not self.combines:
            return super().forward(hidden_states, **kwargs)
        both = torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(both), **kwargs))


def all_further(predictors, hidden_states, inputs_embeds, detached: bool = False, **kwargs) -> tuple[torch.Tensor, ...]:
    """h^1 .. h^D of a whole text from h^0 and its embeddings, [B, T, d] each; detached: no gradient reaches these two.

    Behind the text's end tokens wrap around: those positions have no targets, and no position before sees them.
    """
    if detached:
        hidden_states, inputs_embeds = hidden_states.detach(), inputs_embeds.detach()
    states = []
    for k, module in enumerate(predictors, start=1):
        hidden_states = module(hidden_states, inputs_embeds.roll(-k, 1), **kwargs)
        states.append(hidden_states)
    return tuple(states)


# -- the loss ----------------------------------------------------------------------------------------------------------


def further_targets(
    k: int,
    shift_labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What module k is to predict at each position, t_{i+k+1}: [B, T], ignore_index where there is nothing.

    That is beyond the end, where the next-token loss ignores that token, in another document than t_i, and in padding.
    Documents are known by position_ids that start anew; a 4-D mask alone tells nothing about targets.

    Args:
        shift_labels: [B, T], the next token of each position or ignore_index.
        attention_mask, position_ids: as the model takes them; documents packed into a row are told apart by positions.
    """
    T = shift_labels.shape[1]
    targets = F.pad(shift_labels[:, k:], (0, min(k, T)), value=ignore_index)
    real = real_token_mask(attention_mask, T)
    document = torch.zeros_like(shift_labels)
    if position_ids is not None:
        documents = packed_documents(position_ids, real)
        document = document if documents is None else documents.expand_as(shift_labels)
    if real is not None:
        document = document.masked_fill(real == 0, -1)
    # Of the last position in a document the next token is another's: so the document of t_{i+k+1} itself.
    later = F.pad(document[:, k + 1 :], (0, min(k + 1, T)), value=-1)
    return targets.masked_fill((document < 0) | (document != later), ignore_index)


@dataclass
class MtpLoss:
    """The loss of D modules, under the names of the model's output.

    Attributes:
        mtp_loss: 1/D sum_k L^k.
        mtp_depth_losses: [D], L^k.
        mtp_correct, mtp_targets: [D], how many targets were each module's likeliest token, and how many there were.
    """

    mtp_loss: torch.Tensor | None = None
    mtp_depth_losses: torch.Tensor | None = None
    mtp_correct: torch.Tensor | None = None
    mtp_targets: torch.Tensor | None = None


def mtp_loss(
    states: tuple[torch.Tensor, ...],
    head: nn.Module,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    detached: bool = False,
    **kwargs,
) -> MtpLoss:
    r"""L^k = -1/N sum over its targets of log P^k(t_{i+k+1}) (V3 report eq. 24), N the targets of the next-token loss
    (in the optimizer's whole batch, with num_items_in_batch).

    Args:
        states: h^k [B, T, d] of each module.
        head: the output head.
        detached: the head gets no gradient.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    items = (shift_labels != ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    items = items.to(states[0].device) if torch.is_tensor(items) else items
    losses, correct, counts = [], [], []
    for k, hidden_BTd in enumerate(states, start=1):
        targets = further_targets(k, shift_labels, attention_mask, position_ids, ignore_index)
        total, right = summed_cross_entropy(hidden_BTd, head, targets, ignore_index, detached)
        losses.append(total.to(states[0].device) / items)
        correct.append(right)
        counts.append((targets != ignore_index).sum())
    depth_losses = torch.stack(losses)
    return MtpLoss(depth_losses.mean(), depth_losses.detach(), torch.stack(correct), torch.stack(counts))


# -- drafting ----------------------------------------------------------------------------------------------------------


@dataclass
class DraftReport:
    """What drafting brought in one call of `generate(use_mtp=True)`.

    Attributes:
        steps: forwards of the model after the prompt's.
        drafted, accepted: tokens.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_step(self) -> float:
        """Tokens written per forward of the model; 1 without drafting."""
        return 1 + self.accepted / max(self.steps, 1)


class DraftCache(LatentCache):
    """What one module has read: the states of its one attention layer, whatever that layer's number is."""

    def __init__(self):
        Cache.__init__(self, layers=[GrowingLayer()])

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, 0, *args, **kwargs)


class Drafter(CandidateGenerator):
    """Drafts tokens with the model's own modules, for transformers' assisted decoding, which verifies them.

    When the model has read t_0..t_{n-1} and t_n is chosen, module 1 reads h_{n-1} with t_n and drafts t_{n+1}, module 2
    reads module 1's output with t_{n+1} and drafts t_{n+2}, and so on. Beyond D tokens the last module goes on from its
    own output, one position further each time. A module's state at position i is final once t_{i+k} is chosen; later
    ones rest on drafts, are cropped from its cache, and made again when the true token is there.

    Args:
        model: a NanoDeepSeekForCausalLM with modules.
        depth: tokens to draft at a time.
        generation_config, logits_processor: of this call of `generate`.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_last_hidden_state": True}

    def __init__(self, model, depth: int, generation_config, logits_processor=None):
        self.model, self.depth, self.processor = model, depth, logits_processor
        self.modules = model.model.predictors
        self.caches = [DraftCache() for _ in self.modules]
        self.samples = generation_config.do_sample
        self.longest = min(generation_config.max_length, model.config.position_limit)
        self.report = DraftReport()
        self.first: int | None = None  # position of the first token that the modules have read
        # Of each module, the states before it that it has not read yet, though they are final.
        self.unread: list[torch.Tensor | None] = [None] * len(self.modules)

    def get_candidates(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs):
        """transformers' interface: [1, n + 1] chosen tokens -> the same with drafts behind, and the drafts' logits."""
        chosen = input_ids.shape[1]
        depth = min(self.depth, self.longest - chosen - 1)
        if is_first_iteration or depth < 1:  # the model has to read the prompt first; or this is the last token
            return input_ids, None
        hidden = model_outputs.last_hidden_state
        if self.first is None:
            self.first = chosen - 1 - hidden.shape[1]
        else:
            hidden = hidden[:, : n_last_matches + 1]
        tokens, logits, padding = input_ids, [], model_kwargs.get("attention_mask")
        outputs: list[torch.Tensor] = []
        for j in range(1, depth + 1):
            k = min(j, len(self.modules)) - 1
            if j <= len(self.modules):
                fresh = hidden if j == 1 else outputs[-1]
                states = fresh if self.unread[k] is None else torch.cat((self.unread[k], fresh), dim=1)
            else:
                states = outputs[-1][:, -1:]
            outputs.append(self.read(k, states, tokens, padding))
            logits.append(self.logits(outputs[-1][:, -1:], tokens))
            tokens = torch.cat((tokens, self.choose(logits[-1])), dim=1)
        self.forget(outputs, chosen)
        self.report.drafted += depth
        return tokens, torch.stack(logits, dim=1)

    def read(self, k: int, states: torch.Tensor, tokens: torch.Tensor, padding) -> torch.Tensor:
        """Module k + 1 on `states`, each with the token it predicts from; the last of `tokens` is the last state's."""
        cache, count = self.caches[k], states.shape[1]
        start = self.first + cache.get_seq_length()
        position_ids = torch.arange(start, start + count, device=tokens.device)[None]
        mask = None
        if padding is not None and padding.shape[-1] and not padding.all():
            mask = F.pad(padding, (0, max(0, start + count - padding.shape[1])), value=1)[:, : start + count]
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
            mask = mask[:, self.first :]
        ahead = tokens[:, -count:]
        return self.model.model.predict_further(self.modules[k], states, ahead, position_ids, mask, cache)

    def logits(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[1, V], after the processors that the model's own logits go through."""
        scores = self.model.lm_head(state)[:, 0].float().to(tokens.device)
        return self.processor(tokens, scores) if self.processor else scores

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.samples:
            return torch.multinomial(logits.softmax(-1), num_samples=1)
        return logits.argmax(-1, keepdim=True)

    def forget(self, outputs: list[torch.Tensor], chosen: int):
        """Crops what rests on drafts, and keeps the final states that the next module has not read."""
        # t_0..t_n are chosen, n + 1 = `chosen`: of module k + 1 the positions with i + k + 1 <= n are final.
        lengths = [max(0, chosen - 1 - k - self.first) for k in range(len(self.modules))]
        for k, (cache, length) in enumerate(zip(self.caches, lengths)):
            end = self.first + cache.get_seq_length()  # of what was read, further rounds of the last module included
            if k + 1 < min(len(outputs), len(self.modules)):
                start = end - outputs[k].shape[1]
                self.unread[k + 1] = outputs[k][:, self.first + lengths[k + 1] - start : self.first + length - start]
            if cache.get_seq_length() > length:
                cache.crop(length - cache.get_seq_length())

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        """transformers' interface: how many of the last drafts were accepted. The prompt's forward had none."""
        if self.first is not None:
            self.report.steps += 1
            self.report.accepted += int(num_matches)
