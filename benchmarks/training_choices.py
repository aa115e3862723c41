"""Measures two choices of the training pipeline on this machine, side by side.

    python -m benchmarks.training_choices [--threads 2] [--runs 7]

1. Muon's orthogonalisation: ours (all matrices of a shape at once, fp32 where bf16 is not native) against
   torch.optim.Muon's (one at a time, bf16), on the matrices of the quickstart model. Equality first: both must point
   the same way (cosine above 0.99).
2. `keep_memory()`: a training step of the quickstart model with and without it, in processes of their own, alternating.
   Equality first: the losses of both are the same.

Prints one JSON object last: medians in seconds and ratios (above 1: ours is faster).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F
from torch.optim._muon import _zeropower_via_newtonschulz

from train.hardware import keep_memory
from train.models import build_model
from train.optimizers import build_optimizer, orthogonalize
from train.recipe import REPOSITORY, OptimizerSection


def median_seconds(function, runs: int) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def orthogonalisation(runs: int) -> dict[str, float]:
    groups = {}
    for name, parameter in build_model("quickstart").named_parameters():
        if parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name and not name.endswith("gate.weight"):
            blocks = 2 if name.endswith("gate_up_proj") else 1
            matrices = torch.randn_like(parameter).reshape(-1, parameter.shape[-2] // blocks, parameter.shape[-1])
            groups.setdefault(matrices.shape[1:], []).append(matrices)
    stacks = [torch.cat(matrices) for matrices in groups.values()]

    def one(matrix: torch.Tensor) -> torch.Tensor:
        return _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)

    for stack in stacks:
        theirs = torch.stack([one(matrix) for matrix in stack]).float()
        cosine = F.cosine_similarity(orthogonalize(stack).flatten(1), theirs.flatten(1)).min().item()
        assert cosine > 0.99, f"the two disagree: cosine {cosine}"
    ours = median_seconds(lambda: [orthogonalize(stack) for stack in stacks], runs)
    theirs = median_seconds(lambda: [one(matrix) for stack in stacks for matrix in stack], runs)
    return {"ours_s": ours, "torch_s": theirs, "ratio": theirs / ours}


def step(runs: int) -> dict[str, float | list[float]]:
    """One process's measurement: the median of a step, and the losses for comparison."""
    torch.manual_seed(0)
    model = build_model("quickstart").train()
    optimizer = build_optimizer(model, OptimizerSection())
    ids, losses = torch.randint(0, 4096, (24, 256)), []

    def run():
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    run()
    return {"seconds": median_seconds(run, runs), "losses": losses[:3]}


def allocator(threads: int, runs: int) -> dict[str, float]:
    seconds = {"keep": [], "return": []}
    losses = {}
    for _ in range(3):
        for mode in seconds:
            command = [sys.executable, "-m", "benchmarks.training_choices", "--step", mode]
            command += ["--threads", str(threads), "--runs", str(runs)]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            seconds[mode].append(result["seconds"])
            losses[mode] = result["losses"]
    assert losses["keep"] == losses["return"], losses
    keep, back = (statistics.median(values) for values in seconds.values())
    return {"keep_memory_s": keep, "default_s": back, "ratio": back / keep}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--step", choices=["keep", "return"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "keep":
        keep_memory()
    torch.set_num_threads(args.threads)
    if args.step:
        print(json.dumps(step(args.runs)))
        return
    result = {"torch": torch.__version__, "threads": args.threads, "dtype": "float32"}
    result["orthogonalisation"] = orthogonalisation(args.runs)
    result["allocator"] = allocator(args.threads, args.runs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
