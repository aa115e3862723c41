"""Same weights, same logits and gradients as transformers' DeepseekV3ForCausalLM, in fp32."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)

from modeling_nanodeepseek import (
    NanoDeepSeekConfig,
    NanoDeepSeekForCausalLM,
    NanoDeepSeekForSequenceClassification,
    NanoDeepSeekForTokenClassification,
)
from tests.conftest import TINY, YARN, assert_close, tiny_config, tiny_model, tokens

CASES = {
    "yarn-groups": {},
    "yarn-unequal-mscale": {"rope_parameters": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "no-q-rank": {"q_lora_rank": None},
    "default-rope-long-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "dynamic-rope": {  # 31 tokens, where 16 are meant
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        "max_position_embeddings": 16,
    },
    "half-split-rope": {"rope_interleave": False},
    "no-groups": {"n_group": 1, "topk_group": 1},
    "all-groups": {"topk_group": 4},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "tied-bias": {"tie_word_embeddings": True, "attention_bias": True},
    "all-moe": {"first_k_dense_replace": 0},
    "dense": {"first_k_dense_replace": 3},
}


def pair(overrides: dict, attention: str):
    """Ours and transformers' with the same random weights."""
    ours = tiny_model(**overrides)
    settings = copy.deepcopy(TINY | overrides) | {"num_key_value_heads": TINY["num_attention_heads"]}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    for model in (ours, theirs):
        model.set_attn_implementation(attention)
        model.set_experts_implementation("eager")
    return ours, theirs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, attention):
    ours, theirs = pair(CASES[case], attention)
    ids = tokens(2, 31)
    results = []
    for model in (ours, theirs):
        output = model(ids, labels=ids)
        output.loss.backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (a, ours_grads), (b, their_grads) = results
    assert_close(b.logits, a.logits, 1e-5, "logits")
    assert_close(b.loss, a.loss, 1e-6, "loss")
    assert ours_grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        assert expected.abs().max() > 0, f"{name} has no gradient: the case does not test it"
        assert_close(expected, ours_grads[name], 1e-4, name)


HEADS = {
    "sequence": (NanoDeepSeekForSequenceClassification, DeepseekV3ForSequenceClassification),
    "token": (NanoDeepSeekForTokenClassification, DeepseekV3ForTokenClassification),
}
LABELS = {
    "sequence": torch.tensor([2, 0, 1]),
    "sequence-regression": torch.tensor([0.5, -1.0, 2.0]),
    "sequence-several": torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]),
    "token": torch.arange(27).reshape(3, 9) % 4,
}


@pytest.mark.parametrize("kind", LABELS)
def test_classification_heads(kind):
    """On rows padded at the left, at the right and not at all."""
    labels = LABELS[kind]
    settings = {"pad_token_id": 0, "num_labels": 1 if kind.endswith("regression") else 4, "num_key_value_heads": 3}
    ours, theirs = (
        head(config_class(**copy.deepcopy(TINY | settings))).eval()
        for head, config_class in zip(HEADS[kind.split("-")[0]], (NanoDeepSeekConfig, DeepseekV3Config))
    )
    for name, parameter in ours.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = tokens(3, 9) % 96 + 1
    ids[0, :4] = ids[1, 6:] = 0
    results = []
    for model in (ours, theirs):
        output = model(ids, attention_mask=(ids != 0).long(), labels=labels)
        output.loss.backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (a, ours_grads), (b, their_grads) = results
    assert_close(b.logits, a.logits, 1e-5, "logits")
    assert_close(b.loss, a.loss, 1e-5, "loss")
    for name, expected in their_grads.items():
        assert_close(expected, ours_grads[name], 1e-4, name)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_left_padding(form):
    ours, theirs = pair({"attention_form": form}, "sdpa")
    ids, mask = tokens(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[0, :9] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    actual = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(expected[mask.bool()], actual[mask.bool()], 1e-5)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
def test_greedy_generation(form):
    ours, theirs = pair({"attention_form": form}, "sdpa")
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


@pytest.mark.parametrize("ours_writes", [True, False])
def test_checkpoints_are_interchangeable(ours_writes, tmp_path):
    ours, theirs = pair({}, "sdpa")
    written = ours if ours_writes else theirs
    written.save_pretrained(tmp_path)
    reader = DeepseekV3ForCausalLM if ours_writes else NanoDeepSeekForCausalLM
    config = theirs.config if ours_writes else tiny_config()
    read, info = reader.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
