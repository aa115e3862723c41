"""The pipeline end to end, as a user runs it, and what it refuses."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments, pipeline
from transformers.integrations import integration_utils

from tests.small_run import small_tokenizer, text
from train import pretrain
from train.recipe import REPOSITORY

KINDS = {".md", ".yaml", ".py"}
STARTS = re.compile(r"accelerate launch .*(--config_file|-m train)")


@pytest.mark.parametrize("kind", ["mla-moe", "dense_transformer"])
def test_a_run_from_text_to_text(kind, tiny_recipe, capsys, tmp_path):
    variant = None if kind == "mla-moe" else kind
    recipe = tiny_recipe(trainer={"max_steps": 40}, prompt="the quick")
    recipe.model.variant = variant
    if variant:
        recipe.model.overrides.pop("n_routed_experts")
    metrics = pretrain.run(recipe)
    assert metrics["eval_bits_per_byte"] < 2.0  # the grammar has one bit per word; an untrained model needs 3
    printed = capsys.readouterr().out
    assert any(line.startswith("the quick") for line in printed.splitlines())
    output = tmp_path / "run"
    assert {"config.json", "model.safetensors", "tokenizer.json", "loss.png", "metrics.json"} <= set(os.listdir(output))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG") and (output / "loss.png").stat().st_size > 5000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    ids = tokenizer(text(5), return_tensors="pt")["input_ids"][:, :64]  # what the model has positions for
    assert model(ids, labels=ids).loss < 3.0
    written = pipeline("text-generation", model=str(output))("the quick", max_new_tokens=8)[0]["generated_text"]
    assert written.startswith("the quick") and len(written) > len("the quick")


def test_continuing_from_a_checkpoint(tiny_recipe, tmp_path):
    first = pretrain.run(tiny_recipe(trainer={"max_steps": 20}))
    second = tiny_recipe(
        output_dir=str(tmp_path / "second"),
        trainer={"max_steps": 10},
        optimizer={"matrix_lr": 0.005, "embedding_lr": 0.02, "head_lr": 0.001},
    )
    second.model.config, second.model.overrides, second.model.checkpoint = None, {}, str(tmp_path / "run")
    assert pretrain.run(second)["eval_loss"] < first["eval_loss"]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed(tracker, tiny_recipe, tmp_path, monkeypatch):
    """Said before anything is read."""
    monkeypatch.setattr(integration_utils, f"is_{tracker}_available", lambda: False)
    recipe = tiny_recipe(trainer={"report_to": ["tensorboard", tracker]}, data={"source": str(tmp_path / "nowhere")})
    message = pretrain.problem(pretrain.run, recipe)
    assert message.startswith(f"error: trainer.report_to=['tensorboard', '{tracker}'] is not possible: ")
    assert f"pip install {tracker}" in message and "\n" not in message
    recipe.trainer["report_to"] = ["tensorbored"]
    assert "tensorbored is not supported, only" in pretrain.problem(pretrain.run, recipe)


def test_deepspeed_that_is_not_installed(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "is_deepspeed_available", lambda: False)
    recipe = tiny_recipe(data={"source": str(tmp_path / "nowhere")})
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(SystemExit) as caught:
            pretrain.launch(pretrain.run, recipe)
    message = str(caught.value)
    assert message.startswith("error: the launch file (ACCELERATE_USE_DEEPSPEED) asks for DeepSpeed, which is not inst")
    assert "pip install -e '.[zero]'" in message and "\n" not in message
    recipe.trainer["deepspeed"] = {"zero_optimization": {"stage": 3}}
    assert pretrain.problem(pretrain.run, recipe).startswith("error: trainer.deepspeed asks for DeepSpeed, which is")


def test_two_gpus_in_one_process_are_refused(tiny_recipe, tmp_path, monkeypatch):
    """Trainer would share them by nn.DataParallel. Said before anything is read or written."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"2 GPUs in one process .*nn\.DataParallel.*accelerate launch --multi_gpu"):
        pretrain.run(tiny_recipe(trainer={"max_steps": 1}, data={"source": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "run").exists()


def test_the_command(tiny_recipe, tmp_path):
    """`accelerate launch -m train.pretrain --config ... field=value`, from another process."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe().model_dump(mode="json")))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        "configuration/accelerate/single.yaml",
    ]
    command = [*launch, "-m", "train.pretrain", "--config", str(file), "trainer.max_steps=3", "optimizer.name=adamw"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 2/3" in done.stdout and "bits per byte" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_documented_commands_end_quietly():
    """Of one process that ends with a message accelerate prints a traceback of its own without --quiet."""
    folders = ("configuration", "docs", "examples", "train")
    files = [file for name in folders for file in (REPOSITORY / name).rglob("*.*") if file.suffix in KINDS]
    files += [REPOSITORY / "Makefile", REPOSITORY / "README.md"]
    commands = [(file, line) for file in files for line in file.read_text().splitlines() if STARTS.search(line)]
    assert len(commands) > 10
    assert not [(file, line) for file, line in commands if "accelerate launch --quiet " not in line]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bf16_trains_like_fp32(optimizer, tiny_recipe):
    """Autocast to bf16: the same course to two digits, weights and router biases still fp32."""
    rates = {"name": optimizer, "matrix_lr": 0.02 if optimizer == "muon" else 0.003, "embedding_lr": 0.02}
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = tiny_recipe(precision=precision, optimizer=rates, trainer={"max_steps": 20})
        trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
        trainer.train()
        assert {t.dtype for t in (*trainer.model.parameters(), *trainer.model.buffers())} == {torch.float32}
        losses[precision] = trainer.evaluate()["eval_loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["fp32"] < 5.0


REFUSED = {
    "empty corpus": ({"data.source": "{empty}"}, ["no file of a known kind"]),
    "absent corpus": ({"data.source": "{absent}"}, ["absent", "does not exist"]),
    "short corpus": (
        {"data.sequence_length": 64, "tokenizer.vocab_size": 280, "data.source": "{short}"},
        ["less than one sequence of 64"],
    ),
    "large tokenizer": ({"tokenizer.vocab_size": 330}, ["330 tokens", "vocab_size is only 320"]),
    "long sequences": ({"data.sequence_length": 128}, ["sequence_length=128", "max_position_embeddings=64"]),
    "unknown model": ({"model.config": "huge"}, ["'huge' is neither"]),
    "unknown field": ({"model.overrides": "{hidden_sise: 8}"}, ["hidden_sise", "did you mean 'hidden_size'"]),
    "no text in a column": ({"data.source": "{numbers}"}, ["numbers.jsonl", "'text' holds int64", "text_field"]),
    "unknown data set": ({"data.source": "{dataset: nope_not_here}"}, ["nope_not_here", "cannot be loaded"]),
    "wrong argument": ({"data.source": "{dataset: json, nonsense: 3}"}, ["nonsense", "cannot be loaded"]),
    "streaming": ({"data.source": "{dataset: json, streaming: true}"}, ["streaming is not supported"]),
    "absent tokenizer": ({"tokenizer.path": "/nope/x"}, ["tokenizer.path", "'/nope/x' is not a folder"]),
    "tokenizer nobody has": ({"tokenizer.path": "nope/x"}, ["'nope/x' has no tokenizer that can be read"]),
    "no special tokens": ({"tokenizer.path": "{plain}"}, ["tokenizer has no bos_token, eos_token, pad_token"]),
    "absent model file": ({"model.config": "/nope/m.json"}, ["'/nope/m.json' is neither a file nor one of"]),
    "absent checkpoint": ({"model": "{checkpoint: /nope/x}"}, ["model.checkpoint '/nope/x' is not a folder"]),
    "checkpoint nobody has": ({"model": "{checkpoint: nope/x}"}, ["'nope/x' is not a folder, and not to be had"]),
    "absent validation": ({"data.validation": "{absent}"}, ["absent", "does not exist"]),
    "no tokens to train on": (
        {"data.source": "{few}", "data.validation": "{short}", "tokenizer.path": "{whole}"},
        ["the corpus has only", "less than one sequence of 32"],
    ),
    "no tokens to validate": ({"data.validation": "{few}"}, ["the validation text has only", "one sequence of 32"]),
    "rope without factor": ({"model.overrides": "{rope_parameters: {rope_type: yarn}}"}, ["lacks 'factor'"]),
    "output is a file": ({"output_dir": "{short}"}, ["output_dir", "is a file"]),
    "impossible output": ({"output_dir": "/proc/nope"}, ["/proc/nope"]),
    "impossible field": (
        {"model.overrides": "{num_attention_heads: 0}"},
        ["config of 'small': num_attention_heads=0", "at least 1"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_in_one_clear_error(case, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `datasets` looks through all files below
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text(" ".join(f"w{i}" for i in range(40)) * 3)
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "few.txt").write_text("fox\n")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "whole")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "plain")
    places = {"{few}": "few.txt", "{plain}": "plain", "{whole}": "whole"}
    places |= {"{numbers}": "numbers.jsonl", "{empty}": "empty", "{absent}": "absent", "{short}": "short.txt"}
    changes, words = REFUSED[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe().model_dump(mode="json")))
    arguments = [f"{key}={tmp_path / places[v] if v in places else v}" for key, v in changes.items()]
    with pytest.raises(SystemExit) as error:
        pretrain.main(["--config", str(file), *arguments])
    message = str(error.value)
    assert message.startswith("error: ") and len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_recipe_that_cannot_be_read(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe().model_dump(mode="json")))
    for arguments, words in (
        (["--config", "/nope/recipe.yaml"], "error: recipe '/nope/recipe.yaml' does not exist"),
        (["--config", str(file), "data.sorce=x"], "data.sorce: Extra inputs are not permitted (given 'x')"),
        (["--config", str(file), "trainer.max_step=3"], "did you mean 'max_steps'"),
    ):
        with pytest.raises(SystemExit) as caught:
            pretrain.main(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and words in error and "Traceback" not in error


def test_a_failed_run_leaves_the_last_one_alone(tiny_recipe, tmp_path):
    pretrain.run(tiny_recipe())
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(ValueError):
        pretrain.run(tiny_recipe(tokenizer={"vocab_size": 330}))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_recipe_uses_a_gpu(tiny_recipe):
    recipe = tiny_recipe()
    assert pretrain.training_arguments(recipe).device.type == "cuda"
    assert pretrain.run(recipe)["eval_loss"] < 7
