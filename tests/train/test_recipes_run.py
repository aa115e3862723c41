"""The shipped recipes of pretraining run: at a tiny size for a step or two, by-name sources read from local files."""

import json

import pytest
from datasets import Dataset

from modeling_nanodeepseek import NanoDeepSeekConfig
from tests.small_run import TINY_MODEL, text
from train import pretrain
from train import trainer as trainer_module
from train.recipe import load_recipe


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Runs a shipped recipe with these changes; its folder."""
    monkeypatch.setattr(trainer_module, "matmul_peak", lambda *a: 1e12)
    monkeypatch.setattr(pretrain, "plot_losses", lambda history, path, title: path.write_text(title) and path)

    def run(name: str, **changes):
        recipe = load_recipe(f"configuration/recipes/{name}.yaml")
        values = recipe.model_dump()
        values["output_dir"], values["prompt"], values["threads"] = str(tmp_path / name), None, 1
        small = {"max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
        values["trainer"] |= small | {"gradient_accumulation_steps": 2, "report_to": [], "disable_tqdm": True}
        for section, change in changes.items():
            values[section] |= change
        metrics = pretrain.run(type(recipe).model_validate(values))
        assert metrics["eval_loss"] > 0
        return tmp_path / name

    return run


def test_longer_contexts_one_after_the_other(shipped, tmp_path):
    def data(**more):
        return {
            "source": {"synthetic": "needle", "documents": 400, **more},
            "validation": {"synthetic": "needle", "documents": 12},
        }

    shipped("needle", data=data(words=96))
    for phase, (origin, length) in enumerate((("needle", 256), ("extend_1", 512)), start=1):
        model = {"checkpoint": str(tmp_path / origin)}
        folder = shipped(f"extend_{phase}", data=data(words=200), model=model)
        config = NanoDeepSeekConfig.from_pretrained(folder)
        assert config.max_position_embeddings == length and config.rope_parameters["factor"] == 4
        assert config.rope_parameters["original_max_position_embeddings"] == 128
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == length


def test_by_name_through_local_files(shipped, tmp_path):
    """The Hub's columns: WikiText's lines, FineWeb-Edu's documents with what is known of each."""
    tiny = {"model": {"config": "small", "overrides": TINY_MODEL}, "tokenizer": {"vocab_size": 320}}
    lines = [
        line for i in range(60) for line in (f" = Title {i} = \n", "", f" {text(i)}", " = = Part = = \n", text(i + 1))
    ]
    pages = {"text": [text(i) for i in range(60)], "id": [f"<{i}>" for i in range(60)], "score": [3.0] * 60}
    Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "wiki.parquet")
    Dataset.from_dict(pages).to_parquet(tmp_path / "000.parquet")
    wiki, web = ({"dataset": "parquet", "data_files": str(tmp_path / name)} for name in ("wiki.parquet", "000.parquet"))
    shipped("wikitext", data={"source": wiki, "validation": wiki, "sequence_length": 32}, **tiny)
    few = {"validation_documents": 6, "sequence_length": 32}
    card = (shipped("fineweb_edu", data={"source": web} | few, **tiny) / "README.md").read_text()
    assert "the first 6 documents" in card and "a stream for training" in card


def test_v3(shipped, tmp_path):
    """All of it at once, over a text of one's own; the card says so."""
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(text(i))
    model = {"config": "small", "overrides": TINY_MODEL | {"num_nextn_predict_layers": 1, "initializer_range": 0.006}}
    folder = shipped(
        "v3",
        model=model,
        tokenizer={"vocab_size": 320},
        data={"source": str(tmp_path), "sequence_length": 32},
        schedule={"batch_ramp": {"start": 2, "tokens": 100}, "warmup_steps": 2},
        trainer={"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    card = (folder / "README.md").read_text()
    assert "256: 3 steps of up to 4 rows of 32" in card
    assert "warm-up over 2 steps, constant until 67.6%, cosine to 0.1 until 96.6%, 0.0332 from 98.9%" in card
