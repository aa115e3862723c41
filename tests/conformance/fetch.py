"""Downloads the tests that belong to the installed transformers, once."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "conformance"


def tests_folder() -> Path:
    """Where the tests of the installed transformers lie once they have been fetched."""
    return CACHE / f"transformers-{importlib.metadata.version('transformers')}" / "tests"


def fetch() -> Path:
    """Makes sure that `tests_folder()` exists, and returns it.

    Through pip, so that its configured index and proxy are used. Raises RuntimeError with pip's words if it fails.
    """
    target = tests_folder()
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        requirement = f"transformers=={importlib.metadata.version('transformers')}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        # Run inside the scratch folder: pip would take a pyproject.toml in the current one for its own.
        run = subprocess.run([*command, requirement], cwd=scratch, text=True, capture_output=True)
        if run.returncode != 0:
            raise RuntimeError(f"The source archive of {requirement} could not be downloaded:\n{run.stderr}")
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        unpacked = Path(scratch) / "unpacked" / "tests"
        with tarfile.open(archive) as tar:
            for member in tar:
                *folders, name = Path(member.name).parts[1:] or [""]  # without the archive's top folder
                if member.isfile() and folders[:1] == ["tests"] and ".." not in folders and name.endswith(".py"):
                    path = Path(unpacked, *folders[1:], name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tar.extractfile(member).read())
        (unpacked / "__init__.py").touch()  # the sdist leaves it out, and a test module loads it by its path
        shutil.rmtree(target.parent, ignore_errors=True)
        os.rename(unpacked.parent, target.parent)  # whole or not at all
    return target


if __name__ == "__main__":
    print(fetch())
