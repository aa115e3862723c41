"""A loss or a gradient that is no number ends the run, with the step and the module, before it reaches a weight."""

import errno
import json
import os
import re
import signal
import threading

import pytest
import torch
from accelerate import Accelerator
from torch.distributed import DistBackendError, DistNetworkError
from transformers import TrainerCallback

from tests.train.test_trainer import build
from train import pretrain
from train.faults import (
    NonFiniteError,
    Stopped,
    check_finite,
    first_non_finite,
    full_disks_of_threads,
    heed_sigterm,
    lost_others,
    non_finite_gradients,
)


class Poison(TrainerCallback):
    """Spoils something before a step."""

    def __init__(self, step: int, spoil):
        self.step, self.spoil = step, spoil

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.spoil(model)


def run(recipe, step, spoil):
    trainer = build(recipe)
    trainer.add_callback(Poison(step, spoil))
    trainer.train()


def test_a_loss_that_is_nan(tiny_recipe):
    def spoil(model):
        model.model.layers[1].mlp.experts.down_proj.data.fill_(float("nan"))

    message = r"step 3: the loss is nan, first in the output of model\.layers\.1\.mlp\.experts \(GatedExperts\)"
    with pytest.raises(NonFiniteError, match=message):
        run(tiny_recipe(trainer={"report_to": []}), 3, spoil)


def test_it_ends_the_command_with_one_message(tiny_recipe, tmp_path, capfd):
    """A rate that no weight survives, through the entry point."""
    recipe = tiny_recipe(optimizer={"name": "adamw", "matrix_lr": 1e30}, trainer={"report_to": []})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["--config", str(tmp_path / "recipe.yaml")])
    message = str(caught.value)
    assert re.match(r"error: step \d: the loss is (nan|inf), first in the output of model\.layers\.\d\.\S+ \(", message)
    assert "\n" not in message and "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_full_disk_under_a_thread(tiny_recipe, capfd):
    """The last write of a log has no next one that could tell; other errors of threads stay what they are."""

    def raising(error):
        def work():
            raise error

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with pytest.raises(SystemExit, match="run' cannot be written to: No space left on device. There is no earlier"):
        pretrain.launch(lambda recipe: raising(OSError(errno.ENOSPC, "No space left on device")), tiny_recipe())
    assert "Traceback" not in capfd.readouterr().err
    seen, before = [], threading.excepthook
    threading.excepthook = seen.append
    try:
        with full_disks_of_threads():
            raising(ValueError("another"))
        assert len(seen) == 1 and threading.excepthook == seen.append
    finally:
        threading.excepthook = before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_infinite(accumulation, tiny_recipe):
    """The loss is a number; the weights are still those of the step before."""
    kept = {}

    def spoil(model):
        kept.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        kept["model"] = model
        model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))

    message = r"step 2: the loss is \d+\.\d+, and gradients are not finite: model\.norm\.weight\."
    with pytest.raises(NonFiniteError, match=message):
        run(tiny_recipe(trainer={"report_to": [], "gradient_accumulation_steps": accumulation}), 2, spoil)
    model = kept.pop("model")
    assert all(torch.equal(kept[name], parameter) for name, parameter in model.named_parameters())


def test_scaled_gradients_may_overflow():
    """fp16's scaler skips such a step and goes on with a smaller scale; a loss that is no number stays an error."""
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad.fill_(float("inf"))
    fine, nan = ({}, torch.tensor(1.0)), ({"input": torch.full((1, 2), float("nan"))}, torch.tensor(float("nan")))
    accelerator = Accelerator(cpu=True)
    with pytest.raises(NonFiniteError, match="gradients are not finite: weight"):
        check_finite(accelerator, model, [fine], step=1)
    accelerator.scaler = object()
    check_finite(accelerator, model, [fine], step=1)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        check_finite(accelerator, model, [nan, fine], step=1)


def test_an_earlier_micro_batch_is_named(tiny_recipe):
    """The first of two is wrong, and the second's loss is fine."""
    trainer = build(tiny_recipe(trainer={"report_to": [], "gradient_accumulation_steps": 2}))
    forwards = []

    def spoil(module, args, output):
        forwards.append(1)
        return output * float("nan") if len(forwards) in (3, 5) else output  # the second step's first, and its search

    trainer.model.model.layers[1].mlp.shared_experts.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan, first in .*layers\.1\.mlp\.shared_experts"):
        trainer.train()


def test_what_is_finite_passes(tiny_recipe):
    trainer = build(tiny_recipe(trainer={"report_to": []}))
    trainer.train()
    assert trainer.state.global_step == 6
    batch = next(iter(trainer.get_train_dataloader()))
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]  # transformers' own
    assert (
        non_finite_gradients(trainer.model.named_parameters()) == [] and first_non_finite(trainer.model, batch) is None
    )
    assert hooks == [len(module._forward_hooks) for module in trainer.model.modules()]


GONE = [
    RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41042"),
    RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [::1]:4: Connection reset by peer"),
    DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shut down?"),
    DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.27\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
    DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
]
OWN = [
    DistBackendError("NCCL error in: ..., invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA"),
    DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (127.0.0.1, 29500)."),
    RuntimeError("No backend type associated with device type cuda: the group has gloo only"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
]


@pytest.mark.parametrize("error", GONE + OWN, ids=lambda error: str(error)[:20])
def test_what_is_said_of_others_that_are_gone(error, tiny_recipe, capfd):
    """One line with what to go on from; any other error stays what it is."""

    def run(recipe):
        raise error

    assert lost_others(error) == (error in GONE)
    with pytest.raises(SystemExit if error in GONE else type(error)) as caught:
        pretrain.launch(run, tiny_recipe())
    written = capfd.readouterr().err
    if error in OWN:
        assert caught.value is error and not written
        return
    assert caught.value.code == 1 and written == f"{caught.value}\n" and written.count("\n") == 1
    assert written.startswith("error: process 0 stops, because another has ended (")
    assert written.endswith("). There is no checkpoint yet\n")


def test_sigterm_of_a_launcher(monkeypatch):
    """Raised in a process of several, but not in one that it has forked, which ends by it as ever."""
    before = signal.getsignal(signal.SIGTERM)
    with heed_sigterm():
        assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Stopped), heed_sigterm():
        forked = os.fork()
        if not forked:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
