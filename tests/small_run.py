"""A tokenizer, a corpus and a recipe small enough to run in a moment."""

import random
from functools import cache
from pathlib import Path

import pytest

from train.recipe import Recipe
from train.tokenizer import train_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew for an evil queen".split()


def text(seed: int, words: int = 60) -> str:
    """Sentences with a grammar of their own: each word is followed by one of two others."""
    chooser, word, out = random.Random(seed), seed % len(WORDS), []
    for _ in range(words):
        out.append(WORDS[word])
        word = (word * 3 + chooser.choice((1, 2))) % len(WORDS)
    return " ".join(out) + "\n"


@cache
def small_tokenizer():
    code = "def main():\n    return {x: 12345 for x in range(10)}\n"
    return train_tokenizer([*(text(seed) for seed in range(300)), code * 20], 320)


TINY_MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed in range(60):
        (folder / f"{seed}.txt").write_text(text(seed))
    return folder


@pytest.fixture
def tiny_recipe(tmp_path, corpus):
    """A function that builds the recipe of a run of a few steps, sections overridable."""

    def build(**changes) -> Recipe:
        values = {
            "output_dir": str(tmp_path / "run"),
            "model": {"config": "small", "overrides": TINY_MODEL},
            "tokenizer": {"vocab_size": 320},
            "data": {"source": str(corpus), "sequence_length": 32, "validation_share": 0.1},
            "threads": 1,
            "trainer": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 3,
                "logging_steps": 2,
                "save_strategy": "no",
                "disable_tqdm": True,
                "seed": 3,
            },
        }
        for section, change in changes.items():
            values[section] = values[section] | change if isinstance(change, dict) and section in values else change
        return Recipe.model_validate(values)

    return build
