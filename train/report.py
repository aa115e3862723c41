"""Pictures of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_losses(history: list[dict], path: Path, title: str) -> Path:
    """Draws training loss (nats per token) and validation bits per byte against the step into a PNG."""
    train = [(entry["step"], entry["ce_loss"]) for entry in history if "ce_loss" in entry]
    validation = [(entry["step"], entry["eval_bits_per_byte"]) for entry in history if "eval_bits_per_byte" in entry]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.set(title=title, xlabel="optimizer step", ylabel="training loss (nats per token)")
    axis.grid(alpha=0.3)
    lines = axis.plot(*zip(*train), color="tab:blue", label="training loss") if train else []
    if validation:
        right = axis.twinx()
        right.set_ylabel("validation bits per byte")
        lines += right.plot(*zip(*validation), color="tab:orange", marker="o", markersize=4, label="validation")
        axis.set_title(f"{title}: {validation[-1][1]:.3f} bits per byte")
    axis.legend(handles=lines, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
