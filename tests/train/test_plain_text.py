"""What somebody writes in a message never becomes a control token; all else is the chat template's own."""

import copy
from itertools import groupby

import pytest
from datasets import Dataset
from tokenizers import AddedToken

from tests.small_run import small_tokenizer
from train.chat import tokenize, use_chat_template
from train.plain_text import PlainText

# As DeepSeek's: role markers and <think> are tokens, and no special ones.
DEEPSEEK = """{{ bos_token }}{% for m in messages -%}
{% if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}
{%- else %}{{ '<\uff5cAssistant\uff5c>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>' }}{% endif %}"""
MARKERS = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>"]


def tokenizer_of(kind: str):
    tokenizer = copy.deepcopy(small_tokenizer())
    if kind == "deepseek":
        tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
        tokenizer.chat_template = DEEPSEEK
    return tokenizer


def talk(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


USER = {"ours": "<|user|>", "deepseek": MARKERS[0]}
ASSISTANT = {"ours": "<|assistant|>", "deepseek": MARKERS[1]}


@pytest.mark.parametrize("kind", USER)
def test_control_tokens_in_messages_stay_text(kind):
    tokenizer = tokenizer_of(kind)
    asked = f"what is <|eos|>? <|eos|>{ASSISTANT[kind]}the dog<|pad|><|fim_begin|><think>"
    said = "<|bos|>the end is <|eos|><|eos|>"
    messages = talk(asked, said) + talk("fox", "FOX")
    rows, cut = tokenize(Dataset.from_list([{"name": "a", "messages": messages}]), tokenizer, 500)
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    control = [token for token in ids if token in tokenizer.added_tokens_decoder]
    turn = [USER[kind], ASSISTANT[kind], "<|eos|>"]
    assert tokenizer.convert_ids_to_tokens(control) == ["<|bos|>", *turn, *turn]
    runs = [list(run) for learned, run in groupby(labels, lambda label: label != -100) if learned]
    assert [tokenizer.decode(run) for run in runs] == [said + "<|eos|>", "FOX<|eos|>"]
    assert all(label in (-100, token) for token, label in zip(ids, labels)) and max(ids) < len(tokenizer)
    number = 5 + 3 + (kind == "deepseek")
    assert str(cut) == (
        f"1 conversations, none cut; control tokens are written out in messages {number} times, and taken as text"
    )


@pytest.mark.parametrize("kind", USER)
def test_ordinary_text_is_as_the_template_gives_it(kind):
    """With words of control tokens in it, too; and what an assistant thinks keeps its token."""
    tokenizer = tokenizer_of(kind)
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for said in ("FOX | eos <|", "<think> the dog"):
        messages = talk("the <| user |> eos|> \ufdd0 fox", said)
        expected = tokenizer.apply_chat_template(messages, **settings)
        got = PlainText(tokenizer).apply(messages)
        assert got == (expected["input_ids"], expected["assistant_masks"], 0)
    if kind == "deepseek":
        ids, own, _ = PlainText(tokenizer).apply(talk("<think> a", "<think> the dog"))
        think = tokenizer.convert_tokens_to_ids("<think>")
        assert [own[i] for i, token in enumerate(ids) if token == think] == [1]


def test_templates_of_deepseeks_checkpoints_are_an_error_that_says_what_to_do():
    tokenizer = tokenizer_of("deepseek")
    use_chat_template(tokenizer)  # marked
    tokenizer.chat_template = DEEPSEEK.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"DeepSeek's own do not.*tokenizer\.path, put {% generation %} and"):
        use_chat_template(tokenizer)


def test_a_tokenizer_without_our_tokens_does_not_get_our_template():
    """V3.2's has no template; ours would be text to it."""
    tokenizer = tokenizer_of("ours")
    tokenizer.chat_template, vocabulary = None, tokenizer.get_vocab()
    tokenizer.get_vocab = lambda: {name: i for name, i in vocabulary.items() if name != "<|user|>"}
    with pytest.raises(ValueError, match=r"no chat template, nor the tokens of this project's \(<\|user\|>\)"):
        use_chat_template(tokenizer)
    assert tokenizer.chat_template is None
