"""V2's routing (softmax scores, groups by their best expert, no bias) against transformers' DeepseekV2ForCausalLM."""

import copy

import pytest
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from tests.conftest import TINY, assert_close, tiny_model, tokens

V2 = {
    "hidden_size": 48,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "q_lora_rank": None,
}


@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy"])
def test_logits_and_gradients(topk_method):
    ours = tiny_model(**V2, topk_method=topk_method)
    settings = copy.deepcopy(TINY | V2) | {"topk_method": topk_method, "num_key_value_heads": 3}
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**settings)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = tokens(2, 29)
    a, b = ours(ids, labels=ids), theirs(ids, labels=ids)
    assert_close(b.logits, a.logits, 1e-5, "logits")
    a.loss.backward(), b.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(expected[name].grad, parameter.grad, 1e-4, name)
