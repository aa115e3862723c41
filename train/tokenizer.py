"""Byte-level BPE, trained with DeepSeek-V3's pre-tokenisation, special tokens and a chat template."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
ROLE_MARKERS = [USER, ASSISTANT, SYSTEM]
FIM = ["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"]

# The same tokens in DeepSeek's own tokenizers, between full-width bars.
DEEPSEEK_FIM = [f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end")]

# DeepSeek-V3's word boundaries, to the letter: llama.cpp recognises a tokenizer by how these cut a test text.
SPLITS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]

# `generation` marks what the assistant says, for losses on those tokens alone.
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}
{%- elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>' -}}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration -%}
{%- else %}{{ raise_exception("unknown role '" + message['role'] + "': use system, user or assistant") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, special ones and the 256 bytes included.

    Any text encodes and decodes back exactly. `<|bos|>` is put in front by default, as DeepSeek's tokenizers do.
    Raises: ValueError if the texts cannot supply so many tokens.
    """
    special = [BOS, EOS, PAD, *ROLE_MARKERS, *FIM]
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        got = tokenizer.get_vocab_size()
        raise ValueError(f"the text supports only {got} tokens, tokenizer.vocab_size={vocab_size} asks for more")
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[*ROLE_MARKERS, *FIM],
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def fim_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of begin, hole and end, for filling in the middle: ours, or those of DeepSeek's own tokenizers.

    Raises: ValueError if the tokenizer has neither.
    """
    known = tokenizer.get_vocab()
    for names in (FIM, DEEPSEEK_FIM):
        if all(name in known for name in names):
            return [known[name] for name in names]
    raise ValueError(
        f"data.fim_rate needs a tokenizer with the tokens {', '.join(FIM)} (or DeepSeek's own of these names), and "
        "this one lacks them: set fim_rate to 0, or train a tokenizer (leave out tokenizer.path)"
    )
