"""Streams: the rows that packing makes, from any position, over any number of processes; synthetic sources."""

import json
from itertools import islice

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from torch.utils.data import DataLoader

from tests.small_run import small_tokenizer, text
from train import data, streams
from train.data import Packer, load_documents, pack
from train.streams import RepeatedRows, StreamedRows, first_documents, stream_documents
from train.synthetic import KINDS


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A folder in FineWeb-Edu's layout: shards of a column `text` among others; some texts are blank."""
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for shard in range(3):
        texts = [" " if i == 4 else text(13 * shard + i, 30) for i in range(13)]
        rows = {"text": texts, "id": [f"<{i}>" for i in range(13)], "score": [3.1] * 13}
        Dataset.from_dict(rows).to_parquet(folder / f"{shard:03d}_00000.parquet")
    for module in (data, streams):
        monkeypatch.setattr(module, "BLOCK", 7)  # documents packed together
    return folder


def stream(folder, **settings) -> StreamedRows:
    return StreamedRows(stream_documents(str(folder)), Packer(small_tokenizer(), 32, **settings), held_out=6, seed=3)


def ids(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def test_a_stream_has_the_rows_that_packing_makes(parquet):
    """Each time around the same ones in another order; without the documents that are held out for validation."""
    held_out = first_documents(stream_documents(str(parquet)), 6)["text"]
    documents = load_documents(str(parquet))
    assert held_out == documents["text"][:5]  # the fifth is blank
    packed = pack(documents.select(range(5, len(documents))), small_tokenizer(), 32, fim_rate=0.3)
    rows = ids(islice(stream(parquet, fim_rate=0.3), 2 * len(packed)))
    first, second = rows[: len(packed)], rows[len(packed) :]
    assert sorted(first) == sorted(second) == sorted(ids(packed)) and len(first) > 40
    assert first != second and first != ids(packed)


def test_a_stream_goes_on_from_any_position(parquet):
    """Through JSON, across shards of the source and its end, and from a position that was itself gone on from."""
    whole = ids(islice(stream(parquet), 340))
    for taken in [*range(0, 40, 3), 131, 200, 280]:
        running = stream(parquet)
        list(islice(running, taken + 5))  # a data loader reads ahead
        for further in (0, 8):
            position = json.loads(json.dumps(running.position(taken + further)))
            running = stream(parquet)
            running.go_to(position)
            assert ids(islice(running, 20)) == whole[taken + further : taken + further + 20]


def test_packed_rows_repeat_in_another_order(parquet):
    packed = pack(load_documents(str(parquet)), small_tokenizer(), 32)
    whole = ids(islice(RepeatedRows(packed, 5), 2 * len(packed)))
    assert sorted(whole[: len(packed)]) == sorted(whole[len(packed) :]) and whole[: len(packed)] != whole[len(packed) :]
    again = RepeatedRows(packed, 5)
    again.go_to(again.position(len(packed) + 3))
    assert ids(islice(again, 9)) == whole[len(packed) + 3 :][:9]


def test_processes_see_the_rows_of_one(parquet):
    """As accelerate deals a stream out: step by step the same rows in union, none twice."""
    one = ids(islice(stream(parquet), 24))
    shards = [IterableDatasetShard(stream(parquet), batch_size=2, num_processes=3, process_index=r) for r in range(3)]
    loaders = [iter(DataLoader(shard, batch_size=2)) for shard in shards]
    for step in range(4):
        rows = torch.cat([next(loader)["input_ids"] for loader in loaders]).tolist()
        assert rows == one[6 * step : 6 * step + 6]


def test_streams_of_every_kind(tmp_path, parquet):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(5)))
    (tmp_path / "notes.txt").write_text("a note\n")
    lines = [row["text"] for row in stream_documents(str(tmp_path / "a.jsonl"), "body")]
    assert lines == [f"line {i}" for i in range(5)]
    named = {"dataset": "parquet", "data_files": str(parquet / "*.parquet")}
    assert [r["text"] for r in stream_documents(named)] == [r["text"] for r in stream_documents(str(parquet))]
    mixed = stream_documents([str(tmp_path / "notes.txt"), str(parquet), {"synthetic": "copy", "documents": 3}])
    assert len([row for row in mixed]) == 1 + 39 + 3


def lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "source, words",
    [
        (lambda d: str(d / "absent"), ["absent", "does not exist"]),
        (lambda d: {"dataset": "nope_not_here"}, ["nope_not_here", "cannot be streamed"]),
        (lambda d: lines(d / "n.jsonl", {"text": 1}), ["n.jsonl", "'text' holds int", "text_field"]),
        (lambda d: lines(d / "c.jsonl", {"body": "x"}), ["c.jsonl", "no column 'text'", "['body']"]),
        (lambda d: lines(d / "e.jsonl"), ["e.jsonl"]),
        (lambda d: {"synthetic": "poems"}, ["synthetic='poems'", "copy, arithmetic, needle, mixed"]),
        (lambda d: {"synthetic": "copy", "size": 3}, ["has no field 'size'", "documents"]),
        (lambda d: {"synthetic": "copy", "words": 0}, ["words=0", "at least 1"]),
    ],
)
def test_bad_streams_are_named(source, words, tmp_path):
    with pytest.raises(ValueError) as error:
        stream_documents(source(tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_stream_that_yields_nothing(parquet):
    everything = StreamedRows(stream_documents(str(parquet)), Packer(small_tokenizer(), 32), held_out=39)
    with pytest.raises(ValueError, match="yields nothing to train on: no text beyond the 39 documents held out"):
        next(iter(everything))
    with pytest.raises(ValueError, match="first 3 documents of the stream .* hold no text"):
        first_documents(Dataset.from_dict({"text": [" "] * 3}).to_iterable_dataset(), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_documents(kind):
    """The same for a seed, however many; others for another."""
    source = {"synthetic": kind, "documents": 20, "words": 60}
    documents = load_documents(source)
    assert documents["text"][:9] == load_documents(source | {"documents": 9})["text"][:]
    assert not set(documents["text"]) & set(load_documents(source | {"seed": 1})["text"])
    assert all(10 < len(text.split()) < 90 for text in documents["text"])


def test_synthetic_documents_have_their_structure():
    for row in load_documents({"synthetic": "arithmetic", "documents": 5}):
        for sum_ in row["text"].split(".")[:-1]:
            left, right = sum_.split("=")
            assert sum(int(number) for number in left.split("+")) == int(right)
    for row in load_documents({"synthetic": "needle", "documents": 20}):
        facts = [sentence.strip() for sentence in row["text"].split(".") if "code of" in sentence]
        assert sorted(facts) == sorted(2 * list(dict.fromkeys(facts)))  # each twice
        half = len(facts) // 2
        assert set(facts[half:]) == set(facts[:half])
    for row in load_documents({"synthetic": "copy", "documents": 5}):
        for line in row["text"].split(".")[:-1]:
            first, second = line.split("Again: ")[1].split("; ")
            assert first == second
