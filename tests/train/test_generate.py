"""train/generate.py in its modes."""

import io
import json
import shutil
from pathlib import Path

import pytest

from modeling_nanodeepseek.saving import COMMITTED
from tests.small_run import TINY_MODEL, small_tokenizer
from train import generate
from train.models import build_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = build_model("small", **TINY_MODEL | {"initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": 0})
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def test_one_shot_streams_what_it_returns(checkpoint, capsys):
    writer = generate.Writer(checkpoint, max_new_tokens=10, do_sample=False)
    written = writer.stream("the quick")
    assert capsys.readouterr().out.strip() == written.strip() and written
    generate.main(["--model", checkpoint, "--prompt", "the quick", "--max-new-tokens", "10"])
    assert capsys.readouterr().out.strip() == written.strip()


def test_batch_equals_single_and_keeps_the_order(checkpoint, tmp_path):
    prompts = ["the quick brown fox jumps over", "a", "seven wizards make", "lazy dog"]
    (tmp_path / "in.txt").write_text("\n\n".join(prompts) + "\n")
    arguments = ["--model", checkpoint, "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    generate.main([*arguments, "--batch-size", "3", "--max-new-tokens", "8"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    writer = generate.Writer(checkpoint, max_new_tokens=8, do_sample=False)
    assert [line["prompt"] for line in lines] == prompts
    assert [line["completion"] for line in lines] == [writer.write([prompt])[0] for prompt in prompts]
    assert not list(tmp_path.glob("*.partial"))


def test_drafted_texts_are_the_same(tmp_path):
    """By --use-mtp, one text at a time; a model without modules to draft with says so."""
    ids = {"eos_token_id": 1, "bos_token_id": 0}
    model = build_model("small", **TINY_MODEL | ids | {"initializer_range": 0.3, "num_nextn_predict_layers": 1})
    model.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("the quick brown\n\na\nseven wizards\n")
    arguments = ["--model", str(tmp_path / "model"), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "8"]
    texts = []
    for settings in ([], ["--use-mtp"]):
        generate.main([*arguments, *settings, "--output", str(tmp_path / "out.jsonl")])
        texts.append((tmp_path / "out.jsonl").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 3


def test_interactive(checkpoint, capsys):
    writer = generate.Writer(checkpoint, max_new_tokens=6, do_sample=False)
    generate.converse(writer, chat=False, lines=io.StringIO("the quick\n\nlazy dog\n/quit\nnever read\n"))
    printed = capsys.readouterr().out
    expected = "".join(writer.write([prompt])[0] for prompt in ("the quick", "lazy dog"))
    assert printed.replace("\n", "").replace(" ", "") == expected.replace("\n", "").replace(" ", "")


def test_a_conversation_carries_its_turns(checkpoint, monkeypatch, capsys):
    writer = generate.Writer(checkpoint, max_new_tokens=5, do_sample=False)
    prompts, stream = [], writer.stream
    monkeypatch.setattr(writer, "stream", lambda text, **k: prompts.append(text) or stream(text, **k))
    generate.converse(writer, chat=True, lines=io.StringIO("hello\nand\n"))
    assert prompts[0] == "<|bos|><|user|>hello<|assistant|>"
    assert prompts[1].startswith(prompts[0]) and prompts[1].endswith("<|eos|><|user|>and<|assistant|>")


def test_sampling_follows_the_seed(checkpoint, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        arguments = ["--model", checkpoint, "--prompt", "the", "--temperature", "1.5", "--seed", seed]
        generate.main([*arguments, "--max-new-tokens", "12"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--input", "none.txt", "--output", "o"], ["none.txt", "does not exist"]),
        (["--prompt", "the fox " * 80], ["tokens", "max_position_embeddings is 64"]),
    ],
)
def test_bad_input_is_named(arguments, words, checkpoint):
    with pytest.raises(SystemExit) as error:
        generate.main(["--model", checkpoint, *arguments])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batch-size", "0"], ["--batch-size", "0 is not at least 1"]),
        (["--temperature", "-1"], ["--temperature", "-1.0 is not at least 0"]),
        (["--top-p", "2"], ["--top-p", "2.0 is not above 0 and at most 1"]),
        (["--seed", "-1"], ["--seed", "-1 is not at least 0"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens", "invalid int value: 'many'"]),
        (["--chat"], ["--chat goes with --interactive"]),
        (["--device", "tpu9"], ["--device 'tpu9' cannot be used"]),
    ],
)
def test_impossible_arguments(arguments, words, checkpoint, capsys):
    with pytest.raises(SystemExit) as error:
        generate.main(["--model", checkpoint, "--prompt", "x", *arguments])
    message = capsys.readouterr().err + str(error.value)
    assert all(word in message for word in words), message


def test_files_are_checked_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("the fox\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.setattr(generate.Writer, "write", lambda *a, **k: pytest.fail("work that would be lost"))
    for source, target, words in (
        ("in.txt", "absent/out.jsonl", "cannot be written"),
        ("latin.txt", "out.jsonl", "latin.txt' is not UTF-8"),
    ):
        with pytest.raises(SystemExit, match=words):
            generate.main(
                ["--model", checkpoint, "--input", str(tmp_path / source), "--output", str(tmp_path / target)]
            )


def test_a_long_line_ends_the_turn_not_the_session(checkpoint, capsys):
    writer = generate.Writer(checkpoint, max_new_tokens=4, do_sample=False)
    for chat in (False, True):
        generate.converse(writer, chat, io.StringIO("the fox " * 80 + "\nlazy dog\n"))
        first, *rest = capsys.readouterr().out.strip().splitlines()
        assert first.startswith("error: the prompt has") and rest


def test_an_absent_model_is_named():
    with pytest.raises(SystemExit, match="nowhere"):
        generate.main(["--model", "./nowhere", "--prompt", "x"])


DAMAGES = {
    "cut weights": ("model.safetensors", lambda text: text[:5000], "no complete safetensors file"),
    "half a config": ("config.json", lambda text: text[:80], "not a valid JSON file"),
    "impossible value": ("config.json", lambda text: text.replace(b'"silu"', b'"gelu"'), "hidden_act='gelu' is not"),
    "no number": (
        "config.json",
        lambda text: text.replace(b'k_dense_replace": ', b'k_dense_replace": "few", "_": '),
        "few",
    ),
    "odd dtype": ("config.json", lambda text: text.replace(b"float32", b"floaty"), "'floaty'"),
    "odd tokenizer": ("tokenizer.json", lambda text: b"{}", "has no tokenizer that can be read"),
    "another architecture": (
        "config.json",
        lambda text: text.replace(b"nanodeepseek", b"nothing_known").replace(b"auto_map", b"auto_nap"),
        "nothing_known",
    ),
    "another's code": (
        "config.json",
        lambda text: text.replace(b"nanodeepseek", b"nothing_known"),
        "contains custom code",  # and nobody is asked, on a terminal neither
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named(case, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    name, damage, words = DAMAGES[case]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert (folder / name).read_bytes() != Path(checkpoint, name).read_bytes()
    with pytest.raises(SystemExit) as error:
        generate.main(["--model", str(folder), "--prompt", "x"])
    message = str(error.value)
    assert message.startswith("error: ") and words in message and len(message) < 800 and "\n" not in message, message


def test_what_a_killed_save_left_complete_is_read(checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder / COMMITTED)
    generate.main(["--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "2"])
    assert capsys.readouterr().out and not (folder / COMMITTED).exists()
