"""The model card of a run: what it says is what was done, and what users write cannot break it."""

import configparser
import json
import math
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from modeling_nanodeepseek import NanoDeepSeekConfig
from tests.conftest import SPARSE, TINY, tiny_model, tokens
from tests.small_run import TINY_MODEL
from train import finetune, pretrain
from train.accounting import count_parameters
from train.card import REQUIRES, cache_bytes, code, describe_source, escape, hub_datasets, model_card
from train.recipe import REPOSITORY, CardSection, FinetuneRecipe


def rows(card: ModelCard) -> dict[str, str]:
    """All tables of a card, by the first cell."""
    cells = (re.fullmatch(r"\| (.+?) \| (.+) \|", line) for line in card.text.splitlines())
    return {match[1]: match[2] for match in cells if match}


def front_matter(card: ModelCard) -> dict:
    """As the Hub reads it, with the rules that it checks."""
    values = yaml.safe_load(str(card).split("\n---\n")[0].removeprefix("---"))
    assert re.fullmatch(r"[a-z0-9.-]+", values["license"])
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "text-generation"
    assert all(isinstance(tag, str) for tag in values["tags"]) and len(set(values["tags"])) == len(values["tags"])
    for entry in values.get("model-index", []):
        assert entry["name"]
        for result in entry["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(isinstance(metric["value"], float) for metric in result["metrics"])
    return values


def test_what_a_run_writes(tiny_recipe, tmp_path):
    recipe = tiny_recipe(trainer={"max_steps": 6, "gradient_accumulation_steps": 2}, card={"language": ["en"]})
    metrics = pretrain.run(recipe)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    values, said = front_matter(card), rows(card)
    assert values["license"] == "apache-2.0" and values["language"] == ["en"]
    assert {"nanodeepseek", "mla", "moe"} <= set(values["tags"]) and "sparse-attention" not in values["tags"]
    assert "datasets" not in values and "base_model" not in values  # neither is on the Hub
    figures = {metric["type"]: metric["value"] for metric in values["model-index"][0]["results"][0]["metrics"]}
    expected = {"bits_per_byte": metrics["eval_bits_per_byte"], "loss": metrics["eval_loss"]}
    assert figures == {name: round(value, 4) for name, value in expected.items()}
    assert said["held-out bits per byte"] == f"{metrics['eval_bits_per_byte']:.4f}"

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    counts = count_parameters(NanoDeepSeekConfig.from_dict(config))
    assert said["parameters"] == f"{counts['total']:,}" and said["active per token"] == f"{counts['active']:,}"
    assert said["layers"] == "2" and said["width"] == "32" and said["context"] == "64 tokens"
    assert said["experts"].startswith("4 routed, 2 per token; 1 shared") and config["n_routed_experts"] == 4
    assert said["source"] == "the text in `corpus`"
    assert said["tokens seen"] == "1,536: 6 steps of 8 rows of 32"
    assert "matrices by Muon at 0.02" in said["optimizer"] and said["precision, seed"] == "fp32, 3"
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    last = [entry["ce_loss"] for entry in history if "ce_loss" in entry][-1]
    assert said["training cross-entropy, nats per token"] == f"{last:.4f}"
    assert 'name = "run"' in card.text and "trust_remote_code=True" in card.text
    assert str(tmp_path) not in str(card)  # the machine's folders are nobody's business
    assert "Licence\n\nWeights: `apache-2.0`" in card.text


def test_the_cache_is_counted_to_the_byte():
    mla = TINY | {"num_nextn_predict_layers": 1}
    for overrides in (mla, mla | SPARSE, {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2}):
        model = tiny_model(**overrides).to(torch.bfloat16)
        with torch.no_grad():
            cache = model(tokens(1, 7), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == 7 * cache_bytes(model.config), overrides


def test_modules_indexers_and_origins_are_named(tiny_recipe, tmp_path):
    first = tiny_recipe(trainer={"max_steps": 1})
    first.model.overrides = TINY_MODEL | {"num_nextn_predict_layers": 1, "q_lora_rank": 16}
    first.model.overrides |= {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
    pretrain.run(first)
    second = tiny_recipe(output_dir=str(tmp_path / "second"), trainer={"max_steps": 1})
    second.model.config, second.model.overrides, second.model.checkpoint = None, {}, str(tmp_path / "run")
    pretrain.run(second)
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert {"sparse-attention", "multi-token-prediction"} <= set(front_matter(card)["tags"])
    said = rows(card)
    assert "1 module(s)" in said["of multi-token prediction, not counted above"] and "8 keys" in said["attention"]
    assert "trained from the weights of `run`" in card.text and "fresh weights" not in card.text
    assert "base_model" not in front_matter(card)
    assert 0 <= float(said["second token right, held out"]) <= 1


def test_what_fine_tuning_and_its_adapters_say(tiny_recipe, tmp_path):
    """Three kinds beside a pretrained model's: all weights, an adapter, and the model with it merged."""
    pytest.importorskip("peft")
    pretrain.run(tiny_recipe(trainer={"max_steps": 1}))
    talk = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "FOX"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 9)
    values = tiny_recipe(output_dir=str(tmp_path / "tuned")).model_dump(mode="json") | {
        "model": {"checkpoint": str(tmp_path / "run")},
        "data": {"source": str(tmp_path / "chat.jsonl"), "sequence_length": 40, "validation_share": 0.2},
        "optimizer": {"name": "adamw"},
        "balance": {"gamma": 0.0},
    }
    values["trainer"] |= {"max_steps": 1}
    finetune.run(FinetuneRecipe.model_validate(values))
    values |= {"output_dir": str(tmp_path / "lora"), "lora": {"rank": 2, "merge": True}}
    finetune.run(FinetuneRecipe.model_validate(values))
    tuned, lora, merged = (ModelCard.load(tmp_path / f / "README.md") for f in ("tuned", "lora", "lora/merged"))
    for card in (tuned, lora, merged):
        said = rows(card)
        assert said["source"] == "the conversations in `chat.jsonl`" and said["learned"] == "what the assistant says"
        assert said["balancing"].startswith("biases rest") and "so has the model that it" in card.text
        assert "Losses are those of what the assistant says" in card.text and "apply_chat_template" in card.text
        assert "tokens seen" not in said and card.data.eval_results[0].dataset_name == "held-out conversations"
        assert re.search(r"\n\n\| \| \|\n\|---\|---\|\n\| ", card.text)
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors").values()
    assert rows(lora)["parameters that learned"] == f"{sum(weight.numel() for weight in weights):,}"
    assert "parameters that learned" not in rows(tuned) and "LoRA" not in rows(tuned)
    assert "the weights of the base stay" in rows(lora)["LoRA"] and "merged" in rows(merged)["LoRA"]
    assert [card.data.library_name for card in (tuned, lora, merged)] == ["transformers", "peft", "transformers"]
    assert ["PeftModel" in card.text for card in (tuned, lora, merged)] == [False, True, False]
    assert ["LICENSE-CODE" in card.text for card in (tuned, lora, merged)] == [True, False, True]


def test_a_warm_up_says_that_attention_is_dense_and_that_biases_rest(tiny_recipe):
    recipe = tiny_recipe(trainer={"max_steps": 1})
    recipe.model.overrides = TINY_MODEL | {"q_lora_rank": 16}
    recipe.model.indexer, recipe.model.dsa_stage = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}, "warmup"
    said = rows(model_card(pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))))
    assert "dense, with an indexer in warm-up, for 8 keys" in said["attention"] and "balancing" not in said
    assert int(said["parameters that learned"].replace(",", "")) < 2000


HOSTILE = '---\nlicense: gpl\n---\n# <script>alert(1)</script> [x](http://x) | `rm` "'


def test_what_users_write_stays_text(tiny_recipe):
    recipe = tiny_recipe(card={"title": HOSTILE, "license": "other", "license_name": "a: b | c\n---\n- d"})
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    recipe.data.source = [HOSTILE, {"dataset": "someone/data", "name": "`|`", "split": "train"}]
    recipe.model.checkpoint = "someone/base"
    trainer.state.log_history = [{"eval_loss": 1.0}]
    assert front_matter(model_card(trainer))["model-index"][0]["name"].startswith("--- license: gpl --- # <script>")
    trainer.state.log_history = [{"eval_loss": math.nan}, {"ce_loss": math.inf}]
    card = model_card(trainer)
    values = front_matter(card)
    assert values["license"] == "other" and values["license_name"] == "a: b | c --- - d"
    assert values["datasets"] == ["someone/data"] and values["base_model"] == "someone/base"
    assert "model-index" not in values  # no figure is better than one that is none
    assert ModelCard(str(card)).text == card.text  # what was written is what is read
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert len(headings) == 8 and "<" not in headings[0] and "\\[x\\]\\(http" in headings[0]
    name = next(line for line in card.text.splitlines() if line.startswith("name = "))
    assert eval(name.removeprefix("name = "), {"__builtins__": {}}) == HOSTILE
    assert "\\|" in rows(card)["source"] and "``" in rows(card)["source"]
    assert "Nothing was logged" in card.text


def test_escapes():
    assert escape("a_b*c <i>\n# d") == "a\\_b\\*c &lt;i&gt; \\# d"
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a\nb|c") == "`a b\\|c`"


def test_data_sets_of_the_hub_and_others(tmp_path):
    (tmp_path / "mine").mkdir()
    source = ["stdlib", str(tmp_path / "mine"), {"dataset": "wikitext", "name": "wikitext-2-raw-v1"}]
    source += [{"dataset": "json", "data_files": "x.json"}, {"dataset": str(tmp_path / "mine")}]
    assert hub_datasets(source) == ["wikitext"]
    words = describe_source(source)
    assert "Python's standard library" in words and "`wikitext`, name `wikitext-2-raw-v1`" in words
    assert str(tmp_path) not in words


def test_the_section_refuses_what_the_hub_would():
    for wrong in ({"license": "My Licence"}, {"license": "other"}, {"license_name": "x"}, {"language": ["english"]}):
        with pytest.raises(ValueError):
            CardSection(**wrong)


def test_the_versions_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    needed = setup["options"]["install_requires"].split()
    assert sorted(needed) == sorted(f"{name}>={version}" for name, version in REQUIRES.items())
