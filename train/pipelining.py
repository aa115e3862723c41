"""A model cut into stages on several processes, trained by torch's pipeline schedules: `Pipeline`.

A stage holds some decoder layers. The first has the embedding; the last has the last norm, the head, multi-token
prediction's modules and, for these or a tied head, the embedding too. Positions, padding and labels go to every stage,
which makes its own masks and rotations of them; from stage to stage go the hidden states and two running sums, of the
balance and the indexers' losses, so that the last stage has the whole loss and its backward reaches every layer.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import (
    ScheduleDualPipeV,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from modeling_nanodeepseek import NanoDeepSeekForCausalLM, update_expert_bias
from modeling_nanodeepseek.balancing import ExpertLoad, routers
from modeling_nanodeepseek.indexer import IndexerObjective
from modeling_nanodeepseek.losses import linear_cross_entropy
from modeling_nanodeepseek.masks import masks, real_token_mask
from modeling_nanodeepseek.modeling_nanodeepseek import target_weights
from modeling_nanodeepseek.moe import TopkRouter, sequence_balance_loss
from modeling_nanodeepseek.mtp import all_further, mtp_loss

from .faults import non_finite_gradients, watch_outputs


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule of torch: its class, stages per process, and whether these lie as a V (0 1 2 3 3 2 1 0)."""

    schedule: type
    stages_per_rank: int = 1

    @property
    def is_v(self) -> bool:
        return self.stages_per_rank == 2


SCHEDULES = {
    "1f1b": ScheduleKind(Schedule1F1B),
    "zb1p": ScheduleKind(ScheduleInterleavedZeroBubble),  # which with one stage per process is ZB1P
    "zbv": ScheduleKind(ScheduleZBVZeroBubble, 2),
    "dualpipev": ScheduleKind(ScheduleDualPipeV, 2),
}


def bubble(schedule: str, stages: int, forward: float, backward: float, weight: float, pair: float) -> float:
    """The time that the process that takes longest idles in a step, whatever the number of micro-batches.

    1f1b (PP-1)(F+B); zb1p (PP-1)(F+B-2W); dualpipev (PP/2-1)(F&B+B-3W) (V3 report table 2, whose DualPipe has the same
    bubble on PP processes); zbv 0, for F = B-W = W (arXiv:2401.10241 section 6).

    Args:
        stages: PP; with two per process it is twice their number.
        forward, backward, weight, pair: of one stage and micro-batch F, B (all of the backward), W (its part for the
            weights) and F&B (a forward and a backward as one, overlapped or not).
    """
    return {
        "1f1b": (stages - 1) * (forward + backward),
        "zb1p": (stages - 1) * (forward + backward - 2 * weight),
        "zbv": 0.0,
        "dualpipev": (stages / 2 - 1) * (pair + backward - 3 * weight),
    }[schedule]


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """The stages of one process, in their order."""
    return [rank, 2 * ranks - 1 - rank] if SCHEDULES[schedule].is_v else [rank]


def split_layers(layers: int, further: int, stages: int, sizes: list[int] | None = None) -> list[range]:
    """The decoder layers of each stage: `sizes` of them, or evenly, modules of multi-token prediction (`further`, on
    the last stage) counted as layers; what is left over goes to the middle, as first and last stage have more to do.

    Raises: ValueError for sizes that do not add up, and for a stage that would have no layer.
    """
    if sizes is None:
        share, rest = divmod(layers + further, stages)
        sizes = [share] * stages
        middle = sorted(range(stages), key=lambda i: abs(i - (stages - 1) / 2))
        for i in middle[:rest]:
            sizes[i] += 1
        sizes[-1] -= further
        while sizes[-1] < 1 and max(sizes) > 1:  # more modules than a stage's share
            sizes[sizes.index(max(sizes))] -= 1
            sizes[-1] += 1
    if len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1:
        raise ValueError(
            f"pipeline.layers={sizes} does not cut {layers} decoder layers into {stages} stages: "
            f"{stages} numbers of at least 1 that add up to {layers} do"
        )
    ends = [sum(sizes[: i + 1]) for i in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes)]


class Stage(nn.Module):
    """Some layers of a model, with what comes before the first or after the last one. The modules are the model's own.

    Arguments of forward: hidden states [B, T, d] and sums [2] of the stage before, or (first) anything; of the
    micro-batch input_ids, labels, position_ids, and attention_mask or None, each [B, T].
    -> the same two of this stage, or (last) the loss.
    """

    def __init__(self, model: NanoDeepSeekForCausalLM, layers: range, first: bool, last: bool, autocast: bool = False):
        super().__init__()
        decoder = model.model
        self.config, self.first, self.last, self.autocast = model.config, first, last, autocast
        self.wanted = decoder.further_losses()
        self.predicts = last and any(p.requires_grad for module in decoder.predictors for p in module.parameters())
        self.embed_tokens = decoder.embed_tokens if first or self.predicts else None
        self.layers = nn.ModuleList(decoder.layers[i] for i in layers)
        self.rotary_emb = decoder.rotary_emb
        self.norm, self.lm_head = (decoder.norm, model.lm_head) if last else (None, None)
        self.predictors = nn.ModuleList(decoder.predictors if last else ())
        self.items = 1  # targets in the whole batch
        self.reports: list[dict[str, torch.Tensor]] = []  # of each micro-batch, on the last stage
        self.routing, self.index_losses = [], []  # what this forward's routers and indexers gave
        for module in self.modules():
            if isinstance(module, TopkRouter):
                module.register_forward_hook(lambda _, args, output: self.routing.append(output[0]))
            elif isinstance(module, IndexerObjective):
                module.register_forward_hook(lambda _, args, output: self.index_losses.append(output))

    def forward(self, *received, input_ids, labels, position_ids, attention_mask=None):
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            return self.run(*received, ids=input_ids, labels=labels, places=(attention_mask, position_ids))

    def run(self, *received, ids, labels, places):
        config = self.config
        self.routing, self.index_losses = [], []
        embeds = None if self.embed_tokens is None else self.embed_tokens(ids)
        hidden, sums = (embeds, embeds.new_zeros(2, dtype=torch.float32)) if self.first else received
        kwargs = {}
        if "index_loss" in self.wanted:
            kwargs["index_loss_weight"] = target_weights(labels, num_items_in_batch=self.items)
        mask, kwargs = masks(config, hidden, *places, None, **kwargs)
        kwargs |= {"attention_mask": mask, "position_embeddings": self.rotary_emb(hidden, places[1])}
        kwargs["position_ids"] = places[1]
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        if not self.last:
            self.count(places[0], ids.shape[1])
            return hidden, sums + self.own_losses(hidden, labels, places[0])
        hidden = self.norm(hidden)
        detached = self.config.mtp_detach_trunk
        further = all_further(self.predictors, hidden, embeds, detached, **kwargs) if self.predicts else ()
        self.count(places[0], ids.shape[1])
        sums = sums + self.own_losses(hidden, labels, places[0])
        return self.loss(hidden, further, sums, labels, *places)

    def own_losses(self, hidden, labels, attention_mask) -> torch.Tensor:
        """The balance loss and the indexers' of this stage's layers, [2], before their factors."""
        balance = index = hidden.new_zeros((), dtype=torch.float32)
        if "balance_loss" in self.wanted and self.routing:
            shares = (labels[:, 1:] != -100).sum(-1).float() / self.items
            real_tokens = real_token_mask(attention_mask, labels.shape[1])
            balance = sequence_balance_loss(tuple(self.routing), self.config, shares, real_tokens)
        if self.index_losses:
            index = sum(self.index_losses)
        return torch.stack((balance, index))

    def loss(self, hidden, further, sums, labels, attention_mask, position_ids) -> torch.Tensor:
        """The micro-batch's part of the whole batch's loss, as NanoDeepSeekForCausalLM puts it together."""
        config = self.config
        ce_loss = linear_cross_entropy(hidden, self.lm_head, labels, num_items_in_batch=self.items)
        report = {"ce_loss": ce_loss}
        loss = ce_loss
        for name, total in zip(("balance_loss", "index_loss"), sums):
            if name in self.wanted:
                loss = loss + getattr(config, self.wanted[name]) * total
                report[name] = total
        if further and config.dsa_stage != "warmup":
            places = {"attention_mask": attention_mask, "position_ids": position_ids}
            settings = {"num_items_in_batch": self.items, "detached": config.mtp_detach_trunk}
            predicted = mtp_loss(tuple(further), self.lm_head, labels, **places, **settings)
            loss = loss + config.mtp_loss_coef * predicted.mtp_loss
            report |= {name: value for name, value in vars(predicted).items() if name != "mtp_loss"}
        self.reports.append({name: value.detach() for name, value in (report | {"loss": loss}).items()})
        return loss

    def count(self, attention_mask, length: int):
        """Counts each expert's load, as NanoDeepSeekModel's forward does."""
        if not self.training or not torch.is_grad_enabled() or self.config.dsa_stage == "warmup":
            return
        for module in (*self.layers, *(self.predictors if self.predicts else ())):
            for router in module.modules():
                if isinstance(router, TopkRouter):
                    router.count(real_token_mask(attention_mask, length))


class Part(nn.ModuleList):
    """The stages of one process, as an optimizer asks for the parts of a model."""

    def __init__(self, stages: list[Stage], model: NanoDeepSeekForCausalLM):
        super().__init__(stages)
        self._ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}  # no children

    def get_input_embeddings(self) -> nn.Module:
        return self._ends["embedding"]

    def get_output_embeddings(self) -> nn.Module:
        return self._ends["head"]


def check_torch(schedule: str):
    """Raises ValueError for a split backward before torch 2.13, which adds up a weight's gradient wrongly where it is
    used twice."""
    if schedule != "1f1b" and torch.__version__ < (2, 13):
        raise ValueError(
            f"pipeline.schedule={schedule!r} needs torch 2.13 or later, and this is {torch.__version__}, whose split "
            f"backward sums the gradient of a weight that is used twice wrongly; '1f1b' has no such backward"
        )


def check_microbatches(schedule: str, microbatches: int, stages: int, ranks: int):
    """Raises ValueError where the schedule has too few micro-batches to run, or ZB1P a number it cannot divide."""
    least = stages if schedule != "zbv" else 1
    if microbatches < least:
        raise ValueError(
            f"pipeline.schedule={schedule!r} on {ranks} processes needs at least {least} micro-batches "
            f"(trainer.gradient_accumulation_steps), and there are {microbatches}"
        )
    if schedule == "zb1p" and microbatches % ranks:
        raise ValueError(
            f"pipeline.schedule='zb1p' needs a multiple of the {ranks} processes as micro-batches "
            f"(trainer.gradient_accumulation_steps), not {microbatches}"
        )


class Pipeline:
    """This process's stages of a model, and a training step of all of them. Every process calls every method.

    The model is cut in place: parameters that this process has no use for move to the meta device, until `whole`
    brings them back from where they are.

    Args:
        model: the same on every process of the default group, in training mode.
        schedule: a name of `SCHEDULES`.
        microbatches, rows, length: a batch of `microbatches * rows` rows of `length` tokens.
        sizes: decoder layers of each stage; default: evenly.
        autocast: bf16.

    Raises: ValueError for a cut or a number of micro-batches that the schedule cannot run, or a torch that is too old
        for it.
    """

    def __init__(
        self,
        model: NanoDeepSeekForCausalLM,
        schedule: str,
        microbatches: int,
        rows: int,
        length: int,
        sizes: list[int] | None = None,
        autocast: bool = False,
    ):
        kind, (rank, ranks) = SCHEDULES[schedule], (dist.get_rank(), dist.get_world_size())
        stages = ranks * kind.stages_per_rank
        check_torch(schedule)
        check_microbatches(schedule, microbatches, stages, ranks)
        config, device = model.config, model.device
        parts = split_layers(config.num_hidden_layers, config.num_nextn_predict_layers, stages, sizes)
        self.model, self.device, self.rank = model, device, rank
        self.last_rank = 0 if kind.is_v else ranks - 1
        mine = stages_of(rank, ranks, schedule)
        cut = [Stage(model, parts[i], first=i == 0, last=i == stages - 1, autocast=autocast) for i in mine]
        self.part = Part(cut, model)
        self.shared = self._shared_weight()
        self._drop_others()
        hidden = torch.empty(rows, length, config.hidden_size, device=device)
        received = hidden.requires_grad_(config.dsa_stage != "warmup"), torch.empty(2, device=device).requires_grad_()
        ids, loss = torch.empty(rows, length, dtype=torch.long, device=device), torch.empty((), device=device)
        self.stages = [
            PipelineStage(
                module,
                i,
                stages,
                device,
                input_args=(ids,) if i == 0 else received,  # shapes that are given are not found out by a forward
                output_args=loss.requires_grad_() if i == stages - 1 else received,
            )
            for i, module in zip(mine, self.part)
        ]
        settings = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        self.schedule = kind.schedule(
            self.stages if kind.is_v or schedule == "zb1p" else self.stages[0], microbatches, **settings
        )
        # Groups are made by all processes, in the same order.
        self.ends = dist.new_group([0, self.last_rank]) if self.last_rank else None
        self.alone, _ = dist.new_subgroups(1)

    def _shared_weight(self) -> nn.Parameter | None:
        """The embedding's weight, if the last stage uses it too."""
        tied = self.model.lm_head.weight is self.model.model.embed_tokens.weight
        predicts = any(p.requires_grad for module in self.model.model.predictors for p in module.parameters())
        return self.model.model.embed_tokens.weight if tied or predicts else None

    def _drop_others(self):
        kept = {id(parameter) for parameter in (*self.part.parameters(), *self.part.buffers())}
        decoder = self.model.model
        for module in (decoder.embed_tokens, *decoder.layers, decoder.norm, self.model.lm_head):
            if not any(id(tensor) in kept for tensor in (*module.parameters(), *module.buffers())):
                module.to("meta")

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward and backward of a whole batch, given to every process; gradients are added to `.grad`.

        Returns: the loss and its terms, summed over the micro-batches; {} on processes without the last stage.
        """
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        for module in self.part:
            module.items, module.reports = max(1, int((batch["labels"][:, 1:] != -100).sum())), []
        first = [batch["input_ids"]] if self.part[0].first else []
        last = self.part[-1].last
        self.schedule.step(*first, target=batch["labels"] if last else None, return_outputs=False, **batch)
        self._add_shared_gradients()
        reports = self.part[-1].reports
        return {name: torch.stack([report[name] for report in reports]).sum(0) for name in reports[0]} if last else {}

    def _add_shared_gradients(self):
        """First and last stage each have a part of the embedding's gradient; in a V they have one `.grad`."""
        if self.shared is None or self.ends is None or self.rank not in (0, self.last_rank):
            return
        if self.shared.requires_grad:
            if self.shared.grad is None:
                self.shared.grad = torch.zeros_like(self.shared)
            dist.all_reduce(self.shared.grad, group=self.ends)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This process's own, by their names in the model; the last stage's copy of the embedding counts as the first
        one's."""
        mine = {id(parameter) for parameter in self.part.parameters()}
        copied = self.shared if self.rank and self.rank == self.last_rank else None
        return [(n, p) for n, p in self.model.named_parameters() if id(p) in mine and p is not copied]

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """The norm of all gradients, over all processes, as torch.nn.utils.get_total_norm has it on one."""
        grads = [p.grad for _, p in self.parameters() if p.grad is not None]
        squares = torch.stack([grad.float().square().sum() for grad in grads] or [torch.zeros((), device=self.device)])
        total = squares.sum(dtype=torch.float64).float()
        dist.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def clip_gradients(self, norm: float, most: float):
        """Scales the gradients, whose norm this is, so that it is at most that, as torch.nn.utils.clip_grad_norm_."""
        scale = min(1.0, most / (norm + 1e-6))
        for parameter in self.part.parameters():
            if parameter.grad is not None:
                parameter.grad *= scale

    def first_non_finite(self, batch: dict[str, torch.Tensor]) -> str | None:
        """The module whose output, in this step done again, is the first that holds NaN or infinity; None if none
        does. Of several processes' the one that comes first in the model: from there on it spreads."""
        with watch_outputs(self.model) as found:
            self.step(batch)
        places = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        first: list = [None] * dist.get_world_size()
        dist.all_gather_object(first, found[0] if found else None)
        return min(filter(None, first), key=lambda told: places[told.split()[0]], default=None)

    def non_finite_gradients(self) -> list[str]:
        """Parameters of all processes whose gradient holds NaN or infinity, in the order of the model."""
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, non_finite_gradients(self.parameters()))
        found = {name for part in parts for name in part}
        return [name for name, _ in self.model.named_parameters() if name in found]

    def update_expert_bias(self, gamma: float, centre: bool) -> ExpertLoad | None:
        """Loss-free balancing of this process's layers. Each process sees the whole batch, so nothing is summed."""
        return update_expert_bias(self.part, gamma, centre, group=self.alone)

    def all_loads(self, load: ExpertLoad | None) -> ExpertLoad | None:
        """The loads of all processes' layers, in the order of the layers in the model."""
        places = {id(gate): i for i, gate in enumerate(routers(self.model))}
        mine = [places[id(gate)] for gate in routers(self.part)]
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, None if load is None else list(zip(mine, load.tokens.cpu(), load.bias.cpu())))
        layers = sorted((row for part in parts if part is not None for row in part), key=lambda row: row[0])
        return ExpertLoad(*(torch.stack(column) for column in list(zip(*layers))[1:])) if layers else None

    def from_last(self, report: dict) -> dict:
        """What the process of the last stage has, on every process."""
        box = [{name: value.cpu() for name, value in report.items()}]
        dist.broadcast_object_list(box, src=self.last_rank, device=self.device)
        return box[0]

    def whole(self) -> dict[str, torch.Tensor]:
        """All weights of the model, on the CPU of every process, under the model's own names."""
        mine = {name: tensor.cpu() for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        state: dict[str, torch.Tensor] = {}
        for rank in range(dist.get_world_size()):
            box = [mine if rank == self.rank else None]
            dist.broadcast_object_list(box, src=rank, device=self.device)
            state = box[0] | state
        return state

    def restore(self):
        """Makes the model whole again, on every process."""
        self.model.load_state_dict(self.whole(), assign=True)
        self.model.tie_weights()
        self.model.to(self.device)
