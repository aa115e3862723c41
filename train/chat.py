"""Conversations in, rows of tokens out, of which only what the assistant says is to be learned.

A source is `docstrings` (questions about the Python standard library and its own answers: real text everywhere, nothing
to download), a .jsonl, .json or .parquet file, a folder of such files, a list of those, or a data set known to
`datasets` by name. Each row of it holds `messages`, a list of {role, content}. What else a message says, or a row of
tools, would be lost, and is refused; other columns are ignored.
"""

import ast
import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .data import ROW_FORMATS, rows_by_name, rows_of_file, standard_library
from .plain_text import PlainText
from .tokenizer import CHAT_TEMPLATE, ROLE_MARKERS

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of a message that would change the text or what is learned of it, and are not supported; and values that would
# not. Other fields say something about it, and are left aside.
UNSUPPORTED = dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning"), ())
UNSUPPORTED |= {"thinking": (False,), "weight": (1,), "train": (True,)}
CONVERSATION = Features(
    {"name": Value("string"), "messages": List({"role": Value("string"), "content": Value("string")})}
)


def load_conversations(source: str | list[str] | dict[str, Any], field: str = "messages") -> Dataset:
    """The conversations of a source: a Dataset with columns `name` and `messages`.

    Raises: ValueError, naming the source or the conversation, if it is missing, unreadable, or holds something else.
    """
    if isinstance(source, list):
        parts = [load_conversations(part, field) for part in source]
        if not parts:
            raise ValueError("data source: the list is empty")
        return concatenate_datasets(parts)
    if isinstance(source, dict):
        return _checked(rows_by_name(source), field, str(source["dataset"]))
    if source == "docstrings":
        return Dataset.from_list(list(_docstrings()), features=CONVERSATION)
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in ROW_FORMATS)
    if not path.exists():
        raise ValueError(f"data source {source!r} does not exist")
    if not files or files[0].suffix.lower() not in ROW_FORMATS:
        raise ValueError(f"data source {source!r} holds no conversations: these are in {', '.join(ROW_FORMATS)} files")
    return concatenate_datasets([_checked(rows_of_file(file), field, file.name) for file in files])


def _docstrings() -> Iterator[dict]:
    """What each public function and class of the standard library does, by the first paragraph of its docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for module in standard_library():
        name = module["name"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in name.split(".")):
            continue
        for node in ast.parse(module["text"]).body:
            text = ast.get_docstring(node) if isinstance(node, kinds) and not node.name.startswith("_") else None
            answer = " ".join((text or "").split("\n\n")[0].split())
            if not answer:
                continue
            messages = [
                {"role": "user", "content": f"What does {name}.{node.name} do?"},
                {"role": "assistant", "content": answer},
            ]
            yield {"name": f"{name}.{node.name}", "messages": messages}


def _checked(rows: Dataset, field: str, name: str) -> Dataset:
    """Rows with that column, as conversations; the first one that is none is an error."""
    if field not in rows.column_names:
        raise ValueError(f"{name}: no column {field!r}; there are {rows.column_names} (set data.messages_field)")
    conversations = []
    tools = rows["tools"] if "tools" in rows.column_names else repeat(None)
    for i, (messages, offered) in enumerate(zip(rows[field], tools)):
        if _says(offered):
            raise ValueError(
                f"conversation {name}#{i}: the row has tools={offered!r:.80}, which are not supported: only {field!r} "
                "is read. Tell of them in a system message, or leave them out"
            )
        conversations.append({"name": f"{name}#{i}", "messages": _messages(messages, f"{name}#{i}")})
    return Dataset.from_list(conversations, features=CONVERSATION)


def _says(value: Any) -> bool:
    """Whether a field says anything: what only other rows have is null here, at any depth."""
    if isinstance(value, (dict, list)):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    return value is not None and value not in ("", "[]", "{}")


def _messages(messages: Any, name: str) -> list[dict[str, str]]:
    """The messages of one conversation. Raises: ValueError that names it."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            f"conversation {name}: it must be a list of messages {{role, content}}, and is {messages!r:.80}"
        )
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"conversation {name}: unknown role {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"conversation {name}: the {role}'s content must be text, and is {content!r:.80}")
        for field, harmless in UNSUPPORTED.items():
            if _says(message.get(field)) and message[field] not in harmless:
                raise ValueError(
                    f"conversation {name}: the {role}'s message has {field}={message[field]!r:.80}, which is not "
                    "supported: only role and content are read. Leave it out, or write into content what it says"
                )
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise ValueError(f"conversation {name}: there is nothing to learn, because the assistant says nothing")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def use_chat_template(tokenizer: PreTrainedTokenizerBase):
    """Gives a tokenizer without a chat template this project's, which is then saved with it.

    Raises: ValueError for a template that does not mark what the assistant says, as those of DeepSeek's checkpoints do
        not; and where there is none and the tokenizer lacks the tokens of ours (V3.2's).
    """
    if tokenizer.chat_template is None:
        absent = [marker for marker in ROLE_MARKERS if marker not in tokenizer.get_vocab()]
        if absent:
            raise ValueError(
                f"the tokenizer has no chat template, nor the tokens of this project's ({', '.join(absent)}): in a "
                "copy of its folder, named by tokenizer.path, write one into chat_template.jinja, with "
                "{% generation %} and {% endgeneration %} around what the assistant says and the token that ends it"
            )
        tokenizer.chat_template = CHAT_TEMPLATE
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        raise ValueError(
            "the tokenizer's chat template does not mark what the assistant says (DeepSeek's own do not): in a copy of "
            "its folder, named by tokenizer.path, put {% generation %} and {% endgeneration %} around it and the token "
            "that ends it"
        )


@dataclass
class Cut:
    """What is not as it was: of how many conversations how many were cut, what that cost, how many were left out, and
    what was taken as text."""

    conversations: int = 0
    cut: int = 0
    tokens: int = 0
    learned: int = 0
    left_out: int = 0
    written_out: int = 0  # control tokens in what is said

    def __str__(self) -> str:
        parts = [f"{self.conversations:,} conversations, none cut"]
        if self.cut:
            parts = [
                f"{self.conversations:,} conversations, {self.cut:,} too long and cut at the end: {self.tokens:,} "
                f"tokens are lost, {self.learned:,} of them the assistant's"
            ]
        if self.left_out:
            parts.append(f"{self.left_out:,} are left out, with nothing of the assistant's left")
        if self.written_out:
            parts.append(f"control tokens are written out in messages {self.written_out:,} times, and taken as text")
        return "; ".join(parts)


def tokenize(
    conversations: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, workers: int = 1
) -> tuple[Dataset, Cut]:
    """Conversations by the tokenizer's template: columns `input_ids`, and `labels`, which are -100 outside of what the
    template marks as the assistant's; and what was cut to at most `sequence_length` tokens. Control tokens written out
    in a message stay text (`plain_text.py`).

    Raises: ValueError for a conversation that the template refuses, or in which it marks nothing.
    """

    plain = PlainText(tokenizer)

    def encode(name: str, messages: list[dict[str, str]]) -> dict[str, Any]:
        try:
            # What is too long is cut below.
            ids, learned, written_out = plain.apply(messages, tokenizer_kwargs={"verbose": False})
        except TemplateError as error:
            raise ValueError(f"conversation {name}: the chat template refuses it: {error}") from error
        learned = [0, *learned[1:]]  # the first token follows nothing
        if not any(learned):
            raise ValueError(f"conversation {name}: the chat template marks none of its tokens as the assistant's")
        labels = [token if own else -100 for token, own in zip(ids, learned)]
        lost = labels[sequence_length:]
        return {
            "input_ids": ids[:sequence_length],
            "labels": labels[:sequence_length],
            "lost": len(lost),
            "lost_learned": sum(label != -100 for label in lost),
            "written_out": written_out,
            "kept": any(learned[:sequence_length]),
        }

    rows = conversations.map(
        encode,
        input_columns=["name", "messages"],
        remove_columns=conversations.column_names,
        num_proc=workers if workers > 1 else None,
        desc="tokenising",
    )
    lost, kept = rows["lost"], rows["kept"]
    cut = Cut(
        conversations=len(rows),
        cut=sum(n > 0 for n in lost),
        tokens=sum(lost),
        learned=sum(rows["lost_learned"]),
        left_out=len(rows) - sum(kept),
        written_out=sum(rows["written_out"]),
    )
    if cut.left_out == len(rows):
        raise ValueError(f"data.sequence_length={sequence_length} is too short: {cut}")
    rows = rows.select([i for i, some in enumerate(kept) if some])
    return rows.select_columns(["input_ids", "labels"]), cut


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Which items share a row of `room`: the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(left, (lengths[item], -1))
        free, row = left.pop(place) if place < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(left, (free - lengths[item], row))
    return rows


def pack_conversations(rows: Dataset, room: int) -> Dataset:
    """Several conversations in a row of at most `room` tokens, or one of more, none divided. Positions start anew with
    each, so that they do not see each other (the library's `masks.py`): columns `input_ids`, `position_ids`, `labels`.
    """
    ids, labels = list(rows["input_ids"]), list(rows["labels"])
    packed = []
    for members in best_fit([len(tokens) for tokens in ids], room):
        packed.append(
            {
                "input_ids": [token for i in members for token in ids[i]],
                "labels": [label for i in members for label in labels[i]],
                "position_ids": [position for i in members for position in range(len(ids[i]))],
            }
        )
    return Dataset.from_list(packed).with_format("torch")


class PadConversations:
    """Rows -> a batch of `input_ids`, `labels`, `position_ids`, `attention_mask` [B, L], L the longest row's length."""

    def __init__(self, pad_token_id: int):
        self.fillings = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0}

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(parts: list[torch.Tensor], filling: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filling)

        batch = {key: pad([row[key] for row in rows], filling) for key, filling in self.fillings.items()}
        return batch | {"attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], 0)}
