"""Pretraining: `accelerate launch --quiet -m train.pretrain --config RECIPE [field=value ...]`.

Reads the text, trains a tokenizer if none is given, packs, trains, evaluates, saves model, tokenizer, model card and a
report with pictures (`report.py`) into `output_dir`, and lets the model speak. `trainer.push_to_hub=true
trainer.hub_model_id=...` uploads that folder.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate.utils import is_deepspeed_available, parse_flag_from_env
from transformers import TrainingArguments, pipeline, set_seed
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.saving import replacing

from .accounting import count_parameters
from .card import tables
from .checkpointing import STATE, checkpoints, explain, resumed_checkpoint
from .data import Packer, collate, hold_out, load_documents, pack
from .faults import NonFiniteError, Stopped, full_disks_of_threads, heed_sigterm, lost_others
from .fp8 import convert_to_fp8, describe_fp8, launched_in_fp8, precision_of, trains_in_fp8
from .hardware import keep_memory, multiplies_bf16, name_of, use_threads
from .loading import load_config, possible_config
from .loading import load_tokenizer as read_tokenizer
from .models import build_model
from .optimizers import parameter_groups
from .parallel import share_experts
from .recipe import ContextSection, ModelSection, Recipe, recipe_from_command_line, resolve
from .report import METRICS, SUMMARY, plot_losses, write_report
from .streams import RepeatedRows, RowStream, StreamedRows, first_documents, read, stream_documents
from .tokenizer import train_tokenizer
from .trainer import NanoDeepSeekTrainer
from .zero3 import whole_models


def training_arguments(recipe: Recipe, kind: type[TrainingArguments] = TrainingArguments, **more) -> TrainingArguments:
    """The recipe's settings for a Trainer; `more` are defaults of another kind of it."""
    if Path(recipe.output_dir).exists() and not Path(recipe.output_dir).is_dir():
        raise ValueError(f"output_dir {recipe.output_dir!r} is a file; a folder is needed")
    check_deepspeed(recipe)
    on_cpu = recipe.trainer.get("use_cpu", False) or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    fp8 = trains_in_fp8(recipe.precision)
    bf16 = recipe.precision == "bf16" or (recipe.precision in ("auto", "fp8") and multiplies_bf16(device))
    bf16 = bf16 and not (fp8 and launched_in_fp8())  # accelerate's fp8 is bf16 outside the products
    settings = {"report_to": ["tensorboard"], "remove_unused_columns": False, "label_names": ["labels"]}
    # Each process reads a stream by itself: what one reads for all cannot be joined where only some rows are padded.
    accelerate = {"dispatch_batches": False} | (recipe.trainer.get("accelerator_config") or {})
    settings |= {"bf16": bf16, "use_cpu": on_cpu}  # bf16 on a CPU must be asked for by name
    # Without a name trackio would log what is evaluated after the training as a run of its own.
    settings["run_name"] = Path(recipe.output_dir).absolute().name
    args = kind(output_dir=recipe.output_dir, **settings | more | recipe.trainer | {"accelerator_config": accelerate})
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would share it by nn.DataParallel, which loses the experts' load: start "
            "one for each (accelerate launch --multi_gpu), or set CUDA_VISIBLE_DEVICES to one"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > args.world_size:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), and each would train alone, with "
            f"trainer.use_cpu={args.use_cpu} and no GPU for each: for processes on CPUs set trainer.use_cpu=true"
        )
    check_trackers(args.report_to)
    return args


def check_deepspeed(recipe: Recipe):
    """Raises ValueError where it is asked for and not installed. (`accelerate launch` finds that out by itself, before
    this program starts.)"""
    by_launch_file = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if (by_launch_file or recipe.trainer.get("deepspeed")) and not is_deepspeed_available():
        asking = "the launch file (ACCELERATE_USE_DEEPSPEED)" if by_launch_file else "trainer.deepspeed"
        raise ValueError(f"{asking} asks for DeepSpeed, which is not installed: pip install -e '.[zero]'")


def check_trackers(names: list[str]):
    """Raises ValueError for one that Trainer does not know or that is not installed: it would find that out when all
    data is read and packed. Those that are there are not started."""
    there = get_available_reporting_integrations()
    for name in [name for name in names if name not in there]:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (RuntimeError, ImportError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"trainer.report_to={names} is not possible: {told}") from error


def load_data(recipe: Recipe):
    """The training and validation documents; a stream of the former where the recipe wants one."""
    data = recipe.data
    if data.streaming:
        documents = stream_documents(data.source, data.text_field)
        if data.validation is not None:
            return documents, load_documents(data.validation, data.text_field)
        return documents, first_documents(documents, data.validation_documents)
    documents = load_documents(data.source, data.text_field, data.document_start)
    if data.validation is not None:
        return documents, load_documents(data.validation, data.text_field, data.document_start)
    return hold_out(documents, data.validation_share)


def training_rows(recipe: Recipe, documents, tokenizer, seed: int):
    """What is trained on: packed rows, or a stream of them where the data or the batch has no fixed size.

    Raises: ValueError if there is none.
    """
    data = recipe.data
    settings = {"fim_rate": data.fim_rate, "seed": seed, "cut_documents": data.cut_documents}
    if data.streaming:
        stream = StreamedRows(
            documents, Packer(tokenizer, data.sequence_length, **settings), data.held_out_documents, seed, data.source
        )
        next(iter(stream))  # raises if there is none
        return stream
    rows = pack(documents, tokenizer, data.sequence_length, data.workers, **settings)
    return rows if recipe.schedule.batch_ramp is None else RepeatedRows(rows, seed)


def folder_or_name(path: str, field: str) -> str:
    """A local folder, or a name on the Hub: what is written like a path must exist."""
    folder = resolve(path)
    if not folder.is_dir() and path.startswith(("/", ".", "~")):
        raise ValueError(f"{field} {path!r} is not a folder")
    return str(folder) if folder.is_dir() else path


def checkpoint_of(recipe: Recipe) -> str | None:
    """Folder or name of the model that the recipe starts from, if it does."""
    if recipe.model.checkpoint is None:
        return None
    checkpoint = folder_or_name(recipe.model.checkpoint, "model.checkpoint")
    load_config(checkpoint, "the start of a run (model.checkpoint)", ours=True)  # before its tokenizer is
    return checkpoint


def load_tokenizer(recipe: Recipe, documents, resumed: Path | None = None):
    """The one that the recipe names, or else a trained one: of the checkpoint that is resumed, whose weights know no
    other, or new."""
    checkpoint, path = checkpoint_of(recipe), recipe.tokenizer.path
    if path or checkpoint:
        return read_tokenizer(folder_or_name(path, "tokenizer.path") if path else checkpoint)
    if resumed is not None:
        return read_tokenizer(str(resumed))

    def texts():
        left = recipe.tokenizer.train_megabytes * 1e6
        if recipe.data.streaming:
            chosen = (text for text, _ in read(documents, recipe.data.held_out_documents))
        else:
            chosen = documents.shuffle(seed=0)["text"]
        for text in chosen:
            yield text
            left -= len(text)
            if left <= 0:
                return

    return train_tokenizer(texts(), recipe.tokenizer.vocab_size)


def load_model(recipe: Recipe, tokenizer) -> NanoDeepSeekForCausalLM:
    """The model, checked against the tokenizer before anything is trained."""
    if recipe.model.checkpoint is not None:
        folder = checkpoint_of(recipe)
        longer = {} if recipe.model.context is None else {"config": extended(folder, recipe.model.context)}
        with whole_models():
            model = NanoDeepSeekForCausalLM.from_pretrained(folder, **longer, dtype=torch.float32)
    else:
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = build_model(recipe.model.config, recipe.model.variant, **ids | recipe.model.overrides)
    model = enter_stage(model, recipe.model)
    config = model.config
    if recipe.mtp is not None:
        if config.num_nextn_predict_layers == 0:
            raise ValueError(
                "the recipe's section mtp is for a model with num_nextn_predict_layers of at least 1, and "
                f"{recipe.model.checkpoint or recipe.model.config!r} has none"
            )
        config.mtp_loss_coef, config.mtp_detach_trunk = recipe.mtp.coef, recipe.mtp.detach_trunk
        model.freeze_for_stage()
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is only {config.vocab_size}"
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        length, limit = recipe.data.sequence_length, config.max_position_embeddings
        raise ValueError(f"data.sequence_length={length} exceeds the model's max_position_embeddings={limit}")
    return convert_to_fp8(model, recipe.fp8_scales == "ue8m0") if trains_in_fp8(recipe.precision) else model


def extended(folder: str, section: ContextSection) -> NanoDeepSeekConfig:
    """The config of a checkpoint, with a longer context by YaRN (arXiv:2309.00071; V3 report section 4.3).

    What the checkpoint's own YaRN says holds where the section is silent: it was trained with that temperature.

    Raises: ValueError for a length below the one it has, no longer than the original, or beyond what the factor
    reaches, and for a model with another kind of scaling.
    """
    config = NanoDeepSeekConfig.from_pretrained(folder)
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "yarn"):
        raise ValueError(f"model.context extends plain rotary positions by YaRN; this model has {rope['rope_type']!r}")
    original = section.original or rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = section.factor or max(rope.get("factor", 1.0), section.length / original)
    if section.length < config.max_position_embeddings:
        raise ValueError(
            f"model.context.length={section.length} is below the {config.max_position_embeddings} tokens that the "
            "checkpoint has: it would lose some"
        )
    if section.length <= original:
        raise ValueError(f"model.context.length={section.length} is no extension of the original {original} tokens")
    if section.length > factor * original:
        raise ValueError(
            f"model.context.length={section.length} is beyond what factor={factor:g} makes of the original {original} "
            f"tokens, {factor * original:g}: leave factor out, or give {section.length / original:g}"
        )
    config.max_position_embeddings = section.length
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": rope["rope_theta"],
        "factor": float(factor),
        "original_max_position_embeddings": original,
    }
    for field, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale_all_dim", 1.0)):
        chosen = getattr(section, field)
        config.rope_parameters[field] = rope.get(field, default) if chosen is None else chosen
    kept = section.mscale_all_dim is None and "mscale" in rope
    config.rope_parameters["mscale"] = rope["mscale"] if kept else config.rope_parameters["mscale_all_dim"]
    return config


def enter_stage(model: NanoDeepSeekForCausalLM, section: ModelSection) -> NanoDeepSeekForCausalLM:
    """The model with the indexer that the recipe adds, in the recipe's stage of sparse attention.

    Raises: ValueError for an indexer beside one that is there, and for a stage that needs one where there is none.
    """
    origin = section.checkpoint or section.config
    if section.indexer is not None:
        if model.config.has_indexer:
            raise ValueError(
                f"model.indexer is for a model without one, and {origin!r} has one, with "
                f"index_topk={model.config.index_topk}: leave it out"
            )
        model = model.with_indexer(**section.indexer)
    if section.dsa_stage in ("warmup", "sparse") and model.config.index_topk is None:
        raise ValueError(
            f"model.dsa_stage={section.dsa_stage!r} cannot start from {origin!r}, which has no indexer: give it one by "
            "model.indexer={index_topk: ...} and train that in model.dsa_stage='warmup'"
            + (" first" if section.dsa_stage == "sparse" else "")
        )
    if section.dsa_stage is not None:
        model.set_dsa_stage(section.dsa_stage)
    return model


def build_trainer(
    recipe: Recipe, args: TrainingArguments, kind: type[NanoDeepSeekTrainer] = NanoDeepSeekTrainer
) -> NanoDeepSeekTrainer:
    """Everything up to the first step: data read, tokenizer trained, model built, rows packed."""
    with args.main_process_first(desc="preparing data"):
        resumed = resumed_checkpoint(args)
        train_documents, validation_documents = load_data(recipe)
        tokenizer = load_tokenizer(recipe, train_documents, resumed)
        set_seed(args.seed)  # the weights depend on the seed alone, not on what was read before
        model = load_model(recipe, tokenizer)
        length, workers = recipe.data.sequence_length, recipe.data.workers
        train_rows = training_rows(recipe, train_documents, tokenizer, args.seed)
        whole = {"name": "the validation text", "cut_documents": recipe.data.cut_documents}
        validation_rows = pack(validation_documents, tokenizer, length, workers, **whole)
        fresh = recipe.tokenizer.path is None and recipe.model.checkpoint is None
        if fresh or recipe.model.context is not None:
            tokenizer.model_max_length = model.config.max_position_embeddings
    return kind(
        share_experts(model, recipe.parallel),
        args,
        recipe=recipe,
        validation_bytes=sum(len(text.encode()) for text in validation_documents["text"]),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=collate,
        processing_class=tokenizer,
    )


def describe(trainer: NanoDeepSeekTrainer) -> str:
    """What is about to run: model, data, machine, and each parameter group with its optimizer and rate."""
    args, counts = trainer.args, count_parameters(trainer.model.config)
    streams = isinstance(trainer.train_dataset, RowStream)
    rows = "a stream of" if streams else f"{len(trainer.train_dataset):,}"
    length, precision = trainer.recipe.data.sequence_length, precision_of(args, trainer.recipe.precision)
    further = f"; {counts['mtp']:,} more for multi-token prediction" if counts["mtp"] else ""
    groups = [
        f"{group['name']} {sum(p.numel() for p in group['params']):,} by {'Muon' if group['muon'] else 'AdamW'}"
        f" at {group['lr']:g}"
        for group in parameter_groups(trainer.model, trainer.recipe.optimizer)
    ]
    return (
        f"model: {counts['total']:,} parameters, {counts['active']:,} active per token"
        f"{further}\n"
        f"data: {rows} training and {len(trainer.eval_dataset):,} validation rows of {length} tokens\n"
        f"machine: {args.device}, {precision}, {torch.get_num_threads()} threads\n"
        f"optimizer: {'; '.join(groups)}"
        + (f"\n{describe_fp8(trainer.model, args.device)}" if trains_in_fp8(trainer.recipe.precision) else "")
    )


def run(recipe: Recipe, build: Callable | None = None, after: Callable | None = None) -> dict[str, float]:
    """Runs a recipe; returns the final metrics.

    Args:
        build: makes the trainer of a recipe; default `build_trainer`.
        after: what the main process does with recipe and trainer when all is saved; default `speak`.
    """
    if recipe.pipeline is not None and build is None:
        raise ValueError(
            "the recipe's section pipeline is for torchrun --nproc_per_node 2 -m train.pipeline; train.pretrain does "
            "not spread layers: leave it out"
        )
    begin = time.perf_counter()
    use_threads(recipe.threads)
    trainer = build(recipe) if build else build_trainer(recipe, training_arguments(recipe))
    if trainer.is_world_process_zero():
        print(describe(trainer), flush=True)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model(_internal_call=True)  # the other kind uploads at once, and there is more to upload
    metrics["seconds"] = round(time.perf_counter() - begin, 1)
    if trainer.is_world_process_zero():
        finish(recipe, trainer, metrics)
        with whole_models():  # in this process alone
            (after or speak)(recipe, trainer)
        print(json.dumps(metrics))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    return metrics


def finish(recipe: Recipe, trainer: NanoDeepSeekTrainer, metrics: dict[str, float]):
    """Writes the history, the metrics, the picture, the model card and the report."""
    output = Path(recipe.output_dir)
    trainer.create_model_card()
    with replacing(output) as stage:
        trainer.state.save_to_json(str(stage / STATE))
        (stage / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        (stage / SUMMARY).write_text(json.dumps(summary(trainer), indent=2) + "\n")
        plot_losses(trainer.state.log_history, stage / "loss.png", title=output.name)
    print(f"saved: {output} (report: {write_report(output)})")


def summary(trainer: NanoDeepSeekTrainer) -> dict[str, dict[str, str]]:
    """The report's tables: what ran, on what."""
    args = trainer.args
    machine = {
        "device": name_of(args.device),
        "processes, threads of each": f"{args.world_size}, {torch.get_num_threads()}",
        "precision": precision_of(args, trainer.recipe.precision),
        "measured peak": f"{trainer.peak / 1e12:.3g} TFLOP/s in matrix products, all processes",
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    headings = tables(trainer) | {"Machine": machine}
    return {heading: {name: str(value) for name, value in rows.items()} for heading, rows in headings.items()}


def speak(recipe: Recipe, trainer: NanoDeepSeekTrainer):
    """Prints the saved model's continuation of the recipe's prompt."""
    if recipe.prompt:
        write = pipeline("text-generation", model=recipe.output_dir, device=trainer.args.device)
        print(write(recipe.prompt, max_new_tokens=96, do_sample=False)[0]["generated_text"])


def main(argv: list[str] | None = None):
    launch(run, recipe_from_command_line(__doc__.splitlines()[0], argv))


def launch(run: Callable[[Recipe], dict[str, float]], recipe: Recipe):
    """Runs a recipe as a program does: a problem of the user's, and the end of another process, end it with one
    message, which is written before the launcher may kill this process too."""
    keep_memory()
    try:
        with heed_sigterm():
            message = problem(run, recipe)
            if message is not None:
                print(message, file=sys.stderr, flush=True)
    except Stopped:
        told = "another has ended or all were told to (SIGTERM)"
        print(f"error: {stops(recipe, told)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a group whose others are gone may wait for them
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if message is not None:
        ended = SystemExit(message)
        ended.code = 1  # else it would be written again
        raise ended


def problem(run: Callable[[Recipe], dict[str, float]], recipe: Recipe) -> str | None:
    """Runs a recipe; what to tell the user if it fails for a reason outside the code."""
    try:
        with full_disks_of_threads(), possible_config(recipe.model.checkpoint or recipe.model.config):
            run(recipe)
    except (ValueError, OSError, NonFiniteError) as error:
        return f"error: {explain(error, recipe.output_dir)}"
    except RuntimeError as error:
        if not lost_others(error):
            raise
        first = str(error).splitlines()[0].split(". ")[0]
        return f"error: {stops(recipe, f'another has ended ({first})')}"


def stops(recipe: Recipe, because: str) -> str:
    """That this process stops, and what to go on from."""
    last = next(iter(checkpoints(Path(recipe.output_dir))), None)
    return f"process {os.environ.get('RANK', 0)} stops, because {because}. " + (
        f"trainer.resume_from_checkpoint=true goes on from '{last}'" if last else "There is no checkpoint yet"
    )


if __name__ == "__main__":
    main()
