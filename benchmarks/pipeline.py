"""What each pipeline schedule idles, measured and by formula, and a picture of who did what when.

    python -m benchmarks.pipeline [--ranks 4] [--microbatches 8] [--unit 0.1]

Stages of known durations (they sleep, so that processes do not compete for cores), run by torch's schedules in gloo
processes on this machine: forward, gradient of the input and of the weight take one `unit` each; where a schedule puts
two stages on a process each takes half, so that the whole model is the same. The first stage's input is a parameter, as
an embedding is: torch runs its whole backward where the schedule has W.

Bubble is the time in which a process does nothing between its own first and last action, in units: of the process
that takes longest (arXiv:2401.10241 section 4).
Writes benchmarks/results/DATE-cpu-pipeline.json and .png; the last line is one JSON object.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from benchmarks.collect import command, processor
from train.pipelining import SCHEDULES, bubble, stages_of
from train.recipe import REPOSITORY

REPEATS = 3  # steps, of which the fastest is taken: others use the machine too
COLOURS = {"F": "tab:blue", "I": "tab:orange", "W": "tab:green", "B": "tab:red"}
NAMES = {"F": "forward", "I": "gradient of the input", "W": "gradient of the weight", "B": "whole backward"}


class Pause(torch.autograd.Function):
    """x, which takes some seconds forward and backward."""

    @staticmethod
    def forward(ctx, x, forward: float, backward: float):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


class TimedStage(nn.Module):
    """x * w; F in the forward, and in the backward I on the way to x and W on the way to w."""

    def __init__(self, seconds: float, first: bool, last: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.embedding = nn.Parameter(torch.ones(4)) if first else 0.0
        self.seconds, self.last = seconds, last

    def forward(self, x):
        x = Pause.apply(x + self.embedding, self.seconds, self.seconds)
        y = x * Pause.apply(self.weight, 0.0, self.seconds)
        return y.sum() if self.last else y


def record(stage: PipelineStage, events: list):
    """Notes (kind, stage, micro-batch, start, end) of everything the stage does."""

    def timed(method, kind):
        def run(index, *args, **kwargs):
            start = time.perf_counter()
            result = method(index, *args, **kwargs)
            if not (stage.is_first and kind(kwargs) == "I"):  # which is nothing
                events.append((kind(kwargs), stage.stage_index, index, start, time.perf_counter()))
            return result

        return run

    weight = "B" if stage.is_first else "W"
    stage.forward_one_chunk = timed(stage.forward_one_chunk, lambda _: "F")
    stage.backward_one_chunk = timed(
        stage.backward_one_chunk, lambda given: "B" if given.get("full_backward", True) else "I"
    )
    stage.backward_weight_one_chunk = timed(stage.backward_weight_one_chunk, lambda _: weight)


def work(rank: int, ranks: int, store: str, microbatches: int, unit: float, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for name, kind in SCHEDULES.items():
        stages, events, steps = ranks * kind.stages_per_rank, [], []
        x, y = torch.ones(1, 4), torch.ones(1, 4, requires_grad=True)
        mine = []
        for i in stages_of(rank, ranks, name):
            last = i == stages - 1
            example = {"input_args": (x,) if i == 0 else (y,), "output_args": (y.sum() if last else y,)}
            module = TimedStage(unit / kind.stages_per_rank, i == 0, last)
            mine.append(PipelineStage(module, i, stages, torch.device("cpu"), **example))
        settings = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        given = mine[0] if name == "1f1b" else mine
        schedule = kind.schedule(given, microbatches, **settings)
        batch = torch.ones(microbatches, 4)
        step = partial(schedule.step, *([batch] if rank == 0 else []), target=batch, return_outputs=False)
        step()  # connections are made
        for stage in mine:
            record(stage, events)
        for _ in range(REPEATS):
            dist.barrier()
            step()
            steps.append(list(events))
            events.clear()
        results[name, rank] = steps
    dist.destroy_process_group()


def measure(ranks: int, microbatches: int, unit: float) -> dict[str, list[list[tuple]]]:
    """Of each schedule the events of each process, times in units since the first of all."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (ranks, f"{folder}/store", microbatches, unit, results), nprocs=ranks)
        runs = {}
        for name in SCHEDULES:
            steps = zip(*(results[name, rank] for rank in range(ranks)))
            runs[name] = min(steps, key=lambda processes: span(processes)[1] - span(processes)[0])
    for name, processes in runs.items():
        begin = span(processes)[0]
        runs[name] = [
            [(kind, stage, index, (start - begin) / unit, (end - begin) / unit) for kind, stage, index, start, end in e]
            for e in processes
        ]
    return runs


def span(processes: list[list[tuple]]) -> tuple[float, float]:
    """When the first action of all began, and when the last one ended."""
    events = [event for events in processes for event in events]
    return min(event[3] for event in events), max(event[4] for event in events)


def idle(processes: list[list[tuple]]) -> list[float]:
    """Of each process the time between its first and last action in which it did nothing."""
    spans = [max(event[4] for event in events) - min(event[3] for event in events) for events in processes]
    return [span - sum(stop - start for *_, start, stop in events) for span, events in zip(spans, processes)]


def formula(name: str, ranks: int) -> float:
    """In units: F = I = W = 1 divided by the stages of a process; torch runs a pair one after the other."""
    part = 1 / SCHEDULES[name].stages_per_rank
    times = {"forward": part, "backward": 2 * part, "weight": part, "pair": 3 * part}
    return bubble(name, ranks * SCHEDULES[name].stages_per_rank, **times)


def draw(runs: dict, rows: list[dict], path: Path):
    figure, axes = plt.subplots(len(runs), 1, figsize=(15, 2.3 * len(runs)), sharex=True, layout="constrained")
    for axis, row in zip(axes, rows):
        for rank, events in enumerate(runs[row["schedule"]]):
            for kind, stage, index, start, end in events:
                second = SCHEDULES[row["schedule"]].is_v and stage >= len(runs[row["schedule"]])
                alpha = 0.55 if second else 1.0
                axis.barh(
                    rank, end - start, left=start, color=COLOURS[kind], alpha=alpha, edgecolor="white", height=0.9
                )
                axis.text((start + end) / 2, rank, index, ha="center", va="center", fontsize=6, color="white")
        axis.set(yticks=range(len(runs[row["schedule"]])), ylabel="process")
        axis.set_title(
            f"{row['schedule']}: idle {row['measured']:.1f} of {row['span']:.1f} units, formula {row['formula']:.1f}",
            loc="left",
        )
        axis.invert_yaxis()
    axes[-1].set_xlabel("time, in units (pale: the second stage of a process; numbers: micro-batches)")
    figure.legend(
        handles=[Patch(color=COLOURS[k], label=NAMES[k]) for k in COLOURS], loc="outside upper right", ncols=4
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--unit", type=float, default=0.1, help="seconds")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args()
    runs = measure(args.ranks, args.microbatches, args.unit)
    rows = []
    for name, processes in runs.items():
        times = idle(processes)
        row = {"schedule": name, "measured": max(times), "formula": formula(name, args.ranks)}
        rows.append(row | {"span": span(processes)[1], "of_each_process": times})
    print(f"{'schedule':12}{'idle, measured':>16}{'by formula':>12}{'span':>8}   (units of {args.unit} s)")
    for row in rows:
        print(f"{row['schedule']:12}{row['measured']:16.2f}{row['formula']:12.2f}{row['span']:8.2f}")
    kept = {"command": command("pipeline"), "date": datetime.date.today().isoformat()}
    kept |= {"device": processor("cpu"), "ranks": args.ranks, "microbatches": args.microbatches, "unit": args.unit}
    kept |= {"torch": torch.__version__, "python": platform.python_version()}
    file = args.results / f"{kept['date']}-cpu-pipeline.json"
    file.write_text(json.dumps(kept | {"schedules": rows}, indent=1) + "\n")
    draw(runs, rows, file.with_suffix(".png"))
    print(json.dumps({row["schedule"]: {k: round(row[k], 3) for k in ("measured", "formula")} for row in rows}))


if __name__ == "__main__":
    main()
