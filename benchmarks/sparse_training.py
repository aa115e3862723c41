"""Trains DeepSeek Sparse Attention in its three stages on real text, with controls; writes figures and a picture.

    python -m benchmarks.sparse_training [--folder runs/dsa_stages] [--share 1.0]

The recipes dsa_dense, dsa_warmup and dsa_sparse, one after the other, each from the model of the one before, and

- `control`: the dense model trained on as the sparse one is, with attention to all keys: the same batches, steps and
  rates. The quality of sparse attention is its bits per byte against the control's.
- `fixed`: what the last keys and the first few would hold of the dense model's attention, as many keys as the indexer
  selects (no training): the baseline of the indexer's recall. Beside it `best`: what the heaviest keys hold, the bound.

Recall is the share of the attention's mass that the selected keys hold, on held-out text, over tokens that see more
keys than are selected. A stage whose result lies in the folder already is not run again. `--share` shortens every
stage. Writes benchmarks/results/DATE-DEVICE-sparse_training.json and .png; the last line is one JSON object.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import transformers
from matplotlib import pyplot as plt

from benchmarks.collect import command, processor
from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from train import pretrain
from train.recipe import REPOSITORY, Recipe, load_recipe

GLOBAL_TOKENS = 4  # of the fixed window: the first of each document, where attention likes to rest
RUNS = {  # recipe, the run it starts from, and what the control changes
    "dense": ("dsa_dense", None, []),
    "warmup": ("dsa_warmup", "dense", []),
    "sparse": ("dsa_sparse", "warmup", []),
    "control": ("dsa_sparse", "dense", ["model.dsa_stage=null"]),
}
CURVES = ("ce_loss", "index_kl", "eval_bits_per_byte", "eval_index_recall")


def recipe_of(name: str, folder: Path, share: float, threads: int) -> Recipe:
    recipe, start, changes = RUNS[name]
    changes = [*changes, f"output_dir={folder / name}", f"threads={threads}"]
    if start is not None:
        changes.append(f"model.checkpoint={folder / start}")
    loaded = load_recipe(f"configuration/recipes/{recipe}.yaml", changes)
    loaded.trainer["max_steps"] = max(1, round(share * loaded.trainer["max_steps"]))
    loaded.trainer["report_to"] = "none"
    return loaded


def finished(recipe: Recipe) -> dict | None:
    """The metrics of a run of that many steps, if it is there."""
    metrics, state = (Path(recipe.output_dir) / name for name in ("metrics.json", pretrain.STATE))
    if not (metrics.is_file() and state.is_file()):
        return None
    whole = json.loads(state.read_text())["global_step"] == recipe.trainer["max_steps"]
    return json.loads(metrics.read_text()) if whole else None


def run(recipe: Recipe) -> dict:
    """Final metrics, and the curves of the log: [[step, value], ...]."""
    metrics = finished(recipe) or pretrain.run(recipe)
    history = json.loads((Path(recipe.output_dir) / pretrain.STATE).read_text())["log_history"]
    curves = {name: [[entry["step"], entry[name]] for entry in history if name in entry] for name in CURVES}
    return {"steps": recipe.trainer["max_steps"], **metrics, "curves": {n: c for n, c in curves.items() if c}}


@torch.no_grad()
def heaviest_keys(target, indices_BTK: torch.Tensor, keys: int) -> torch.Tensor:
    """The mass on the heaviest keys; as IndexerRecall.forward, which gives that on the keys selected."""
    _, T, K = indices_BTK.shape
    p_BTS, visible_BTS = target(0, T)
    return p_BTS.topk(K, dim=-1).values.sum(-1).masked_fill(visible_BTS.sum(-1) <= K, float("nan"))


def untrained_selections(recipe: Recipe, dense: Path) -> tuple[dict, dict]:
    """Recall of a fixed pattern of as many keys, and of the heaviest ones, on the dense model's own attention."""
    topk = recipe.model.indexer["index_topk"]
    pattern = {"index_pattern": "fixed", "index_topk": topk, "index_global_tokens": GLOBAL_TOKENS}
    pattern["index_window"] = topk - GLOBAL_TOKENS
    model = NanoDeepSeekForCausalLM.from_pretrained(dense, config=NanoDeepSeekConfig.from_pretrained(dense, **pattern))
    recipe = recipe.model_copy(deep=True)
    recipe.model.dsa_stage = recipe.model.indexer = None
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    trainer.model = model
    model.config.dsa_stage = "warmup"  # attention stays dense, and what would be selected is measured
    fixed = pattern | trainer.evaluate()
    for layer in model.model.layers:
        layer.self_attn.recall.forward = heaviest_keys
    return fixed, trainer.evaluate()


def draw(runs: dict, path: Path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    kept = {name: runs[name]["curves"] for name in ("dense", "warmup", "sparse", "control")}
    shift = runs["warmup"]["steps"]
    for name, start, colour in (("warmup", 0, "tab:blue"), ("sparse", shift, "tab:green")):
        for axis, curve in ((left, "index_kl"), (middle, "eval_index_recall")):
            points = [(start + step, value) for step, value in kept[name].get(curve, [])]
            axis.plot(*zip(*points), color=colour, marker=".", label=name)
    middle.axhline(runs["fixed"]["eval_index_recall"], color="tab:red", linestyle="--", label="fixed window")
    middle.axhline(runs["best"]["eval_index_recall"], color="grey", linestyle=":", label="heaviest keys")
    left.set(title="indexer's KL, mean over layers", xlabel="step of warm-up, then sparse stage", ylabel="nats")
    middle.set(title="recall of the attention's mass", xlabel="step of warm-up, then sparse stage", ylim=(0, 1.02))
    for name, colour in (("control", "tab:orange"), ("sparse", "tab:green")):
        right.plot(*zip(*kept[name]["eval_bits_per_byte"]), color=colour, marker=".", label=name)
    right.axhline(runs["dense"]["eval_bits_per_byte"], color="grey", linestyle="--", label="dense, before")
    right.set(title="validation bits per byte", xlabel="step after the dense run (control) or warm-up (sparse)")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "dsa_stages")
    parser.add_argument("--share", type=float, default=1.0, help="of each stage's steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args()
    recipes = {name: recipe_of(name, args.folder, args.share, args.threads) for name in RUNS}
    runs = {name: run(recipe) for name, recipe in recipes.items()}
    runs["fixed"], runs["best"] = untrained_selections(recipes["warmup"], args.folder / "dense")
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    bits = {name: runs[name]["eval_bits_per_byte"] for name in RUNS}
    summary = {
        "sequence_length": recipes["warmup"].data.sequence_length,
        "index_topk": recipes["warmup"].model.indexer["index_topk"],
        "recall_untrained": runs["warmup"]["curves"]["eval_index_recall"][0][1],
        "recall_after_warmup": runs["warmup"]["eval_index_recall"],
        "recall_after_sparse": runs["sparse"]["eval_index_recall"],
        "recall_fixed_window": runs["fixed"]["eval_index_recall"],
        "recall_best_keys": runs["best"]["eval_index_recall"],
        "bits_per_byte": bits,
        "sparse_over_control": bits["sparse"] / bits["control"],
    }
    kept = {"command": command("sparse_training"), "date": datetime.date.today().isoformat()}
    kept |= {"device": processor(device), "threads": args.threads, "share": args.share}
    kept |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    file = args.results / f"{kept['date']}-{device}-sparse_training.json"
    file.write_text(json.dumps(kept | {"summary": summary, "runs": runs}, indent=1) + "\n")
    draw(runs, file.with_suffix(".png"))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
