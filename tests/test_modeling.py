"""The whole model: every combination of toggles, packing, padding, accumulation, loss terms."""

import itertools
import logging

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from modeling_nanodeepseek import (
    NanoDeepSeekForCausalLM,
    NanoDeepSeekForSequenceClassification,
    NanoDeepSeekForTokenClassification,
    NanoDeepSeekModel,
    update_expert_bias,
)
from tests.conftest import (
    EARLIER_TRANSFORMERS,
    assert_close,
    assert_same,
    checkpoint_activations,
    rms_ratio,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.small_run import small_tokenizer

ATTENTION = {
    "mla": {},
    "mla-direct-query": {"q_lora_rank": None},
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gqa-qk-norm": {"attention_type": "gqa", "num_attention_heads": 2, "num_key_value_heads": 1, "qk_norm": True},
}
FEED_FORWARD = {
    "moe": {},
    "moe-relu2": {"hidden_act": "relu2", "gated_mlp": False},
    "moe-softmax-greedy": {"scoring_func": "softmax", "topk_method": "greedy"},
    "moe-v2": {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "moe-adaptive-noisy": {"adaptive_expert_threshold": 0.5, "router_noise": 0.1},
    "moe-no-shared": {"n_shared_experts": 0},
    "dense": {"n_routed_experts": None},
    "dense-relu2": {"n_routed_experts": None, "hidden_act": "relu2", "gated_mlp": False},
}
OTHER = {
    "plain": {},
    "weightless-tied": {"rms_norm_weight": False, "tie_word_embeddings": True},
    "default-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_interleave": False},
}
COMBINATIONS = list(itertools.product(ATTENTION, FEED_FORWARD, OTHER))


@pytest.mark.parametrize("attention, feed_forward, other", COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_every_combination_trains_generates_and_survives_saving(attention, feed_forward, other, tmp_path):
    overrides = ATTENTION[attention] | FEED_FORWARD[feed_forward] | OTHER[other]
    model = NanoDeepSeekForCausalLM(tiny_config(initializer_range=0.2, **overrides)).train()
    ids = tokens(2, 9)
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().max() > 0, f"{name} has no gradient"
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1

    model.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (model.generate(ids[:, :4], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (2, 10)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))
    assert_same(model(ids).logits, read(ids).logits)


def pack(*documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return torch.cat(documents)[None], positions[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_packed_documents_are_separate(kind, train, attention):
    """Also in evaluation, where use_cache is on by default and transformers' own models stop separating."""
    model = tiny_model(**ATTENTION[kind]).train(train)
    model.set_attn_implementation(attention)
    documents = [tokens(1, n, seed=n)[0] for n in (7, 1, 12, 4)]
    packed, positions = pack(*documents)
    expected = torch.cat([model(document[None]).logits for document in documents], 1)
    assert_close(expected, model(packed, position_ids=positions).logits, 1e-5)
    ones = torch.ones_like(packed)  # what a tokenizer returns: a mask that masks nothing
    assert_close(expected, model(packed, position_ids=positions, attention_mask=ones).logits, 1e-5)
    empty = model.model.new_cache()
    assert_close(expected, model(packed, position_ids=positions, past_key_values=empty).logits, 1e-5)
    assert rms_ratio(expected, model(packed).logits) > 1e-2  # without positions they do see each other


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(form, attention):
    model = tiny_model(attention_form=form)
    model.set_attn_implementation(attention)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    for side in ("left", "right"):
        padded, mask = [], []
        for row in rows:
            fill = torch.full((9 - len(row),), 3)
            padded.append(torch.cat((fill, row) if side == "left" else (row, fill)))
            zeros, ones = torch.zeros(9 - len(row)), torch.ones(len(row))
            mask.append(torch.cat((zeros, ones) if side == "left" else (ones, zeros)))
        ids, mask = torch.stack(padded), torch.stack(mask).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert logits.isfinite().all()  # rows that are all padding so far included
        for i, row in enumerate(rows):
            assert_close(model(row[None]).logits[0], logits[i][mask[i].bool()], 1e-5, f"{side} {i}")


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_batched_generation_with_left_padding_equals_single(kind):
    model = tiny_model(**ATTENTION[kind])
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **settings)[:, 9:]
    for row, written in zip(rows, batch):
        single = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **settings)
        assert torch.equal(single[0, len(row) :], written)


def test_sampling_follows_the_seed():
    model = tiny_model()

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(
            tokens(2, 5), max_new_tokens=12, do_sample=True, temperature=1.5, eos_token_id=None, pad_token_id=0
        )

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_registered_with_the_auto_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is NanoDeepSeekModel
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is NanoDeepSeekForCausalLM


@pytest.mark.parametrize("source", ["folder", "memory"])
def test_pipeline(source, tmp_path, caplog, recwarn):
    """Text generation from a path and with a live model: what generate() writes, and not a word of warning."""
    tokenizer = small_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = {"model": str(tmp_path)} if source == "folder" else {"model": model, "tokenizer": tokenizer}
    inputs = tokenizer("the quick brown", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    warned, logged = len(recwarn), len(caplog.records)
    generator = pipeline("text-generation", **given)
    text = generator("the quick brown", max_new_tokens=9, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(written[0], skip_special_tokens=True)
    if EARLIER_TRANSFORMERS:
        return  # 5.17's pipeline warns of its own defaults
    assert not [record.getMessage() for record in caplog.records[logged:] if record.levelno >= logging.WARNING]
    assert not [str(warning.message) for warning in list(recwarn)[warned:]]


def test_heads_do_not_look_their_decoder_up(monkeypatch):
    """AutoModel does not know the config of code that was loaded from a checkpoint's folder."""
    monkeypatch.setattr(AutoModel, "from_config", None)
    for head in (NanoDeepSeekForSequenceClassification, NanoDeepSeekForTokenClassification):
        assert type(head(tiny_config()).model) is NanoDeepSeekModel


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classification_on_a_causal_checkpoint(auto, tmp_path):
    """The decoder is the checkpoint's, only the head is new; each sequence is judged by its last real token."""
    causal = tiny_model(pad_token_id=0)
    causal.save_pretrained(tmp_path)
    model, info = auto.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"lm_head"}
    ids = tokens(2, 9) % 96 + 1
    ids[0, 6:] = 0
    mask = (ids != 0).long()
    every = model.score(causal.model(ids, attention_mask=mask).last_hidden_state)
    expected = every[[0, 1], [5, 8]] if auto is AutoModelForSequenceClassification else every
    assert_close(expected, model(ids, attention_mask=mask).logits, 1e-6)

    twice = [model.train()(ids, attention_mask=mask).logits for _ in range(2)]
    assert torch.equal(*twice) == (auto is AutoModelForSequenceClassification)  # the other has dropout
    update_expert_bias(model)
    labels = torch.ones(2) if auto is AutoModelForSequenceClassification else torch.ones(2, 9)
    model.train()(ids, attention_mask=mask, labels=labels.long()).loss.backward()
    load = update_expert_bias(model)
    assert load.tokens.sum(-1).tolist() == [15 * 3, 15 * 3]  # 15 real tokens, 3 experts each, in both MoE layers


def test_the_loss_is_the_sum_of_its_terms():
    model, ids = tiny_model(aux_loss_alpha=0.3).train(), tokens()
    output = model(ids, labels=ids, skip_logits=False)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.ce_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx((output.ce_loss + 0.3 * output.balance_loss).item(), rel=1e-6)
    gate, terms = model.model.layers[1].mlp.gate.weight, (output.loss, output.ce_loss, output.balance_loss)
    whole, ce, balance = (torch.autograd.grad(term, gate, retain_graph=True)[0] for term in terms)
    assert_close(ce + 0.3 * balance, whole, 1e-5)
    assert rms_ratio(ce, whole) > 1e-3  # the balance loss does act
    assert 2 * 0.5 < output.balance_loss.item() < 2 * 8 / 3  # two layers, each near 1
    evaluated = model.eval()(ids, labels=ids)
    assert evaluated.balance_loss is None and evaluated.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert tiny_model(aux_loss_alpha=0.0).train()(ids, labels=ids).balance_loss is None


@pytest.mark.parametrize("parts", [[8], [2, 2, 2, 2], [1, 3, 4], [1] * 8])
def test_accumulation_equals_the_whole_batch(parts):
    """Loss and gradients with unequal lengths and every term on, normalised as Trainer does it."""
    ids, labels = tokens(8, 13), tokens(8, 13).clone()
    mask = torch.ones(8, 13, dtype=torch.long)
    for row, length in enumerate((13, 2, 7, 13, 5, 9, 3, 11)):
        labels[row, length:] = -100
        mask[row, length:] = 0
    items = (labels[:, 1:] != -100).sum()

    def run(sizes: list[int]):
        model = tiny_model(aux_loss_alpha=0.5).train()
        total = 0.0
        for i, m, y in zip(ids.split(sizes), mask.split(sizes), labels.split(sizes)):
            loss = model(i, attention_mask=m, labels=y, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in model.named_parameters()}

    expected, gradients = run([8])
    plain = tiny_model(aux_loss_alpha=0.5).train()(ids, attention_mask=mask, labels=labels).loss
    assert expected == pytest.approx(plain.item(), rel=1e-5)
    loss, actual = run(parts)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, actual[name], 1e-4, name)


def test_reentrant_checkpointing_does_not_lose_the_balance_loss_silently():
    model = tiny_model().train()
    checkpoint_activations(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(tokens(), labels=tokens())


def test_logits_to_keep():
    model, ids = tiny_model(), tokens()
    assert_close(model(ids).logits[:, -3:], model(ids, logits_to_keep=3).logits, 1e-6)


def test_inputs_embeds():
    model, ids = tiny_model(), tokens()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(ids).logits, model(inputs_embeds=embeds).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_ones_own(boolean, attention, form):
    """A 4-D mask, boolean or additive: here a window of four tokens."""
    model, ids = tiny_model(attention_form=form), tokens(2, 14)
    model.set_attn_implementation(attention)
    visible = torch.ones(14, 14, dtype=torch.bool).tril().triu(-3)[None, None].expand(2, 1, -1, -1)
    mask = visible if boolean else torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    logits = model(ids, attention_mask=mask).logits
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97  # three layers of a window of four: 9 tokens back at most
    assert_same(logits[:, 10:], model(changed, attention_mask=mask).logits[:, 10:])
    assert rms_ratio(logits[:, :10], model(changed, attention_mask=mask).logits[:, :10]) > 1e-3
    assert rms_ratio(logits[:, 10:], model(ids).logits[:, 10:]) > 1e-3


def test_resized_embeddings():
    model = tiny_model()
    model.resize_token_embeddings(120)
    ids = tokens() + 20
    assert model(ids, labels=ids).logits.shape[-1] == 120
    with pytest.raises(ValueError, match=r"Token id 120 .* 0\.\.119"):
        model(torch.tensor([[120]]))


@pytest.mark.parametrize("wrong", [97, -1, 10**6])
def test_token_ids_outside_the_vocabulary_are_named(wrong):
    ids = tokens()
    ids[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"Token id {wrong} is outside .* 0\.\.96"):
        tiny_model()(ids)


def test_initialisation_reaches_every_tensor():
    """Also from the meta device, where nothing that a constructor wrote survives."""
    config = tiny_config(initializer_range=0.006, hidden_size=256, vocab_size=512, n_routed_experts=8)
    torch.manual_seed(0)
    model = NanoDeepSeekForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.001, name
    assert all((b == 0).all() for n, b in model.named_buffers() if n.endswith("bias"))
