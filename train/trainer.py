"""The Trainer: transformers' own, with this project's optimizer, schedule, exact evaluation and log."""

import math
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import RandomSampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from modeling_nanodeepseek import LoadBalancingCallback
from modeling_nanodeepseek.mtp import further_targets
from modeling_nanodeepseek.remote_code import LICENSE
from modeling_nanodeepseek.saving import replacing

from .accounting import training_flops_per_token
from .card import model_card
from .checkpointing import AtomicCheckpoints
from .expert_load import ExpertLoadLog
from .faults import check_finite
from .fp8 import convert_no_further
from .gradients import gradient_norms
from .hardware import matmul_peak, sum_dtype
from .optimizers import build_optimizer
from .parallel import settle_fsdp2, shard_on_cpu
from .recipe import MtpSection, Recipe, ScheduleSection
from .steps import StreamedSteps, filled, rows_per_step


def lr_factor(progress: float, schedule: ScheduleSection) -> float:
    """The learning-rate factor at `progress` in 0..1; a warm-up in steps (`warmup_steps`) is not part of it."""
    if schedule.warmup_steps is None and progress < schedule.warmup:
        return progress / schedule.warmup
    return (trapezoid if schedule.kind == "trapezoid" else v3)(progress, schedule)


def trapezoid(progress: float, schedule: ScheduleSection) -> float:
    """Constant, then linear decay to `final`."""
    if progress <= 1 - schedule.decay or not schedule.decay:
        return 1.0
    left = max(0.0, 1 - progress) / schedule.decay
    return schedule.final + (1 - schedule.final) * left


def v3(progress: float, schedule: ScheduleSection) -> float:
    """Constant, cosine to `floor`, constant, and the last stretch at `tail` (V3 report section 4.2)."""
    if progress <= schedule.constant_until:
        return 1.0
    if progress < schedule.cosine_until:
        done = (progress - schedule.constant_until) / (schedule.cosine_until - schedule.constant_until)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * done)) / 2
    return schedule.floor if progress <= schedule.tail_from else schedule.tail


class Clock(TrainerCallback, ExportableState):
    """Seconds spent training, kept across a resume, and the end of the run when they are used up."""

    def __init__(self, max_seconds: float | None = None, spent: float = 0.0):
        self.max_seconds = max_seconds
        self.spent = spent
        self._last: float | None = None
        self._began: tuple[float, float] | None = None  # the time, and `spent`, when training began

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run's state holds what its checkpoint saved; transformers itself restores it on request only.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.spent = max(self.spent, saved["args"]["spent"])
        self._began = time.perf_counter(), self.spent

    def on_step_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.spent += time.perf_counter() - self._last
        if self.max_seconds is None:
            return
        if args.world_size > 1:
            # One clock for all: ranks that stopped at different steps, or stepped at different rates, would be lost.
            spent = torch.tensor(self.spent, dtype=torch.float32, device=args.device)
            torch.distributed.broadcast(spent, src=0)
            self.spent = spent.item()
        control.should_training_stop |= self.spent >= self.max_seconds

    def seconds_left(self, steps: int, seconds_per_step: float) -> float:
        """Until the run ends, by its steps or by its time limit, whichever comes first.

        Steps and limit are of training; what evaluating, saving and reading took beside it since the run began is
        expected to go on in proportion.
        """
        training = steps * seconds_per_step
        if self.max_seconds is not None:
            training = min(training, max(0.0, self.max_seconds - self.spent))
        if self._began is None or self.spent <= self._began[1]:
            return training
        return training * max(1.0, (time.perf_counter() - self._began[0]) / (self.spent - self._began[1]))

    def state(self) -> dict:
        return {"args": {"max_seconds": self.max_seconds, "spent": self.spent}, "attributes": {}}


class LineCallback(ProgressCallback):
    """transformers' progress bars (none with `disable_tqdm`), and each log entry as one dense line above them."""

    FORMATS = {
        "loss": "loss {:.4f}",
        "ce_loss": "ce {:.4f}",
        "balance_loss": "balance {:.3f}",
        "index_kl": "index KL {:.4f} per layer",
        "mtp_loss_1": "mtp {:.4f}",
        "mtp_accuracy_1": "second token {:.1%}",
        "grad_norm": "|g| {:.2f}",
        "learning_rate": "lr {:.2e}",
        "expert_max_violation": "maxvio {:.2f}",
        "expert_load_entropy": "entropy {:.3f}",
        "expert_dead_share": "dead {:.1%}",
        "tokens_per_second": "{:,.0f} tok/s",
        "flop_utilisation": "{:.0%} of peak FLOP/s",
        "eval_loss": "validation loss {:.4f}",
        "eval_bits_per_byte": "validation {:.4f} bits per byte",
        "eval_index_recall": "index recall {:.4f}",
        "eval_mtp_accuracy_1": "second token {:.1%}",
    }

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            return super().on_train_begin(args, state, control, **kwargs)
        self.training_bar, self.current_step = tqdm(disable=True), 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        parts = [text.format(float(logs[key])) for key, text in self.FORMATS.items() if key in logs]
        parts += [f"{timedelta(seconds=round(logs['seconds_left']))} left"] if "seconds_left" in logs else []
        line = f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts)
        if parts:
            (self.training_bar.write if self.training_bar is not None else print)(line)


class MtpCallback(TrainerCallback):
    """Sets the weight of multi-token prediction's loss before each step, by the share of the run that is over."""

    def __init__(self, section: MtpSection, progress: Callable[[float], float]):
        self.section, self.progress = section, progress

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        done = self.progress(state.global_step / max(state.max_steps, 1))
        model.config.mtp_loss_coef = self.section.coef if done < self.section.switch_at else self.section.final_coef


class NanoDeepSeekTrainer(StreamedSteps, AtomicCheckpoints, Trainer):
    """Trainer for a recipe.

    Adds: the recipe's optimizer and schedule; loss-free balancing; the weight of multi-token prediction; every loss
    term, each module's accuracy, the experts' load (`expert_load.py`), the gradients' norms by part (`gradients.py`),
    tokens per second, FLOP utilisation and the time left in the log; `evaluate()` with the exact mean loss and bits per
    byte; checkpoints that are whole or not there (`checkpointing.py`).

    Args:
        recipe: the run.
        validation_bytes: length of the validation documents in UTF-8 bytes, for bits per byte.
    """

    def __init__(self, *args, recipe: Recipe, validation_bytes: int | None = None, **kwargs):
        self.recipe = recipe
        self.validation_bytes = validation_bytes
        super().__init__(*args, **kwargs)
        self.stream_steps(recipe.schedule.batch_ramp, recipe.data.sequence_length)
        balance = recipe.balance
        self.balancing = LoadBalancingCallback(lambda done: balance.step(self.progress(done)), balance.centre)
        self.load_log = ExpertLoadLog(self.balancing, self.model)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        for callback in (Clock(recipe.schedule.max_seconds), self.balancing, self.load_log, LineCallback()):
            self.add_callback(callback)
        if recipe.mtp is not None:
            self.add_callback(MtpCallback(recipe.mtp, self.progress))
        # Since the last log: sums of the loss terms, micro-batches' tokens, optimizer steps, and when it was.
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._tokens = self._steps = 0
        self._since: float | None = None
        self._gradient_norms: dict[str, float] = {}
        self._batches: list[tuple[dict, torch.Tensor]] = []  # inputs and losses since the last step
        self._flops_per_token = training_flops_per_token(self.model.config, recipe.data.sequence_length)
        dtype = torch.float32 if self.args.mixed_precision == "no" else torch.bfloat16
        # FLOP/s of all processes' devices in matrix products, measured.
        self.peak = matmul_peak(self.args.device, dtype) * self.args.world_size

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        convert_no_further(self.accelerator)
        shard_on_cpu(self)
        settle_fsdp2(self)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate wraps a model's forward in autocast, but not under FSDP2 (see `settle_fsdp2`)."""
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    @property
    def clock(self) -> Clock:
        """The clock in use; transformers may replace callbacks when it resumes."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))

    def progress(self, share_of_steps: float) -> float:
        """Share of the run that is over: by tokens or by time, whichever is further. Without a ramp of the batch the
        share of tokens is that of steps."""
        limit = self.recipe.schedule.max_seconds
        share = share_of_steps if self.plan is None else self.plan.share(share_of_steps)
        return max(share, self.clock.spent / limit if limit else 0.0)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) not in (RandomSampler, SequentialSampler):
            return sampler
        rows = sampler.data_source
        count = filled(len(rows), rows_per_step(self.args))
        if type(sampler) is SequentialSampler:
            return [index % len(rows) for index in range(count)]
        return RandomSampler(rows, num_samples=count, generator=sampler.generator)

    def create_optimizer(self, model=None):
        if self.is_deepspeed_enabled and self.recipe.optimizer.name == "muon":
            raise ValueError(
                "optimizer.name='muon' is not possible with DeepSpeed, which steps flat pieces of parameters and not "
                "matrices: use optimizer.name=adamw, or FSDP2 (configuration/accelerate/fsdp2.yaml)"
            )
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.recipe.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            schedule = self.recipe.schedule
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                # In the middle of a step: neither the first nor the last has a rate of 0.
                lambda step: (
                    min(1.0, (step + 1) / (schedule.warmup_steps or 1))
                    * lr_factor(self.progress((step + 0.5) / num_training_steps), schedule)
                ),
            )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._since = self.clock.spent if self._since is None else self._since
            self._tokens += inputs["input_ids"].numel() * self.args.world_size
            self._steps += self.accelerator.sync_gradients
            for term in ("ce_loss", "balance_loss", "index_loss", "mtp_depth_losses", "mtp_correct", "mtp_targets"):
                if outputs.get(term) is not None:
                    self._terms.setdefault(term, []).append(outputs[term].detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not inputs:  # an empty micro-batch of a smaller step
            return loss
        self._batches.append((inputs, loss))
        if self.accelerator.sync_gradients:  # before what is not finite reaches a weight; DeepSpeed skips such a step
            batches, self._batches = self._batches, []
            check_finite(self.accelerator, model, batches, self.state.global_step + 1, self._prepare_inputs)
            if self._logs_gradients():  # before gradients are clipped
                scaler = self.accelerator.scaler
                self._gradient_norms = gradient_norms(self.model, 1.0 if scaler is None else scaler.get_scale())
        return loss

    def _logs_gradients(self) -> bool:
        """Whether the step under way will be logged, with gradients that can be told apart: each a whole one or a
        DTensor, which FSDP 1 has not. With logging_strategy="epoch" that is not known beforehand."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            return False
        step = self.state.global_step + 1
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0
        return by_steps or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self._steps:
            for term, values in self._terms.items():
                # Micro-batches and ranks hold shares of their batch's mean, so they add up.
                totals = self.accelerator.reduce(torch.stack(values).sum(0), reduction="sum").tolist()
                logs[term] = (
                    [total / self._steps for total in totals] if isinstance(totals, list) else totals / self._steps
                )
            if "index_loss" in logs:  # which sums over layers, as in the loss
                learning = [p for n, p in self.model.named_parameters() if ".indexer.wk." in n and p.requires_grad]
                logs["index_kl"] = logs["index_loss"] / len(learning)
            self._name_by_depth(logs)
            seconds = max(self.clock.spent - self._since, 1e-9)
            logs["tokens_per_second"] = self._tokens / seconds
            logs["flop_utilisation"] = logs["tokens_per_second"] * self._flops_per_token / self.peak
            left = self.state.max_steps - self.state.global_step
            logs["seconds_left"] = self.clock.seconds_left(left, seconds / self._steps)
            logs |= self.load_log.metrics() | self._gradient_norms
            self._terms, self._tokens, self._steps, self._since = {}, 0, 0, None
            self._gradient_norms = {}
        super().log(logs, *args, **kwargs)

    @staticmethod
    def _name_by_depth(logs: dict):
        """What was summed for each module, as `mtp_loss_1`, `mtp_accuracy_1`, ...: a log holds numbers alone."""
        losses, correct, targets = (logs.pop(f"mtp_{name}", []) for name in ("depth_losses", "correct", "targets"))
        for k, (loss, right, all_) in enumerate(zip(losses, correct, targets), start=1):
            logs |= {f"mtp_loss_{k}": loss, f"mtp_accuracy_{k}": right / max(all_, 1e-9)}

    def get_eval_dataloader(self, eval_dataset=None):
        """Every row is evaluated, also where `dataloader_drop_last` drops some in training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean cross-entropy per predicted token in nats, and bits per byte of the validation text.

        bits per byte = (sum of -log2 p of every predicted token) / (bytes of the documents); no term but the CE.
        index_recall, of a model that selects keys or learns to: the share of the dense attention's mass that the
        selection holds, the mean over layers and over the predicting tokens that see more keys than are selected.
        mtp_accuracy_k: how often the true token is likeliest to module k of multi-token prediction, of its targets.
        """
        model = self._wrap_model(self.model, training=False)
        model.eval()
        config = self.model.config
        selects = config.index_topk is not None and config.dsa_stage != "dense"
        depth = config.num_nextn_predict_layers
        extras = {"output_index_recall": True} if selects else {}
        extras |= {"output_mtp_hidden_states": True} if depth else {}
        # nats, targets; right tokens and targets of each module; recall, tokens it is taken over
        sums = torch.zeros(4 + 2 * depth, dtype=torch.float64)
        batches = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = batches
        for batch in batches:
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            with self.compute_loss_context_manager():
                outputs = model(**batch, use_cache=False, **extras)
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            logits = outputs.logits.float().flatten(0, 1)
            losses = F.cross_entropy(logits, shifted.flatten(), reduction="none").view_as(shifted)
            terms = [losses, shifted != -100]
            for k, state in enumerate(outputs.mtp_hidden_states if depth else (), start=1):
                places = batch.get("attention_mask"), batch.get("position_ids")
                targets = further_targets(k, shifted, *places)
                terms += [self.model.lm_head(state).argmax(-1).to(targets.device) == targets, targets != -100]
            if selects:
                recall = torch.stack(outputs.index_recall).mean(0)
                counted = (shifted != -100) & ~recall.isnan()
                terms += [recall.masked_fill(~counted, 0.0), counted]
            rows = torch.stack([term.sum(-1, dtype=sum_dtype(term.device)) for term in terms], -1)
            sums[: len(terms)] += self.accelerator.gather_for_metrics(rows).sum(0).cpu()
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nats, targets, *further = sums.tolist()
        recall, counted = further[2 * depth :]
        metrics = {f"{metric_key_prefix}_loss": nats / max(targets, 1), f"{metric_key_prefix}_tokens": int(targets)}
        if counted:
            metrics[f"{metric_key_prefix}_index_recall"] = recall / counted
        for k in range(depth):
            right, all_ = further[2 * k : 2 * k + 2]
            metrics[f"{metric_key_prefix}_mtp_accuracy_{k + 1}"] = right / max(all_, 1)
        if self.validation_bytes and eval_dataset is None:
            metrics[f"{metric_key_prefix}_bits_per_byte"] = nats / math.log(2) / self.validation_bytes
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args, **kwargs):
        """Writes README.md into the output folder (`card.py`); transformers' own draft is not used."""
        if self.is_world_process_zero():
            with replacing(self.args.output_dir) as stage:
                model_card(self).save(stage / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # transformers moves config and weights up to what it uploads, and not the code that config.json names.
        if self.is_world_process_zero():
            folder = Path(checkpoint_folder)
            for file in (*folder.glob("*.py"), *folder.glob(LICENSE)):
                shutil.copyfile(file, Path(self.args.output_dir, file.name))
        super()._push_from_checkpoint(checkpoint_folder)
