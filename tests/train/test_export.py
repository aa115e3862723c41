"""The command that exports: from a folder to a folder, or one line that says why not."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.conftest import assert_close, tiny_model, tokens
from train import export
from train.tokenizer import train_tokenizer


def saved(folder, **overrides):
    tokenizer = train_tokenizer(["a b c d e f g"] * 20, vocab_size=270)
    model = tiny_model(vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_from_folder_to_folder(tmp_path, capsys):
    model = saved(tmp_path / "ours", num_nextn_predict_layers=1)
    out = str(tmp_path / "native")
    export.main(["--model", str(tmp_path / "ours"), "--output", out, "--dtype", "float32", "--max-shard-gb", "1e-4"])
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = tokens(1, 20)
    assert_close(model(ids).logits, theirs(ids).logits, 1e-5)
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"][0] == 0


def test_fp8(tmp_path):
    model = saved(tmp_path / "ours")
    export.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "native"), "--fp8", "--ue8m0"])
    assert '"scale_fmt": "ue8m0"' in (tmp_path / "native" / "config.json").read_text()
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    for (name, exact), rounded in zip(model.named_parameters(), read.parameters()):
        assert_close(exact, rounded, 0.05, name)


@pytest.mark.parametrize(
    "overrides, flags, message",
    [
        ({"hidden_act": "relu2"}, [], "hidden_act='relu2'"),
        ({}, ["--ue8m0"], "needs fp8=True"),
        ({}, ["--architecture", "deepseek_v32"], "index_topk=None"),
    ],
)
def test_one_line_says_why_not(overrides, flags, message, tmp_path):
    saved(tmp_path / "ours", **overrides)
    with pytest.raises(SystemExit, match=message):
        export.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "native"), *flags])
    assert not (tmp_path / "native").exists()
    with pytest.raises(SystemExit, match="error: .*nowhere' is not a folder"):
        export.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "native")])


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not possible: allowed are 'silu', 'relu2'"),
        ({"hidden_size": "forty"}, "'hidden_size' expected int, got str (value: 'forty')"),
        ({"dtype": "floaty"}, "'floaty'"),
        ({"model_type": "gpt2", "kv_lora_rank": 3, "n_embd": 3}, "NanoDeepSeekConfig has no field 'n_embd'"),
    ],
)
def test_an_impossible_config_is_one_line(values, words, tmp_path):
    saved(tmp_path / "ours")
    change(tmp_path / "ours" / "config.json", **values)
    with pytest.raises(SystemExit) as ended:
        export.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "native")])
    message = str(ended.value)
    assert message.startswith("error: ") and words in message and "\n" not in message


def test_a_folders_code_is_not_run(tmp_path, monkeypatch):
    """Whoever answers yes to what transformers would ask, too."""
    saved(tmp_path / "ours")
    (tmp_path / "ours" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    auto = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    change(tmp_path / "ours" / "tokenizer_config.json", **auto)
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    with pytest.raises(SystemExit, match="error: .* has no tokenizer that can be read: .*contains custom code"):
        export.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "native")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "native").exists()


def test_an_export_is_exported_again(tmp_path):
    """DeepSeek's own layouts are read, too, by our classes."""
    saved(tmp_path / "ours")
    export.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "native")])
    export.main(["--model", str(tmp_path / "native"), "--output", str(tmp_path / "fp8"), "--fp8"])
    assert '"quant_method": "fp8"' in (tmp_path / "fp8" / "config.json").read_text()
