"""transformers' own Trainer on our model: how a batch is cut, recomputation and evaluation change nothing."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_nanodeepseek import LoadBalancingCallback
from modeling_nanodeepseek.balancing import routers
from tests.conftest import assert_close, checkpoint_activations, tiny_model, tokens

LENGTHS = (13, 2, 7, 13, 5, 9, 3, 11)


def rows() -> list[dict]:
    """24 rows of unequal lengths, some of whose tokens are not to be learned."""
    data = []
    for i in range(24):
        ids = tokens(1, LENGTHS[i % 8], seed=i)[0]
        labels = ids.clone()
        labels[: i % 4] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Right padding to the longest row of the micro-batch, so that the cut changes the shapes too."""
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row["input_ids"]) for row in batch], batch_first=True)
    ids = pad([row["input_ids"] for row in batch], batch_first=True)
    labels = pad([row["labels"] for row in batch], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Biases(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.stack([gate.e_score_correction_bias.clone() for gate in routers(model)]))


def run(folder, batch: int, accumulation: int, checkpointing: bool = False, evaluates: bool = False):
    """Three steps of 8 rows with every loss on, by SGD, which shows a gradient's size as AdamW does not."""
    model, biases = tiny_model(aux_loss_alpha=0.5).train(), Biases()
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        logging_steps=1, save_strategy="no", eval_strategy="steps" if evaluates else "no", eval_steps=1, seed=5,
        use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=1e9, lr_scheduler_type="constant",
    )  # fmt: skip
    data = rows()
    trainer = Trainer(
        model, arguments, collate, train_dataset=data, eval_dataset=data[:4],
        callbacks=[LoadBalancingCallback(gamma=0.01), biases],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.01), None),
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(biases.seen) == 3
    return model, history, biases.seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """8 rows at once."""
    return run(tmp_path_factory.mktemp("whole"), 8, 1)


CUTS = {
    "4x2": (4, 2),
    "1x8": (1, 8),
    "checkpointed-8x1": (8, 1, True),
    "checkpointed-2x4": (2, 4, True),
    "evaluated-4x2": (4, 2, False, True),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(cut, whole, tmp_path):
    """Losses, gradient norms, weights, and router biases step by step, exactly."""
    model, history, biases = run(tmp_path, *CUTS[cut])
    expected_model, expected_history, expected_biases = whole
    for ours, expected in zip(history, expected_history):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # the log is rounded
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(biases, expected_biases))
    assert not torch.equal(biases[0], biases[1])
    for (name, ours), expected in zip(model.named_parameters(), expected_model.parameters()):
        assert_close(expected, ours, 1e-5, name)
    start = dict(tiny_model().named_parameters())
    assert all(not torch.equal(start[name], parameter) for name, parameter in model.named_parameters())
