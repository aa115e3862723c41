"""TRL's SFTTrainer and transformers' Trainer learn from the same losses; where losses are lost, somebody says so."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_nanodeepseek import LoadBalancingCallback, ModelLoss, NanoDeepSeekForSequenceClassification, lora_targets
from modeling_nanodeepseek import modeling_nanodeepseek as modeling
from modeling_nanodeepseek.balancing import routers
from tests.conftest import SPARSE, assert_close, tiny_config, tiny_model, tokens
from tests.small_run import TINY_MODEL, small_tokenizer, text

trl = pytest.importorskip("trl", minversion="1.16")


class WholeSFT(ModelLoss, trl.SFTTrainer):
    pass


TERMS = ("loss", "ce_loss", "balance_loss", "index_loss", "mtp_loss")
LOSSES = {
    "balance": {"aux_loss_alpha": 0.5},
    "further": {"aux_loss_alpha": 0.5, "num_nextn_predict_layers": 2},
    "warmup": SPARSE | {"dsa_stage": "warmup", "num_nextn_predict_layers": 1},
    "sparse": SPARSE | {"aux_loss_alpha": 0.5, "num_nextn_predict_layers": 1},
}
SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "save_strategy": "no",
    "seed": 5, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 1e9, "bf16": False,
    "lr_scheduler_type": "constant", "learning_rate": 0.01, "logging_steps": 1, "optim": "sgd",
    "gradient_checkpointing": False,
}  # fmt: skip


def rows() -> Dataset:
    """Conversations of unequal lengths as TRL has prepared them: some tokens are not to be learned."""
    data = []
    for i, length in enumerate((13, 2, 7, 13, 5, 9, 3, 11, 6, 6, 8, 12)):
        ids = tokens(1, length, seed=i)[0].tolist()
        data.append({"input_ids": ids, "labels": [-100] * (i % 4) + ids[i % 4 :]})
    return Dataset.from_list(data)


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def train(kind, folder, model, **changes):
    """A run's loss terms by forward, logged losses, gradients by step, router biases."""
    pad = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0)
    if issubclass(kind, trl.SFTTrainer):
        settings = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = trl.SFTConfig(str(folder), **settings | SETTINGS | changes)
    else:
        arguments = TrainingArguments(str(folder), **SETTINGS | changes)
    gradients, terms = Gradients(), []
    trainer = kind(
        model, arguments, pad, train_dataset=rows(), processing_class=small_tokenizer(),
        callbacks=[LoadBalancingCallback(gamma=0.01), gradients],
    )  # fmt: skip
    inner = trainer.accelerator.unwrap_model(trainer.model)
    bare = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    loss_of = type(trainer).compute_loss

    def watched(self, *args, return_outputs=False, **kwargs):
        loss, outputs = loss_of(self, *args, return_outputs=True, **kwargs)
        terms.append([None if outputs.get(t) is None else outputs[t].detach() for t in TERMS])
        return (loss, outputs) if return_outputs else loss

    if kind is not trl.SFTTrainer:
        trainer.compute_loss = watched.__get__(trainer)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return terms, history, gradients.seen, torch.stack([g.e_score_correction_bias for g in routers(bare)])


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_sft_learns_from_the_same_losses_as_trainer(kind, adapter, tmp_path):
    """Every term of every micro-batch, the logged loss, every parameter's gradient, the router biases: two steps of
    three micro-batches with unequal numbers of targets."""
    if adapter and kind == "warmup":
        pytest.skip("the indexer alone learns there, and has no adapter")

    def model():
        torch.manual_seed(0)
        plain = tiny_model(**LOSSES[kind])
        if not adapter:
            return plain
        peft = pytest.importorskip("peft")
        targets = lora_targets(plain)
        return peft.get_peft_model(plain, peft.LoraConfig(r=2, init_lora_weights=False, **targets))

    expected = train(Trainer, tmp_path / "theirs", model())
    actual = train(WholeSFT, tmp_path / "sft", model())
    assert len(expected[0]) == len(actual[0]) == 6 and actual[1] == expected[1]
    present = [term for term, value in zip(TERMS, expected[0][0]) if value is not None]
    lost = {"balance": ("index_loss", "mtp_loss"), "further": ("index_loss",), "warmup": ("balance_loss", "mtp_loss")}
    lost["sparse"] = ("index_loss",) if adapter else ()  # the indexer is frozen then
    assert present == [term for term in TERMS if term not in lost[kind]]
    for ours, theirs in zip(actual[0], expected[0]):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs))
    assert len(expected[2]) == 2
    for ours, theirs in zip(actual[2], expected[2]):
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name in theirs:
            assert_close(theirs[name], ours[name], 1e-6, name)
    learning = {name for name, p in model().named_parameters() if p.requires_grad}
    assert set(expected[2][0]) == learning
    assert torch.equal(actual[3], expected[3])


@pytest.fixture
def warnings(caplog, monkeypatch):
    """A function that returns what was warned of lost losses."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    modeling.logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if "not in the loss" in record.getMessage()]


def test_sft_alone_says_once_what_it_loses(warnings, tmp_path):
    terms, _, gradients, biases = train(trl.SFTTrainer, tmp_path, tiny_model(**LOSSES["sparse"]))
    assert len(warnings()) == 1
    for told in ("balance_loss (aux_loss_alpha=0.5)", "index_loss (index_loss_coef=", "mtp_loss (mtp_loss_coef="):
        assert told in warnings()[0]
    assert "ModelLoss" in warnings()[0]
    assert not any(".indexer." in name or "layers.3." in name for name in gradients[0])  # it is true
    assert not torch.equal(biases[0], routers(tiny_model())[0].e_score_correction_bias)  # balancing works nonetheless


def test_nothing_is_said_where_nothing_is_lost(warnings, tmp_path):
    ids = tokens()
    train(WholeSFT, tmp_path / "whole", tiny_model(**LOSSES["sparse"]))
    none = {"aux_loss_alpha": 0.0, "index_loss_coef": 0.0, "mtp_loss_coef": 0.0}
    train(trl.SFTTrainer, tmp_path / "none", tiny_model(**LOSSES["sparse"] | none))
    model = tiny_model(**LOSSES["sparse"])
    model(ids)  # in evaluation
    model.train()
    with torch.no_grad():
        model(ids)
    NanoDeepSeekForSequenceClassification(tiny_config(pad_token_id=0)).train()(ids)
    assert warnings() == []
    model(ids)
    model.model(ids)
    assert len(warnings()) == 1


def test_the_fused_head_scores_as_the_model_does():
    """What SFT, DPO and GRPO read of a model, log-probabilities by the head's weight: those of its logits."""
    model, ids = tiny_model(**SPARSE).double(), tokens()
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    trl.trainer.utils.add_fused_lm_head(model)
    assert_close(expected, model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, 1e-6)


def test_conversations_that_trl_prepares(tmp_path, warnings):
    """Its own tokenising, masks on the assistant's tokens and packing, without padding: the loss is the model's own."""
    tokenizer = small_tokenizer()
    chat = [
        {"messages": [{"role": "user", "content": text(i, 3)}, {"role": "assistant", "content": text(i + 1, 4)}]}
        for i in range(12)
    ]
    model = tiny_model(**TINY_MODEL | {"q_lora_rank": 8, "rope_parameters": None, "num_nextn_predict_layers": 1})
    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=48, assistant_only_loss=True, **SETTINGS | {"max_steps": 1}
    )
    trainer = WholeSFT(model, arguments, train_dataset=Dataset.from_list(chat), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 2 and "attention_mask" not in batch
    learned = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert learned.count("<|eos|>") == (batch["position_ids"] == 0).sum() and "<|user|>" not in learned
    output = model.train()(**batch)
    own = trainer.compute_loss(model, dict(batch))
    assert output.mtp_loss > 0 and torch.equal(own, output.loss)
    trainer.train()
    assert warnings() == []


REFUSED = {
    "dft": ({"loss_type": "dft"}, "loss_type='dft'.*only 'nll'"),
    "another balance loss": ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01.*aux_loss_alpha"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_loss_is_refused(case, tmp_path):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        train(WholeSFT, tmp_path, tiny_model(), **settings)
