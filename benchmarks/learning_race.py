"""Who learns most in equal time: this model, each ingredient taken away, and what people would train instead.

    python -m benchmarks.learning_race [--seconds 200] [--seeds 1 2 3] [--racers ours dense ...] [--folder runs/race]

Every racer reads the same rows of the quickstart's data with the same tokenizer, on the same threads, for the same
seconds of training (steps alone are timed), its learning rate warming up, constant and decaying by the clock; then the
held-out files are scored in bits per byte. `ours` is the quickstart recipe, run with every seed, the others with the
first; an ingredient is that recipe with one thing changed; the rivals are transformers' models in a plain loop. The
quickstart's sizes and rates were chosen by the same held-out files (docs/log.md), the rivals' were not chosen. A racer
whose result lies in the folder, of the same recipe, is not run again.

Writes benchmarks/results/DATE-DEVICE-learning_race.json; prints a table; the last line is one JSON object.
"""

import argparse
import datetime
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.collect import command, processor
from train import pretrain
from train.checkpointing import STATE
from train.data import collate, pack
from train.hardware import keep_memory, use_threads
from train.models import model_files
from train.optimizers import MuonAdamW, parameter_groups
from train.recipe import REPOSITORY, Recipe, load_recipe
from train.trainer import lr_factor

QUICKSTART = "configuration/recipes/quickstart.yaml"
RATES = ("embedding_lr", "head_lr", "scalar_lr", "router_lr")
# The quickstart with one thing changed.
INGREDIENTS = {
    "ours": [],
    "adamw": ["optimizer.name=adamw", "optimizer.matrix_lr=0.003"],
    "one_rate": [f"optimizer.{rate}=0.003" for rate in RATES],
    "router_at_once": ["optimizer.router_lr=null", "balance.gamma=0.01", "balance.final_gamma=null"],
    "init_0.006": ["model.overrides.initializer_range=0.006"],
    "dense": ["model.overrides.n_routed_experts=null", "model.overrides.intermediate_size=640"],
    "gqa": ["model.variant=moe_only"],
    "mtp": ["model.overrides.num_nextn_predict_layers=1", "mtp={coef: 0.3, final_coef: 0.1}"],
    "auxiliary_loss": ["balance.gamma=0", "model.overrides.aux_loss_alpha=0.01"],
    "unbalanced": ["balance.gamma=0", "model.overrides.aux_loss_alpha=0"],
    # nanochat's kind of model at its size: no experts, GQA with QK-norm, relu^2, weightless norms, Muon.
    "gpt_muon": [
        "model.variant=dense_transformer",
        *(f"model.overrides.{k}" for k in ("num_hidden_layers=7", "hidden_size=320", "intermediate_size=1280")),
    ],
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True)


def our_optimizer(model: nn.Module) -> MuonAdamW:
    """The quickstart's, on transformers' classes: their fused experts hold two matrices each, as ours do."""
    section = load_recipe(QUICKSTART).optimizer
    groups = parameter_groups(model, section)
    fused = {id(p) for n, p in model.named_parameters() if n.endswith("gate_up_proj")}
    for group in [group for group in groups if group["name"] == "matrices"]:
        pairs = [p for p in group["params"] if id(p) in fused]
        group["params"] = [p for p in group["params"] if id(p) not in fused]
        groups.append(group | {"name": "gate_up", "params": pairs, "row_blocks": 2})
    return MuonAdamW(groups, betas=section.betas, momentum=section.momentum)


def deepseek_v3(ids: dict) -> nn.Module:
    values = json.loads(model_files()["quickstart"].read_text()) | ids
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{k: v for k, v in values.items() if k != "model_type"}))


def llama(ids: dict) -> nn.Module:
    """4.8 M parameters, as many as the quickstart multiplies a token with."""
    sizes = dict(vocab_size=4096, hidden_size=256, intermediate_size=640, num_hidden_layers=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=2048, **ids))


RIVALS: dict[str, tuple[Callable, Callable, bool]] = {  # model, optimizer, bf16 autocast
    "deepseek_v3_adamw": (deepseek_v3, adamw, False),
    "deepseek_v3_adamw_bf16": (deepseek_v3, adamw, True),
    "deepseek_v3_muon": (deepseek_v3, our_optimizer, False),
    "llama_adamw": (llama, adamw, False),
}


def quickstart(name: str, seed: int, args: argparse.Namespace) -> Recipe:
    changes = [f"output_dir={args.folder / f'{name}-{seed}'}", f"threads={args.threads}", "prompt=null"]
    changes += [f"schedule.max_seconds={args.seconds}", f"trainer.seed={seed}", "trainer.max_steps=100000"]
    changes += ["trainer.report_to=none", "trainer.eval_strategy=no", *INGREDIENTS.get(name, [])]
    return load_recipe(QUICKSTART, changes)


def run_ours(recipe: Recipe) -> dict:
    metrics = pretrain.run(recipe)
    state = json.loads(Path(recipe.output_dir, STATE).read_text())
    history = [entry for entry in state["log_history"] if "ce_loss" in entry]
    violations = [entry["expert_max_violation"] for entry in history if "expert_max_violation" in entry]
    result = {"bits_per_byte": metrics["eval_bits_per_byte"], "steps": state["global_step"]}
    if violations:
        result |= {"max_violation": violations[-1], "max_violation_median": statistics.median(violations)}
        result |= {"global_violation": history[-1]["expert_global_violation"]}
    return result


def run_rival(name: str, recipe: Recipe) -> dict:
    """A plain loop: forward, backward, clip, step."""
    make_model, make_optimizer, bf16 = RIVALS[name]
    args, seed = recipe.trainer, recipe.trainer["seed"]
    train_documents, held_out = pretrain.load_data(recipe)
    tokenizer = pretrain.load_tokenizer(recipe, train_documents)
    rows, held_out_rows = (
        pack(documents, tokenizer, recipe.data.sequence_length) for documents in (train_documents, held_out)
    )
    set_seed(seed)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_model(ids).train()
    optimizer, schedule, limit = make_optimizer(model), recipe.schedule, recipe.schedule.max_seconds
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(
        rows, args["per_device_train_batch_size"], shuffle=True, drop_last=True, collate_fn=collate, generator=generator
    )
    spent, steps = 0.0, 0
    while spent < limit:
        for batch in batches:
            start = time.perf_counter()
            factor = lr_factor(spent / limit, schedule)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
            spent, steps = spent + time.perf_counter() - start, steps + 1
            if spent >= limit:
                break
    return {"bits_per_byte": score(model, held_out_rows, held_out["text"], bf16), "steps": steps}


@torch.no_grad()
def score(model: nn.Module, rows, texts: list[str], bf16: bool) -> float:
    """Bits per byte of the held-out text, as `NanoDeepSeekTrainer.evaluate` counts them."""
    model.eval()
    nats = 0.0
    for batch in DataLoader(rows, 24, collate_fn=collate):
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**batch, use_cache=False).logits
        nats += F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def race(name: str, seed: int, args: argparse.Namespace) -> dict:
    """The result of one racer, kept in the folder with its recipe."""
    file, recipe = args.folder / f"{name}-{seed}.json", quickstart(name, seed, args)
    settings = recipe.model_dump(mode="json")
    if file.is_file() and json.loads(file.read_text())["recipe"] == settings:
        return json.loads(file.read_text())
    use_threads(args.threads)
    result = run_rival(name, recipe) if name in RIVALS else run_ours(recipe)
    tokens = result["steps"] * recipe.trainer["per_device_train_batch_size"] * recipe.data.sequence_length
    result |= {"racer": name, "seed": seed, "seconds": args.seconds, "tokens_per_second": tokens / args.seconds}
    result["recipe"] = settings
    args.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    gc.collect()
    return result


def main():
    everyone = [*INGREDIENTS, *RIVALS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of ours; the others run the first")
    parser.add_argument(
        "--racers", nargs="+", choices=everyone, default=everyone, metavar="RACER", help=", ".join(everyone)
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "race")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args()
    keep_memory()
    runs = [(name, seed) for name in args.racers for seed in (args.seeds if name == "ours" else args.seeds[:1])]
    results = [race(name, seed, args) for name, seed in runs]
    print(
        f"{'racer':24} seed  bits/byte  tokens/s  max violation of the last step (median over the run), of the last ten"
    )
    for r in sorted(results, key=lambda r: r["bits_per_byte"]):
        shown = ("max_violation", "max_violation_median", "global_violation")
        violation = "{:.2f} ({:.2f}) {:.2f}".format(*(r[key] for key in shown)) if shown[0] in r else ""
        print(f"{r['racer']:24} {r['seed']:4}  {r['bits_per_byte']:9.3f}  {r['tokens_per_second']:8,.0f}  {violation}")
    kept = {"command": command("learning_race"), "date": datetime.date.today().isoformat()}
    kept |= {"device": processor("cpu"), "threads": args.threads, "torch": torch.__version__}
    shown = [{key: value for key, value in result.items() if key != "recipe"} for result in results]
    kept |= {"transformers": transformers.__version__, "python": platform.python_version(), "results": shown}
    (args.results / f"{kept['date']}-cpu-learning_race.json").write_text(json.dumps(kept, indent=1) + "\n")
    ours = [r["bits_per_byte"] for r in results if r["racer"] == "ours"]
    best = {r["racer"]: r["bits_per_byte"] for r in results if r["racer"] != "ours"}
    print(json.dumps({"ours": ours, "others": best}))


if __name__ == "__main__":
    main()
