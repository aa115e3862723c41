"""Byte-level BPE: exact round trips, DeepSeek's word boundaries, special tokens, the chat template."""

import pytest
from transformers import AutoTokenizer

from tests.small_run import small_tokenizer
from train.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    "text",
    ["plain", "  spaces\t\n\n tabs ", "é漢字 🙂 \u200b", "x=12345678\r\n", "def f(a):\n        pass", "\x00\x7f"],
)
def test_any_text_comes_back(text):
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_size_and_special_tokens(tmp_path):
    tokenizer = small_tokenizer()
    assert len(tokenizer) == 320
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    ids = tokenizer("the fox")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer("the fox", add_special_tokens=False)["input_ids"] == ids[1:]
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("the fox")["input_ids"] == ids and read.chat_template == tokenizer.chat_template
    assert read.decode(ids, skip_special_tokens=True) == "the fox"


def test_word_boundaries_are_deepseeks():
    """Digits in threes, a symbol with the letters behind it, line ends with the space before them."""
    split = small_tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in split("a12345 b.join(x)\n\n    return 漢字é")]
    assert words == ["a", "123", "45", " b", ".join", "(x", ")\n\n", "   ", " return", " ", "æ¼¢åŃĹ", "Ã©"]


def test_chat_template_and_assistant_mask():
    tokenizer = small_tokenizer()
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "lazy dog"},
        {"role": "user", "content": "and?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>be brief<|user|>the fox?<|assistant|>lazy dog<|eos|><|user|>and?<|assistant|>"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"]) if m]
    assert tokenizer.decode(said) == "lazy dog<|eos|>"
    with pytest.raises(Exception, match="unknown role 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="supports only .*vocab_size=5000 asks for more"):
        train_tokenizer(["a few words"], 5000)
