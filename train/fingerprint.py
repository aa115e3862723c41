"""What a run trains on, and in which order, in a few numbers: a resume goes on with the same rows in the same order."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset
from transformers import TrainingArguments

from .steps import rows_per_step
from .streams import RepeatedRows, StreamedRows

BATCH = 1000  # rows that are hashed at a time
COLUMNS = ("input_ids", "labels")
# What decides on the order of rows, with the recipe's fields for it. Checkpoints from before this was kept lack it.
ORDER = {
    "rows per step": "trainer.per_device_train_batch_size x trainer.gradient_accumulation_steps x processes",
    "data seed": "trainer.data_seed, or else trainer.seed",
    "order": "schedule.batch_ramp, trainer.train_sampling_strategy",
}


def fingerprint(rows: Any, seed: int) -> dict[str, int | str] | None:
    """Of rows in memory or repeated: their number, length and tokens. Of a stream: what it reads, how it packs that,
    and the tokens of its first block. Of both the seed of the order. None of a data set of another kind.
    """
    if isinstance(rows, StreamedRows):
        return _of_stream(rows) | {"seed": seed}
    rows = rows.rows if isinstance(rows, RepeatedRows) else rows
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return None
    tokens, longest = hashlib.sha256(), 0
    columns = [name for name in COLUMNS if name in rows.column_names]
    for table in rows.select_columns(columns).with_format("arrow").iter(BATCH):
        for name in columns:
            column = table[name].combine_chunks()
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            longest = max(longest, int(lengths.max()))
            tokens.update(lengths.astype("<i8").tobytes())
            tokens.update(column.flatten().to_numpy(zero_copy_only=False).astype("<i8", copy=False).tobytes())
    return {"rows": len(rows), "sequence length": longest, "tokens' hash": _short(tokens), "seed": seed}


def order(rows: Any, args: TrainingArguments) -> dict[str, int | str]:
    """The entries of `ORDER`. Another number of processes takes the rows in the same order, as long as a step has as
    many of them; so do other micro-batches."""
    streams = {StreamedRows: "of a stream", RepeatedRows: "of a batch_ramp"}
    kind = streams.get(type(rows)) or getattr(args, "train_sampling_strategy", "random")
    found = {"rows per step": rows_per_step(args), "order": kind}
    # A stream has its order from the seed alone.
    return found | ({"data seed": args.seed if args.data_seed is None else args.data_seed} if kind == "random" else {})


def _of_stream(stream: StreamedRows) -> dict[str, int | str]:
    packer = stream.packer
    return {
        **_of_files(stream.source),
        "documents held out": stream.held_out,
        "sequence length": packer.sequence_length,
        "fim_rate": packer.fim_rate,
        "cut_documents": packer.cut_documents,
        "first tokens' hash": _short(hashlib.sha256(numpy.array(stream.first_block(), "<i8").tobytes())),
    }


def _of_files(source: Any) -> dict[str, int | str]:
    """Of a source of documents: its files' number, bytes, and names with sizes (as a hash); of others how it is named.
    Where the files lie makes no difference."""
    files, others = [], []
    for part in source if isinstance(source, list) else [source]:
        path = Path(part).expanduser() if isinstance(part, str) else None
        if path is not None and path.exists():
            found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            base = path if path.is_dir() else path.parent
            files += [(str(file.relative_to(base)), file.stat().st_size) for file in found]
        else:
            others.append(f"stdlib of Python {platform.python_version()}" if part == "stdlib" else part)
    return {
        "files": len(files),
        "bytes": sum(size for _, size in files),
        "names' and sizes' hash": _short(hashlib.sha256(json.dumps(files).encode())),
        "other sources": json.dumps(others, sort_keys=True),
    }


def differences(before: dict[str, int | str], now: dict[str, int | str]) -> list[str]:
    """What is not the same in two fingerprints, in words, but for the order."""
    return [
        f"{name} {before.get(name, 'unknown')} then and {now.get(name, 'unknown')} now"
        for name in {**before, **now}
        if name not in ORDER and before.get(name) != now.get(name)
    ]


def reordered(before: dict[str, int | str], now: dict[str, int | str]) -> list[str]:
    """What is not the same in their `ORDER`, in words, with the fields; an entry that one lacks is not known."""
    return [
        f"{name} {before[name]} then and {now[name]} now ({fields})"
        for name, fields in ORDER.items()
        if name in before and name in now and before[name] != now[name]
    ]


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
