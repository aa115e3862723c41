"""The report of a run: one HTML file with tables and pictures that needs nothing else, not even a network.

    python -m train.report runs/quickstart

A run draws it when it ends, into `report.html` of its output folder; the command draws it anew, also of a run that was
cut off, from what lies there: `trainer_state.json` (or the last checkpoint's), `expert_load.jsonl`, `metrics.json` and
`summary.json`. What a run did not log has no section.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_nanodeepseek.saving import replacing

from .checkpointing import STATE, checkpoints
from .expert_load import read_expert_load

REPORT, SUMMARY, METRICS = "report.html", "summary.json", "metrics.json"
POINTS = 1000  # of a curve or of a heat map's time axis: more than a screen shows
MAPS = 12  # layers that get a heat map over time of their own
PARTS = ("embedding", "head", "matrices", "experts", "router", "indexer", "mtp", "scalars")


@dataclass
class Run:
    """What a report is drawn from: the Trainer's log, the experts' load, final metrics, and tables by heading."""

    title: str
    history: list[dict]
    load: list[dict] = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    summary: dict[str, dict[str, str]] = field(default_factory=dict)

    def curve(self, key: str) -> tuple[list[int], list[float]] | None:
        """Steps and values of a key of the log, or None if it is nowhere."""
        points = [(entry["step"], entry[key]) for entry in self.history if key in entry]
        return tuple(zip(*thinned(points))) if points else None

    def layers(self, key: str) -> dict[int, str]:
        """The keys `<key>/layer_<i>` of the log, by layer."""
        names = {name for entry in self.history for name in entry if name.startswith(f"{key}/layer_")}
        return dict(sorted((int(name.rsplit("_", 1)[1]), name) for name in names))


def read_run(folder: Path) -> Run:
    """The run of an output folder.

    Raises: ValueError if it holds none.
    """
    states = [path for path in (folder / STATE, *(c / STATE for c in checkpoints(folder))) if path.is_file()]
    if not states:
        raise ValueError(f"{str(folder)!r} is no folder of a run: it has neither {STATE} nor a checkpoint with one")

    def read(file: Path, *keys: str) -> dict:
        try:
            values = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is damaged: {error}") from error
        absent = [key for key in keys if key not in values] if isinstance(values, dict) else ["fields"]
        if absent:
            raise ValueError(f"{str(file)!r} is damaged: it has no {', '.join(absent)}")
        return values

    state = read(states[0], "global_step", "log_history")
    load = [entry for entry in read_expert_load(folder) if entry["step"] <= state["global_step"]]
    summary, metrics = read(folder / SUMMARY), read(folder / METRICS)
    return Run(folder.absolute().name, state["log_history"], load, metrics, summary)


def thinned(entries: list, most: int = POINTS) -> list:
    """At most so many of them, evenly spaced, the last one always among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def new_figure(title: str, ylabel: str, width: float = 6.4):
    figure, axis = plt.subplots(figsize=(width, 3.4), layout="constrained")
    axis.set(title=title, xlabel="optimizer step", ylabel=ylabel)
    axis.grid(alpha=0.3)
    return figure, axis


def draw(axis, run: Run, key: str, label: str | None = None, **style) -> list:
    """The line of a key; nothing if it was not logged."""
    curve = run.curve(key)
    if curve is None:
        return []
    style = {"marker": "o" if len(curve[0]) < 3 else None, "linewidth": 1.4} | style  # of one or two points no line
    return axis.plot(*curve, label=label, **style)


def two_axes(run: Run, title: str, left: tuple, right: tuple) -> Figure | None:
    """Two quantities against the step; each side is (axis label, {key: name in the legend})."""
    if all(run.curve(key) is None for _, keys in (left, right) for key in keys):
        return None
    figure, axis = new_figure(title, left[0])
    lines = [line for key, name in left[1].items() for line in draw(axis, run, key, name, color="tab:blue")]
    if any(run.curve(key) for key in right[1]):
        other = axis.twinx()
        other.set_ylabel(right[0])
        style = {"color": "tab:orange", "marker": "o", "markersize": 3}
        lines += [line for key, name in right[1].items() for line in draw(other, run, key, name, **style)]
    axis.legend(handles=lines)
    return figure


def losses(run: Run) -> Figure | None:
    left = ("cross-entropy (nats per token)", {"ce_loss": "training"})
    return two_axes(run, "Loss", left, ("bits per byte", {"eval_bits_per_byte": "held out"}))


def rates(run: Run) -> Figure | None:
    if run.curve("learning_rate") is None:
        return None
    figure, axis = new_figure("Learning rate of the hidden matrices", "learning rate")
    draw(axis, run, "learning_rate")
    axis.set_ylim(bottom=0)
    return figure


def gradients(run: Run) -> Figure | None:
    if run.curve("grad_norm") is None:
        return None
    figure, axis = new_figure("Gradient norms before clipping", "2-norm")
    draw(axis, run, "grad_norm", "all", color="black")
    for part, color in zip(PARTS, plt.get_cmap("tab10").colors):
        draw(axis, run, f"grad_norm/{part}", part, color=color, linewidth=1)
    axis.set_yscale("log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def multi_token(run: Run) -> Figure | None:
    depths = sorted(int(key.rsplit("_", 1)[1]) for key in {k for e in run.history for k in e if "mtp_loss_" in k})
    if not depths:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    left.set(title="Multi-token prediction", xlabel="optimizer step", ylabel="loss (nats per token)")
    right.set(title="its most likely token is right", xlabel="optimizer step", ylabel="share of targets")
    for depth in depths:
        draw(left, run, f"mtp_loss_{depth}", f"module {depth}")
        draw(right, run, f"mtp_accuracy_{depth}", f"module {depth}, training")
        draw(right, run, f"eval_mtp_accuracy_{depth}", f"module {depth}, held out", marker="o", markersize=3)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def indexer(run: Run) -> Figure | None:
    left = ("KL per layer (nats)", {"index_kl": "KL to the attention"})
    return two_axes(run, "The indexer", left, ("share of the mass", {"eval_index_recall": "recall, held out"}))


def of_layers(run: Run, key: str, title: str, ylabel: str, mean: str | None = None) -> Figure | None:
    """A line per layer, coloured by its number, and their mean."""
    layers = run.layers(key)
    if not layers:
        return None
    figure, axis = new_figure(title, ylabel)
    shade = Normalize(min(layers), max(max(layers), min(layers) + 1))
    colors = plt.get_cmap("viridis")
    for layer, name in layers.items():
        draw(axis, run, name, f"layer {layer}", color=colors(shade(layer)), linewidth=1)
    if mean:
        draw(axis, run, mean, "mean", color="black", linewidth=2)
    axis.set_ylim(bottom=0)
    if len(layers) <= 8:
        axis.legend(fontsize="small")
    else:
        label = "layer (black: mean)" if mean else "layer"
        figure.colorbar(ScalarMappable(shade, colors), ax=axis, label=label, ticks=MaxNLocator(integer=True))
    return figure


def violations(run: Run) -> Figure | None:
    title = "Maximal violation: the most loaded expert, against the mean"
    return of_layers(run, "expert_max_violation", title, "max load / mean load - 1", "expert_max_violation")


def bias_ranges(run: Run) -> Figure | None:
    return of_layers(run, "expert_bias_range", "Spread of the routing biases", "max b - min b")


def shares(tokens) -> np.ndarray:
    """Loads [..., E] as multiples of the mean, 1 being balanced; 0 for a layer that rested."""
    tokens = np.asarray(tokens, dtype=float)
    return tokens / np.maximum(tokens.mean(-1, keepdims=True), 1e-9)


LOADS = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1.0, 0.0, 3.0)}


def edges(steps: list[int]) -> np.ndarray:
    """Where the columns of a heat map over steps begin and end: half-way between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    return np.concatenate(([1.5 * steps[0] - 0.5 * steps[1]], middles, [1.5 * steps[-1] - 0.5 * steps[-2]]))


def loads_over_time(run: Run) -> Figure | None:
    if not run.load:
        return None
    entries, layers = thinned(run.load, POINTS // 2), run.load[0]["layers"]
    chosen = thinned(list(range(len(layers))), MAPS)
    columns = min(2 if len(chosen) <= 4 else 3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9.6, 0.8 + 1.9 * rows), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    times = edges([entry["step"] for entry in entries])
    load = shares([entry["tokens"] for entry in entries])  # [steps, layers, E]
    for axis, row in zip(axes.flat, chosen):
        limits = np.arange(load.shape[-1] + 1) - 0.5
        image = axis.pcolormesh(times, limits, load[:, row].T, rasterized=True, **LOADS)
        axis.set_title(f"layer {layers[row]}", fontsize="medium")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel("expert", fontsize="medium")
    drawn = list(axes.flat[: len(chosen)])  # matplotlib takes no removed ones
    figure.colorbar(image, ax=drawn, label="load / mean load", extend="max", shrink=0.9)
    return figure


def at_the_end(run: Run) -> Figure | None:
    """Load (of the last tenth of the run) and biases, layer by expert."""
    if not run.load:
        return None
    layers = run.load[0]["layers"]
    last = run.load[-max(1, len(run.load) // 10) :]
    load = shares(np.mean([entry["tokens"] for entry in last], axis=0))
    bias = np.array(run.load[-1]["bias"], dtype=float)
    bias -= bias.mean(-1, keepdims=True)  # the common part changes no choice
    widest = float(np.abs(bias).max()) or 1.0
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, min(8.0, 1.6 + 0.28 * len(layers))), layout="constrained", sharey=True
    )
    signs = {"cmap": "PuOr_r", "norm": Normalize(-widest, widest)}
    titles = ("Load, last tenth of the run", "load / mean load"), ("Routing bias at the end", "b - mean b of the layer")
    for axis, values, style, (title, label) in zip(axes, (load, bias), (LOADS, signs), titles):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **style)
        axis.set(title=title, xlabel="expert")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axis, label=label, extend="max" if style is LOADS else "neither")
    shown = thinned(list(range(len(layers))), 16)
    axes[0].set(ylabel="layer", yticks=shown, yticklabels=[layers[row] for row in shown])
    return figure


def speed(run: Run) -> Figure | None:
    curve = run.curve("tokens_per_second")
    if curve is None:
        return None
    figure, axis = new_figure("Speed", "tokens per second")
    draw(axis, run, "tokens_per_second")
    axis.set_ylim(bottom=0)
    shares_of_peak = run.curve("flop_utilisation")
    if shares_of_peak is not None:  # the same curve in another unit
        other = axis.twinx()
        other.set_ylabel("FLOP utilisation (% of the measured peak)")
        other.set_ylim(0, axis.get_ylim()[1] * 100 * shares_of_peak[1][-1] / curve[1][-1])
    return figure


# Each picture with what to see in it.
FIGURES: dict[Callable[[Run], Figure | None], str] = {
    losses: "Cross-entropy of the training batches, and bits per byte of held-out text, a unit for every tokenizer.",
    rates: "As the schedule sets it, by steps or by the clock. The other groups' rates move in proportion.",
    gradients: "The squares of the parts add up to that of the whole. mtp: the modules of multi-token prediction; "
    "matrices: the other weights of two dims; scalars: norms and biases.",
    multi_token: "Module k predicts the token after the next k.",
    indexer: "How far its choice is from the attention's own weights, and what share of them falls on the chosen keys.",
    violations: "0 is balanced; number of experts / experts per token - 1 is one set of experts for all tokens.",
    bias_ranges: "The biases that loss-free balancing adds to the scores when experts are chosen.",
    loads_over_time: "Each expert's share of the tokens of a step: white is the mean, blue less, red more. "
    "Layers of multi-token prediction come last.",
    at_the_end: "Where load stays uneven although the bias has moved, the router insists.",
    speed: "FLOP utilisation: the operations that the equations need, against large matrix products on this machine.",
}


def plot_losses(history: list[dict], path: Path, title: str) -> Path:
    """Draws training loss (nats per token) and validation bits per byte against the step into a PNG."""
    figure = losses(Run(title, history))
    if figure is None:
        figure, _ = new_figure("", "cross-entropy (nats per token)")
    scores = [entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry]
    figure.axes[0].set_title(f"{title}: {scores[-1]:.3f} bits per byte" if scores else title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def inline(figure: Figure, alternative: str) -> str:
    """The figure as an <img> that holds it: vectors, with heat maps as pixels."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):  # equal runs give equal files
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def text(value) -> str:
    """A value for HTML; `code spans` of the model card become <code>."""
    if isinstance(value, float):
        value = f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return re.sub(r"(`+) ?(.+?) ?\1", r"<code>\2</code>", html.escape(str(value), quote=False))


def table(rows: dict) -> str:
    cells = (f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 1.5em }}
figure {{ margin: 0 }} figure.wide {{ grid-column: 1 / -1 }}
img {{ width: 100%; height: auto }} figcaption {{ color: #555; font-size: 13px }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 10px 3px 0; border-bottom: 1px solid #ddd }}
th {{ font-weight: 500; color: #444; width: 38% }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def render(run: Run) -> str:
    """The page."""
    tables = [f"<section><h2>{text(name)}</h2>{table(rows)}</section>" for name, rows in run.summary.items() if rows]
    drawn = {draw_one: draw_one(run) for draw_one in FIGURES}
    figures = [
        f'<figure class="{"wide" if figure.get_size_inches()[0] > 8 else "half"}">'
        f"{inline(figure, draw_one.__name__.replace('_', ' '))}"
        f"<figcaption>{text(FIGURES[draw_one])}</figcaption></figure>"
        for draw_one, figure in drawn.items()
        if figure is not None
    ]
    parts = [f'<div class="grid">{"".join(tables)}</div>'] if tables else []
    parts += [f'<h2>The course of the run</h2><div class="grid">{"".join(figures)}</div>'] if figures else []
    parts += [f"<h2>Final metrics</h2>{table(run.metrics)}"] if run.metrics else []
    return PAGE.format(title=text(run.title), body="\n".join(parts))


def write_report(folder: Path) -> Path:
    """Draws the report of a run into its folder; returns the file."""
    page = render(read_run(folder))
    with replacing(folder) as stage:
        (stage / REPORT).write_text(page, encoding="utf-8")
    return folder / REPORT


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the output folder of a run, e.g. runs/quickstart")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.run))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
