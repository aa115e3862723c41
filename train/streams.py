"""Rows without end, read while training: of documents too many to pack beforehand, or packed ones again and again.

A stream has a position, the number of rows that all processes have taken together. A run that goes on from one sees
exactly the rows that it would have seen; the process count may change in between, the order does not.
"""

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from torch.utils import data as torch_data

from .data import BLOCK, ROW_FORMATS, Packer, check_column, load_documents, synthetic

Row = dict[str, torch.Tensor]


def stream_documents(source: str | list[str] | dict[str, Any], text_field: str = "text") -> IterableDataset:
    """The documents of a source, read one by one: an IterableDataset with a column `text`.

    Read lazily are data sets by name, and files and folders of one kind of rows; the rest is read whole.
    Raises: ValueError as `load_documents`.
    """
    if isinstance(source, list) and source:
        return concatenate_datasets([stream_documents(part, text_field) for part in source])
    if isinstance(source, dict) and synthetic(source) is None:
        if "dataset" not in source:
            raise ValueError(f"data source {source!r} needs a key 'dataset', the name for datasets.load_dataset")
        arguments = {"split": "train"} | {key: value for key, value in source.items() if key != "dataset"}
        return _lazily(str(source["dataset"]), text_field, path=source["dataset"], **arguments | {"streaming": True})
    path = Path(source).expanduser() if isinstance(source, str) else None
    if path is not None and path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        kinds = {file.suffix.lower() for file in files}
        if len(kinds) == 1 and kinds <= set(ROW_FORMATS):
            kind, names = ROW_FORMATS[kinds.pop()], [str(file) for file in files]
            return _lazily(str(path), text_field, path=kind, data_files=names, split="train", streaming=True)
    return load_documents(source, text_field).to_iterable_dataset().select_columns(["text"])


def _lazily(name: str, text_field: str, **arguments) -> IterableDataset:
    try:
        rows = load_dataset(**arguments)
        first = next(iter(rows), None)
    except Exception as error:  # a missing name, a closed network, a damaged file: `datasets` has an error for each
        raise ValueError(f"data source {name!r} cannot be streamed: {type(error).__name__}: {error}") from error
    if first is None:
        raise ValueError(f"data source {name!r} holds no rows")
    check_column(list(first), type(first.get(text_field)), text_field, name)
    rows = rows.select_columns([text_field])
    return rows if text_field == "text" else rows.rename_column(text_field, "text")


def read(documents: IterableDataset, held_out: int, state: dict | None = None) -> Iterator[tuple[str, IterableDataset]]:
    """Texts, from the state or else from the first document that is not held out, with what gives the state after
    each."""
    documents = documents.skip(0)  # a copy: a state once loaded would be every later iteration's beginning
    if state is not None:
        documents.load_state_dict(state)
    for number, row in enumerate(documents):
        if (state is not None or number >= held_out) and row["text"] and row["text"].strip():
            yield row["text"], documents


def first_documents(documents: IterableDataset, count: int) -> Dataset:
    """The first so many, blank ones left out. Raises: ValueError if that leaves none."""
    texts = [row["text"] for row in documents.take(count) if row["text"] and row["text"].strip()]
    if not texts:
        raise ValueError(f"the first {count} documents of the stream (data.validation_documents) hold no text")
    return Dataset.from_dict({"text": texts})


class RowStream(torch_data.IterableDataset):
    """Packed rows without end. Iterating starts at the position last given to `go_to`, at first the beginning."""

    def __init__(self):
        self._start: dict[str, Any] = {"rows": 0}

    def go_to(self, position: dict[str, Any]):
        self._start = position

    def position(self, rows: int) -> dict[str, Any]:
        """Where `rows` rows have been taken, as JSON can hold it; not before an earlier one that was asked for."""
        raise NotImplementedError


class RepeatedRows(RowStream):
    """Packed rows, in another order each time around."""

    def __init__(self, rows: Dataset, seed: int):
        super().__init__()
        self.rows, self.seed = rows, seed

    def position(self, rows: int) -> dict[str, Any]:
        return {"rows": rows}

    def __iter__(self) -> Iterator[Row]:
        epoch, done = divmod(self._start["rows"], len(self.rows))
        while True:
            for index in shuffled(range(len(self.rows)), self.seed, epoch)[done:]:
                yield self.rows[index]
            epoch, done = epoch + 1, 0


class StreamedRows(RowStream):
    """Documents, tokenised and packed 1000 at a time as `pack` does; the rows of each 1000 in an order drawn anew each
    time around.

    Args:
        documents: with a column `text`.
        packer: what makes rows of them.
        held_out: so many documents at the beginning are left out.
        seed: of the order.
        source: of the documents, as the recipe names it.

    Raises: ValueError, while iterating, if there is nothing beyond what is held out.
    """

    def __init__(
        self, documents: IterableDataset, packer: Packer, held_out: int = 0, seed: int = 0, source: Any = None
    ):
        super().__init__()
        self.source = source
        self.documents, self.packer, self.held_out, self.seed = documents, packer, held_out, seed
        self._blocks: deque[dict[str, Any]] = deque()  # where each block started, the latest last

    def position(self, rows: int) -> dict[str, Any]:
        while len(self._blocks) > 1 and self._blocks[1]["rows"] <= rows:
            self._blocks.popleft()
        if not self._blocks:
            return self._start
        block = self._blocks[0]
        return block | {"rows": rows, "skip": rows - block["rows"]}

    def __iter__(self) -> Iterator[Row]:
        start = {"epoch": 0, "block": 0, "documents": None, "skip": 0} | self._start
        rows, epoch, number, state = start["rows"] - start["skip"], start["epoch"], start["block"], start["documents"]
        skip = start["skip"]
        self._blocks.clear()
        while True:
            before = rows
            for texts, after in self._blocks_of(state):
                self._blocks.append({"rows": rows, "epoch": epoch, "block": number, "documents": state})
                columns = self.packer(texts)
                count = len(columns["input_ids"])
                for index in shuffled(range(count), self.seed, epoch, number)[skip:]:
                    yield {name: torch.tensor(column[index]) for name, column in columns.items()}
                rows, number, state, skip = rows + count, number + 1, after, 0
            if rows == before and state is None:
                raise ValueError(
                    f"the streamed data yields nothing to train on: no text beyond the {self.held_out} documents held "
                    "out (data.validation_documents)"
                )
            epoch, number, state = epoch + 1, 0, None

    def first_block(self) -> list[list[int]]:
        """The tokens of the first 1000 documents' rows. Not to be called while the stream is read."""
        texts, _ = next(self._blocks_of(None))
        return self.packer(texts)["input_ids"]

    def _blocks_of(self, state: dict | None) -> Iterator[tuple[list[str], dict]]:
        """Texts, 1000 at a time, and the state of the documents after them."""
        texts: list[str] = []
        for text, documents in read(self.documents, self.held_out, state):
            texts.append(text)
            if len(texts) == BLOCK:
                yield texts, documents.state_dict()
                texts = []
        if texts:
            yield texts, documents.state_dict()


def shuffled(indices: range, *seeds: int) -> list[int]:
    order = list(indices)
    random.Random(" ".join(map(str, seeds))).shuffle(order)
    return order
