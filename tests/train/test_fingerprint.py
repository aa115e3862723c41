"""Fingerprints of what a run trains on: the same for the same rows, however they are stored; another for any other."""

import shutil

import pytest
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments

from tests.small_run import small_tokenizer, text
from train.data import Packer
from train.fingerprint import differences, fingerprint, order, reordered
from train.streams import RepeatedRows, StreamedRows, stream_documents

ROWS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def rows(ids=ROWS, **columns) -> Dataset:
    return Dataset.from_dict({"input_ids": ids, **columns}).with_format("torch")


def test_rows_however_they_are_stored():
    expected = fingerprint(rows(), 3)
    assert expected["rows"] == 3 and expected["sequence length"] == 4 and expected["seed"] == 3
    parts = concatenate_datasets([rows(ROWS[:1]), rows(ROWS[1:])])
    chosen = rows([*ROWS[::-1], [0] * 4]).select([2, 1, 0])
    for same in (rows(), parts, chosen, RepeatedRows(rows(), 3), rows(position_ids=[[0, 1, 2, 3]] * 3)):
        assert fingerprint(same, 3) == expected
    assert fingerprint(ROWS, 3) is None


@pytest.mark.parametrize(
    "ids, words",
    [
        (ROWS[:2], "rows 3 then and 2 now"),
        (ROWS[::-1], "tokens' hash"),
        ([*ROWS[:2], [9, 10, 11, 13]], "tokens' hash"),
        ([[1, 2, 3], [4, 5, 6, 7, 8], *ROWS[2:]], "sequence length 4 then and 5 now"),
        ([[1, 2, 3], [4, 5, 6, 7], *ROWS[2:]], "tokens' hash"),
    ],
)
def test_other_rows(ids, words):
    assert any(found.startswith(words) for found in differences(fingerprint(rows(), 3), fingerprint(rows(ids), 3)))


def test_other_labels_and_seed():
    masked = [[-100, 2, 3, 4], *ROWS[1:]]
    first, second = (fingerprint(rows(labels=labels), 3) for labels in (ROWS, masked))
    assert [found.split()[0] for found in differences(first, second)] == ["tokens'"]
    assert differences(fingerprint(rows(), 3), fingerprint(rows(), 4)) == ["seed 3 then and 4 now"]


def test_the_order():
    """It goes by the rows of a whole step, however they are split, and by the seed in force; each change is named with
    its fields, and what an earlier checkpoint does not say is not held against it."""

    def of(data=None, batch=4, accumulation=1, **settings):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return order(rows() if data is None else data, TrainingArguments("x", use_cpu=True, **sizes | settings))

    whole = of(seed=3)
    assert whole == {"rows per step": 4, "order": "random", "data seed": 3}
    assert of(batch=1, accumulation=4, seed=3) == of(batch=2, accumulation=2, seed=9, data_seed=3) == whole
    ramp = RepeatedRows(rows(), 3)
    for changed, words in (
        (of(accumulation=2, seed=3), "rows per step 4 then and 8 now (trainer.per_device_train_batch_size x trainer."),
        (of(seed=3, data_seed=5), "data seed 3 then and 5 now (trainer.data_seed, or else trainer.seed)"),
        (of(ramp, seed=3), "order random then and of a batch_ramp now (schedule.batch_ramp, trainer.train_sampling"),
        (of(seed=3, train_sampling_strategy="sequential"), "order random then and sequential now (schedule"),
    ):
        (found,) = reordered(whole, changed)
        assert found.startswith(words), found
        assert differences(whole, changed) == [] == reordered({}, changed)


def test_streams(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        Dataset.from_dict({"text": [text(9 * shard + i) for i in range(9)]}).to_parquet(folder / f"{shard}.parquet")

    def stream(source, held_out=2, **settings):
        packer = Packer(small_tokenizer(), 32, **settings)
        return fingerprint(StreamedRows(stream_documents(source), packer, held_out, 3, source), 3)

    expected = stream(str(folder))
    assert expected["files"] == 2 and expected["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    shutil.copytree(folder, tmp_path / "moved")
    assert stream(str(tmp_path / "moved")) == expected
    for changed, word in (
        (stream(str(folder), held_out=3), "documents held out 2 then and 3 now"),
        (stream(str(folder), fim_rate=0.9), "fim_rate 0.0 then and 0.9 now"),
        (stream([str(folder), {"synthetic": "copy", "documents": 3}]), "other sources [] then and [{"),
        (stream([str(folder)] * 2), "files 2 then and 4 now"),
    ):
        assert any(found.startswith(word) for found in differences(expected, changed)), changed
    (folder / "1.parquet").rename(folder / "2.parquet")
    assert [found.split(" hash")[0] for found in differences(expected, stream(str(folder)))] == ["names' and sizes'"]
