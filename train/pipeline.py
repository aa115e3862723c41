r"""Pretraining with the layers spread over processes, by torch's pipeline schedules:

    torchrun --nproc_per_node 2 -m train.pipeline --config configuration/recipes/quickstart.yaml \
        pipeline.schedule=dualpipev trainer.per_device_train_batch_size=6 trainer.gradient_accumulation_steps=4 \
        trainer.eval_strategy=no

The recipe is that of `train.pretrain`, and so are the batches, the losses and what is saved: a step has
`gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` rows, on however many processes. Each
process keeps gradients and optimizer state of its own layers alone (`pipelining.py`).
"""

import json
import math
import os

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from transformers import TrainingArguments

from modeling_nanodeepseek.saving import replacing

from .faults import NonFiniteError, describe_gradients
from .fp8 import trains_in_fp8
from .optimizers import build_optimizer
from .pipelining import Pipeline, check_torch
from .pretrain import build_trainer, launch, run, training_arguments
from .recipe import PipelineSection, Recipe, recipe_from_command_line
from .steps import filled
from .trainer import NanoDeepSeekTrainer

# Trainer's settings that a pipeline does not honour otherwise, and what to do instead.
HONOURED = {
    "eval_strategy": (("no",), "the model is evaluated at the end"),
    "save_strategy": (("no", "steps"), "these replace the model in the output folder"),
    "logging_strategy": (("steps",), "a log is of steps"),
    "resume_from_checkpoint": ((None, False), "start anew from the saved weights by model.checkpoint"),
    "gradient_checkpointing": ((False,), "more stages or smaller micro-batches save memory"),
    "load_best_model_at_end": ((False,), "the last model is saved"),
    "torch_compile": ((False,), "stages run as they are"),
    "eval_on_start": ((False,), "the model is evaluated at the end"),
    "data_seed": ((None,), "rows are shuffled by trainer.seed"),
    "train_sampling_strategy": (("random",), "rows are shuffled by trainer.seed"),
    "dataloader_num_workers": ((0,), "the first process reads the rows for all"),
    "neftune_noise_alpha": ((None,), "embeddings are trained without noise"),
    "use_liger_kernel": ((False,), "stages run as they are"),
    "auto_find_batch_size": ((False,), "a step has one size"),
    "torch_empty_cache_steps": ((None,), "memory is kept"),
    "include_num_input_tokens_seen": (("no",), "a log has the tokens per second"),
    "enable_jit_checkpoint": ((False,), "a pipeline has no checkpoint to go on from"),
    "save_on_each_node": ((False,), "the first process saves the whole model"),
    "debug": (([],), "stages are not watched"),
}


def check(recipe: Recipe, args: TrainingArguments):
    """Raises ValueError for settings that a pipeline would not honour."""
    check_torch((recipe.pipeline or PipelineSection()).schedule)
    for field, (allowed, reason) in HONOURED.items():
        value = getattr(args, field, allowed[0])  # an earlier transformers may lack it
        if value not in allowed:
            shown = " or ".join(json.dumps(choice) for choice in allowed if choice is not None or len(allowed) == 1)
            value = json.dumps(getattr(value, "value", value))
            raise ValueError(f"trainer.{field}={value} is not possible in a pipeline, only {shown}: {reason}")
    if recipe.data.streaming or recipe.schedule.batch_ramp is not None:
        field = "data.streaming" if recipe.data.streaming else "schedule.batch_ramp"
        raise ValueError(
            f"{field} is not possible in a pipeline, whose steps have one size and known rows: leave it out"
        )
    if recipe.parallel.expert > 1:
        raise ValueError(f"parallel.expert={recipe.parallel.expert} is not possible in a pipeline: leave it out")
    if trains_in_fp8(recipe.precision):
        raise ValueError("precision='fp8' is not possible in a pipeline: use bf16, fp32 or auto")
    sharded = [
        f"{name}=true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"
    ]
    sharded += [f"trainer.{name}" for name in ("fsdp", "deepspeed") if getattr(args, name)]
    if sharded:
        raise ValueError(f"a pipeline is combined with no sharding ({sharded[0]}): start it by torchrun")
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ValueError("a pipeline runs in several processes: torchrun --nproc_per_node 2 -m train.pipeline ...")


class PipelineTrainer(NanoDeepSeekTrainer):
    """The Trainer of a recipe whose steps run in a pipeline. While it trains, each process has its own layers alone;
    before and after it has the whole model, which is evaluated and saved as ever."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(self.balancing)  # it would add up the loads of different layers
        self.section = self.recipe.pipeline or PipelineSection()
        self.rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def train(self, *args, **kwargs):
        args, state, handler = self.args, self.state, self.callback_handler
        self.model.train()
        pipeline = Pipeline(
            self.model,
            self.section.schedule,
            args.gradient_accumulation_steps,
            args.per_device_train_batch_size,
            self.recipe.data.sequence_length,
            self.section.layers,
            autocast=args.bf16,
        )
        self.optimizer = build_optimizer(pipeline.part, self.recipe.optimizer)
        per_epoch = math.ceil(len(self.train_dataset) / self.rows)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        scheduler = self.create_scheduler(steps, self.optimizer)
        state.max_steps = steps
        state.compute_steps(args, steps)
        state.is_world_process_zero, state.is_local_process_zero = self.is_world_process_zero(), args.process_index == 0
        handler.on_train_begin(args, state, self.control)
        for step, batch in zip(range(1, steps + 1), self.batches(per_epoch)):
            handler.on_step_begin(args, state, self.control)
            report = pipeline.from_last(pipeline.step(batch))
            self.note(report)
            norm = pipeline.gradient_norm()
            self.check_finite(pipeline, batch, report["loss"].item(), norm, step)
            if args.max_grad_norm:
                pipeline.clip_gradients(norm, args.max_grad_norm)
            self.optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            self.optimizer.zero_grad()
            balance, done = self.recipe.balance, self.progress((step - 1) / steps)
            load = pipeline.update_expert_bias(balance.step(done), balance.centre)
            self.balancing.load = pipeline.all_loads(load)
            state.global_step, state.epoch = step, step / per_epoch
            handler.on_step_end(args, state, self.control)
            last = step == steps or self.control.should_training_stop
            if step % state.logging_steps == 0 or last or (step == 1 and args.logging_first_step):
                self.log({"loss": self.mean_loss(), "grad_norm": norm, "learning_rate": rate})
            if args.save_strategy == "steps" and step % state.save_steps == 0 and not last:
                self.save_whole(pipeline)
            if last:
                break
        pipeline.restore()
        handler.on_train_end(args, state, self.control)

    def batches(self, per_epoch: int):
        """The batches in the order in which Trainer on one process has them. The first process reads them for all."""
        rows = filled(len(self.train_dataset), self.rows)
        sampler = SeedableRandomSampler(self.train_dataset, num_samples=rows, data_seed=self.args.seed)
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order = list(sampler)
            for i in range(per_epoch):
                rows = order[i * self.rows : (i + 1) * self.rows]
                box = [self.data_collator([self.train_dataset[row] for row in rows]) if not dist.get_rank() else None]
                dist.broadcast_object_list(box, src=0, device=self.args.device)
                yield box[0]
            epoch += 1

    def check_finite(self, pipeline: Pipeline, batch: dict, loss: float, norm: float, step: int):
        """Raises NonFiniteError, the same on every process, where the loss or the gradients' norm is no number: before
        gradients are clipped, which would spread it to all of them, and before it reaches a weight."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        if math.isfinite(loss):
            names = pipeline.non_finite_gradients() or [f"none by itself, but their norm is {norm}"]
            raise NonFiniteError(f"step {step}: {describe_gradients(loss, names)}")
        module = pipeline.first_non_finite(batch)
        where = f", first in the output of {module}" if module else ""
        raise NonFiniteError(f"step {step}: the loss is {loss}{where}. No checkpoint holds this step.")

    def note(self, report: dict[str, torch.Tensor]):
        """Keeps a step's loss terms for the log, which adds up what the processes have."""
        self._since = self.clock.spent if self._since is None else self._since
        self._tokens += self.rows * self.recipe.data.sequence_length
        self._steps += 1
        for term, value in report.items():
            self._terms.setdefault(term, []).append(value.to(self.args.device) / self.args.world_size)

    def mean_loss(self) -> float:
        """Of the steps since the last log."""
        return torch.stack(self._terms.pop("loss")).mean().item() * self.args.world_size

    def save_whole(self, pipeline: Pipeline):
        """Replaces the model in the output folder, all or nothing."""
        whole = pipeline.whole()
        if self.is_world_process_zero():
            with replacing(self.args.output_dir) as stage:
                self.model.save_pretrained(stage, state_dict=whole)
                self.processing_class.save_pretrained(stage)
        dist.barrier()


def build(recipe: Recipe) -> PipelineTrainer:
    args: TrainingArguments = training_arguments(recipe)
    _ = args.device  # asking for it joins the processes
    check(recipe, args)
    return build_trainer(recipe, args, PipelineTrainer)


def main(argv: list[str] | None = None):
    recipe = recipe_from_command_line(__doc__.splitlines()[0], argv)
    launch(lambda recipe: run(recipe, build), recipe)


if __name__ == "__main__":
    main()
