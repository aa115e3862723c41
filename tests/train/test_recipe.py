"""Recipes: strict fields, overrides, and errors that name the place."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from train.recipe import ONLY, ONLY_OF_ACCELERATOR, OURS, REPOSITORY, FinetuneRecipe, Recipe, load_recipe

GOOD = """
output_dir: out
model: {config: configuration/models/small.json}
data: {source: stdlib, sequence_length: 64}
trainer: {max_steps: 3, eval_strategy: no}
"""


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return str(file)


def test_shipped_recipes_load():
    recipes = sorted((REPOSITORY / "configuration" / "recipes").glob("*.yaml"))
    assert {"quickstart", "dsa_dense", "dsa_warmup", "dsa_sparse", "finetune", "finetune_lora"} <= {
        recipe.stem for recipe in recipes
    }
    for recipe in recipes:
        load_recipe(str(recipe), kind=FinetuneRecipe if recipe.stem.startswith("finetune") else Recipe)


def test_the_quickstarts_differ_by_the_module_alone():
    one, two = (
        load_recipe(f"configuration/recipes/{name}.yaml").model_dump() for name in ("quickstart", "quickstart_mtp")
    )
    assert two["mtp"] is not None and two["model"]["overrides"].pop("num_nextn_predict_layers") == 1
    for recipe in (one, two):
        recipe.pop("output_dir"), recipe.pop("mtp")
    assert one == two


def test_overrides_of_any_field(recipe_file):
    changes = [
        "optimizer.matrix_lr=1e-3",
        "--trainer.max_steps=7",
        "model.overrides.attention_type=gqa",
        "data.source=[a.txt, b.txt]",
        "data.validation={dataset: x, split: test}",
        "tokenizer.path=some/where",
        "schedule.max_seconds=null",
    ]
    recipe = load_recipe(recipe_file, changes)
    assert recipe.optimizer.matrix_lr == 1e-3 and recipe.trainer == {"max_steps": 7, "eval_strategy": "no"}
    assert recipe.model.overrides == {"attention_type": "gqa"} and recipe.data.source == ["a.txt", "b.txt"]
    assert recipe.data.validation == {"dataset": "x", "split": "test"} and recipe.tokenizer.path == "some/where"


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """YAML 1.1 takes 1e-3 for a string; unconverted it would fail in the middle of a run."""
    (tmp_path / "r.yaml").write_text(GOOD.replace("max_steps: 3", "max_steps: 3, max_grad_norm: 1e-3"))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.trainer["max_grad_norm"] == 1e-3 and recipe.trainer["eval_strategy"] == "no"


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.matrix_rl=1", ["optimizer.matrix_rl", "not permitted", "1"]),
        ("optimiser.name=muon", ["optimiser", "not permitted"]),
        ("optimizer.name=sgd", ["optimizer.name", "'muon' or 'adamw'", "sgd"]),
        ("optimizer.matrix_lr=-1", ["optimizer.matrix_lr", "greater than or equal to 0"]),
        ("optimizer.matrix_lr=fast", ["optimizer.matrix_lr", "valid number", "fast"]),
        ("data.sequence_length=1", ["data.sequence_length", "greater than or equal to 2"]),
        ("trainer.max_step=3", ["trainer.max_step", "did you mean 'max_steps'"]),
        ("trainer.bf16=true", ["trainer.bf16", "precision"]),
        ("model.checkpoint=x", ["model", "either config"]),
        ("model.dsa_stage=cool", ["model.dsa_stage", "'dense', 'warmup' or 'sparse'", "cool"]),
        ("model.indexer={index_n_heads: 3}", ["model", "indexer needs index_topk"]),
        ("model={config: small, dsa_stage: sparse, indexer: {index_topk: 4}}", ["dsa_stage='warmup' first"]),
        ("data.fim_rate=2", ["data.fim_rate", "less than or equal to 1"]),
        ("data.document_start=(", ["document_start='('", "regular expression"]),
        ("schedule.kind=cosine", ["'trapezoid' or 'v3'"]),
        ("schedule.warmup=0.9", ["warmup + decay", "exceeds"]),
        ("trainer.max_steps=0", ["trainer.max_steps=0", "at least 1"]),
        ("trainer.max_steps=abc", ["trainer.max_steps='abc'", "valid integer"]),
        ("trainer.gradient_accumulation_steps=0", ["gradient_accumulation_steps=0", "above 0"]),
        ("trainer.logging_steps=abc", ["trainer.logging_steps='abc'", "valid number"]),
        ("trainer.label_smoothing_factor=0.1", ["label_smoothing_factor=0.1 is not possible, only 0.0", "not shifted"]),
        ("trainer.weight_decay=0.1", ["trainer.weight_decay is set by the recipe's field optimizer.weight_decay"]),
        ("trainer.adam_beta1=0.8", ["trainer.adam_beta1 is set by the recipe's field optimizer.betas"]),
        ("trainer.adam_beta2=0.8", ["trainer.adam_beta2 is set by the recipe's field optimizer.betas"]),
        ("trainer.adam_epsilon=1e-6", ["trainer.adam_epsilon is set by the recipe's field optimizer.eps"]),
        ("trainer.optim_args=x", ["trainer.optim_args is set by the recipe's field optimizer"]),
        ("trainer.optim_target_modules=x", ["trainer.optim_target_modules is set by the recipe's field optimizer"]),
        ("trainer.lr_scheduler_kwargs={}", ["trainer.lr_scheduler_kwargs is set by the recipe's field schedule"]),
        ("trainer.bf16_full_eval=true", ["trainer.bf16_full_eval is set by the recipe's field precision"]),
        ("trainer.ignore_data_skip=true", ["ignore_data_skip=True is not possible, only False: a resume"]),
        ("trainer.auto_find_batch_size=true", ["auto_find_batch_size=True is not possible, only False"]),
        (
            "trainer.eval_accumulation_steps=2",
            ["eval_accumulation_steps=2 is not possible, only None", "no predictions"],
        ),
        ("trainer.use_liger_kernel=true", ["use_liger_kernel=True is not possible, only False", "no kernels"]),
        ("trainer.do_train=false", ["do_train=False is not possible, only True", "train.evaluate"]),
        ("trainer.accelerator_config=a.json", ["accelerator_config='a.json' is not possible", "no file"]),
        (
            "trainer.accelerator_config={use_seedable_sampler: false}",
            ["trainer.accelerator_config.use_seedable_sampler=False is not possible, only True", "find the order"],
        ),
        (
            "trainer.accelerator_config={split_batches: true}",
            ["trainer.accelerator_config.split_batches=True is not possible, only False", "of one process"],
        ),
        ("trainer.average_tokens_across_devices=false", ["devices=False is not possible, only True", "add up"]),
        ("optimizer.betas=[2, 3]", ["optimizer.betas.0", "less than 1"]),
        ("optimizer.matrix_lr=.inf", ["optimizer.matrix_lr", "finite number"]),
        ("data.source=[a", ["data.source=[a", "not valid YAML"]),
        ("max_steps", ["field=value"]),
        ("output_dir.deep=1", ["not a section"]),
    ],
)
def test_mistakes_are_named(recipe_file, override, words):
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_file, [override])
    for word in words:
        assert word in str(error.value), str(error.value)


def test_what_is_refused_of_transformers_is_there():
    """Trainer's fields of its optimizer and schedule are all refused, and what is told apart has its default allowed,
    but for what a run does anyway."""
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    trains = re.compile("optim|adam_|learning_rate|lr_scheduler|weight_decay|warmup")
    assert {name for name in fields if trains.match(name)} <= OURS.keys()
    for name in ONLY.keys() & fields.keys() - {"do_train", "do_eval", "label_names"}:
        default = fields[name].default
        assert ONLY[name][0] == (fields[name].default_factory() if default is dataclasses.MISSING else default), name
    assert (
        ONLY_OF_ACCELERATOR.items()
        == {
            name: (getattr(AcceleratorConfig(), name), reason) for name, (_, reason) in ONLY_OF_ACCELERATOR.items()
        }.items()
    )


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))
