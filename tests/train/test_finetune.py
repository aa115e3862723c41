"""Fine-tuning on chat: what is learned of a conversation, rows, both engines, adapters, and what is refused."""

import json
import os
import random
from itertools import groupby
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from tests.conftest import assert_close, tiny_model
from tests.small_run import TINY_MODEL, WORDS, small_tokenizer
from train import finetune, pretrain
from train.chat import (
    PadConversations,
    best_fit,
    load_conversations,
    pack_conversations,
    tokenize,
    use_chat_template,
)
from train.models import build_model
from train.recipe import FinetuneRecipe, load_recipe
from train.tokenizer import CHAT_TEMPLATE


def conversation(seed: int, turns: int = 1) -> list[dict[str, str]]:
    """The assistant repeats the user's words in capitals: two things to learn, where words are and when to stop."""
    chooser, messages = random.Random(seed), []
    for _ in range(turns):
        words = chooser.choices(WORDS, k=2)
        messages.append({"role": "user", "content": " ".join(words)})
        messages.append({"role": "assistant", "content": " ".join(words).upper()})
    return messages


def write(path, conversations, field: str = "messages"):
    path.write_text("".join(json.dumps({field: messages}) + "\n" for messages in conversations))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A checkpoint with every extra loss, and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), small_tokenizer()
    torch.manual_seed(0)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build_model("small", **TINY_MODEL | ids | {"num_nextn_predict_layers": 1, "aux_loss_alpha": 0.01})
    with torch.no_grad():
        for layer in (model.model.embed_tokens, model.lm_head):
            layer.weight.normal_(std=0.3)  # frozen beside an adapter: large enough to be of use
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(base, tmp_path):
    """A function that builds the recipe of a run of a few steps, sections overridable."""

    def build(**changes) -> FinetuneRecipe:
        values = {
            "output_dir": str(tmp_path / "run"),
            "model": {"checkpoint": base},
            "data": {"source": write(tmp_path / "chat.jsonl", [conversation(i, 1 + i % 2) for i in range(60)])},
            "optimizer": {"name": "adamw", "matrix_lr": 0.01, "embedding_lr": 0.01, "head_lr": 0.01},
            "precision": "fp32",
            "threads": 1,
            "trainer": {
                "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1,
                "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "seed": 3,
                "gradient_accumulation_steps": 2,
            },
        }  # fmt: skip
        values["data"] |= {"sequence_length": 64, "validation_share": 0.1}
        for section, change in changes.items():
            values[section] = values[section] | change if isinstance(values.get(section), dict) else change
        return FinetuneRecipe.model_validate(values)

    return build


# -- conversations -----------------------------------------------------------------------------------------------------


def test_only_what_the_assistant_says_is_learned():
    messages = [{"role": "system", "content": "the dog"}, *conversation(1, turns=2)]
    tokenizer = small_tokenizer()
    rows, cut = tokenize(Dataset.from_list([{"name": "a", "messages": messages}]), tokenizer, 200)
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert all(label in (-100, token) for token, label in zip(ids, labels))
    runs = [list(run) for learned, run in groupby(labels, lambda label: label != -100) if learned]
    learned = [tokenizer.decode(run) for run in runs]
    assert learned == [m["content"] + "<|eos|>" for m in messages if m["role"] == "assistant"]
    assert str(cut) == "1 conversations, none cut"


def test_what_is_cut_is_said():
    """Of three conversations one fits, one is cut within the answer, one before it."""
    tokenizer, filler = small_tokenizer(), " ".join(WORDS)
    said = [("the", "DOG"), ("the", filler * 2), (filler * 3, "DOG")]
    chat = [
        {"name": str(i), "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for i, (a, b) in enumerate(said)
    ]
    whole, _ = tokenize(Dataset.from_list(chat), tokenizer, 10_000)
    rows, cut = tokenize(Dataset.from_list(chat), tokenizer, 30)
    lost = [row["labels"][30:] for row in whole]
    assert (cut.conversations, cut.cut, cut.left_out) == (3, 2, 1)
    assert cut.tokens == sum(map(len, lost)) and cut.learned == sum(label != -100 for part in lost for label in part)
    assert [row["input_ids"] for row in rows] == [row["input_ids"][:30] for row in whole][:2]
    assert [row["labels"] for row in rows] == [row["labels"][:30] for row in whole][:2]
    told = f"3 conversations, 2 too long and cut at the end: {cut.tokens} tokens are lost, {cut.learned} of them the"
    assert str(cut) == f"{told} assistant's; 1 are left out, with nothing of the assistant's left"
    with pytest.raises(ValueError, match="sequence_length=2 is too short: 3 conversations, 3 too long"):
        tokenize(Dataset.from_list(chat), tokenizer, 2)


def test_best_fit():
    lengths = [random.Random(seed).randint(1, 20) for seed in range(200)]
    rows = best_fit(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(200))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert max(filled) <= 20 and len(rows) <= sum(lengths) / 20 * 1.05 + 1
    assert best_fit([3, 9, 9], 0) == [[1], [2], [0]]  # no room: one in each


def test_packed_conversations_stay_apart():
    """Each conversation's logits are those it has alone, and the loss of the packed batch is that of all of them."""
    tokenizer, model = small_tokenizer(), tiny_model(**TINY_MODEL | {"q_lora_rank": 8, "rope_parameters": None})
    chat = [{"name": str(i), "messages": conversation(i, 1 + i % 2)} for i in range(9)]
    rows, _ = tokenize(Dataset.from_list(chat), tokenizer, 60)
    packed, single = pack_conversations(rows, 60), pack_conversations(rows, 0)
    assert len(single) == 9 and 1 < len(packed) < 7
    pad = PadConversations(tokenizer.pad_token_id)
    batch, alone = pad([packed[i] for i in range(len(packed))]), pad([single[i] for i in range(9)])
    assert batch["attention_mask"].sum() == alone["attention_mask"].sum() < batch["input_ids"].numel()
    assert (batch["labels"] != -100).sum() == (alone["labels"] != -100).sum()
    assert not ((batch["labels"] != -100) & (batch["position_ids"] == 0)).any()
    with torch.no_grad():
        together, apart = model(**batch), model(**alone)
    assert_close(apart.loss, together.loss, 1e-5)
    row, start = 0, 0
    for i in range(9):  # find each in the packed rows by its tokens
        ids = rows[i]["input_ids"]
        row, start = next(
            (r, s)
            for r in range(len(packed))
            for s in range(61 - len(ids))
            if batch["input_ids"][r, s : s + len(ids)].tolist() == ids and batch["position_ids"][r, s] == 0
        )
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0]
        assert_close(own, together.logits[row, start : start + len(ids)], 1e-4)


def test_sources(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [conversation(1)]), tmp_path / "b"
    second.mkdir()
    Dataset.from_list([{"messages": conversation(2)}]).to_parquet(second / "c.parquet")
    both = load_conversations([first, str(second)])
    assert both["name"] == ["a.jsonl#0", "c.parquet#0"] and both["messages"] == [conversation(1), conversation(2)]
    other = write(tmp_path / "d.jsonl", [conversation(3)], field="turns")
    assert load_conversations(other, "turns")["messages"] == [conversation(3)]


def test_docstrings():
    chat = load_conversations("docstrings")
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in chat}
    assert answers["What does json.dumps do?"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert len(answers) > 1000 and all(len(row["messages"]) == 2 for row in chat)


def a(role="user", content="x", **more) -> dict:
    return {"role": role, "content": content, **more}


SAYS = a("assistant", "y")


def rows(path, *columns: dict) -> str:
    """A file of the same conversation, with other columns beside it."""
    path.write_text("".join(json.dumps({"messages": [a(), SAYS]} | more) + "\n" for more in columns))
    return str(path)


REFUSED = {
    "no such file": (lambda path: "nowhere.jsonl", "'nowhere.jsonl' does not exist"),
    "text": (lambda path: [(path / "a.txt").write_text("x"), str(path / "a.txt")][1], "no conversations.*jsonl"),
    "no column": (lambda path: write(path / "a.jsonl", [[a(), SAYS]], "turns"), r"no column 'messages'.*\['turns'\]"),
    "no messages": (lambda path: write(path / "a.jsonl", [[]]), "conversation a.jsonl#0: it must be a list of mess"),
    "a string": (lambda path: write(path / "a.jsonl", ["hello"]), "a.jsonl#0: it must be a list.*'hello'"),
    "unknown role": (
        lambda path: write(path / "a.jsonl", [[a(), SAYS], [a("human"), SAYS]]),
        "a.jsonl#1: unknown role 'human'; it must be one of system, developer, user, assistant, tool",
    ),
    "no text": (lambda path: write(path / "a.jsonl", [[a(content=None), SAYS]]), "the user's content must be text"),
    "tool calls": (
        lambda path: write(path / "a.jsonl", [[a(), SAYS], [a(), a("assistant", "y", tool_calls=[{"name": "f"}])]]),
        r"a.jsonl#1: the assistant's message has tool_calls=\[\{'name': 'f'\}\], which is not .*only role and content",
    ),
    "reasoning": (
        lambda path: write(path / "a.jsonl", [[a(), SAYS], [a(), a("assistant", "y", reasoning_content="so")]]),
        "a.jsonl#1: the assistant's message has reasoning_content='so', which is not supported: only role and content",
    ),
    "no weight": (
        lambda path: write(path / "a.jsonl", [[a(), SAYS, a(), a("assistant", "y", weight=0)]]),
        "a.jsonl#0: the assistant's message has weight=0, which is not supported",
    ),
    "tools": (
        lambda path: rows(path / "a.jsonl", {"id": 0}, {"tools": [{"name": "f"}]}),
        r"a.jsonl#1: the row has tools=\[\{'name': 'f'\}\], which are not supported: only 'messages' is read",
    ),
    "no assistant": (lambda path: write(path / "a.jsonl", [[a()]]), "a.jsonl#0: there is nothing to learn"),
    "an empty list": (lambda path: [], "the list is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_conversation_is_one_clear_error(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_conversations(make(tmp_path))


def test_what_says_nothing_is_no_reason_to_refuse(tmp_path):
    """Fields that are null or empty, which tables fill in; and what is no part of the conversation."""
    harmless = {"id": 7, "source": "x", "tools": "[]"}
    empty = a(
        "assistant",
        "y",
        tool_calls=None,
        reasoning_content="",
        call={"name": None, "arguments": []},
        weight=1,
        train=True,
        thinking=False,
        toxic=False,
    )
    chat = load_conversations(rows(tmp_path / "a.jsonl", harmless, {"messages": [a(), empty], "tools": None}))
    assert chat["messages"] == [[a(), SAYS]] * 2


def test_chat_templates(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    use_chat_template(tokenizer)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not mark what the assistant says .* put {% generation %}"):
        use_chat_template(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    refused = Dataset.from_list([{"name": "b#7", "messages": [a("tool"), SAYS]}])
    with pytest.raises(ValueError, match="conversation b#7: the chat template refuses it: unknown role 'tool'"):
        tokenize(refused, tokenizer, 50)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% generation %}{{ '' }}{% endgeneration %}"
    with pytest.raises(ValueError, match="conversation b#7: the chat template marks none of its tokens"):
        tokenize(refused, tokenizer, 50)


# -- runs --------------------------------------------------------------------------------------------------------------

LORA = {"lora": {"rank": 4, "alpha": 8.0}}


def test_full_fine_tuning_learns_to_answer(recipe, tmp_path, capsys):
    run = recipe(trainer={"max_steps": 60, "logging_steps": 20}, prompt="the quick")
    first = finetune.build_trainer(run).evaluate()
    metrics = finetune.run(run)
    assert metrics["eval_loss"] < 0.7 * first["eval_loss"] and metrics["eval_tokens"] == first["eval_tokens"]
    printed = capsys.readouterr().out
    assert "training: 54 conversations, none cut" in printed and "mtp" in printed and "balance" in printed
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "loss.png"} <= set(
        os.listdir(tmp_path / "run")
    )
    talk = pipeline("text-generation", model=str(tmp_path / "run"))
    said = talk([a(content="the quick")], max_new_tokens=8)[0]["generated_text"][-1]
    assert said["role"] == "assistant"


def test_lora_trains_an_adapter_alone(recipe, base, tmp_path):
    """Saved are the adapter, which loads by itself, and, as asked, the merged model: the same logits."""
    lora = {"rank": 8, "alpha": 16.0, "merge": True}
    run = recipe(lora=lora, trainer={"max_steps": 30}, optimizer={"matrix_lr": 0.03}, prompt="a lazy")
    first = finetune.build_trainer(run).evaluate()
    assert finetune.run(run)["eval_loss"] < 0.9 * first["eval_loss"]
    output = tmp_path / "run"
    assert "model.safetensors" not in os.listdir(output)
    weights = load_file(output / "adapter_model.safetensors")
    assert all(".lora_" in name for name in weights) and any(".experts." in name for name in weights)
    assert any("layers.2." in name for name in weights)  # multi-token prediction's module, which learns here
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        adapted, merged = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (output, output / "merged"))
        assert (
            type(merged) is NanoDeepSeekForCausalLM and AutoTokenizer.from_pretrained(output / "merged").chat_template
        )
        assert_close(adapted(ids).logits, merged(ids).logits, 1e-4)
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
    changed, kept = dict(merged.named_parameters()), dict(plain.named_parameters())
    untouched = {name for name in kept if torch.equal(changed[name], kept[name])}
    assert all("norm" in name or "gate.weight" in name or "embed" in name or "lm_head" in name for name in untouched)


def test_merging_leaves_the_trainers_adapter_alone(recipe, tmp_path):
    """It is saved once more when it is pushed, which made it an empty one."""
    run = recipe(lora={"rank": 4, "alpha": 8.0, "merge": True}, trainer={"max_steps": 2})
    trainer = finetune.build_trainer(run)
    trainer.train()
    trainer.save_model()
    before = load_file(tmp_path / "run" / "adapter_model.safetensors")
    finetune.answer(run, trainer)
    trainer.save_model()
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert before and before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert Path(settings["base_model_name_or_path"]).is_absolute()


def test_an_adapter_that_nobody_could_load_is_not_pushed(recipe):
    run = recipe(lora={"rank": 4, "alpha": 8.0}, trainer={"push_to_hub": True, "hub_model_id": "me/adapter"})
    with pytest.raises(ValueError, match="push_to_hub with the section lora is not possible"):
        finetune.build_trainer(run)


def test_an_adapter_is_not_saved_beside_another_model(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model, and an adapter saved beside it would be put on that"):
        finetune.build_trainer(recipe(lora={"rank": 4, "alpha": 8.0}))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_both_engines_take_the_same_steps(kind, recipe, tmp_path):
    """Every loss term and gradient norm, and the weights after four steps of two micro-batches."""
    pytest.importorskip("trl", minversion="1.16")
    results = []
    for engine in ("trainer", "trl"):
        run = recipe(engine=engine, output_dir=str(tmp_path / engine), **(LORA if kind == "lora" else {}))
        trainer = finetune.build_trainer(run)
        trainer.train()
        keys = ("loss", "ce_loss", "balance_loss", "mtp_loss_1", "mtp_accuracy_1", "grad_norm", "learning_rate")
        history = [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]
        results.append((trainer, history, trainer.evaluate(), dict(trainer.model.named_parameters())))
    (theirs, expected, metrics, weights), (ours, actual, same, again) = results
    assert type(ours).__mro__[1] is type(theirs) and len(expected) == 4 and actual == expected and same == metrics
    assert all(entry["balance_loss"] > 0 and entry["mtp_loss_1"] > 0 for entry in actual)
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("kind", ["lora", "lora by trl"])
def test_an_adapter_resumes_as_if_uninterrupted(kind, recipe, tmp_path):
    if kind != "lora":
        pytest.importorskip("trl", minversion="1.16")
    settings = LORA | {"engine": "trl" if kind != "lora" else "trainer"}
    schedule = {"warmup": 0.0, "decay": 0.0}

    def run(folder: str, **trainer) -> dict[str, torch.Tensor]:
        given = recipe(output_dir=str(tmp_path / folder), schedule=schedule, trainer=trainer, **settings)
        finetune.run(given)
        return load_file(tmp_path / folder / "adapter_model.safetensors")

    whole = run("whole", max_steps=4)
    run("cut", max_steps=2, save_strategy="steps", save_steps=2)
    resumed = run("cut", max_steps=4, save_strategy="steps", save_steps=2, resume_from_checkpoint=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


IMPOSSIBLE = {
    "no checkpoint": ({"model": {"checkpoint": None, "config": "small"}}, "needs model.checkpoint"),
    "muon": (LORA | {"optimizer": {"name": "muon"}}, "lora needs optimizer.name=adamw"),
    "balancing": (LORA | {"balance": {"gamma": 0.01}}, "balance.gamma=0.01 is not possible with lora"),
    "rank": ({"lora": {"rank": 0}}, "lora.rank"),
    "a part": ({"lora": {"targets": ["router"]}}, "lora.targets"),
    "an engine": ({"engine": "megatron"}, "engine.*'trainer' or 'trl'"),
    "expert parallelism": ({"parallel": {"expert": 2}}, "parallel.expert=2 is for pretraining only"),
    "a pipeline": ({"pipeline": {"schedule": "zbv"}}, "section pipeline is for pretraining only"),
    "a growing batch": ({"schedule": {"batch_ramp": {"start": 1, "tokens": 9}}}, "batch_ramp is for pretraining"),
    "a text field": ({"data": {"text_field": "text"}}, "data.text_field"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_recipes(case, recipe, tmp_path):
    changes, message = IMPOSSIBLE[case]
    values = recipe().model_dump(mode="json")
    for section, change in changes.items():
        values[section] = (values[section] or {}) | change if isinstance(change, dict) else change
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        load_recipe(str(file), kind=FinetuneRecipe)


def test_problems_end_the_command_with_one_message(recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(**LORA).model_dump(mode="json")))
    lonely = write(tmp_path / "one.jsonl", [conversation(1)])
    for change, message in (
        ("lora.dropout=0.1", "lora.dropout=0.1 is not possible with routed experts"),
        ("data.sequence_length=65", "data.sequence_length=65 exceeds the model's max_position_embeddings=64"),
        (f"data.source={lonely}", "holds one conversation: give others as data.validation"),
        ("model.checkpoint=./nowhere", "model.checkpoint './nowhere' is not a folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            finetune.main(["--config", str(file), change])
        assert message in str(ended.value)
    finetune.main(["--config", str(file), "trainer.max_steps=1", "data.packing=false", "lora.targets=[attention]"])
    assert '"eval_loss"' in capsys.readouterr().out
    assert not any("experts" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))


def test_a_model_without_the_parts(recipe, tmp_path):
    dense = build_model("small", **TINY_MODEL | {"first_k_dense_replace": 2})
    dense.save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    model = {"checkpoint": str(tmp_path / "dense")}
    with pytest.raises(ValueError, match="There is no 'experts' to adapt in this model.*attention, mlp"):
        finetune.build_trainer(recipe(model=model, lora={"targets": ["experts"]}))
    trainer = finetune.build_trainer(recipe(model=model, lora={"dropout": 0.1}))
    assert "matrices" in pretrain.describe(trainer)
