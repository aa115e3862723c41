"""Trains the quickstart with and without multi-token prediction on the same tokens, and decodes held-out text with both
ways of decoding; writes figures.

    python -m benchmarks.mtp [--folder runs/mtp] [--steps 240] [--seeds 1] [--threads 2] [--deeper 8]

Quality: validation bits per byte of the main head, with D = 1 and without, at equal steps, seed by seed.
Speed: greedy continuations of held-out files, plain and by `generate(use_mtp=True)` in turns; the texts must be equal.
`ratio` is the median over prompts of plain seconds / drafted seconds; acceptance is the share of drafted second tokens
that the model itself would have written. A run whose result lies in the folder already is not run again. Writes
benchmarks/results/DATE-DEVICE-mtp.json; the last line is one JSON object.

A module costs one layer, so drafting pays with the number of layers: `--deeper` measures the same model with so many.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from benchmarks.collect import command, processor
from benchmarks.sparse_training import finished
from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from train import pretrain
from train.hardware import use_threads
from train.recipe import REPOSITORY, Recipe, load_recipe

RECIPES = {"without": "quickstart", "with": "quickstart_mtp"}


def recipe_of(kind: str, seed: int, args: argparse.Namespace, layers: int | None = None) -> Recipe:
    name = f"{kind}-{seed}" if layers is None else f"{kind}-{seed}-{layers}-layers"
    changes = [f"output_dir={args.folder / name}", f"threads={args.threads}", "schedule.max_seconds=null"]
    changes += [] if layers is None else [f"model.overrides.num_hidden_layers={layers}"]
    steps = args.steps if layers is None else args.deeper_steps
    changes += ["prompt=null", f"trainer.seed={seed}", "trainer.report_to=none", f"trainer.max_steps={steps}"]
    return load_recipe(f"configuration/recipes/{RECIPES[kind]}.yaml", changes)


def prompts(recipe: Recipe, tokenizer, count: int, length: int) -> list[torch.Tensor]:
    """The first tokens of held-out files that are long enough, [1, length] each."""
    documents = pretrain.load_data(recipe)[1]["text"]
    ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in documents)
    return [row[:, :length] for row in ids if row.shape[1] >= 2 * length][:count]


def decode(model, prompt: torch.Tensor, new: int, **settings) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    text = model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
    return text, time.perf_counter() - start


def measure_decoding(recipe: Recipe, drafts: int, args: argparse.Namespace) -> dict:
    """Both ways on every prompt, in turns, `--runs` times after one that is not counted."""
    model = NanoDeepSeekForCausalLM.from_pretrained(recipe.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.output_dir)
    ratios, plain_seconds, equal, counts = [], [], 0, [0, 0, 0]
    texts = prompts(recipe, tokenizer, args.prompts, args.length)
    for prompt in texts:
        seconds = {"plain": [], "drafted": []}
        for run in range(args.runs + 1):
            plain, a = decode(model, prompt, args.new)
            drafted, b = decode(model, prompt, args.new, use_mtp=True, num_assistant_tokens=drafts)
            if run:
                seconds["plain"].append(a)
                seconds["drafted"].append(b)
        equal += torch.equal(plain, drafted)
        report = model.draft_report
        counts = [x + y for x, y in zip(counts, (report.steps, report.drafted, report.accepted))]
        plain_seconds.append(statistics.median(seconds["plain"]))
        ratios.append(plain_seconds[-1] / statistics.median(seconds["drafted"]))
    steps, drafted, accepted = counts
    return {
        "layers": model.config.num_hidden_layers,
        "drafts": drafts,
        "prompts": len(texts),
        "equal_texts": equal,
        "acceptance": accepted / drafted,
        "tokens_per_step": 1 + accepted / steps,
        "plain_tokens_per_second": args.new / statistics.median(plain_seconds),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "mtp")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--deeper", type=int, help="layers of a second model to decode with")
    parser.add_argument("--deeper-steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-threads", type=int, default=1)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args()
    quality = []
    for seed in args.seeds:
        row = {"seed": seed}
        for kind in RECIPES:
            recipe = recipe_of(kind, seed, args)
            metrics = finished(recipe) or pretrain.run(recipe)
            row[kind] = metrics["eval_bits_per_byte"]
            row |= {"mtp_accuracy": metrics["eval_mtp_accuracy_1"]} if kind == "with" else {}
        quality.append(row)
    models = [recipe_of("with", args.seeds[0], args)]
    if args.deeper:
        models.append(recipe_of("with", args.seeds[0], args, args.deeper))
        finished(models[-1]) or pretrain.run(models[-1])
    use_threads(args.decode_threads)
    decoding = [measure_decoding(recipe, drafts, args) for recipe in models for drafts in args.drafts]
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    kept = {"command": command("mtp"), "date": datetime.date.today().isoformat()}
    kept |= {
        "device": processor(device),
        "steps": args.steps,
        "deeper_steps": args.deeper_steps,
        "threads": args.threads,
    }
    kept |= {"runs": args.runs, "prompt_tokens": args.length, "new_tokens": args.new}
    kept |= {"decode_threads": args.decode_threads, "torch": torch.__version__}
    kept |= {"transformers": transformers.__version__, "python": platform.python_version()}
    file = args.results / f"{kept['date']}-{device}-mtp.json"
    summary = {"quality": quality, "decoding": decoding}
    file.write_text(json.dumps(kept | summary, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
