"""How many sequences each step takes, and a Trainer whose steps may grow, fed by a stream of rows."""

import json
import math
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from modeling_nanodeepseek.stacking import CheckpointError

from .recipe import BatchRampSection
from .streams import RowStream

POSITION = "data_position.json"


def rows_per_step(args: TrainingArguments) -> int:
    """Of a whole step, over all processes and micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def filled(rows: int, step: int) -> int:
    """Rows of an epoch: up to a whole number of steps, the last of which takes rows a second time if need be. The same
    for every number of processes and of micro-batches, as long as a step has as many rows in all."""
    return math.ceil(rows / step) * step


class StepPlan:
    """Rows of every step of a run.

    Args:
        steps: of the run.
        unit: rows of one micro-batch over all processes.
        most: micro-batches of a whole step, of each process.
        ramp: how the steps grow; None for whole ones from the start.
        length: tokens of a row.

    Attributes:
        micro_batches: of each step, for each process.
        rows: that were taken before each step, and before the end: rows[s] after s steps.

    Raises: ValueError for a ramp that starts above the whole batch, or between two multiples of the unit.
    """

    def __init__(self, steps: int, unit: int, most: int, ramp: BatchRampSection | None, length: int):
        whole = unit * most
        if ramp is not None and (ramp.start > whole or ramp.start % unit):
            raise ValueError(
                f"schedule.batch_ramp.start={ramp.start} is not possible: it must be a multiple of the {unit} "
                f"sequences that all processes take at once, and at most {whole}, those of a whole step"
            )
        self.micro_batches: list[int] = []
        self.rows = [0]
        for _ in range(steps):
            size = whole
            if ramp is not None:
                size = min(whole, ramp.start + (whole - ramp.start) * self.rows[-1] * length / ramp.tokens)
            self.micro_batches.append(int(size // unit))
            self.rows.append(self.rows[-1] + self.micro_batches[-1] * unit)

    def share(self, share_of_steps: float) -> float:
        """Of the run's rows, those that its first steps take; of a step's half, half of them."""
        steps = len(self.micro_batches)
        done = min(steps, round(share_of_steps * steps, 6))
        step = int(done)
        part = (done - step) * (self.rows[step + 1] - self.rows[step]) if step < steps else 0
        return (self.rows[step] + part) / self.rows[-1]


class ShareAsEpoch(TrainerCallback):
    """Without an end to the data, `epoch` is the share of the steps that are done, also after a resume."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class StreamedSteps:
    """Goes in front of transformers' Trainer; a `RowStream` as train_dataset is then read from where a checkpoint was,
    and a step takes as many micro-batches as the plan says.

    Trainer wants gradient_accumulation_steps of them for each step. A smaller step has empty ones in front, which cost
    and count nothing; its loss is the mean over its own tokens, as that of any step.
    """

    plan: StepPlan | None = None
    _resumed: str | None = None  # the checkpoint whose generators' states are yet to be restored

    def stream_steps(self, ramp: BatchRampSection | None, length: int):
        """Makes the plan; to be called at the end of __init__."""
        if not isinstance(self.train_dataset, RowStream):
            return
        unit = self.args.train_batch_size * self.args.world_size
        self.plan = StepPlan(self.args.max_steps, unit, self.args.gradient_accumulation_steps, ramp, length)
        self.args.ignore_data_skip = True  # the stream goes to its place by itself
        self.add_callback(ShareAsEpoch())

    def train(self, *args, **kwargs):
        if self.plan is not None:
            self.train_dataset.go_to({"rows": 0})
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        if self.plan is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        count = self.plan.micro_batches[self.state.global_step]
        batches, items = super().get_batch_samples(epoch_iterator, count, device)
        if self._resumed is not None:  # not before: a new iterator draws a number, and an old one has drawn it
            super()._load_rng_state(self._resumed)
            self._resumed = None
        return [{} for _ in range(num_batches - count)] + batches, items

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if not inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> int:
        return super().floating_point_ops(inputs) if inputs else 0

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        if self.plan is not None and self.args.should_save:
            position = self.train_dataset.position(self.plan.rows[self.state.global_step])
            Path(output_dir, POSITION).write_text(json.dumps(position))

    def _load_rng_state(self, checkpoint: str | None):
        if checkpoint is None:
            return super()._load_rng_state(checkpoint)
        file = Path(checkpoint, POSITION)
        if self.plan is None:
            if file.is_file():
                raise CheckpointError(
                    f"{checkpoint!r} has a {POSITION}: its run streamed its data or had a schedule.batch_ramp, and "
                    "this one does neither; a resume needs what it had"
                )
            return super()._load_rng_state(checkpoint)
        self._resumed = checkpoint
        if not file.is_file():
            raise CheckpointError(
                f"{checkpoint!r} has no {POSITION}: its run did not stream its data, as this one does"
            )
        position, rows = json.loads(file.read_text()), self.plan.rows[self.state.global_step]
        if position["rows"] != rows:
            raise CheckpointError(
                f"{checkpoint!r} has taken {position['rows']} sequences by step {self.state.global_step}, and this run "
                f"would have taken {rows}: resume it with the batch sizes, accumulation and batch_ramp that it had"
            )
        self.train_dataset.go_to(position)
