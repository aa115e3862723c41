"""`python -m train.evaluate`: the table, the file, tasks, speed, and what it refuses."""

import importlib
import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from modeling_nanodeepseek import Fp8LatentCache
from tests.conftest import SPARSE, tiny_model
from tests.small_run import small_tokenizer, text
from train import evaluate, scoring, speed
from train.data import hold_out, load_documents
from train.loading import load_model, load_tokenizer

QUESTION = {"text": "the quick brown fox", "choices": [" jumps", " queen"], "right": 0}
TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/datasets}}
test_split: test
doc_to_text: "{{{{text}}}}"
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints `ours` (dense), `sparse` and `llama`, `corpus`, and a task."""
    folder, tokenizer = tmp_path_factory.mktemp("evaluated"), small_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=128, **sizes, **ids))
    models = {"ours": tiny_model(vocab_size=320, **ids), "sparse": tiny_model(vocab_size=320, **ids, **SPARSE)}
    for name, model in (models | {"llama": llama}).items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "corpus").mkdir()
    for seed in range(12):
        (folder / "corpus" / f"{seed}.txt").write_text(text(seed))
    (folder / "tasks").mkdir()
    (folder / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (folder / "tasks" / "choose.yaml").write_text(TASK.format(folder=folder))
    return folder


def test_two_models_in_one_table_and_one_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "measure_apart", speed.measure)  # here: the other process has a test of its own
    models = [str(folder / "sparse"), str(folder / "llama")]
    arguments = ["--model", *models, "--data", str(folder / "corpus"), "--held-out", "0.25", "--context", "40"]
    arguments += [
        "--speed",
        "40",
        "24",
        "--written",
        "4",
        "--runs",
        "1",
        "--json",
        str(tmp_path / "out.json"),
        "--threads",
        "1",
    ]
    evaluate.main(arguments)
    report = json.loads((tmp_path / "out.json").read_text())
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [result["model"] for result in report["models"]] == models and report["settings"]["context"] == 40
    held_out = hold_out(load_documents(str(folder / "corpus")), 0.25)[1]  # as a recipe does
    assert len(held_out) == 3 and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in printed}
    assert cells[""] == models and len(set(map(len, printed))) == 1
    for column, (name, result) in enumerate(zip(models, report["models"])):
        expected = scoring.evaluate_text(load_model(name), load_tokenizer(name), held_out, 40)
        assert result["text"] == pytest.approx(expected) and result["text"]["documents"] == 3
        assert cells["bits per byte"][column] == f"{expected['bits_per_byte']:.4f}"
        assert cells["read in"][column] == "context 40, stride 20"
        assert [row["context"] for row in result["speed"]] == [24, 40]
        assert all(row[key] > 0 for row in result["speed"] for key in row)
        assert float(cells["decode at 40, tokens/s"][column].replace(",", "")) > 0
    assert cells["class"] == ["NanoDeepSeekForCausalLM", "LlamaForCausalLM"]


def test_the_caches_are_counted_to_the_byte(folder):
    """After N tokens: latents, rotated keys and indexer's keys; in FP8; keys and values of a model of transformers."""
    config = AutoConfig.from_pretrained(folder / "sparse")
    width, layers = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim, config.num_hidden_layers
    settings = {"written": 3, "runs": 1, "rows": 2, "threads": 1}
    default, fp8, llama = (
        speed.measure(str(folder / name), [20], cache=cache, **settings)[0]
        for name, cache in (("sparse", "default"), ("sparse", "fp8"), ("llama", "default"))
    )
    assert default["cache_bytes"] == 2 * 20 * layers * width * 4
    assert default["cache_bytes_per_token"] == layers * width * 4
    packed = config.kv_lora_rank + 4 * 1 + 2 * config.qk_rope_head_dim + 4 * config.index_head_dim
    assert fp8["cache_bytes"] == 2 * 20 * layers * packed
    assert llama["cache_bytes"] == 2 * 20 * 2 * 2 * 16 * 4


@torch.no_grad()
def test_what_is_timed_is_generation(folder):
    """The cache holds the whole context, filled by one forward and then token by token."""
    model, lengths = load_model(str(folder / "ours")), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    cache = Fp8LatentCache(model.config)
    ids = torch.arange(11)[None]
    prefill, decode, filled = speed.generate_once(model, ids, 5, cache)
    assert filled is cache and cache.get_seq_length() == 16 and lengths == [11, 1, 1, 1, 1, 1]
    assert prefill > 0 and decode > 0


def test_speed_in_a_process_of_its_own(folder, capsys):
    """Its memory is at least the weights, and not that of this process, which has torch and more in it."""
    evaluate.main(["--model", str(folder / "ours"), "--speed", "32", "--runs", "1", "--threads", "1"])
    cells = capsys.readouterr().out.split("peak memory at 32, MB")[1].split("|")
    weights = sum(tensor.nbytes for tensor in load_file(folder / "ours" / "model.safetensors").values())
    assert weights / 1e6 < float(cells[1]) < 200


def test_tasks_of_lm_eval(folder, capsys):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'nanodeepseek[test]'")
    tasks = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(folder / "tasks"), include_defaults=False
    )
    given = {"model": "hf", "model_args": {"pretrained": str(folder / "ours")}, "device": "cpu", "bootstrap_iters": 0}
    expected = lm_eval.simple_evaluate(tasks=["choose"], task_manager=tasks, **given)["results"]["choose"]["acc,none"]
    args = [
        "--model",
        str(folder / "ours"),
        "--tasks",
        "choose",
        "--include-path",
        str(folder / "tasks"),
        "--threads",
        "1",
    ]
    evaluate.main(args)
    cells = capsys.readouterr().out.split("choose, acc")[1].split("|")
    assert cells[1].split()[0] == f"{expected:.4f}"


def test_overrides_reach_the_model(folder):
    dense = load_model(str(folder / "sparse"), index_topk=4, dsa_stage="dense", attn_implementation="eager")
    assert (dense.config.dsa_stage, dense.config.index_topk) == ("dense", 4)
    assert dense.config._attn_implementation == "eager" and load_model(str(folder / "sparse"), dtype="bfloat16")


def damaged(folder, tmp_path, kind):
    """A copy of `ours` with something wrong."""
    copy = tmp_path / kind
    shutil.copytree(folder / "ours", copy)
    if kind == "adapter":
        (copy / "config.json").unlink()
        (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    elif kind == "untold":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (copy / name).unlink()
    elif kind == "empty":
        shutil.rmtree(copy)
        copy.mkdir()
    return str(copy)


DATA = ["--data", "{folder}/corpus"]
REFUSED = {  # the model, arguments, words of the one message
    "absent folder": ("/nope/model", DATA, ["'/nope/model' is not a folder"]),
    "absent name": ("runs/nope", DATA, ["'runs/nope' is not a folder, and not to be had from the Hub"]),
    "no checkpoint": ("empty", DATA, ["empty' holds no config.json"]),
    "adapter": ("adapter", DATA, ["adapter' is no model but a LoRA adapter for 'some/base'", "lora.merge=true"]),
    "no tokenizer": ("untold", DATA, ["untold' has no tokenizer that can be read"]),
    "absent data": ("ours", ["--data", "/nope.txt"], ["'/nope.txt' does not exist"]),
    "no text": ("ours", ["--data", "{folder}/tasks/empty.txt"], ["holds no text"]),
    "odd data": ("ours", ["--data", "{dataset: [}"], ["'{dataset: [}' is not valid YAML"]),
    "long context": ("ours", [*DATA, "--context", "641"], ["--context 641 exceeds max_position_embeddings=640"]),
    "long rows": ("llama", [*DATA, "--rows", "129"], ["--rows 129 exceeds max_position_embeddings=128"]),
    "few tokens": ("ours", ["--data", "{folder}/corpus/1.txt", "--rows", "600"], ["less than one sequence of 600"]),
    "long stride": ("ours", [*DATA, "--context", "8", "--stride", "8"], ["--stride 8 must be below the context, 8"]),
    "long speed": ("ours", ["--speed", "32", "641"], ["--speed 641 exceeds", "max_position_embeddings=640"]),
    "short speed": ("ours", ["--speed", "16"], ["--speed 16 leaves no prompt: 16 tokens"]),
    "another's cache": ("llama", ["--speed", "32", "--cache", "fp8"], ["--cache fp8 is for", "'llama'"]),
    "unknown task": ("ours", ["--tasks", "choose,nope", "--include-path", "{folder}/tasks"], ["knows no 'nope'"]),
    "absent tasks": ("ours", ["--tasks", "choose", "--include-path", "/nope"], ["--include-path '/nope' is not"]),
    "unknown field": ("ours", [*DATA, "--override", "atention_form=x"], ["'atention_form'", "mean 'attention_form'"]),
    "impossible value": ("ours", [*DATA, "--override", "attention_form=x"], ["attention_form='x' is not possible"]),
    "no number": ("ours", [*DATA, "--override", "hidden_size=forty"], ["'hidden_size' expected int, got str"]),
    "no place": ("ours", [*DATA, "--json", "/nope/out.json"], ["--json '/nope/out.json' cannot be written"]),
    "no device": ("ours", [*DATA, "--device", "tpu9"], ["--device 'tpu9' cannot be used"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error(case, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure_apart", speed.measure)
    if case == "unknown task":  # without lm-eval's thousands, which take seconds to list
        tasks = pytest.importorskip("lm_eval.tasks", reason="pip install 'nanodeepseek[test]'")
        monkeypatch.setattr(
            tasks, "TaskManager", lambda *a, _real=tasks.TaskManager, **k: _real(*a, **k | {"include_defaults": False})
        )
    (folder / "tasks" / "empty.txt").write_text(" \n")
    model, arguments, words = REFUSED[case]
    if model in ("adapter", "untold", "empty"):
        model = damaged(folder, tmp_path, model)
    elif (folder / model).is_dir():
        model = str(folder / model)
    arguments = [argument.replace("{folder}", str(folder)) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--model", model, "--threads", "1", *arguments])
    message = str(caught.value)
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert "\n" not in message, message


def test_lines_are_joined_as_a_recipe_joins_them(tmp_path):
    lines = [" = One = \n", " first\n", " = Two = \n", "", " second\n"]
    Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "wiki.parquet")
    arguments = ["--model", "any", "--data", str(tmp_path / "wiki.parquet"), "--document-start", " = [^=]+ = \n"]
    texts = evaluate.load_texts(evaluate.command_line().parse_args(arguments))["text"]
    assert list(texts) == [" = One = \n first\n", " = Two = \n second\n"]


def test_arguments_that_do_not_go_together(folder, capsys):
    for arguments, words in (
        ([], "nothing to evaluate"),
        (["--data", "stdlib", "--rows", "8", "--stride", "2"], "--rows evaluates as training does"),
        (["--data", "stdlib", "--whole-documents"], "--whole-documents goes with --rows"),
        (["--data", "stdlib", "--document-start", "("], "'(' is no regular expression"),
        (["--data", "stdlib", "--override", "x"], "must read field=value"),
        (["--data", "stdlib", "--held-out", "0"], "0.0 is not above 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            evaluate.main(["--model", str(folder / "ours"), *arguments])
        assert caught.value.code == 2 and words in capsys.readouterr().err
