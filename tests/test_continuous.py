"""Continuous batching writes what generate() writes."""

import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.conftest import SPARSE, tiny_model, tokens

KINDS = {
    "mla": {},
    "mla, narrow values": {"v_head_dim": 4, "q_lora_rank": None},
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2},
    "an indexer at rest": SPARSE | {"dsa_stage": "dense"},
    "with modules of multi-token prediction": {"num_nextn_predict_layers": 1},
}
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)


def small_pages() -> ContinuousBatchingConfig:
    """16 tokens a forward and 8 a page, so that prompts are read in parts, and each text lies in several pages."""
    names = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in names else "block_size"  # its name in transformers 5.17
    return ContinuousBatchingConfig(max_batch_tokens=16, num_blocks=64, **{page: 8})


def written(model, prompts: list[list[int]], settings: GenerationConfig = GREEDY) -> list[list[int]]:
    """What continuous batching writes after each prompt."""
    outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=small_pages())
    assert not [output.error for output in outputs.values() if output.error]
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def alone(model, prompt: list[int], new_tokens: int = 12) -> list[int]:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_generate_writes(kind, backend):
    """Prompts of many lengths, two with a page in common; the model is afterwards what it was before."""
    model = tiny_model(**KINDS[kind], eos_token_id=None, pad_token_id=0)
    model.set_attn_implementation(backend)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (7, 19, 3, 30)]
    prompts.append(prompts[1][:16] + [5])
    expected, before = [alone(model, prompt) for prompt in prompts], model.config.to_dict()
    assert written(model, prompts) == expected
    assert model.config.to_dict() == before and model.config._attn_implementation == backend
    assert [alone(model, prompt) for prompt in prompts] == expected


def test_texts_end_at_the_last_position():
    """As in generate(): the last token is never fed, so it may be one beyond. A longer prompt harms no other."""
    model = tiny_model(max_position_embeddings=24, eos_token_id=None, pad_token_id=0)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (20, 8)]
    expected = [alone(model, prompts[0], 5), alone(model, prompts[1])]
    assert written(model, prompts) == expected
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=small_pages()) as manager:
        with pytest.raises(ValueError, match="25 tokens, and max_position_embeddings is 24"):
            manager.add_request([3] * 25)
        name = manager.add_request(prompts[1])
        assert manager.get_result(request_id=name, timeout=60).generated_tokens == expected[1]


def test_selected_keys_are_refused():
    with pytest.raises(ValueError, match="index_topk=5: its cache holds no keys of an indexer"):
        tiny_model(**SPARSE).generate_batch([[1, 2, 3]], generation_config=GREEDY)


def test_other_backends_are_refused():
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="not possible with 'flex_attention'"):
        model.generate_batch([[1, 2, 3]], generation_config=GREEDY)
