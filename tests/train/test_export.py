"""The command that exports: from a folder to a folder, or one line that says why not."""

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
    with pytest.raises(SystemExit):
        export.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "native")])
