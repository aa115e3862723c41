"""What a forward returns beside logits, with and without gradient checkpointing, and what Trainer makes of it."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_nanodeepseek import update_expert_bias
from modeling_nanodeepseek.moe import TopkRouter
from tests.conftest import assert_close, checkpoint_activations, tiny_model, tokens
from tests.parity.test_deepseek_v3 import pair

EVERYTHING = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
RECORDED = ("hidden_states", "attentions", "router_logits")
CHECKPOINTING = {"off": None, "on": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def checkpointed(model, how: str):
    if CHECKPOINTING[how] is not None:
        checkpoint_activations(model, **CHECKPOINTING[how])
        model.enable_input_require_grads()  # what a reentrant checkpoint needs
    return model


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_they_are_those_of_deepseek_v3(form, train, how):
    """Hidden states of every layer and after the final norm, attention weights, router logits: number and values."""
    ours, theirs = (checkpointed(model.train(train), how) for model in pair({"attention_form": form}, "eager"))
    actual, expected = (model(tokens(), **EVERYTHING) for model in (ours, theirs))
    for name in expected.keys() & set(RECORDED):  # DeepseekV3 returns no router logits in transformers 5.17
        assert len(actual[name]) == len(expected[name]), name
        for layer, (a, b) in enumerate(zip(actual[name], expected[name])):
            assert_close(b, a, 1e-5, f"{name} {layer}")
    assert [tuple(x.shape) for x in actual.hidden_states] == [(2, 31, 40)] * 4
    assert [tuple(x.shape) for x in actual.attentions] == [(2, 3, 31, 31)] * 3
    assert [tuple(x.shape) for x in actual.router_logits] == [(62, 8)] * 2


@pytest.mark.parametrize("attention_type", ["mla", "gqa"])
def test_hidden_states_from_the_embedding_to_the_norm(attention_type):
    model, ids = tiny_model(attention_type=attention_type, head_dim=6), tokens()
    output = model(ids, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    x = output.hidden_states[0]
    rotary = model.model.rotary_emb(x, torch.arange(31)[None])
    for layer, expected in zip(model.model.layers[:-1], output.hidden_states[1:]):
        x = layer(x, position_embeddings=rotary)
        assert_close(expected, x, 1e-5)
    assert torch.equal(output.hidden_states[-1], model.model(ids).last_hidden_state)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("kind", ["expanded", "absorbed", "gqa"])
def test_attention_weights_are_distributions_over_what_is_visible(kind):
    """Of left-padded rows and of packed ones: each row sums to 1 and is 0 wherever a key is hidden."""
    form = (
        {"attention_type": "gqa", "num_key_value_heads": 1, "head_dim": 6}
        if kind == "gqa"
        else {"attention_form": kind}
    )
    model = tiny_model(**form)
    model.set_attn_implementation("eager")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    documents = torch.tensor([0] * 5 + [1] * 7)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    cases = {
        "padded": ({"attention_mask": mask}, causal & mask[:, None].bool()),
        "packed": ({"position_ids": positions}, (causal & (documents == documents[:, None])).expand(2, -1, -1)),
    }
    for name, (batch, visible) in cases.items():
        attentions = model(ids, output_attentions=True, **batch).attentions
        assert len(attentions) == 3
        for weights in attentions:
            assert weights.shape == (2, 3, 12, 12)
            seen = weights.transpose(1, 2)[visible.any(-1)]  # of queries that are not padding
            hidden = ~visible[visible.any(-1)][:, None].expand_as(seen)
            assert_close(torch.ones(seen.shape[:2]), seen.sum(-1), 1e-6, name)
            assert (seen[hidden] == 0).all() and (seen[~hidden] > 0).all(), name


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_sdpa_gives_no_attention_weights_as_in_deepseek_v3(form):
    ours, theirs = pair({"attention_form": form}, "sdpa")
    assert ours(tokens(), **EVERYTHING).attentions == theirs(tokens(), **EVERYTHING).attentions == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_fp32(dtype):
    model = tiny_model().to(dtype)
    routers = [module for module in model.modules() if isinstance(module, TopkRouter)]
    inputs = []
    for router in routers:
        router.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits = model(tokens(), output_router_logits=True).router_logits
    assert len(logits) == len(routers) == 2
    for router, hidden, actual in zip(routers, inputs, logits):
        assert actual.dtype == torch.float32
        assert_close(hidden.flatten(0, 1).float() @ router.weight.float().T, actual, 1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_return_dict_false_gives_the_same_as_a_tuple(how, train):
    model, ids = checkpointed(tiny_model(aux_loss_alpha=0.0).train(train), how), tokens()
    model.set_attn_implementation("eager")
    settings = EVERYTHING | {"labels": ids, "use_cache": False, "skip_logits": False}
    named, plain = model(ids, **settings), model(ids, return_dict=False, **settings)
    assert list(named) == ["loss", "logits", *RECORDED, "ce_loss"] and len(plain) == 6
    for (name, a), b in zip(named.items(), plain):
        pairs = zip(a, b, strict=True) if name in RECORDED else [(a, b)]
        assert all(torch.equal(x, y) for x, y in pairs), name


@pytest.mark.parametrize("returned", [{}, {"output_router_logits": True}, {"use_cache": False}])
def test_trainer_predicts_logits_alone(returned, tmp_path):
    """Everything else that a forward returns would reach compute_metrics as further predictions."""
    model = tiny_model(aux_loss_alpha=0.3)
    beside = {"past_key_values", "router_logits", "ce_loss", "balance_loss"}
    beside |= {"index_topk_indices", "index_recall", "index_loss", "last_hidden_state"}
    beside |= {"mtp_loss", "mtp_depth_losses", "mtp_correct", "mtp_targets", "mtp_hidden_states"}
    assert set(model.config.keys_to_ignore_at_inference) == beside
    for name, value in returned.items():
        setattr(model.config, name, value)
    ids, seen = tokens(5, 9), []
    data = [{"input_ids": row, "labels": row} for row in ids]

    def compute_metrics(prediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"hits": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    settings = {"per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings), compute_metrics=compute_metrics)
    predicted = trainer.predict(data)
    metrics = trainer.evaluate(data)
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids)
    for predictions in (predicted.predictions, *seen):
        assert isinstance(predictions, np.ndarray)
        assert_close(expected.logits, torch.from_numpy(predictions), 1e-6)
    hits = (expected.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
    assert metrics["eval_hits"] == pytest.approx(hits)
    assert metrics["eval_loss"] == pytest.approx(expected.ce_loss.item(), rel=1e-5)  # no balance loss in it


def test_trainer_decays_matrices_alone(tmp_path):
    """Trainer goes by names: what has `bias` or `norm` in it, and the rest. Routers and stacked experts do decay."""
    model = tiny_model(attention_bias=True)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True))
    decayed, kept = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, wanted in ((decayed, lambda p: p.ndim > 1), (kept, lambda p: p.ndim == 1)):
        expected = {name for name, parameter in model.named_parameters() if wanted(parameter)}
        assert {names[id(parameter)] for parameter in group["params"]} == expected
    moe = model.model.layers[1].mlp
    for parameter in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
        assert any(parameter is other for other in decayed["params"])


NOISY = {"router_noise": 0.3, "attention_dropout": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["on", "reentrant"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
def test_gradient_checkpointing_changes_nothing(attention, how, dtype):
    """Three steps with noise on the router and dropout: losses, gradients, counts and biases, bit by bit."""
    histories = []
    for checkpointing in ("off", how):
        # A reentrant checkpoint cuts the router logits off, which is refused elsewhere: no balance loss for it.
        noise = NOISY | ({"attention_dropout": 0.0} if attention == "blocked" else {})  # which has no dropout
        model = tiny_model(aux_loss_alpha=0.0 if how == "reentrant" else 0.5, **noise).to(dtype).train()
        model.set_attn_implementation("sdpa" if attention == "blocked" else attention)
        checkpointed(model, checkpointing)
        torch.manual_seed(5)
        history = []
        for step in range(3):
            ids = tokens(2, 13, seed=step)
            loss = model(ids, labels=ids).loss
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            load = update_expert_bias(model, gamma=0.05)
            assert load.tokens.sum(-1).eq(2 * 13 * 3).all()  # counted once: tokens times experts per token
            history += [loss.detach(), *gradients, load.tokens, load.bias.clone()]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
            model.zero_grad()
        histories.append(history)
    assert all(torch.equal(a, b) for a, b in zip(*histories, strict=True))


@pytest.mark.parametrize("how", ["on", "reentrant"])
def test_recomputation_routes_as_the_forward_did(how):
    model = checkpointed(tiny_model(aux_loss_alpha=0.0, **NOISY).train(), how)
    choices = {}
    for name, module in model.named_modules():
        if isinstance(module, TopkRouter):
            record = choices.setdefault(name, [])
            module.register_forward_hook(lambda module, args, output, record=record: record.append(output[2].clone()))
    model(tokens(), labels=tokens()).loss.backward()
    assert len(choices) == 2
    for first, second in choices.values():  # once in the forward, once in the backward
        assert torch.equal(first, second)
