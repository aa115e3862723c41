"""Sources, the held-out split, packing, and what is refused."""

import json

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, load_dataset

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM, update_expert_bias
from tests.small_run import TINY_MODEL, small_tokenizer
from train.data import Packer, collate, hold_out, load_documents, pack
from train.tokenizer import DEEPSEEK_FIM, FIM, fim_tokens


def documents(*texts: str) -> Dataset:
    return Dataset.from_list([{"name": f"d{i}", "text": text} for i, text in enumerate(texts)])


def test_the_standard_library():
    loaded = load_documents("stdlib")
    names = set(loaded["name"])
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert not any(name.startswith(("test/", "encodings/", "site-packages/")) or "/tests/" in name for name in names)
    assert sum(map(len, loaded["text"])) > 5e6


def test_files_folders_and_lists(tmp_path):
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("beta é\n")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(["x", " ", "y"]))
    )
    Dataset.from_dict({"body": ["p", "q"]}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "skipped.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "node.js").mkdir()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone.txt")
    assert load_documents(str(tmp_path / "a.txt")).to_list() == [{"name": "a.txt", "text": "alpha\n"}]
    assert load_documents(str(tmp_path / "rows.jsonl"))["text"][:] == ["x", "y"]  # the empty row is left out
    assert load_documents(str(tmp_path / "rows.parquet"), "body")["text"][:] == ["p", "q"]
    (tmp_path / "rows.parquet").unlink()
    large = pyarrow.table({"text": pyarrow.array(["z"], pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "LARGE.PARQUET")
    whole = load_documents(str(tmp_path))
    assert sorted(whole["text"]) == ["alpha\n", "beta é\n", "x", "y", "z"]
    assert len(load_documents([str(tmp_path / "a.txt"), str(tmp_path / "sub")])) == 2


def test_a_data_set_by_name(tmp_path):
    """`datasets.load_dataset` with a builder's name, a configuration's arguments and a split."""
    (tmp_path / "train.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    source = {"dataset": "json", "data_files": {"train": str(tmp_path / "train.jsonl")}, "split": "train[:1]"}
    assert load_documents(source, "content").to_list() == [{"name": "json#0", "text": "one"}]
    assert len(load_dataset("json", data_files=str(tmp_path / "train.jsonl"), split="train")) == 2


def written(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda d: d / "absent.txt", ["absent.txt", "does not exist"]),
        (lambda d: written(d / "empty.txt", b""), ["empty.txt", "no text"]),
        (lambda d: written(d / "blank.txt", b" \n"), ["blank.txt", "no text"]),
        (lambda d: written(d / "latin.txt", b"caf\xe9"), ["latin.txt", "UTF-8", "position 3"]),
        (lambda d: written(d / "bad.jsonl", b"{nope"), ["bad.jsonl", "cannot be read as .jsonl"]),
        (lambda d: written(d / "none.jsonl", b""), ["none.jsonl", "empty"]),
        (lambda d: written(d / "col.jsonl", b'{"body": 1}'), ["'text'", "['body']", "text_field"]),
        (lambda d: d, ["no file of a known kind"]),
    ],
)
def test_bad_sources_are_named(prepare, words, tmp_path):
    with pytest.raises(ValueError) as error:
        load_documents(str(prepare(tmp_path)))
    for word in words:
        assert word in str(error.value), str(error.value)
    with pytest.raises(ValueError, match="needs a key 'dataset'"):
        load_documents({"name": "x"})


def test_hold_out_is_by_whole_documents_and_stable():
    many = documents(*[f"text {i}" for i in range(100)])
    train, validation = hold_out(many, 0.1)
    assert len(validation) == 10 and sorted([*train["text"], *validation["text"]]) == sorted(many["text"])
    shuffled_train, shuffled = hold_out(many.shuffle(seed=3), 0.1)
    assert sorted(validation["name"]) == sorted(shuffled["name"])
    assert len(hold_out(documents("a", "b"), 0.01)[1]) == 1 and len(hold_out(documents("a", "b"), 0.99)[0]) == 1


def test_hold_out_of_a_single_document():
    text = "".join(f"line {i}\n" for i in range(100))
    train, validation = hold_out(documents(text), 0.2)
    assert train[0]["text"] + validation[0]["text"] == text and train[0]["text"].endswith("\n")
    assert 0.15 < len(validation[0]["text"]) / len(text) < 0.25
    with pytest.raises(ValueError, match="too short"):
        hold_out(documents("x"), 0.5)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 50])
def test_packing_predicts_every_token_exactly_once(length):
    tokenizer = small_tokenizer()
    texts = ["first document", "x", "a much longer third document, " * 3, "end"]
    rows = pack(documents(*texts), tokenizer, length)
    batch = collate([rows[i] for i in range(len(rows))])
    assert all(value.shape == (len(rows), length) for value in batch.values())
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    # what the model learns from: (previous token, token) pairs inside a row
    learned = [
        (ids[r, i - 1].item(), labels[r, i].item())
        for r in range(len(rows))
        for i in range(1, length)
        if labels[r, i] >= 0
    ]
    expected = []
    for text in texts:
        tokens = [
            tokenizer.bos_token_id,
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        expected += list(zip(tokens, tokens[1:]))
    assert learned == expected
    # positions count up by one within a document and restart at 0 with the next
    steps = positions[:, 1:] - positions[:, :-1]
    assert ((steps == 1) | (positions[:, 1:] == 0)).all() and (labels[positions == 0] == -100).all()
    starts = ids == tokenizer.bos_token_id
    assert (positions[starts] == 0).all()


def test_padding_is_masked():
    tokenizer = small_tokenizer()
    rows = pack(documents("hello there"), tokenizer, 8)
    last = rows[len(rows) - 1]
    padding = last["input_ids"] == tokenizer.pad_token_id
    assert padding.any() and (last["position_ids"][padding] == 0).all()
    batch = collate([rows[0], last])
    assert (batch["labels"][1][padding] == -100).all()
    assert torch.equal(batch["attention_mask"][1], (~padding).long()) and batch["attention_mask"][0].all()
    assert "attention_mask" not in collate([rows[0]])  # which forwards without padding do without


def test_nothing_is_learned_from_padding():
    """Its state is 0, where each norm multiplies a gradient by 1000: in 20 layers to infinity."""
    tokenizer = small_tokenizer()
    rows = pack(documents(*["hello there, you"] * 3), tokenizer, 30)
    sizes = {**TINY_MODEL, "num_hidden_layers": 20, "first_k_dense_replace": 1, "aux_loss_alpha": 0.1}
    torch.manual_seed(0)
    model = NanoDeepSeekForCausalLM(NanoDeepSeekConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).train()
    last = rows[len(rows) - 1]
    batch, length = collate([last]), int(last["attention_mask"].sum())
    assert length < 25
    grads, loads = [], []
    for part in (batch, {name: column[:, :length] for name, column in batch.items() if name != "attention_mask"}):
        model.zero_grad()
        model(**part).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        loads.append(update_expert_bias(model, gamma=0.0).metrics())
    for (name, _), padded, alone in zip(model.named_parameters(), *grads):
        assert alone.any() and padded.isfinite().all(), name
        torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-6)
    assert loads[0] == loads[1]


def test_a_corpus_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"only \d+ tokens to learn from, less than one sequence of 500"):
        pack(documents("tiny"), small_tokenizer(), 500)


def test_many_tiny_documents_are_enough():
    assert len(pack(documents(*["a b"] * 300), small_tokenizer(), 50)) > 5


def test_ids_fit_int64_batches():
    rows = pack(documents("hello there, you"), small_tokenizer(), 4)
    assert collate([rows[0]])["input_ids"].dtype == torch.int64


def test_rows_that_are_lines_become_documents(tmp_path):
    """WikiText's layout: a row per line, blank ones among them, an article at each heading of the first level."""
    lines = ["", " = First = \n", "", " a text \n", " = = Part = = \n", " more = x \n", " = Second = \n", " end \n"]
    Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "wiki.parquet")
    source = {"dataset": "parquet", "data_files": str(tmp_path / "wiki.parquet")}
    loaded = load_documents(source, document_start="^ = [^=].* = $")
    assert loaded["text"][:] == [" = First = \n a text \n = = Part = = \n more = x \n", " = Second = \n end \n"]
    assert len(load_documents(source)) == 6


def test_filling_in_the_middle():
    """begin prefix hole suffix end middle, of a share of the documents; nothing is lost, and a document's cut depends
    on the seed and its text alone."""
    tokenizer = small_tokenizer()
    begin, hole, end = fim_tokens(tokenizer)
    texts = [f"the quick brown fox {i} jumps over a lazy dog" for i in range(400)]
    packer = Packer(tokenizer, 64, fim_rate=0.25, seed=7)
    changed = 0
    for text, tokens in zip(texts, packer.tokens(texts)):
        if begin not in tokens:
            assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
            continue
        changed += 1
        assert tokens[0] == begin and [tokens.count(t) for t in (begin, hole, end)] == [1, 1, 1]
        a, b = tokens.index(hole), tokens.index(end)
        prefix, suffix, middle = (tokenizer.decode(part) for part in (tokens[1:a], tokens[a + 1 : b], tokens[b + 1 :]))
        assert prefix + middle + suffix == text
    assert 70 < changed < 130
    again = Packer(tokenizer, 64, fim_rate=0.25, seed=7)
    assert again.tokens(texts[::-1])[::-1] == packer.tokens(texts)
    assert Packer(tokenizer, 64, fim_rate=0.25, seed=8).tokens(texts) != packer.tokens(texts)
    rows = pack(documents(*texts[:50]), tokenizer, 64, fim_rate=1.0)
    ids = [token for row in rows for token in row["input_ids"].tolist()]
    assert ids.count(begin) >= 50 and ids[1] == begin  # inside a document, before packing


class Vocabulary:
    def __init__(self, *names):
        self.names = names

    def get_vocab(self):
        return {name: 5 + i for i, name in enumerate(self.names)}


def test_tokens_for_filling_in_the_middle():
    assert fim_tokens(Vocabulary(*FIM)) == fim_tokens(Vocabulary(*DEEPSEEK_FIM)) == [5, 6, 7]
    assert [name.encode() for name in DEEPSEEK_FIM][1] == b"<\xef\xbd\x9cfim\xe2\x96\x81hole\xef\xbd\x9c>"
    with pytest.raises(ValueError, match="fim_rate needs a tokenizer with the tokens .*fim_hole"):
        Packer(Vocabulary("<|bos|>"), 64, fim_rate=0.1)
