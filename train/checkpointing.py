"""Checkpoints of a run that are whole or not there, and a resume from the last one that can be read."""

import os
import pickle
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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

from .faults import disk_is_full
from .sharding import gathered, part

STATE = "trainer_state.json"
STAGE = "_saving"  # transformers uploads no folder that starts with an underscore
REPLACED = "replaced"


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


def check_resumable(checkpoint: Path):
    """Raises CheckpointError unless every file that a resume reads is there and complete.

    Read are the headers of weights, the state, and the ends of torch's archives (where a cut-off file differs).
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
    if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()):
        raise CheckpointError(
            f"{str(checkpoint)!r} has no optimizer state, so it cannot be resumed; to start a new run from its weights "
            "give it as model.checkpoint"
        )
    for archive in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(archive):
            raise CheckpointError(f"{str(archive)!r} is damaged or was cut short")


def last_good_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint of a run that can be resumed, or None without any; and why later ones cannot.

    Raises: CheckpointError if there are checkpoints and none is whole.
    """
    refused = []
    for checkpoint in checkpoints(run):
        try:
            check_resumable(checkpoint)
            return checkpoint, refused
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"no checkpoint in {str(run)!r} can be resumed: {listed(refused)}")
    return None, refused


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
        # A checkpoint is a stage already; with DeepSpeed all ranks write.
        if self._staging or not self.args.should_save or self.is_deepspeed_enabled:
            super().save_model(folder, _internal_call=True)
        else:
            with replacing(folder) as stage:
                super().save_model(str(stage), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer; True is the last complete checkpoint of the output folder, or none if there is none.

        Raises: CheckpointError if the checkpoint, or with True every one, is damaged or of another model.
        """
        run = Path(self.args.output_dir)
        if self.args.should_save:
            settle(run)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint, refused = last_good_checkpoint(run)
            if self.is_world_process_zero():
                for problem in refused:
                    print(f"passed over: {problem}")
                print(f"resuming from {resume_from_checkpoint or 'the start: there is no checkpoint'}")
        elif resume_from_checkpoint:
            check_resumable(Path(resume_from_checkpoint))
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE)))
        if 0 < self.args.max_steps <= state.global_step and not self.is_deepspeed_enabled:
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
    def _shares(self) -> bool:
        """Whether processes share the parameters and checkpoints are whole all the same.

        Then they are what one process writes, and every layout reads every other's. Not so by DeepSpeed, which has a
        format of its own, nor where the launch file asks for FSDP's (SHARDED_STATE_DICT), nor of adapters.
        """
        if hasattr(self.model, "peft_config"):
            return False
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return getattr(self, "is_distributed_loading_by_transformers", False)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self._shares:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = gathered(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

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
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in states["optimizer"]["state"].items():
            for name, value in state.items():
                state[name] = part(value, parameters[index]) if index < len(parameters) else value
        self.optimizer.load_state_dict(states["optimizer"])
        self.lr_scheduler.load_state_dict(states["scheduler"])

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
