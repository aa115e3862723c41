"""Control tokens that somebody wrote out in a message: they are text, and must not become control tokens.

A chat template gives one string, in which a user's `<|eos|>` cannot be told from its own. So each one in a message is
replaced by a token that nothing else has before the template is applied, and that by the text's tokens after it.
"""

import copy
import re
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

STAND_IN = "\ufdd0{}\ufdd1"  # code points that Unicode keeps out of texts


class PlainText:
    """A tokenizer's chat template, with what messages say kept text.

    Kept text are special tokens, and of others that the template writes (DeepSeek's `<|User|>` is none of the special
    ones) those that not the assistant says: its `<think>` is its own.

    It needs a template that takes messages over as they are. Around such a piece of text words are cut as at a control
    token, so that `a<|eos|>` has the tokens of `a` and those of `<|eos|>`; a tokenizer that puts a space in front of
    texts (SentencePiece) puts one there too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added, template = tokenizer.added_tokens_decoder.values(), tokenizer.get_chat_template()
        special = [token.content for token in added if token.special]
        markers = [t.content for t in added if not t.special and t.content.strip() and t.content in template]
        self.original, self.own = tokenizer, copy.deepcopy(tokenizer)
        self.of_assistant, self.of_others = _any_of(special), _any_of(special + markers)
        self.stand_ins = {text: STAND_IN.format(i) for i, text in enumerate(special + markers)}
        self.own.add_tokens([AddedToken(name, special=True, normalized=False) for name in self.stand_ins.values()])
        plain = copy.deepcopy(tokenizer)  # in which all of them are special, for these alone can be taken as text
        plain.add_tokens([AddedToken(text, special=True, normalized=False) for text in markers], special_tokens=True)
        self.tokens = {
            self.own.convert_tokens_to_ids(name): plain(
                text, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            for text, name in self.stand_ins.items()
        }

    def apply(self, messages: list[dict[str, str]], **settings: Any) -> tuple[list[int], list[int], int]:
        """Of a conversation the tokens, for each whether the template marks it as the assistant's, and how many control
        tokens were written out in it. Without any, the first two are what `apply_chat_template` gives."""
        replaced, count = [], 0
        for message in messages:
            pattern = self.of_assistant if message["role"] == "assistant" else self.of_others
            content, found = pattern.subn(lambda match: self.stand_ins[match[0]], message["content"])
            replaced.append(message | {"content": content})
            count += found
        encoded = (self.own if count else self.original).apply_chat_template(
            replaced, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **settings
        )
        ids, own = [], []
        for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"]):
            text = self.tokens.get(token, [token])
            ids += text
            own += [mine] * len(text)
        return ids, own, count


def _any_of(texts: list[str]) -> re.Pattern:
    """Any of the texts, the longest first; of none, nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
