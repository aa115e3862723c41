"""LoRA through PEFT: what is adapted, and that adapted, merged and restored models compute what they should."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_nanodeepseek import (
    LoadBalancingCallback,
    NanoDeepSeekForSequenceClassification,
    lora_targets,
    update_expert_bias,
)
from modeling_nanodeepseek.balancing import routers
from modeling_nanodeepseek.stacking import CheckpointError
from tests.conftest import (
    SPARSE,
    assert_close,
    assert_same,
    checkpoint_activations,
    rms_ratio,
    tiny_config,
    tiny_model,
    tokens,
)

peft = pytest.importorskip("peft", minversion="0.19.1")  # earlier, the experts' factors had another layout

GQA = {"attention_type": "gqa", "head_dim": 6, "num_key_value_heads": 1, "qk_norm": True}
MODELS = {
    "mla": {},
    "no query latent": {"q_lora_rank": None},
    "gqa": GQA,
    "ungated": {"gated_mlp": False, "hidden_act": "relu2"},
    "no shared experts": {"n_shared_experts": 0},
    "dense": {"first_k_dense_replace": 3},
    "sparse": SPARSE,
    "further": {"num_nextn_predict_layers": 2},
    "sparse and further": SPARSE | {"num_nextn_predict_layers": 1},
}


def adapted(model, rank: int = 3, zero: bool = False, **targets):
    """The model with an adapter on all there is, large enough to matter; or fresh, which changes nothing."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, init_lora_weights=zero, task_type="CAUSAL_LM", **lora_targets(model, **targets)
    )
    return peft.get_peft_model(model, config).eval()


def names(model) -> set[str]:
    """What is adapted, by name in the bare model."""
    found = set()
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            bare = name.replace(".base_layer", "")
            found.add(f"{bare}.{module.parameter_name}" if hasattr(module, "parameter_name") else bare)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_of_a_layer_is_adapted_and_nothing_else(kind):
    model = tiny_model(**MODELS[kind])
    never = r"embed_tokens|lm_head|norm|\.gate\.|\.indexer\."
    expected = {n for n, p in model.named_parameters() if not re.search(never, n) and p.ndim > 1}
    expected = {name.removesuffix(".weight") for name in expected}
    assert names(adapted(model)) == expected and len(expected) > 10
    assert any("experts.down_proj" in name for name in expected) == (kind != "dense")


def test_parts_are_chosen_by_name():
    attention = lora_targets(tiny_model(), ["attention"])
    assert len(attention["target_modules"]) == 3 * 5 and attention["target_parameters"] == []
    assert all(".self_attn." in name for name in attention["target_modules"])
    experts = lora_targets(tiny_model(), ["experts"])
    assert experts["target_modules"] == [] and len(experts["target_parameters"]) == 2 * 2
    assert names(adapted(tiny_model(), parts=["experts"])) == set(experts["target_parameters"])
    assert len(lora_targets(tiny_model(), ["mlp"])["target_modules"]) == 3
    assert len(lora_targets(tiny_model(), ["shared_experts"])["target_modules"]) == 2 * 3


def test_further_modules_are_adapted_where_they_learn():
    further = {"num_nextn_predict_layers": 1}

    def of_further(model, **arguments) -> set[str]:
        return {name for name in names(adapted(model, **arguments)) if "layers.3." in name}

    assert len(of_further(tiny_model(**further))) == 1 + 5 + 2 + 3  # eh_proj, attention, experts, shared experts
    assert of_further(tiny_model(**further), mtp=False) == set()
    assert of_further(tiny_model(mtp_loss_coef=0.0, **further)) == set()
    classifier = NanoDeepSeekForSequenceClassification(tiny_config(**further))
    assert not any("layers.3." in name for name in lora_targets(classifier)["target_modules"])


REFUSED = {
    "no experts": (
        lambda: lora_targets(tiny_model(first_k_dense_replace=3), ["experts"]),
        "no 'experts' to adapt.*mlp",
    ),
    "a typing error": (lambda: lora_targets(tiny_model(), ["atention"]), "no 'atention'.*attention, mlp, shared_exp"),
    "warm-up": (lambda: lora_targets(tiny_model(**SPARSE, dsa_stage="warmup")), "dsa_stage='warmup'.*'sparse'"),
    "no modules": (lambda: lora_targets(tiny_model(), mtp=True), "num_nextn_predict_layers=0"),
    "resting modules": (
        lambda: lora_targets(tiny_model(num_nextn_predict_layers=1, mtp_loss_coef=0.0), mtp=True),
        "mtp_loss_coef=0.0",
    ),
    "an adapter there": (lambda: lora_targets(adapted(tiny_model())), "without an adapter, not a PeftModel"),
    "another model": (lambda: lora_targets(nn.Linear(2, 2)), "not a Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_one_clear_error(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_merged_is_unmerged(kind):
    """Logits in one forward and in cached decoding; unmerged again, and switched off, the model is what it was."""
    ids, plain = tokens(), tiny_model(**MODELS[kind]).double().eval()
    model = adapted(tiny_model(**MODELS[kind]).double())
    expected, cached = model(ids).logits, in_steps(model, ids)
    assert rms_ratio(plain(ids).logits, expected) > 0.1
    assert_close(expected, cached, 1e-6)
    model.merge_adapter()
    assert_close(expected, model(ids).logits, 1e-6)
    assert_close(expected, in_steps(model, ids), 1e-6)
    model.unmerge_adapter()
    assert_close(expected, model(ids).logits, 1e-6)
    with model.disable_adapter():
        assert_close(plain(ids).logits, model(ids).logits, 1e-6)


def in_steps(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits by a cache: most of the text at once, then token by token."""
    output = model(ids[:, :20], use_cache=True)
    logits = [output.logits]
    for position in range(20, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


FORMS = {
    "expanded": {"attention_form": "expanded"},
    "absorbed": {"attention_form": "absorbed"},
    "gathered": SPARSE | {"sparse_form": "gathered"},
    "masked absorbed": SPARSE | {"sparse_form": "masked", "attention_form": "absorbed"},
    "masked expanded": SPARSE | {"sparse_form": "masked", "attention_form": "expanded"},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_both_factors_in_every_form_of_attention(form):
    """Those of A and B follow from the merged weight's gradient G: dA = s B^T G, dB = s G A^T."""
    settings = FORMS[form] | {"index_loss_coef": 0.0, "aux_loss_alpha": 0.0}
    model, ids = adapted(tiny_model(**settings).double()).train(), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())

    merged = tiny_model(**settings).double().train()
    with torch.no_grad():
        for name, delta in deltas(model).items():
            parameter = merged.get_parameter(name)
            parameter += delta
    merged(ids, labels=ids).loss.backward()
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.kv_b_proj"
        lora, whole = model.base_model.model.get_submodule(name), merged.get_parameter(f"{name}.weight").grad
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        assert_close(2.0 * b.mT @ whole, a.grad, 1e-8)
        assert_close(2.0 * whole @ a.mT, b.grad, 1e-8)


def deltas(model) -> dict[str, torch.Tensor]:
    """What each factor pair adds to its weight, by hand: s B A; of stacked experts PEFT keeps A expert after expert,
    [E r, in], and B with the expert changing fastest, [out, r E]."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scaling, bare = module.lora_alpha["default"] / module.r["default"], name.replace(".base_layer", "")
        if not hasattr(module, "parameter_name"):
            found[f"{bare}.weight"] = scaling * b @ a
            continue
        experts, rank = module.num_experts, module.r["default"]
        parts = [scaling * b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)]
        found[f"{bare}.{module.parameter_name}"] = torch.stack(parts)
    return found


# Rank and number of experts differ; the hidden size is below, between and above m and 2m: layouts by shape mix them up.
WIDTHS = {"wide experts": {"moe_intermediate_size": 48}, "narrow": {"moe_intermediate_size": 16}, "middle": {}}
WIDTHS["ungated"] = MODELS["ungated"]
WIDTHS["square"] = {"moe_intermediate_size": 40} | MODELS["ungated"]


@pytest.mark.parametrize("implementation", ["sorted_mm", "eager", "grouped_mm"])
@pytest.mark.parametrize("kind", WIDTHS)
def test_every_expert_has_its_own_delta(kind, implementation):
    """Weights expert by expert, and the layer's output and gradients in training, eval and under checkpointing."""
    settings, ids = WIDTHS[kind], tokens(3, 40)
    model = adapted(tiny_model(**settings), rank=5)
    model.base_model.model.set_experts_implementation(implementation)
    by_hand, written = tiny_model(**settings), deltas(model)
    with torch.no_grad():
        for name, delta in written.items():
            parameter = by_hand.get_parameter(name)
            parameter += delta
        assert_close(by_hand(ids).logits, model(ids).logits, 1e-5)
        assert_close(by_hand(ids[:1, :3]).logits, model(ids[:1, :3]).logits, 1e-5)  # few tokens, as in decoding
    expected = by_hand.train()(ids, labels=ids)
    expected.loss.backward()
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model.base_model.model, use_reentrant=False)
        model.train().zero_grad()
        output = model(input_ids=ids, labels=ids)
        assert_close(expected.loss, output.loss, 1e-5)
        output.loss.backward()
        check_factors(model, by_hand)
    with torch.no_grad():
        merged = model.eval().merge_and_unload()
        for name in written:
            for e, (ours, theirs) in enumerate(zip(by_hand.get_parameter(name), merged.get_parameter(name))):
                assert_close(ours, theirs, 1e-6, f"{name}, row or expert {e}")


def check_factors(model, by_hand):
    """The gradients of each expert's factors, from the gradient of its merged weight."""
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "parameter_name"):
            continue
        whole = by_hand.get_parameter(f"{name.replace('.base_layer', '')}.{module.parameter_name}").grad
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for e in range(8):
            own_a, own_b = a[e * 5 : (e + 1) * 5], b[:, e::8]
            assert_close(2.0 * own_b.mT @ whole[e], a.grad[e * 5 : (e + 1) * 5], 1e-4, f"{name} A {e}")
            assert_close(2.0 * whole[e] @ own_a.mT, b.grad[:, e::8], 1e-4, f"{name} B {e}")


@pytest.mark.parametrize("kind", ["sparse and further", "ungated"])
@torch.no_grad()
def test_adapter_round_trip(kind, tmp_path):
    """Saved, loaded by PEFT and by transformers' Auto class: the same factors and numbers; merged, saved, and loaded
    as a plain model."""
    ids, settings = tokens(), MODELS[kind]
    tiny_model(**settings).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected, weights = model(ids).logits, peft.get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    loaded = peft.get_peft_model_state_dict(again)
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert names(again) == names(model)
    for whole in (again, peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
        whole = whole if whole is again else whole.from_pretrained(tmp_path / "adapter")
        assert_same(expected, whole.eval()(ids).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert plain.state_dict().keys() == tiny_model(**settings).state_dict().keys()
    assert_same(merged(ids).logits, plain(ids).logits)
    assert_close(expected, plain(ids).logits, 1e-5)


def test_half_an_adapter_is_refused(tmp_path):
    """transformers would log a table and go on with factors that do nothing."""
    tiny_model().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for kept in (dict(list(weights.items())[::2]), {}):
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="the adapter is incomplete, or another model's: it lacks .*lora_"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_adapters_beside_each_other_and_without_the_modules(tmp_path):
    """A second one on a model that has one; and of a model that was loaded without multi-token prediction the rest."""
    tiny_model(num_nextn_predict_layers=1).save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        torch.manual_seed(ord(name[0]))
        adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / name)
    ids, both = tokens(), AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for name in ("one", "two"):
        both.load_adapter(str(tmp_path / name), adapter_name=name)
        both.set_adapter(name)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert_same(alone(ids).logits, both(ids).logits)
        less = AutoModelForCausalLM.from_pretrained(tmp_path / name, num_nextn_predict_layers=0).eval()
        assert_same(alone(ids).logits, less(ids).logits)


@pytest.mark.parametrize("change, message", [
    ({"r": 7}, r"lora_A.default.weight is \[3, 40\], not \[7, 40\]"),
    ({"target_parameters": None}, "the model has no place for .*experts.*lora_"),
])  # fmt: skip
def test_an_adapter_whose_config_was_changed_is_refused(change, message, tmp_path):
    """transformers would log a table, and leave out the experts' factors or end in an error that names nothing."""
    tiny_model().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"the adapter is incomplete, or another model's: .*{message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_experts_are_balanced_under_an_adapter():
    """The same counts, so the same biases, as without; a fresh adapter changes no choice."""
    ids, plain, model = tokens(), tiny_model().train(), adapted(tiny_model(), zero=True).train()
    biases = []
    for whole in (plain, model):
        whole(input_ids=ids, labels=ids).loss.backward()
        load = update_expert_bias(whole, gamma=0.01)
        assert load.tokens.sum() == 2 * ids.numel() * 3
        biases.append(torch.stack([gate.e_score_correction_bias for gate in routers(whole)]))
    assert torch.equal(*biases) and not torch.equal(biases[0], torch.stack([g.e_score_correction_bias for g in
                                                                           routers(tiny_model())]))  # fmt: skip


def test_stages_of_sparse_attention_under_an_adapter():
    """Sparse: the adapter learns, the indexer is frozen and its loss not in the loss; dense: the same; no part moves
    that is not the adapter's."""
    ids = tokens()
    for stage in ("sparse", "dense"):
        model = adapted(tiny_model(**SPARSE, dsa_stage=stage)).train()
        before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        output = model(input_ids=ids, labels=ids)
        assert output.index_loss is None and output.balance_loss > 0
        output.loss.backward()
        optimizer.step()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name and p.grad.abs().sum() > 0 for name, p in trained.items())
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    merged = model.eval().merge_and_unload()
    merged.set_dsa_stage("sparse")  # and on, without an adapter: the indexer learns again
    assert merged.train()(ids, labels=ids).index_loss > 0


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    """Trainer, an adapter, every loss, gradient checkpointing: resumed = uninterrupted, bit by bit."""
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(12, 17)]

    def train(folder, resume: bool, steps: int):
        torch.manual_seed(0)
        model = adapted(tiny_model(num_nextn_predict_layers=1, aux_loss_alpha=0.1), zero=True)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, learning_rate=0.01, gradient_checkpointing=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[LoadBalancingCallback(gamma=0.0)])
        trainer.train(resume_from_checkpoint=resume)
        return peft.get_peft_model_state_dict(model), [e["loss"] for e in trainer.state.log_history if "loss" in e]

    expected, losses = train(tmp_path / "whole", False, 4)
    train(tmp_path / "cut", False, 2)
    actual, again = train(tmp_path / "cut", True, 4)
    assert losses == again and losses[-1] < losses[0]
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_generation_under_an_adapter_drafts_too():
    model = adapted(tiny_model(num_nextn_predict_layers=1).double())
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(input_ids=tokens(1, 11), **settings)
    assert plain.shape == (1, 20)
    assert torch.equal(plain, model.generate(input_ids=tokens(1, 11), use_mtp=True, **settings))
