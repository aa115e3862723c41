"""A trained model in a pipeline and behind transformers' server: all write what generate() writes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from tests.conftest import SPARSE, tiny_model
from tests.small_run import small_tokenizer, text
from train.serve import main

ROOT = Path(__file__).parent.parent
NEW = 9
PROMPTS = ["the quick brown", "seven", "a lazy dog while seven wizards make", "fox"]
TALK = [{"role": "user", "content": "the quick brown"}]


def folder_of_a_writer(folder: Path, **overrides) -> Path:
    """A checkpoint of a model that has learned to write words (a fresh one writes halves of characters)."""
    tokenizer = small_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=96, **ids, **overrides)
    model.apply(model._init_weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.tensor([tokenizer(text(seed) * 2)["input_ids"][:40] for seed in range(64)])
    for start in range(0, 4 * 64, 8):
        model.train()(rows[start % 64 :][:8], labels=rows[start % 64 :][:8]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return folder_of_a_writer(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    """Selects 5 keys, of prompts and texts that are longer."""
    return folder_of_a_writer(tmp_path_factory.mktemp("sparse"), **SPARSE, dsa_stage="sparse")


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def greedy(folder: Path, prompt: str | list[dict], new_tokens: int = NEW) -> str:
    """What generate() writes after a text or a conversation, of one row."""
    model, tokenizer = load(folder)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(prompt, **given)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    written = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(written) > new_tokens and written.isascii()
    return written


# -- pipeline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "memory"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_pipeline_in_batches(kind, source, request):
    """Prompts of unequal lengths, several at a time, are padded; each is continued as if it were alone."""
    folder = request.getfixturevalue(kind)
    model, tokenizer = load(folder)
    given = {"model": str(folder)} if source == "folder" else {"model": model, "tokenizer": tokenizer}
    write = pipeline("text-generation", **given)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    batched = [rows[0]["generated_text"] for rows in write(PROMPTS, batch_size=3, **settings)]
    assert batched == [greedy(folder, prompt) for prompt in PROMPTS]
    conversations = [TALK, [{"role": "system", "content": "write"}, {"role": "user", "content": "fox"}]]
    answers = [rows[0]["generated_text"] for rows in write(conversations, batch_size=2, **settings)]
    assert answers == [greedy(folder, talk) for talk in conversations]
    whole = write(TALK, **settings | {"return_full_text": True})[0]["generated_text"]
    assert whole == [*TALK, {"role": "assistant", "content": answers[0]}]


@pytest.mark.parametrize("prompt", [PROMPTS[0], TALK], ids=["text", "conversation"])
def test_pipeline_streams(sparse, prompt):
    write = pipeline("text-generation", model=str(sparse))
    streamer = TextIteratorStreamer(write.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    settings = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = Thread(target=write, args=(prompt,), kwargs=settings)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == greedy(sparse, prompt) and len([piece for piece in pieces if piece]) > 2


# -- transformers serve and chat ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | changes


@contextlib.contextmanager
def server(folder: Path, *options: str):
    """`python -m train.serve` on a free port of this machine: its address. Ends with the block, or in 2 minutes."""
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "train.serve", "--model", str(folder), "--host", "127.0.0.1", "--device", "cpu"]
    command = [shutil.which("timeout"), "120", *command, "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except urllib.error.URLError:
        return False


needs_server = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils' timeout, to end a server")


@pytest.fixture
def openai():
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed, reason="pip install 'nanodeepseek[serve]'")
    return pytest.importorskip("openai", reason="pip install 'nanodeepseek[serve]'")


def assert_it_serves(openai, folder: Path, address: str):
    client = openai.OpenAI(base_url=address, api_key="none", timeout=60, max_retries=0)
    assert [model.id for model in client.models.list().data] == [str(folder)]
    settings = {"model": str(folder), "max_tokens": NEW, "temperature": 0}
    for prompt in PROMPTS[:2]:
        completion = client.completions.create(prompt=prompt, **settings)
        assert completion.choices[0].text == greedy(folder, prompt)
        assert completion.usage.completion_tokens == NEW and completion.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(prompt=PROMPTS[0], stream=True, **settings))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == greedy(folder, PROMPTS[0]) and len(chunks) > 3
    answer = client.chat.completions.create(messages=TALK, **settings)
    assert answer.choices[0].message.content == greedy(folder, TALK)
    chunks = list(client.chat.completions.create(messages=TALK, stream=True, **settings))
    content = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(content) == greedy(folder, TALK) and len([piece for piece in content if piece]) > 2
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(prompt="a", **settings | {"model": "another"})
    assert "pinned to" in refused.value.response.text


@needs_server
def test_serve_and_chat(sparse, openai):
    """The server, with an OpenAI client and with `transformers chat`, which is one."""
    with server(sparse) as address:
        assert_it_serves(openai, sparse, address)
        pytest.importorskip("rich", reason="transformers chat needs rich")
        # Without `main`, which asks for a newer transformers on the internet; offline, chat refuses this machine too.
        chat = "from transformers.cli.transformers import app; app()"
        command = [sys.executable, "-c", chat, "chat", str(sparse), address, "do_sample=False", f"max_new_tokens={NEW}"]
        lines = f"{TALK[0]['content']}\nn\n!exit\n"  # "n": no, go not on beyond max_new_tokens
        online = environment(HF_HUB_OFFLINE="0", COLUMNS="200")
        done = subprocess.run(command, input=lines, env=online, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert " ".join(greedy(sparse, TALK).split()) in " ".join(done.stdout.split())


@needs_server
def test_serve_with_continuous_batching(dense, openai):
    pages = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with server(dense, *pages) as address:
        assert_it_serves(openai, dense, address)
    assert "CB: True" in (dense / "server.log").read_text()


def test_serve_refuses_at_the_start_what_it_could_not_serve(sparse, tmp_path, openai):
    with pytest.raises(SystemExit, match="error: Continuous batching is not possible with index_topk=5"):
        main(["--model", str(sparse), "--continuous-batching"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match="error: --model .* holds a 'llama'"):
        main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: Unsupported dtype: 'float7'"):  # what the server itself finds
        main(["--model", str(sparse), "--device", "cpu", "--dtype", "float7"])


DAMAGES = {  # a file, what becomes of it, words of the message
    "cut weights": ("model.safetensors", lambda old: old[:-100], "no complete safetensors file"),
    "cut tokenizer": ("tokenizer.json", lambda old: old[:-100], "has no tokenizer that can be read"),
    "odd tokenizer": ("tokenizer.json", lambda old: b"{}", "has no tokenizer that can be read"),
    "cut config": ("config.json", lambda old: old[:-100], "not a valid JSON file"),
    "impossible value": ("config.json", lambda old: old.replace(b'"silu"', b'"gelu"'), "hidden_act='gelu' is not poss"),
    "other weights": (
        "config.json",
        lambda old: old.replace(b'_size": 40', b'_size": 48'),
        "are not those of its conf",
    ),
    "no class": ("config.json", lambda old: old.replace(b"ForCausalLM", b"Model", 1), "['NanoDeepSeekModel']"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(case, sparse, tmp_path, openai):
    name, damage, words = DAMAGES[case]
    folder = shutil.copytree(sparse, tmp_path / "damaged")
    old = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(old))
    assert (folder / name).read_bytes() != old
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(folder), "--device", "cpu"])
    message = str(ended.value)
    assert message.startswith("error: ") and words in message and str(folder) in message and "\n" not in message
