"""How the experts were loaded over a run: numbers of each layer for the log, and all of it in a file of its own.

`expert_load.jsonl` in the output folder has a line per logged step:

    {"step": 10, "layers": [1, 2], "tokens": [[...], [...]], "bias": [[...], [...]]}

`tokens` and `bias` have a row per layer with experts and an entry per expert: the tokens sent to it in that step, on
all ranks, and its bias afterwards. Not in the trainer's state, which each checkpoint holds anew.
"""

import json
import os
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_nanodeepseek import LoadBalancingCallback
from modeling_nanodeepseek.balancing import ExpertLoad
from modeling_nanodeepseek.moe import TopkRouter
from modeling_nanodeepseek.saving import SaveError, reason

from .gradients import layer_of

FILE = "expert_load.jsonl"


def read_expert_load(folder: str | os.PathLike) -> list[dict]:
    """The entries of a run, in order; none without a file. A last line that a kill cut off is left out.

    Raises: ValueError naming the line for a file that is damaged elsewhere.
    """
    file = Path(folder, FILE)
    if not file.is_file():
        return []
    *lines, rest = file.read_text().split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):  # `rest` is what no line break ended
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(file)!r} line {number} is damaged: {error}") from error
    return entries


def by_layer(load: ExpertLoad, layers: list[int]) -> dict[str, float]:
    """Scalars of each layer that ran: its maximal violation (see `ExpertLoad.metrics`) and max b - min b."""
    numbers = {}
    for layer, tokens, bias in zip(layers, load.tokens.cpu().double(), load.bias):
        if tokens.any():
            violation = tokens.max() / tokens.mean() - 1
            numbers[f"expert_max_violation/layer_{layer}"] = violation.item()
            numbers[f"expert_bias_range/layer_{layer}"] = (bias.max() - bias.min()).item()
    return numbers


class ExpertLoadLog(TrainerCallback):
    """Writes the file, on the main process. A resumed run goes on after the step that it resumes from.

    Args:
        balancing: whose `load`, summed over all ranks, is that of the latest step.
        model: whose routers that is about.
    """

    def __init__(self, balancing: LoadBalancingCallback, model):
        self.balancing = balancing
        self.layers = [layer_of(name) for name, module in model.named_modules() if isinstance(module, TopkRouter)]
        self._since: torch.Tensor | None = None  # tokens of the steps since the last log

    def metrics(self) -> dict[str, float]:
        """What the log gets: of the latest step, over all layers and of each; and expert_global_violation, the maximal
        violation of the tokens of all steps since the last log. One step's is larger by what its few texts prefer:
        arXiv:2408.15664 section 4.1 tells MaxVio_batch and MaxVio_global apart likewise."""
        load = self.balancing.load
        if load is None:
            return {}
        lasting = load if self._since is None else ExpertLoad(self._since, load.bias)
        whole = {"expert_global_violation": lasting.metrics()["expert_max_violation"]}
        return load.metrics() | whole | by_layer(load, self.layers)

    def on_step_end(self, args, state, control, **kwargs):
        load = self.balancing.load
        if load is not None:
            self._since = load.tokens.clone() if self._since is None else self._since + load.tokens

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir, FILE)
        if not state.is_world_process_zero or not file.exists():
            return
        kept = [entry for entry in read_expert_load(args.output_dir) if entry["step"] <= state.global_step]
        new = file.with_suffix(".new")
        new.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        new.replace(file)

    def on_log(self, args, state, control, logs=None, **kwargs):
        load = self.balancing.load
        if "expert_max_violation" in logs:
            self._since = None
        if not state.is_world_process_zero or load is None or "expert_max_violation" not in logs:
            return
        bias = [[float(f"{b:.6g}") for b in row] for row in load.bias.tolist()]
        entry = {"step": state.global_step, "layers": self.layers, "tokens": load.tokens.tolist(), "bias": bias}
        path = Path(args.output_dir, FILE)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise SaveError(f"{str(path)!r} cannot be written: {reason(error)}") from error
