"""Checkpoints of a run that are whole or not there, and a resume from the last one that can be read."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from modeling_nanodeepseek.checkpoints import tensor_shapes, weight_files
from modeling_nanodeepseek.saving import SaveError, is_writing_error, reason, replacing, sync, sync_folder
from modeling_nanodeepseek.stacking import (
    CheckpointError,
    absentees,
    awaited_experts,
    expert_keys,
    listed,
    stack_expert_keys,
)

from . import zero3
from .faults import disk_is_full
from .fingerprint import differences, fingerprint, order, reordered
from .sharding import gathered, part
from .streams import RowStream

STATE = "trainer_state.json"
STAGE = "_saving"  # transformers uploads no folder that starts with an underscore
REPLACED = "replaced"
SCHEDULE = "scheduler.pt"
DATA = "training_data.json"
# Layouts, and what each keeps the optimizer in. Where transformers does not find both it and the schedule, it goes on
# with fresh ones, without a word.
WHOLE, FULL, SHARDED, DEEPSPEED = "whole", "full", "sharded", "deepspeed"
OPTIMIZERS = {WHOLE: "optimizer.pt", FULL: "optimizer.bin", SHARDED: "optimizer_0", DEEPSPEED: "global_step*"}
NAMES = {
    WHOLE: "a run with whole checkpoints",
    FULL: "a run of adapters under FSDP",
    SHARDED: "a run under FSDP with SHARDED_STATE_DICT",
    DEEPSPEED: "a run of stages 1 and 2 or adapters under DeepSpeed",
}
SAMPLED = ("random", "sequential")  # strategies whose order a resume finds again
FROM_WEIGHTS = "to start a new run from its weights give it as model.checkpoint"


def commit(run: Path, name: str):
    """Moves `run/_saving/name`, complete, to `run/name`: by one rename, and one more if such a checkpoint exists."""
    stage, target = run / STAGE, run / name
    sync(stage / name)
    if target.exists():
        target.rename(stage / REPLACED)
    (stage / name).rename(target)
    sync_folder(run)
    shutil.rmtree(stage, ignore_errors=True)


def settle(run: Path):
    """Removes what a killed save left; one that was killed while it replaced an old checkpoint was complete."""
    stage = run / STAGE
    if (stage / REPLACED).is_dir():
        for complete in stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if not (run / complete.name).exists():
                complete.rename(run / complete.name)
    shutil.rmtree(stage, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, the latest first."""
    numbered = [(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in run.glob("checkpoint-*")]
    numbered = [(int(number), path) for number, path in numbered if number.isdecimal() and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def rotate(run: Path, limit: int | None, protected: set[str]):
    """Deletes the oldest checkpoints beyond `limit`, but none of those names.

    By the age of their states, since a fresh run into an old folder counts from 0 again. Each disappears by a rename
    first: half deleted, it would look like a checkpoint.
    """
    if not limit or limit < 0:
        return
    found = sorted(checkpoints(run), key=lambda path: (path / STATE).stat().st_mtime if (path / STATE).exists() else 0)
    surplus = len(found) - max(limit, len(protected))
    for old in [path for path in found if path.name not in protected][: max(0, surplus)]:
        (run / STAGE).mkdir(exist_ok=True)
        old.rename(run / STAGE / "deleted")
        shutil.rmtree(run / STAGE, ignore_errors=True)


def check_resumable(checkpoint: Path, layout: str | None = None, generators: Collection[str] = ()):
    """Raises CheckpointError unless every file that a resume reads is there and complete.

    Read are the headers of weights, the state, and the ends of torch's archives (where a cut-off file differs).

    Args:
        layout: of the run that is to go on, a key of `OPTIMIZERS`; default: that of the checkpoint.
        generators: the files of generators' states that this run reads; those of another number of processes do too.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{str(checkpoint)!r} is no folder")
    state = checkpoint / STATE
    try:
        TrainerState.load_from_json(str(state))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(checkpoint)!r} has no {STATE}: it is no checkpoint of a run, or not all of it"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{str(state)!r} is damaged: {error}") from error
    others = [path for path in checkpoint.glob("*model*") if path.suffix != ".py"]  # of adapters and FSDP
    for adapter in checkpoint.glob("adapter_model*.safetensors"):
        tensor_shapes(adapter)
    if not weight_files(checkpoint) and not others:
        raise CheckpointError(f"{str(checkpoint)!r} has no weights")
    _check_optimizer(checkpoint, layout)
    here = {path.name for path in checkpoint.glob("rng_state*.pth")}
    if not (generators and here.issuperset(generators)) and not (here and here == generator_files(len(here))):
        raise CheckpointError(
            f"{str(checkpoint)!r} lacks the generators' states of its processes (rng_state*.pth), without which its "
            f"run would not go on as it would have; {FROM_WEIGHTS}"
        )
    for archive in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(archive):
            raise CheckpointError(f"{str(archive)!r} is damaged or was cut short")


def _check_optimizer(checkpoint: Path, layout: str | None):
    """Raises CheckpointError unless the optimizer's and the schedule's states are there, in this layout."""
    written = [name for name, file in OPTIMIZERS.items() if any(checkpoint.glob(file))]
    if not written:
        raise CheckpointError(f"{str(checkpoint)!r} has no optimizer state, so it cannot be resumed; {FROM_WEIGHTS}")
    if layout is not None and layout not in written:
        raise CheckpointError(
            f"{str(checkpoint)!r} has no {OPTIMIZERS[layout]}, which {NAMES[layout]} would go on from: it was written "
            f"by {NAMES[written[0]]} ({OPTIMIZERS[written[0]]}). Resume it with a launch file of that kind; "
            f"{FROM_WEIGHTS}"
        )
    # DeepSpeed keeps the schedule in a folder of its own, or transformers asks for the file itself.
    if (layout or written[0]) != DEEPSPEED and not (checkpoint / SCHEDULE).is_file():
        raise CheckpointError(
            f"{str(checkpoint)!r} has no {SCHEDULE}, the state of the learning rate's schedule, so it cannot be "
            f"resumed; {FROM_WEIGHTS}"
        )


def generator_files(processes: int) -> set[str]:
    """What so many processes save their generators' states in."""
    return {f"rng_state_{rank}.pth" for rank in range(processes)} if processes > 1 else {"rng_state.pth"}


def last_good_checkpoint(run: Path, *needs) -> tuple[Path | None, list[str]]:
    """The latest checkpoint of a run that can be resumed, or None without any; and why later ones cannot.

    Args:
        needs: of the run, as `check_resumable` takes them.

    Raises: CheckpointError if there are checkpoints and none is whole.
    """
    refused = []
    for checkpoint in checkpoints(run):
        try:
            check_resumable(checkpoint, *needs)
            return checkpoint, refused
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"no checkpoint in {str(run)!r} can be resumed: {listed(refused)}")
    return None, refused


def resumed_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint that a run of these arguments will go on from, to be asked before there is a Trainer.

    Raises: CheckpointError if it cannot be resumed.
    """
    wanted, run = args.resume_from_checkpoint, Path(args.output_dir)
    if not wanted:
        return None
    if wanted is not True:
        check_resumable(Path(wanted))
        return Path(wanted)
    if args.should_save:
        settle(run)
    return last_good_checkpoint(run)[0]


def explain(error: Exception, run: str) -> str:
    """An error's message; of a disk that fills up outside a save (in a log, say) with what is left of the run, because
    the system's words name no file."""
    if isinstance(error, SaveError) or not disk_is_full(error):
        return str(error)
    return f"{run!r} cannot be written to: {reason(error)}. {last_complete(Path(run))}"


def last_complete(run: Path) -> str:
    left = next(iter(checkpoints(run)), None)
    return f"The last complete checkpoint is {left.name!r}." if left else "There is no earlier checkpoint."


class AtomicCheckpoints:
    """Goes in front of transformers' Trainer; its checkpoints are then written aside and renamed when complete.

    In several processes the rename waits until each has written its files. Older checkpoints are deleted only after.
    `train(resume_from_checkpoint=True)` takes the last checkpoint that is whole, and starts anew if there is none.
    A checkpoint that does not fit the model is an error, where transformers logs a warning and trains fresh weights.
    """

    _staging = False
    _stepped: list[list[torch.nn.Parameter]] = []  # by group what the optimizer steps, before ZeRO-3 makes it flat
    _fingerprint: dict[str, int | str] | None = None  # of what the run under way trains on

    def __init__(self, model, args, *further, **kwargs):
        # transformers refuses to save a model that it shared itself (experts), since its own checkpoints of one would
        # have no optimizer. These do.
        saves, shared = args.save_only_model, getattr(model, "is_distributed_loading_by_transformers", False)
        args.save_only_model = saves or shared
        super().__init__(model, args, *further, **kwargs)
        args.save_only_model = saves

    def _get_output_dir(self, trial) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, STAGE) if self._staging else run

    def _save_checkpoint(self, model, trial):
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run / STAGE / name, run / name
        if self.args.should_save:
            settle(run)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / STATE))
            if self.args.should_save and self._fingerprint is not None:
                (staged / DATA).write_text(json.dumps(self._fingerprint, indent=2) + "\n")
            self.accelerator.wait_for_everyone()  # every rank has written its files
            if self.args.should_save:
                commit(run, name)
        except BaseException as error:
            if self.args.should_save:
                settle(run)
            if is_writing_error(error):
                raise SaveError(f"{str(final)!r} cannot be saved: {reason(error)}. {last_complete(run)}") from error
            raise
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, {name} | ({Path(best).name} if best else set()))

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if not self._staging:  # an upload goes on in the background: not from a folder about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in Trainer; model, tokenizer and arguments appear in the folder together."""
        folder = output_dir or self.args.output_dir
        if self._staging and self._by_zero3:
            weights = zero3.whole_weights(self.model, keep=self.args.should_save)
            if self.args.should_save:
                self._save(folder, state_dict=weights)
        elif self._by_zero3 and self.model_wrapped is self.model:  # a run that was over: nothing is shared
            if self.args.should_save:
                with replacing(folder) as stage:
                    self._save(str(stage))
        # A checkpoint is a stage already; with DeepSpeed all ranks write.
        elif self._staging or not self.args.should_save or self.is_deepspeed_enabled:
            super().save_model(folder, _internal_call=True)
        else:
            with replacing(folder) as stage:
                super().save_model(str(stage), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer; True is the last complete checkpoint of the output folder, or none if there is none.

        Raises: CheckpointError if the checkpoint, or with True every one, is damaged or of another model, or if it was
            trained on other rows than this run's, or in another order.
        """
        # Before the data is read: a stream is in one place at a time.
        self._fingerprint = fingerprint(self.train_dataset, self.args.seed)
        if self._fingerprint is not None:
            self._fingerprint |= order(self.train_dataset, self.args)
        run = Path(self.args.output_dir)
        if self.args.should_save:
            settle(run)
        self.accelerator.wait_for_everyone()
        with agreed():
            notes = []
            if resume_from_checkpoint is True:
                resume_from_checkpoint, refused = last_good_checkpoint(run, *self._needs)
                notes = [f"passed over: {problem}" for problem in refused]
                notes.append(f"resuming from {resume_from_checkpoint or 'the start: there is no checkpoint'}")
            elif resume_from_checkpoint:
                check_resumable(Path(resume_from_checkpoint), *self._needs)
            if resume_from_checkpoint:
                notes += self._other_draws(Path(resume_from_checkpoint))
                notes += self._other_data(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            for note in notes:
                print(note)
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE)))
        if 0 < self.args.max_steps <= state.global_step and (self._by_zero3 or not self.is_deepspeed_enabled):
            return self._restore(str(resume_from_checkpoint), state)
        return super().train(str(resume_from_checkpoint), *args, **kwargs)

    def _restore(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """A run that was over needs its weights alone; transformers would train one step more."""
        if self.is_fsdp_enabled:  # accelerate shards a model together with its optimizer only
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    @property
    def _needs(self) -> tuple[str, set[str]]:
        """What this run goes on from: a layout, and files of generators' states."""
        if self.is_deepspeed_enabled and not self._by_zero3:
            layout = DEEPSPEED
        elif self.is_fsdp_enabled and not self._shares:
            layout = FULL if self._whole_by_fsdp else SHARDED
        else:
            layout = WHOLE
        files = generator_files(self.args.world_size)
        if self.args.save_on_each_node and self.args.world_size > 1:  # the other nodes' files are there
            files = {f"rng_state_{self.args.process_index}.pth"}
        return layout, files

    def _other_draws(self, checkpoint: Path) -> list[str]:
        """A warning where another number of processes wrote the checkpoint: transformers only logs it."""
        if all((checkpoint / name).is_file() for name in self._needs[1]):
            return []
        count = len(list(checkpoint.glob("rng_state*.pth")))
        return [
            f"{str(checkpoint)!r} was written by {count} process{'es' if count > 1 else ''}, and this run has "
            f"{self.args.world_size}: what is drawn at random (noise in routers, dropout) is drawn anew"
        ]

    def _other_data(self, checkpoint: Path) -> list[str]:
        """A warning where it is not known what a checkpoint was trained on.

        Raises: CheckpointError for other data, another order, and an order that no resume finds again.
        """
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in SAMPLED and not isinstance(self.train_dataset, RowStream):
            raise CheckpointError(
                f"{str(checkpoint)!r} cannot be resumed with trainer.train_sampling_strategy={strategy!r}, whose order "
                f"is drawn anew by each start: only {' and '.join(SAMPLED)} ones are known again; {FROM_WEIGHTS}"
            )
        if self._fingerprint is None:
            return []
        if not (checkpoint / DATA).is_file():
            return [f"{str(checkpoint)!r} has no {DATA}: whether it was trained on this data is not known"]
        try:
            before = json.loads((checkpoint / DATA).read_text())
            found, moved = (compare(before, self._fingerprint) for compare in (differences, reordered))
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{str(checkpoint / DATA)!r} is damaged: {error}") from error
        if found:
            raise CheckpointError(
                f"{str(checkpoint)!r} was not trained on this data: {listed(found)}. A resume goes on with the same "
                "rows in the same order: give it the data, and the recipe's data section, that it had; to train on "
                "this data start anew into another output_dir, or there from its weights (model.checkpoint)"
            )
        if moved:
            raise CheckpointError(
                f"{str(checkpoint)!r} took its rows in another order than this run would: {listed(moved)}. A resume "
                "goes on with the same rows in the same order: give these fields the values that they had; to change "
                "them start anew into another output_dir, or there from its weights (model.checkpoint)"
            )
        return []

    @property
    def _whole_by_fsdp(self) -> bool:
        return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def _by_zero3(self) -> bool:
        """Whether DeepSpeed's ZeRO-3 shares the parameters and checkpoints are whole all the same."""
        if not self.is_deepspeed_enabled or hasattr(self.model, "peft_config"):
            return False
        return self.accelerator.state.deepspeed_plugin.zero_stage == 3

    @property
    def _shares(self) -> bool:
        """Whether processes share the parameters and checkpoints are whole all the same.

        Then they are what one process writes, and every layout reads every other's. Not so by DeepSpeed's stages 1 and
        2, which have a format of their own, nor where the launch file asks for FSDP's (SHARDED_STATE_DICT), nor of
        adapters.
        """
        if hasattr(self.model, "peft_config"):
            return False
        if self.is_fsdp_enabled:
            return self._whole_by_fsdp
        return self._by_zero3 or getattr(self, "is_distributed_loading_by_transformers", False)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self._shares:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self._by_zero3:
            state = zero3.whole_optimizer(self.optimizer.param_groups, self._stepped, keep=self.args.should_save)
        else:
            state = gathered(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self._by_zero3:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._stepped = [list(group["params"]) for group in self.create_optimizer().param_groups]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # DeepSpeed reads its own format
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        with must_fit(resume_from_checkpoint):
            if self._shares:
                self._load_parts(resume_from_checkpoint, self.model if model is None else model)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_parts(self, checkpoint: str, model):
        """Of whole weights each process reads its part."""
        weights = {}
        for file in weight_files(Path(checkpoint)):
            weights |= load_file(file)
        experts = {f"{name}.": module for name, module in model.named_modules() if hasattr(module, "stacked_names")}
        for owner, module in experts.items():
            problems = [f"{name} is missing" for name in absentees(module, owner, weights)]
            if not problems:
                stack_expert_keys(module, weights, owner, None, False, [], [], problems)
            if problems:
                raise RuntimeError(listed(problems))
        if self._by_zero3:
            self._issue_warnings_after_load(zero3.load_weights(model, weights))
            return
        here = model.state_dict()
        weights = {name: part(tensor, here[name]) if name in here else tensor for name, tensor in weights.items()}
        self._issue_warnings_after_load(model.load_state_dict(weights, strict=False))

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if self._shares:
            return self._load_from_checkpoint(best)
        with must_fit(best):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        # torch takes these settings from the checkpoint without a word: new ones would not be in force.
        wanted = [dict(group) for group in self.optimizer.param_groups]
        with must_fit(checkpoint):
            if self._shares and checkpoint is not None:
                self._load_optimizer_parts(checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            for new, old in zip(wanted, self.optimizer.param_groups):
                for key in (new.keys() & old.keys()) - {"params", "lr"}:  # the schedule moves lr; initial_lr stays
                    if new[key] != old[key]:
                        group = f" of group {old['name']!r}" if "name" in old else ""
                        raise ValueError(
                            f"it was trained with {key}={old[key]!r}{group}, not {new[key]!r}. A resume keeps the "
                            "optimizer; to change it, start a new run from the weights (model.checkpoint)"
                        )

    def _load_optimizer_parts(self, checkpoint: str):
        """Of a whole optimizer's state each process takes what belongs to its parts of the parameters."""
        states = {
            name: torch.load(os.path.join(checkpoint, f"{name}.pt"), map_location="cpu", weights_only=True, mmap=True)
            for name in ("optimizer", "scheduler")
        }
        self.lr_scheduler.load_state_dict(states["scheduler"])
        if self._by_zero3:
            zero3.load_optimizer(self.optimizer.param_groups, self._stepped, states["optimizer"])
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in states["optimizer"]["state"].items():
            for name, value in state.items():
                state[name] = part(value, parameters[index]) if index < len(parameters) else value
        self.optimizer.load_state_dict(states["optimizer"])

    def _load_rng_state(self, checkpoint: str | None):
        with must_fit(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result):
        missing, unexpected = set(load_result.missing_keys), set(load_result.unexpected_keys)
        missing -= set(getattr(self.model, "all_tied_weights_keys", ()))
        for owner, module in self.model.named_modules():
            # Of shards, transformers compares the names on disk, which are per expert, with those in memory.
            for parameter, experts in (
                expert_keys(module, f"{owner}.").items() if hasattr(module, "stacked_names") else ()
            ):
                on_disk = unexpected.intersection(name for expert in experts for name in expert)
                unexpected -= on_disk
                missing -= {f"{owner}.{parameter}"} if on_disk else set()
        missing = missing.union(awaited_experts(self.model))
        problems = [f"{name} is missing" for name in sorted(missing)]
        problems += [f"{name} has no place in the model" for name in sorted(unexpected)]
        if problems:
            raise RuntimeError(listed(problems))


@contextmanager
def agreed():
    """A CheckpointError of one process, of what lies on its disk, as an error of all: the others would wait for it."""
    error = None
    try:
        yield
    except CheckpointError as caught:
        error = caught
    messages = [message for message in gather_object([error and str(error)]) if message]
    if error is None and messages:
        raise CheckpointError(messages[0])
    if error is not None:
        raise error


@contextmanager
def must_fit(checkpoint: str | None):
    """What torch says of a state that is damaged or not this model's, as one CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint!r} does not fit this run: {_problems(error)}") from error


def _problems(error: Exception) -> str:
    """torch lists what does not fit one per line, after a heading."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return listed(lines[1:] if len(lines) > 1 and lines[0].endswith(":") else lines[:1])
