"""An adapter's folder, given to each command: what writes takes it, all else says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.small_run import TINY_MODEL, small_tokenizer
from train import export, finetune, generate, pretrain, serve
from train.adapters import base_of_adapter
from train.models import build_model
from train.recipe import FinetuneRecipe


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[str, str]:
    """An adapter's folder as PEFT saves it, without a tokenizer, and its model's."""
    peft = pytest.importorskip("peft")
    folder, tokenizer = tmp_path_factory.mktemp("adapted"), small_tokenizer()
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    build_model("small", **TINY_MODEL | ids | {"initializer_range": 0.3}).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = NanoDeepSeekForCausalLM.from_pretrained(folder / "base")
    targets = {"target_modules": ["o_proj"], "r": 2, "init_lora_weights": False}
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **targets)).save_pretrained(folder / "lora")
    return str(folder / "lora"), str(folder / "base")


def write(model: str, capsys) -> str:
    generate.main(["--model", model, "--prompt", "the quick", "--max-new-tokens", "8"])
    return capsys.readouterr().out


def test_an_adapter_writes_on_its_model(adapter, tmp_path, capsys):
    """As its model does with the adapter merged, in the way that refusals name."""
    from peft import AutoPeftModelForCausalLM

    lora, base = adapter
    written = write(lora, capsys)
    AutoPeftModelForCausalLM.from_pretrained(lora).merge_and_unload().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    assert written == write(str(tmp_path), capsys) != write(base, capsys)


def test_what_is_wrong_with_its_model_is_one_line(adapter, tmp_path):
    lora, base = adapter
    shutil.copytree(base, tmp_path / "base")
    config, settings = tmp_path / "base" / "config.json", json.loads(Path(lora, "adapter_config.json").read_text())
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    shutil.copytree(lora, tmp_path / "lora")
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as ended:
        generate.main(["--model", str(tmp_path / "lora"), "--prompt", "the quick"])
    message = str(ended.value)
    assert message.startswith(f"error: config of '{tmp_path / 'base'}': hidden_act='gelu'") and "\n" not in message


def test_an_adapter_is_no_model(adapter, tiny_recipe, tmp_path):
    lora, base = adapter
    recipe = tiny_recipe()
    recipe.model.config, recipe.model.overrides, recipe.model.checkpoint = None, {}, lora
    chats = FinetuneRecipe.model_validate(
        {"output_dir": str(tmp_path), "model": {"checkpoint": lora}, "lora": {}, "optimizer": {"name": "adamw"}}
        | {"data": {"source": "docstrings", "sequence_length": 64}, "trainer": {"report_to": "none"}}
    )
    for call, done in (
        (lambda: pretrain.launch(pretrain.run, recipe), "the start of a run"),
        (lambda: pretrain.launch(finetune.run, chats), "the start of a run"),
        (lambda: export.main(["--model", lora, "--output", str(tmp_path / "out")]), "exported"),
        (lambda: serve.main(["--model", lora]), "served"),
    ):
        with pytest.raises(SystemExit) as ended:
            call()
        message = str(ended.value)
        assert f"{lora!r} is no model but a LoRA adapter for {base!r}, and cannot be {done}" in message
        assert "merge_and_unload()" in message and len(message.splitlines()) == 1
    assert base_of_adapter(base) is None
