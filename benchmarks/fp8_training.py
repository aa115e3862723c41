"""Trains the quickstart in FP8 blocks, in bf16 and in fp32, on the same tokens and from the same weights.

    python -m benchmarks.fp8_training [--folder runs/fp8] [--steps 80] [--batch 6] [--threads 1] [--only fp8-1]

On a CPU the FP8 products are emulated: values rounded to E4M3, multiplied in fp32 (train/fp8.py). Compared with each
reference run: `loss_error`, the mean relative difference of the training loss over the last third of the steps, its
sign kept, and `eval_loss_error`, that of the final loss on held-out files. `loss_spread` is the mean absolute one,
from log to log. What a difference means is seen beside that of two runs that differ by nothing but the seed of weights
and order, and of bf16 against fp32. A run whose result lies in the folder already is not run again; `--only` runs one
and stops. Writes benchmarks/results/DATE-DEVICE-fp8_training.json; the last line is one JSON object.
"""

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path

import torch
import transformers

from benchmarks.collect import command, processor
from benchmarks.sparse_training import finished
from train import pretrain
from train.recipe import REPOSITORY, Recipe, load_recipe

RUNS = {name: tuple(name.split("-")) for name in ("fp32-1", "bf16-1", "fp8-1", "fp32-2")}  # precision, seed
PAIRS = [("fp8-1", "bf16-1"), ("fp8-1", "fp32-1"), ("bf16-1", "fp32-1"), ("fp32-2", "fp32-1")]


def recipe_of(name: str, args: argparse.Namespace) -> Recipe:
    precision, seed = RUNS[name]
    changes = [f"output_dir={args.folder / name}", f"threads={args.threads}", "schedule.max_seconds=null"]
    changes += ["prompt=null", f"precision={precision}", f"trainer.seed={seed}", "trainer.report_to=none"]
    changes += [f"trainer.max_steps={args.steps}", f"trainer.per_device_train_batch_size={args.batch}"]
    changes += ["trainer.logging_steps=2", "trainer.eval_strategy=no", "trainer.disable_tqdm=true"]
    return load_recipe("configuration/recipes/quickstart.yaml", changes)


def run(name: str, args: argparse.Namespace) -> dict:
    """The final metrics of a run, and its training losses: {step: loss}."""
    recipe = recipe_of(name, args)
    metrics = finished(recipe) or pretrain.run(recipe)
    history = json.loads((Path(recipe.output_dir) / pretrain.STATE).read_text())["log_history"]
    return {"eval_loss": metrics["eval_loss"], "losses": {e["step"]: e["loss"] for e in history if "loss" in e}}


def compare(run: dict, reference: dict, steps: int) -> dict[str, float]:
    late = [step for step in run["losses"] if step > steps * 2 / 3]
    errors = [run["losses"][step] / reference["losses"][step] - 1 for step in late]
    return {
        "loss_error": statistics.mean(errors),
        "loss_spread": statistics.mean(map(abs, errors)),
        "eval_loss_error": run["eval_loss"] / reference["eval_loss"] - 1,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "fp8")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=6, help="rows of 256 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args)))
        return
    runs = {name: run(name, args) for name in RUNS}
    compared = {f"{a} against {b}": compare(runs[a], runs[b], args.steps) for a, b in PAIRS}
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    kept = {"command": command("fp8_training"), "date": datetime.date.today().isoformat()}
    kept |= {"device": processor(device), "steps": args.steps, "batch": args.batch, "threads": args.threads}
    kept |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    file = args.results / f"{kept['date']}-{device}-fp8_training.json"
    file.write_text(json.dumps(kept | {"compared": compared, "runs": runs}, indent=1) + "\n")
    print(json.dumps(compared))


if __name__ == "__main__":
    main()
