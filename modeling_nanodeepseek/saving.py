"""Folders that are replaced as a whole: a save that is killed, or runs out of disk, leaves the old version.

    with replacing("my_model") as stage:    # my_model/.saving, empty
        ...write files into stage...

The files are forced to disk and the stage is renamed to `.saved`: from that instant the new version counts. Then its
files move over the old ones, what names the weights last. Whoever ends before that instant leaves the old version
untouched (and a `.saving` that the next save removes); whoever ends after it leaves a `.saved` that `finish_saving`
moves on: the next save and `from_pretrained` call it. The stage lies inside the folder, because only there is it sure
to be on the same file system, where a move is a rename.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

STAGE, COMMITTED = ".saving", ".saved"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# transformers' names of weight files and of their index: model[.variant][-00001-of-00002].safetensors[.index...json]
WEIGHT_FILE = re.compile(
    r"model(?:\.(?P<variant>[^.]+?))?(?:-\d{5,}-of-\d{5,})?\.safetensors(?P<index>\.index(?:\.(?P<of>[^.]+))?\.json)?"
)


class SaveError(OSError):
    """Files could not be written; its cause says why."""


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to write into, whose files replace those of the same names in `folder` if the body succeeds.

    Weight files of `folder` that the new version has no use for are removed: transformers would read an old
    `model.safetensors` beside a new index. Everything else in `folder` stays. One saver at a time.

    Raises: SaveError, an OSError, if the files cannot be written; other errors of the body as they are.
    """
    folder = Path(folder)
    if STAGE in folder.parts:  # a part of what another save replaces as a whole
        yield folder
        return
    is_new = not folder.exists()
    stage = folder / STAGE
    try:
        finish_saving(folder)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        sync(stage)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        if is_writing_error(error):
            raise SaveError(f"{str(folder)!r} cannot be saved: {reason(error)}. What it held is intact.") from error
        raise
    stage.rename(folder / COMMITTED)
    sync_folder(folder)
    finish_saving(folder)


def finish_saving(folder: str | os.PathLike) -> list[str]:
    """Moves a version that was complete, but not all in place, when its process ended; the names of the rest.

    Any number of interruptions do no harm: it goes on where the last one stopped.
    """
    folder = Path(folder)
    saved = folder / COMMITTED
    if not saved.is_dir():
        return []
    kinds = {path.name: WEIGHT_FILE.fullmatch(path.name) for path in saved.iterdir()}
    # A single file, or the index, says which weights count. An old index goes first and the new one comes last, so that
    # whoever reads the folder in between without knowing of `.saved` finds no index, rather than shards of two models.
    heads = sorted(name for name, kind in kinds.items() if kind and (kind["index"] or "-of-" not in name))
    for name in heads:
        remove_superseded(folder, saved / name)
    rest = sorted(kinds.keys() - set(heads), key=lambda name: (name == "config.json", name))  # after the code it names
    for name in (*rest, *heads):
        move(saved / name, folder / name)
    sync_folder(folder)
    with suppress(OSError):  # another process may be at it too: only an empty folder goes
        saved.rmdir()
    return sorted(kinds)


def remove_superseded(folder: Path, head: Path):
    """Removes an index in `folder`, weight files that `head`, a single weight file or an index, does not name,
    and an adapter's."""
    kind, current = WEIGHT_FILE.fullmatch(head.name), {head.name}
    if kind["index"]:
        with suppress(FileNotFoundError):
            current = set(json.loads(head.read_text("utf-8"))["weight_map"].values())
    if not head.exists():  # another process has moved it
        return
    for old in folder.iterdir():
        other = WEIGHT_FILE.fullmatch(old.name)
        same_variant = other and (other["variant"] or other["of"]) == (kind["variant"] or kind["of"])
        if same_variant and old.name not in current:
            old.unlink(missing_ok=True)
    for old in ADAPTER_FILES:  # which would be put on the new model
        if (folder / old).exists() and not (head.parent / old).exists():
            (folder / old).unlink(missing_ok=True)


def move(source: Path, target: Path):
    """A rename that replaces files and folders; if another process has just done it, that is fine."""
    if target.is_dir() and not target.is_symlink() and source.is_dir():
        shutil.rmtree(target)
    with suppress(FileNotFoundError):
        source.replace(target)


def sync(folder: Path):
    """Forces a folder and all files below it to disk: a rename must not become durable before what it names."""
    for path in (folder, *folder.rglob("*")):
        sync_folder(path) if path.is_dir() else _sync(path)


def sync_folder(folder: Path):
    if os.name == "posix":  # elsewhere folders cannot be opened
        _sync(folder)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_writing_error(error: BaseException) -> bool:
    """Whether a file could not be written: Python, safetensors and torch each have an error of their own for it."""
    of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return of_torch or isinstance(error, (OSError, SafetensorError))


def reason(error: BaseException) -> str:
    """One line; torch's words for a full disk are about its own bookkeeping."""
    while isinstance(error, SaveError):
        error = error.__cause__
    if isinstance(error, RuntimeError):
        return "writing failed (no space left on the device?)"
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0].rstrip(".")
