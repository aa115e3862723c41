"""The needle check: haystacks as asked for, and what a model that looks back, or does not, gets."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from tests.small_run import TINY_MODEL, small_tokenizer
from train import needle
from train.synthetic import KEYS, VALUES


def test_haystacks():
    """The length asked for at most, by less than a sentence; one fact, at its depth; the question last."""
    tokenizer = small_tokenizer()
    places = []
    for depth in (0.0, 0.5, 1.0):
        for i in range(5):
            prompt, answer = needle.haystack(tokenizer, 400, depth, random.Random(i))
            assert 340 < len(prompt + answer) <= 400 and prompt[0] == tokenizer.bos_token_id
            text, value = tokenizer.decode(prompt[1:]), tokenizer.decode(answer).strip()
            sentences = [part.strip() for part in text.split(".")]
            facts = [n for n, sentence in enumerate(sentences) if "code of" in sentence]
            assert len(facts) == 2 and facts[1] == len(sentences) - 1 and value in VALUES
            assert sentences[facts[0]] == f"{sentences[-1]} {value}" and sentences[-1].split()[-2] in KEYS
            assert facts[0] == round(depth * (len(sentences) - 2))
            places.append(facts[0])
    assert places[0] == 0 and places[5] > 3
    with pytest.raises(ValueError, match="--lengths 40 leaves no room"):
        needle.haystack(tokenizer, 40, 0.5, random.Random(0))


class Retriever:
    """A model by rule: what followed the last six tokens when they stood before within its reach."""

    device = torch.device("cpu")

    def __init__(self, reach: int):
        self.reach = reach

    def __call__(self, ids, use_cache):
        tokens = ids[0].tolist()
        logits = torch.zeros(1, len(tokens), 320)
        for t in range(6, len(tokens)):
            for s in range(t - 1, max(5, t - self.reach), -1):
                if tokens[s - 5 : s + 1] == tokens[t - 5 : t + 1]:
                    logits[0, t, tokens[s + 1]] = 9.0
                    break
        return SimpleNamespace(logits=logits)


def test_recall_is_what_the_model_looks_up():
    tokenizer = small_tokenizer()
    near, far = (needle.recall(Retriever(reach), tokenizer, 300, 0.0, 6) for reach in (100, 400))
    assert near["accuracy"] == 0 and far["accuracy"] == 1 and far["nats"] < 0.1 < 4 < near["nats"]
    assert needle.recall(Retriever(100), tokenizer, 300, 1.0, 6)["accuracy"] == 1


def test_the_command(tmp_path, capsys):
    tokenizer = small_tokenizer()
    sizes = TINY_MODEL | {"max_position_embeddings": 200}
    NanoDeepSeekForCausalLM(NanoDeepSeekConfig(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--depths", "0", "1", "--count", "2", "--lengths", "150"]
    needle.main([*command, "200", "--output", str(tmp_path / "needle.json")])
    report = json.loads((tmp_path / "needle.json").read_text())
    assert report["accuracy"] == [[0.0, 0.0]] * 2 and report["lengths"] == [150, 200] and report["count"] == 2
    assert all(2 < nats < 12 for row in report["nats"] for nats in row)
    lines = capsys.readouterr().out.splitlines()
    assert "depth   0%" in lines[0] and lines[-1].split() == ["200", "0%", "0%", "0%"]
    with pytest.raises(SystemExit, match="300 is beyond the model's 200 positions"):
        needle.main([*command, "300"])
    needle.main([*command, "300", "--beyond"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.max_position_embeddings == 200
    for output in (tmp_path / "nowhere" / "x.json", tmp_path):  # before the model is looked for
        with pytest.raises(SystemExit, match=f"error: --output '{output}' cannot be written: it must be a file in an"):
            needle.main(["--model", "./absent", "--lengths", "150", "--output", str(output)])
    with pytest.raises(SystemExit, match="'./absent' is not a folder"):
        needle.main(["--model", "./absent", "--lengths", "150"])


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("config.json", '"model_type": "nanodeepseek"', '"model_type": "own"'),  # the Auto classes that it names stay
        ("tokenizer_config.json", '"tokenizer_class"', '"auto_map": {"AutoTokenizer": [null, "own.Own"]}, "was"'),
    ],
)
def test_a_folders_code_is_not_run(name, old, new, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    NanoDeepSeekForCausalLM(NanoDeepSeekConfig(**TINY_MODEL)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match="error: .*contains custom code"):
        needle.main(["--model", str(tmp_path), "--lengths", "150"])
