"""lm-evaluation-harness' `hf` model on small local tasks: what it finds is what the model says of each text alone.

It pads on the right without a mask to score texts, and on the left with one to generate them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SPARSE, tiny_model
from tests.small_run import small_tokenizer

pytest.importorskip("lm_eval", reason="pip install 'nanodeepseek[test]'")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

# Contexts and choices of unequal lengths, most beyond the keys that are selected; one choice is a single token.
QUESTIONS = [
    {"text": "the quick brown fox jumps over a", "choices": [" lazy dog", " fox", " wizard while seven"], "right": 0},
    {"text": "seven", "choices": [" wizards make toxic brew for an evil queen", " a"], "right": 0},
    {"text": "while seven wizards make toxic brew for an evil queen the dog", "choices": [" a", " the"], "right": 1},
    {"text": "over the lazy fox", "choices": [" jumps", " an evil queen", " brew"], "right": 2},
    {"text": "a dog", "choices": [" jumps over the quick brown fox", " makes"], "right": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/datasets}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CONTINUE = """
output_type: generate_until
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module", params=[{}, SPARSE], ids=["dense", "sparse"])
def folder(request, tmp_path_factory) -> Path:
    """A checkpoint, and beside it the tasks."""
    folder, tokenizer = tmp_path_factory.mktemp("evaluated"), small_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(vocab_size=len(tokenizer), **ids, **request.param).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, kind in (("choose", CHOOSE), ("continue", CONTINUE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + kind)
    return folder


only_sparse = pytest.mark.parametrize("folder", [SPARSE], ids=["sparse"], indirect=True)


def load(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return model, AutoTokenizer.from_pretrained(folder / "model")


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation's tokens, read with nothing else beside them."""
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    log_probabilities = model(ids[:, :-1]).logits[0, start - 1 :].double().log_softmax(-1)
    return log_probabilities.gather(-1, ids[0, start:, None]).sum().item()


def continuation(model, tokenizer, context: str) -> str:
    inputs = tokenizer(context, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).split("e")[0]


@pytest.mark.parametrize("source", ["path", "object"])
@torch.no_grad()
def test_it_scores_and_generates_as_the_model_does(folder, source):
    model, tokenizer = load(folder)
    given = {"model": "hf", "model_args": {"pretrained": str(folder / "model")}, "device": "cpu", "batch_size": 4}
    if source == "object":
        given = {"model": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)}
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    report = simple_evaluate(tasks=["choose", "continue"], task_manager=tasks, bootstrap_iters=0, **given)
    correct = 0
    assert len(report["samples"]["choose"]) == len(report["samples"]["continue"]) == len(QUESTIONS)
    for sample in report["samples"]["choose"]:
        question = QUESTIONS[sample["doc_id"]]
        expected = [log_likelihood(model, tokenizer, question["text"], choice) for choice in question["choices"]]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        correct += expected.index(max(expected)) == question["right"]
    assert report["results"]["choose"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))
    for sample in report["samples"]["continue"]:
        expected = continuation(model, tokenizer, QUESTIONS[sample["doc_id"]]["text"])
        assert sample["resps"] == [[expected]]


@only_sparse
@torch.no_grad()
def test_keys_are_really_selected(folder):
    """Else the sparse half of these tests would show nothing."""
    model, tokenizer = load(folder)
    question = QUESTIONS[1]["text"], QUESTIONS[1]["choices"][0]
    sparse = log_likelihood(model, tokenizer, *question)
    model.set_dsa_stage("dense")
    assert abs(log_likelihood(model, tokenizer, *question) - sparse) > 0.01  # far above the tolerance


@only_sparse
def test_the_command_of_the_readme(folder):
    program = "import modeling_nanodeepseek, lm_eval.__main__ as harness; harness.cli_evaluate()"
    command = [sys.executable, "-c", program, "--model", "hf", "--model_args", f"pretrained={folder / 'model'}"]
    command += ["--include_path", str(folder), "--tasks", "choose", "--device", "cpu", "--batch_size", "4"]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(folder)
    right = 0
    for question in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, question["text"], choice) for choice in question["choices"]]
        right += scores.index(max(scores)) == question["right"]
    assert f"|{right / len(QUESTIONS):.4g}|" in next(row for row in done.stdout.splitlines() if "|acc " in row).replace(
        " ", ""
    )
