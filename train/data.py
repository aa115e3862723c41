"""Text in, packed sequences out.

A source is the Python standard library of this machine (`stdlib`: real text everywhere, nothing to download), made up
(`synthetic`), a file (.txt, .md, .py, ... one document; .jsonl, .parquet one document per row), a folder of such files,
a list of those, or a data set known to `datasets` by name. Documents are packed into rows of equal length without
seeing each other: tokens carry positions that restart with each document, which the model turns into separate
attention.
"""

import hashlib
import inspect
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from .synthetic import synthetic_documents
from .tokenizer import fim_tokens

ROW_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".csv", ".xml", ".yaml", ".toml", ".c", ".h", ".js"}
# Left out of the standard library: tests (not installed everywhere), generated tables, other people's packages.
STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


BLOCK = 1000  # documents that are packed together
DOCUMENT = Features({"name": Value("string"), "text": Value("string")})


def load_documents(
    source: str | list[str] | dict[str, Any], text_field: str = "text", document_start: str | None = None
) -> Dataset:
    """The documents of a source: a Dataset with columns `name` and `text`, empty ones left out.

    Args:
        document_start: the rows are lines; a document starts at each that matches this regular expression.

    Raises: ValueError, naming the source, if it is missing, unreadable, of an unknown kind or without text.
    """
    if isinstance(source, list):
        parts = [load_documents(part, text_field, document_start) for part in source]
        if not parts:
            raise ValueError("data source: the list is empty")
        return concatenate_datasets(parts)
    made = synthetic(source)
    if made is not None:
        documents = Dataset.from_list(list(made))
    elif isinstance(source, dict):
        documents = _rows(rows_by_name(source), text_field, str(source["dataset"]))
    elif source == "stdlib":
        documents = Dataset.from_list(list(standard_library()))
    else:
        documents = _from_path(Path(source).expanduser(), text_field)
    if document_start is not None:
        documents = Dataset.from_list(list(joined(documents, document_start)), features=DOCUMENT)
    documents = documents.filter(lambda text: [bool(t and t.strip()) for t in text], input_columns="text", batched=True)
    if len(documents) == 0:
        raise ValueError(f"data source {source!r} holds no text")
    return documents


def synthetic(source: str | dict[str, Any]) -> Iterator[dict[str, str]] | None:
    """The documents of `synthetic` or `{synthetic: kind, ...}`; None for another source."""
    if source == "synthetic":
        return synthetic_documents()
    if not isinstance(source, dict) or "synthetic" not in source:
        return None
    known = inspect.signature(synthetic_documents).parameters
    unknown = [repr(key) for key in source if key not in known]
    if unknown:
        raise ValueError(f"data source {source!r} has no field {', '.join(unknown)}: allowed are {', '.join(known)}")
    return synthetic_documents(**source)


def joined(rows: Dataset, document_start: str) -> Iterator[dict[str, str]]:
    """Rows that are lines, as documents: each starts at a row that matches, and what comes before the first is one too.
    Line ends are part of the rows, as in WikiText."""
    start, name, lines = re.compile(document_start), rows[0]["name"] if len(rows) else "", []
    for row in rows:
        if lines and start.match(row["text"] or ""):
            yield {"name": name, "text": "".join(lines)}
            name, lines = row["name"], []
        lines.append(row["text"] or "")
    yield {"name": name, "text": "".join(lines)}


def standard_library() -> Iterator[dict[str, str]]:
    """Name and text of its modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")
        if (
            generated
            or STDLIB_SKIPPED.intersection(name.parts)
            or any(part.startswith("config-") for part in name.parts)
        ):
            continue
        with tokenize.open(path) as file:  # honours the encoding declared in the file
            yield {"name": str(name), "text": file.read()}


def _from_path(path: Path, text_field: str) -> Dataset:
    if not path.exists():
        raise ValueError(f"data source {str(path)!r} does not exist")
    if path.is_file():
        return _from_file(path, text_field, path.name)
    known = TEXT_SUFFIXES | set(ROW_FORMATS)
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in known and file.is_file()]
    if not files:
        suffixes = " ".join(sorted(TEXT_SUFFIXES | set(ROW_FORMATS)))
        raise ValueError(f"data source {str(path)!r} holds no file of a known kind ({suffixes})")
    texts = [{"name": str(f.relative_to(path)), "text": _read(f)} for f in files if f.suffix.lower() in TEXT_SUFFIXES]
    parts = [Dataset.from_list(texts)] if texts else []
    parts += [_from_file(f, text_field, str(f.relative_to(path))) for f in files if f.suffix.lower() in ROW_FORMATS]
    return concatenate_datasets(parts)


def _from_file(path: Path, text_field: str, name: str) -> Dataset:
    if path.suffix.lower() not in ROW_FORMATS:
        return Dataset.from_list([{"name": name, "text": _read(path)}])
    return _rows(rows_of_file(path), text_field, name)


def rows_of_file(path: Path) -> Dataset:
    """A file of one of `ROW_FORMATS`. Raises: ValueError, naming it, if it is empty or cannot be read."""
    if path.stat().st_size == 0:
        raise ValueError(f"data source {str(path)!r} is empty")
    try:
        return load_dataset(ROW_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # whatever the parser raises, the user needs the file's name
        raise ValueError(f"data source {str(path)!r} cannot be read as {path.suffix}: {error}") from error


def rows_by_name(source: dict[str, Any]) -> Dataset:
    """`{dataset: name, ...}` by `datasets.load_dataset`. Raises: ValueError, naming it, if that is not possible."""
    if "dataset" not in source:
        raise ValueError(f"data source {source!r} needs a key 'dataset', the name for datasets.load_dataset")
    arguments = {key: value for key, value in source.items() if key != "dataset"}
    arguments.setdefault("split", "train")
    if arguments.get("streaming"):
        raise ValueError(f"data source {source!r}: streaming is not supported here; set data.streaming=true")
    try:
        return load_dataset(source["dataset"], **arguments)
    except Exception as error:  # a missing name, a closed network, a wrong argument: `datasets` has an error for each
        raise ValueError(f"data source {source!r} cannot be loaded: {type(error).__name__}: {error}") from error


def check_column(columns: list[str], kind: str | type, text_field: str, name: str):
    """Raises: ValueError, with the source's name, if there is no such column, or its kind is none of text's."""
    if text_field not in columns:
        raise ValueError(f"{name}: no column {text_field!r}; there are {columns} (set data.text_field)")
    if kind not in ("string", "large_string", str):
        shown = kind if isinstance(kind, str) else kind.__name__
        raise ValueError(f"{name}: column {text_field!r} holds {shown}, not text (set data.text_field)")


def _rows(rows: Dataset, text_field: str, name: str) -> Dataset:
    kind = getattr(rows.features.get(text_field), "dtype", "structure")
    check_column(rows.column_names, kind, text_field, name)

    def named(texts: list[str], indices: list[int]) -> dict[str, list[str]]:
        return {"name": [f"{name}#{i}" for i in indices], "text": texts}

    return rows.map(
        named,
        input_columns=text_field,
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        features=DOCUMENT,
    )


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data source {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def hold_out(documents: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Splits off whole documents for validation, chosen by the hash of their names: the same ones on every machine.

    A single document is cut at the line break nearest before its last `share`.
    Raises: ValueError if nothing would be left on one side.
    """
    if len(documents) == 1:
        name, text = documents[0]["name"], documents[0]["text"]
        cut = text.rfind("\n", 0, int(len(text) * (1 - share)) + 1) + 1 or int(len(text) * (1 - share))
        halves = [{"name": name, "text": text[:cut]}, {"name": name, "text": text[cut:]}]
        if not all(half["text"].strip() for half in halves):
            raise ValueError(
                f"the only document, {name!r}, is too short ({len(text)} characters) to hold out {share:.0%}"
            )
        return Dataset.from_list(halves[:1]), Dataset.from_list(halves[1:])
    digests = [hashlib.sha256(name.encode()).digest() for name in documents["name"]]
    ranked = sorted(range(len(documents)), key=lambda i: digests[i])
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    return documents.select(sorted(ranked[count:])), documents.select(sorted(ranked[:count]))


class Packer:
    r"""Texts -> rows of exactly `sequence_length` tokens.

    Each document is `<bos> text <eos>`; of a share `fim_rate` of them (V3 report section 4.1: 0.1) the text is
    `<begin> prefix <hole> suffix <end> middle`, cut at two characters drawn from the seed and the text alone. Where a
    row ends inside a document, the next row starts with the last token again, so that every token but `<bos>` is
    predicted exactly once. Columns `input_ids`, `position_ids` and `attention_mask`, [L] each; a position of 0 starts a
    document or its continuation. The last row of a call is filled up with padding tokens at position 0, 0 in the mask,
    that nothing is learned from; with `cut_documents=False` so is every row without room for the whole next document,
    and only what is longer than a row is cut.

    Raises: ValueError if the tokenizer lacks one of the special tokens, or those of a fim_rate above 0.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        fim_rate: float = 0.0,
        seed: int = 0,
        cut_documents: bool = True,
    ):
        self.tokenizer, self.sequence_length, self.fim_rate, self.seed = tokenizer, sequence_length, fim_rate, seed
        self.cut_documents = cut_documents
        lacking = [token for token in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, token) is None]
        if lacking:
            raise ValueError(f"the tokenizer has no {', '.join(lacking)}: documents cannot be packed into rows without")
        self.fim = fim_tokens(tokenizer) if fim_rate else None

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        bos, eos, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        length, ids, positions, mask = self.sequence_length, [], [], []

        def fill_up():
            filling = -len(ids) % length
            ids.extend([pad] * filling)
            positions.extend([0] * filling)
            mask.extend([0] * filling)

        for tokens in self.tokens(texts):
            tokens = [bos, *tokens, eos]
            if not self.cut_documents and len(tokens) > -len(ids) % length:
                fill_up()
            while len(tokens) > 1:
                room = length - len(ids) % length
                taken = min(room, len(tokens))
                ids += tokens[:room]
                positions += range(taken)
                mask += [1] * taken
                tokens = tokens[room - 1 :] if room > 1 else tokens
        fill_up()
        columns = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        starts = range(0, len(mask), length)
        return {name: [column[i : i + length] for i in starts] for name, column in columns.items()}

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Of each text, rearranged or not."""
        if not self.fim_rate:
            return self._encode(texts)
        parts = [self.cut(text) for text in texts]
        pieces = iter(self._encode([piece for part in parts for piece in part]))
        begin, hole, end = self.fim
        whole = []
        for part in parts:
            tokens = [next(pieces) for _ in part]
            if len(part) == 3:
                prefix, middle, suffix = tokens
                tokens = [[begin, *prefix, hole, *suffix, end, *middle]]
            whole += tokens
        return whole

    def cut(self, text: str) -> list[str]:
        """Prefix, middle and suffix, or the text alone."""
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        chooser = random.Random(f"{self.seed} {digest}")
        if chooser.random() >= self.fim_rate:
            return [text]
        first, second = sorted(chooser.randint(0, len(text)) for _ in range(2))
        return [text[:first], text[first:second], text[second:]]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def pack(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    workers: int = 1,
    name: str = "the corpus",
    **settings,
) -> Dataset:
    """Tokenises documents and packs each 1000 of them into rows by a `Packer` of these settings.

    Raises: ValueError if all documents together, `name` in the message, are shorter than one row.
    """
    rows = documents.map(
        Packer(tokenizer, sequence_length, **settings),
        input_columns="text",
        batched=True,
        batch_size=BLOCK,
        remove_columns=documents.column_names,
        num_proc=workers if workers > 1 else None,
        desc="packing",
    )
    learned = 0
    for row in rows:
        learned += sum(position > 0 for position in row["position_ids"])
        if learned >= sequence_length - 1:
            return rows.with_format("torch")
    raise ValueError(f"{name} has only {learned} tokens to learn from, less than one sequence of {sequence_length}")


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows -> a batch of `input_ids`, `position_ids`, `labels`, [B, L]; -100 where a document starts. With padding,
    `attention_mask` too: unmasked, it would count as experts' load, and its gradients (of the balance loss) would grow
    from norm to norm, because the state of a padding token is 0: by 1 / sqrt(eps) each, up to infinity in deep models.
    """
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    mask = columns.pop("attention_mask")
    columns["labels"] = columns["input_ids"].masked_fill(columns["position_ids"] == 0, -100)
    return columns if mask.all() else columns | {"attention_mask": mask}
