"""Bits per byte and perplexity: every token once, from its own document, whatever the batches and the windows."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import SPARSE, tiny_model
from tests.small_run import small_tokenizer, text
from train import pretrain
from train.scoring import evaluate_text, sliding, windows

TEXTS = ["caf\u00e9 \u4f60\u597d", text(1, 9), "a", text(2, 5), "the quick brown fox\n", text(3, 7)]


def documents(texts=TEXTS) -> Dataset:
    return Dataset.from_list([{"name": str(i), "text": text} for i, text in enumerate(texts)])


def ours(**fields):
    return tiny_model(vocab_size=320, **fields).double()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=1, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("context, stride", [(2, 1), (7, 1), (7, 3), (7, 6), (64, 5)])
def test_windows_score_each_token_once_with_the_overlap_before_it(context, stride):
    for length in range(2, 40):
        seen = []
        for tokens, scored in windows(list(range(length)), context, stride):
            assert len(tokens) <= context and tokens == list(range(tokens[0], tokens[-1] + 1))
            for token in tokens[-scored:]:
                assert token - tokens[0] >= min(token, context - stride)
            seen += tokens[-scored:]
        assert seen == list(range(1, length))


@torch.no_grad()
def one_by_one(model, tokenizer, texts, context: int, stride: int, end: bool) -> tuple[float, int]:
    """Each token predicted in a forward of its own, of what its window holds before it."""
    nats = count = 0
    for words in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(words, add_special_tokens=False)["input_ids"]]
        ids += [tokenizer.eos_token_id] if end else []
        for i in range(1, len(ids)):
            last = context + math.ceil(max(0, i + 1 - context) / stride) * stride  # where the window of i ends
            start = max(0, min(last, len(ids)) - context)
            logits = model(torch.tensor([ids[start:i]])).logits[0, -1]
            nats, count = nats - logits.log_softmax(-1)[ids[i]].item(), count + 1
    return nats, count


@pytest.mark.parametrize("build, error", [(lambda: ours(**SPARSE), 1e-8), (llama, 1e-12)], ids=["sparse", "llama"])
def test_it_equals_a_loop_over_single_tokens(build, error):
    """Parts of our model are fp32 in any case, which is where 1e-8 comes from."""
    model, tokenizer = build(), small_tokenizer()
    size = sum(len(text.encode()) for text in TEXTS)
    assert size > sum(map(len, TEXTS))  # bytes, not characters
    for context, stride, end, batch_size in ((512, 256, True, 4), (9, 4, False, 3)):
        nats, count = one_by_one(model, tokenizer, TEXTS, context, stride, end)
        figures = evaluate_text(model, tokenizer, documents(), context, stride, end=end, batch_size=batch_size)
        assert figures["tokens"] == count and figures["bytes"] == size and figures["documents"] == len(TEXTS)
        assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=error)
        assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=error)
        assert (figures["context"], figures["stride"], figures["eos_predicted"]) == (context, stride, end)


def test_padding_and_batches_change_nothing():
    model, tokenizer = ours(**SPARSE), small_tokenizer()
    values = [evaluate_text(model, tokenizer, documents(), 32, batch_size=n)["bits_per_byte"] for n in (1, 2, 6, 64)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-9)


def test_it_equals_the_trainers_evaluation(tiny_recipe, tmp_path):
    """In rows on any documents; in windows where each document fills a row of its own."""
    trainer = pretrain.build_trainer(
        recipe := tiny_recipe(trainer={"report_to": []}), pretrain.training_arguments(recipe)
    )
    _, validation = pretrain.load_data(recipe)
    expected = trainer.evaluate()
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    figures = evaluate_text(model, tokenizer, validation, 64, rows=32)
    assert figures["tokens"] == expected["eval_tokens"]
    assert figures["bits_per_byte"] == pytest.approx(expected["eval_bits_per_byte"], rel=1e-6)
    whole = evaluate_text(model, tokenizer, validation, 64, rows=32, cut_documents=False)
    trainer.eval_dataset = pretrain.pack(validation, tokenizer, 32, cut_documents=False)
    assert (
        whole["bits_per_byte"]
        == pytest.approx(
            trainer.evaluate(trainer.eval_dataset)["eval_loss"] * whole["tokens"] / math.log(2) / whole["bytes"],
            rel=1e-6,
        )
        and whole["loss"] != figures["loss"]
    )
    others = evaluate_text(model, tokenizer, validation, 32, 31)  # cut elsewhere
    assert others["tokens"] == figures["tokens"] and others["loss"] != figures["loss"]

    alike = documents([text(1, 20)] * 40)
    length = len(tokenizer(alike[0]["text"], add_special_tokens=False)["input_ids"]) + 2
    trainer.eval_dataset = pretrain.pack(alike, tokenizer, length)
    trainer.validation_bytes = 40 * len(alike[0]["text"].encode())
    expected = trainer.evaluate()
    figures = evaluate_text(model, tokenizer, alike, length)
    assert figures["bits_per_byte"] == pytest.approx(expected["eval_bits_per_byte"], rel=1e-6)
    assert figures["tokens"] == expected["eval_tokens"] and figures["loss"] == pytest.approx(expected["eval_loss"])


def test_special_tokens_that_are_not_there():
    """A tokenizer without bos begins with its eos; without eos there is no end to predict."""
    tokenizer = small_tokenizer()
    without_bos, without_eos = (type(tokenizer)(tokenizer_object=tokenizer._tokenizer) for _ in range(2))
    without_bos.eos_token, without_eos.bos_token = "<|eos|>", "<|bos|>"
    eos, bos = without_bos.eos_token_id, without_eos.bos_token_id
    [(tokens, scored)] = sliding(documents(["a fox"]), without_bos, 64, 32)
    assert tokens[0] == tokens[-1] == eos and scored == len(tokens) - 1
    [(tokens, _)] = sliding(documents(["a fox"]), without_eos, 64, 32, end=False)
    assert tokens[0] == bos and tokens[-1] != eos
    with pytest.raises(ValueError, match="no eos_token to predict .*--no-eos"):
        list(sliding(documents(), without_eos, 64, 32))
    without_eos.bos_token = None
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        list(sliding(documents(), without_eos, 64, 32, end=False))


def test_models_that_cannot_be_scored():
    model, tokenizer = ours(), small_tokenizer()
    with pytest.raises(ValueError, match="has 320 tokens, and the model embeds only 97"):
        evaluate_text(tiny_model(), tokenizer, documents(), 64)
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="loss on this data is nan"):
        evaluate_text(model, tokenizer, documents(), 64)
