"""Pretraining with the layers spread over processes, by torch's pipeline schedules:

    torchrun --nproc_per_node 2 -m train.pipeline --config configuration/recipes/quickstart.yaml \
        pipeline.schedule=dualpipev trainer.per_device_train_batch_size=2 trainer.gradient_accumulation_steps=4

The recipe is that of `train.pretrain`, and so are the batches, the losses and what is saved: a step has
`gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` rows, on however many processes. Each
process keeps gradients and optimizer state of its own layers alone (`pipelining.py`).
"""

import math

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from transformers import TrainingArguments

from modeling_nanodeepseek.saving import replacing

from .faults import NonFiniteError, non_finite_gradients
from .optimizers import build_optimizer
from .pipelining import Pipeline
from .pretrain import build_trainer, launch, run, training_arguments
from .recipe import PipelineSection, Recipe, recipe_from_command_line
from .trainer import NanoDeepSeekTrainer

# What would be lost without a word, and what to do instead.
REFUSED = {
    "resume_from_checkpoint": "start anew from the saved weights by model.checkpoint",
    "gradient_checkpointing": "more stages or smaller micro-batches save memory",
    "load_best_model_at_end": "the last model is saved",
}


class PipelineTrainer(NanoDeepSeekTrainer):
    """The Trainer of a recipe whose steps run in a pipeline. While it trains, each process has its own layers alone;
    before and after it has the whole model, which is evaluated and saved as ever.

    Raises: ValueError for settings that a pipeline would not honour.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for field, instead in REFUSED.items():
            if getattr(self.args, field):
                raise ValueError(f"trainer.{field} is not possible in a pipeline: {instead}")
        self.remove_callback(self.balancing)  # it would add up the loads of different layers
        self.section = self.recipe.pipeline or PipelineSection()
        self.rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if len(self.train_dataset) < self.rows:
            raise ValueError(f"the data has {len(self.train_dataset)} rows, fewer than the {self.rows} of one step")

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
        per_epoch = len(self.train_dataset) // self.rows
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        scheduler = self.create_scheduler(steps, self.optimizer)
        state.max_steps, state.logging_steps = steps, args.logging_steps
        state.is_world_process_zero, state.is_local_process_zero = self.is_world_process_zero(), args.process_index == 0
        handler.on_train_begin(args, state, self.control)
        reports = []
        for step, batch in zip(range(1, steps + 1), self.batches(per_epoch)):
            handler.on_step_begin(args, state, self.control)
            reports.append(pipeline.from_last(pipeline.step(batch)))
            norm = self.clip(pipeline, reports[-1]["loss"].item(), step)
            self.optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            self.optimizer.zero_grad()
            balance, done = self.recipe.balance, self.progress(step / steps)
            gamma = balance.gamma if done < balance.freeze_at else 0.0
            load = pipeline.update_expert_bias(gamma, balance.centre)
            state.global_step, state.epoch = step, step / per_epoch
            handler.on_step_end(args, state, self.control)
            last = step == steps or self.control.should_training_stop
            if step % args.logging_steps == 0 or last:
                self.balancing.load = pipeline.all_loads(load)
                self.log_reports(reports, norm, rate)
                reports = []
            if args.save_strategy == "steps" and step % args.save_steps == 0 and not last:
                self.save_whole(pipeline)
            if last:
                break
        pipeline.restore()
        handler.on_train_end(args, state, self.control)

    def batches(self, per_epoch: int):
        """The batches in the order in which Trainer on one process has them; rows that fill no batch are left out.
        The first process reads them for all."""
        sampler = SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed)
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

    def clip(self, pipeline: Pipeline, loss: float, step: int) -> float:
        """The gradients' norm before clipping. Raises NonFiniteError, on every process, where it or the loss is no
        number: before what is not finite reaches a weight."""
        norm = pipeline.clip_gradients(self.args.max_grad_norm or None)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = dict.fromkeys(non_finite_gradients(pipeline.part))
            found: list = [None] * dist.get_world_size()
            dist.all_gather_object(found, [name for name, _ in pipeline.parameters() if names] and list(names))
            where = [f"process {rank}: {', '.join(names[:3])}" for rank, names in enumerate(found) if names]
            raise NonFiniteError(f"step {step}: the loss is {loss}, the gradients' norm {norm}. {'; '.join(where)}")
        return norm

    def log_reports(self, reports: list[dict[str, torch.Tensor]], norm: float, rate: float):
        """Logs the means of the last stage's reports."""
        means = {name: torch.stack([report[name].double() for report in reports]).mean(0) for name in reports[0]}
        logs = {name: value.tolist() for name, value in means.items()} | {"grad_norm": norm, "learning_rate": rate}
        self._name_by_depth(logs)
        if self.balancing.load is not None:
            logs |= self.balancing.load.metrics()
        if "index_loss" in logs:
            logs["index_kl"] = logs["index_loss"] / self.model.config.num_hidden_layers
        tokens = self.state.global_step * self.rows * self.recipe.data.sequence_length
        logs["tokens_per_second"] = tokens / max(self.clock.spent, 1e-9)
        self.log(logs)

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
    if not dist.is_initialized():
        raise ValueError("a pipeline runs in several processes: torchrun --nproc_per_node 2 -m train.pipeline ...")
    return build_trainer(recipe, args, PipelineTrainer)


def main(argv: list[str] | None = None):
    recipe = recipe_from_command_line(__doc__.splitlines()[0], argv)
    launch(lambda recipe: run(recipe, build), recipe)


if __name__ == "__main__":
    main()
