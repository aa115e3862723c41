"""What the code takes from transformers is public and not about to go: other names break at its next release."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("modeling_nanodeepseek", "train", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
REMOVED = {
    "from_legacy_cache", "to_legacy_cache", "key_cache", "value_cache", "seen_tokens", "_seen_tokens", "get_max_length",
    "get_usable_length", "is_torch_fx_available",
}  # fmt: skip


def names_used(source: str) -> tuple[set[str], set[str]]:
    """(what is imported from transformers, as dotted paths; every attribute and imported name)."""
    imported, attributes = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            attributes |= names
            if node.level == 0 and node.module.split(".")[0] == "transformers":
                imported |= {f"{node.module}.{name}" for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.split(".")[0] == "transformers"}
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
    return imported, attributes


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_private_and_no_removed_names(path):
    imported, attributes = names_used(path.read_text())
    assert not {name for name in imported if any(part.startswith("_") for part in name.split("."))}
    assert not attributes & REMOVED


def test_the_search_finds_them():
    imported, attributes = names_used(
        "from transformers.utils import _LazyModule, is_torch_fx_available\nimport transformers._x\ncache.seen_tokens"
    )
    assert {"transformers.utils._LazyModule", "transformers._x"} <= imported
    assert attributes & REMOVED == {"is_torch_fx_available", "seen_tokens"}
    assert len(FILES) > 20
