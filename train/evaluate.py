"""Evaluation of any checkpoint, ours or transformers' own: text, tasks, speed; one table and one JSON file.

python -m train.evaluate --model runs/quickstart --data stdlib --held-out 0.04       bits per byte and perplexity
python -m train.evaluate --model runs/quickstart --data a.txt b/ '{dataset: wikitext, name: wikitext-2-raw-v1}'
python -m train.evaluate --model runs/quickstart --tasks arc_easy,hellaswag          by lm-evaluation-harness
python -m train.evaluate --model runs/quickstart exported --speed 512 2048           side by side; --cache fp8
python -m train.evaluate --model runs/quickstart --data stdlib --json figures.json --override attention_form=absorbed

--data takes what a recipe's data.source does; scoring.py says what is counted.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import hold_out, load_documents
from .generate import number
from .hardware import use_threads
from .loading import DTYPES, first_line, load_config, load_model, load_tokenizer, position_limit
from .scoring import evaluate_text
from .speed import CACHES, check_contexts, measure_apart

CONTEXT = 2048  # of --data by default, at most: all logits of a window are in memory at once


def source_of(text: str) -> Any:
    """A data source as a recipe has it: `{dataset: ...}` is a mapping, all else a name or a path."""
    try:
        return yaml.safe_load(text) if text.startswith("{") else text
    except yaml.YAMLError as error:
        raise ValueError(f"--data {text!r} is not valid YAML: {first_line(error)}") from error


def override_of(text: str) -> tuple[str, Any]:
    """`field=value`, the value in YAML."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must read field=value, e.g. attention_form=absorbed")
    try:
        return field, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {error}") from error


def expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def load_texts(args: argparse.Namespace) -> Dataset:
    """The documents of --data: all, what a recipe holds out of them, or the first ones."""
    documents = load_documents([source_of(text) for text in args.data], args.text_field, args.document_start)
    if args.held_out is not None:
        documents = hold_out(documents, args.held_out)[1]
    return documents.select(range(min(args.max_documents or len(documents), len(documents))))


def check_tasks(args: argparse.Namespace) -> Any:
    """lm-eval's index of tasks. Raises: ValueError if it is not installed or does not know one of --tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install lm-eval") from error
    if args.include_path is not None:
        if not Path(args.include_path).is_dir():
            raise ValueError(f"--include-path {args.include_path!r} is not a folder")
        manager = TaskManager(include_path=args.include_path, include_defaults=False)  # its own take seconds to list
        if set(args.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=args.include_path)
    unknown = [name for name in args.tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks: lm-evaluation-harness knows no {', '.join(map(repr, unknown))}")
    return manager


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manager: Any, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of each task (and of each group's parts) lm-eval's metrics by their names there, e.g. `acc,none`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    report = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
        tasks=args.tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.task_limit,
        log_samples=False,
        bootstrap_iters=1000,  # for errors of metrics that are no means; 100000 by default
    )
    return {
        task: {name: float(value) for name, value in metrics.items() if "," in name and not isinstance(value, str)}
        for task, metrics in report["results"].items()
    }


def check(args: argparse.Namespace):
    """Raises ValueError for what would fail after work is done."""
    if args.json is not None and (not args.json.parent.is_dir() or args.json.is_dir()):
        raise ValueError(f"--json {str(args.json)!r} cannot be written: it must be a file in an existing folder")
    for name in args.model:
        config = load_config(name, **args.override)
        check_contexts(config, args.speed, args.written)
        wanted = args.rows or args.context
        if wanted is not None and wanted > position_limit(config):
            flag = "--rows" if args.rows else "--context"
            raise ValueError(f"{flag} {wanted} exceeds max_position_embeddings={position_limit(config)} of {name!r}")
        context = context_of(args, config)
        if args.stride is not None and args.stride >= context:
            raise ValueError(f"--stride {args.stride} must be below the context, {context}: windows overlap")
        if args.data or args.tasks:
            load_tokenizer(name)


def context_of(args: argparse.Namespace, config) -> int:
    return args.context or int(min(CONTEXT, position_limit(config)))


def evaluate(name: str, documents: Dataset | None, manager: Any, args: argparse.Namespace) -> dict:
    """All figures of one checkpoint."""
    config, result = load_config(name, **args.override), {"model": name}
    if args.speed:
        settings = {key: getattr(args, key) for key in ("written", "runs", "cache", "device", "dtype", "threads")}
        settings |= {"rows": args.texts, "overrides": args.override}
        result["speed"] = measure_apart(name, args.speed, **settings)
    model = load_model(name, args.device, args.dtype, **args.override)
    result |= {"class": type(model).__name__, "parameters": model.num_parameters()}
    result |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    if documents is not None:
        how = {"stride": args.stride, "rows": args.rows, "end": args.eos, "batch_size": args.batch_size}
        how["cut_documents"] = not args.whole_documents
        result["text"] = evaluate_text(model, load_tokenizer(name), documents, context_of(args, config), **how)
    if manager is not None:
        result["tasks"] = run_tasks(model, load_tokenizer(name), manager, args)
    return result


def figures(result: dict) -> dict[str, str]:
    """One model's column of the table."""
    cells = {"parameters": f"{result['parameters']:,}", "class": result["class"]}
    cells["where"] = f"{result['device']}, {result['dtype']}"
    if "text" in result:
        text = result["text"]
        how = f"rows of {text['rows']}" if "rows" in text else f"context {text['context']}, stride {text['stride']}"
        cells["bits per byte"] = f"{text['bits_per_byte']:.4f}"
        cells["perplexity per token"] = f"{text['perplexity']:.3f}"
        cells["nats per token"] = f"{text['loss']:.4f}"
        cells["tokens, bytes"] = f"{text['tokens']:,}, {text['bytes']:,}"
        cells["read in"] = how + ("" if text["eos_predicted"] else ", eos not predicted")
    for task, metrics in result.get("tasks", {}).items():
        for metric, value in metrics.items():
            name, kind = metric.split(",", 1)
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            shown = f"{value:.4f}" + (f" +- {error:.4f}" if error is not None else "")
            cells[f"{task}, {name}" + (f" ({kind})" if kind != "none" else "")] = shown
    for row in result.get("speed", []):
        at, peak = f"at {row['context']:,}", row["peak_memory_bytes"]
        cells[f"prefill {at}, tokens/s"] = f"{row['prefill_tokens_per_second']:,.0f}"
        cells[f"decode {at}, tokens/s"] = f"{row['decode_tokens_per_second']:,.1f}"
        cells[f"peak memory {at}, MB"] = "unknown" if peak is None else f"{peak / 1e6:,.1f}"
        cells[f"cache {at}, MB"] = f"{row['cache_bytes'] / 1e6:,.3f}"
    return cells


def table(results: list[dict]) -> str:
    """The figures in Markdown, a column for each model."""
    columns = [figures(result) for result in results]
    lines = [["", *(result["model"] for result in results)]]
    for label in dict.fromkeys(label for column in columns for label in column):
        lines.append([label, *(column.get(label, "") for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    rows = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines]
    return "\n".join([rows[0], rule, *rows[1:]])


def write(path: Path, report: dict):
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> dict:
    """Evaluates each model; prints the table, writes the file, returns what is in it."""
    check(args)
    manager = check_tasks(args) if args.tasks else None
    documents = load_texts(args) if args.data else None
    use_threads(args.threads)
    results = [evaluate(name, documents, manager, args) for name in args.model]
    print(table(results))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"gpu": gpu, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    report = {"models": results, "settings": settings, "machine": machine, "versions": versions}
    if args.json is not None:
        write(args.json, report)
    return report


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True, help="folders (or Hub names) of checkpoints, to compare")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="SOURCE", help="stdlib, files, folders, {dataset: ...}"
    )
    parser.add_argument(
        "--held-out",
        type=number(float, 0, 1, above=True),
        metavar="SHARE",
        help="what a recipe with this share holds out",
    )
    parser.add_argument("--text-field", default="text", help="column of .jsonl and .parquet files and data sets")
    parser.add_argument(
        "--document-start",
        type=expression,
        help="rows are lines: documents start where this regular expression matches",
    )
    parser.add_argument("--max-documents", type=number(int, 1), help="the first ones only")
    parser.add_argument(
        "--context", type=number(int, 2), help=f"tokens of a window; default: the limit, at most {CONTEXT}"
    )
    parser.add_argument("--stride", type=number(int, 1), help="tokens a window reads on; default: half the context")
    parser.add_argument("--rows", type=number(int, 2), help="instead: rows of this length, as evaluated in training")
    parser.add_argument("--whole-documents", action="store_true", help="with --rows: as data.cut_documents=false")
    parser.add_argument("--no-eos", dest="eos", action="store_false", help="the end of a document is not predicted")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="of lm-evaluation-harness: a,b")
    parser.add_argument("--include-path", help="folder of further tasks, in YAML")
    parser.add_argument("--task-limit", type=number(int, 1), help="the first questions of each task only")
    parser.add_argument("--num-fewshot", type=number(int, 0), help="examples in front of a question")
    parser.add_argument("--speed", type=number(int, 2), nargs="+", default=[], metavar="TOKENS", help="context lengths")
    parser.add_argument(
        "--written", type=number(int, 1), default=16, help="with --speed: tokens written of each context"
    )
    parser.add_argument("--runs", type=number(int, 1), default=3, help="with --speed: medians over so many")
    parser.add_argument("--texts", type=number(int, 1), default=1, help="with --speed: texts at a time")
    parser.add_argument("--cache", choices=CACHES, default="default", help="with --speed: the cache")
    parser.add_argument("--batch-size", type=number(int, 1), default=8, help="for --data and --tasks")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as saved")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads; default: all cores")
    parser.add_argument(
        "--override", type=override_of, action="append", default=[], metavar="FIELD=VALUE", help="of the model's config"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def main(argv: list[str] | None = None):
    command = command_line()
    args = command.parse_args(argv)
    args.override = dict(args.override)
    if not (args.data or args.tasks or args.speed):
        command.error("nothing to evaluate: give --data, --tasks or --speed")
    if args.whole_documents and not args.rows:
        command.error("--whole-documents goes with --rows: windows never cut a document short")
    if args.rows and (args.context or args.stride or not args.eos):
        command.error("--rows evaluates as training does: --context, --stride and --no-eos do not go with it")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
