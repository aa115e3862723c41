"""A save that is killed or runs out of disk leaves a whole version: the old one, or the new one."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, modeling_utils

from modeling_nanodeepseek import NanoDeepSeekForCausalLM, remote_code
from modeling_nanodeepseek.remote_code import LICENSE, code_files
from modeling_nanodeepseek.saving import COMMITTED, STAGE, finish_saving, replacing
from modeling_nanodeepseek.stacking import CheckpointError
from tests.conftest import tiny_model
from tests.killing import at_change, killed

ONE, SHARDS = {}, {"max_shard_size": "150KB"}


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


def as_others_read(folder) -> dict[str, torch.Tensor] | None:
    """The tensors as a reader finds them that knows nothing of stages; None where it finds no whole set."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"none"}
    if not all((folder / file).exists() for file in files):
        return None
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def load_twice(folder):
    """Through AutoModel, which reads the config first: at most one refusal, with a message that says to try again."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except CheckpointError as error:
        assert "was just finished; load it again" in str(error), error
        return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("new_form", [ONE, SHARDS], ids=["to-one", "to-shards"])
@pytest.mark.parametrize("old_form", [ONE, SHARDS], ids=["one", "shards"])
def test_killed_at_every_change_of_the_disk(old_form, new_form, tmp_path, monkeypatch):
    """Another config, other code, the same shapes: a mixture of both versions would load without an error."""
    old, new = tiny_model(seed=1), tiny_model(seed=2, rms_norm_eps=1e-3)
    kept, folder = tmp_path / "kept", tmp_path / "model"
    code = [tmp_path / "attention.py", tmp_path / "modeling_nanodeepseek.py"]  # two files for all: each is a kill more
    monkeypatch.setattr(remote_code, "code_files", lambda: code)
    for file in code:
        file.write_text("old")
    old.save_pretrained(kept, **old_form)
    for file in code:
        file.write_text("new")
    (kept / "notes.txt").write_text("mine")
    seen, versions = [], [as_others_read(kept)]
    new.save_pretrained(folder, **new_form)
    versions.append(as_others_read(folder))
    for step in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        if not killed(lambda: new.save_pretrained(folder, **new_form), at_change(step, folder)):
            break
        found = as_others_read(folder)
        assert found is None or any(all(torch.equal(found[n], v[n]) for n in v) for v in versions), step
        is_new_config = json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-3
        found_code = {(folder / file.name).read_text() for file in code}
        assert not is_new_config or found_code == {"new"}, step  # the code is there before the config that names it
        loaded = load_twice(folder)
        is_new = equal(loaded, new)
        assert is_new or equal(loaded, old), step
        assert loaded.config.rms_norm_eps == (1e-3 if is_new else 1e-6), step
        assert {(folder / file.name).read_text() for file in code} == {"new" if is_new else "old"}, step
        seen.append(is_new)
        assert (folder / "notes.txt").read_text() == "mine"
    assert len(seen) > 8 and seen == sorted(seen) and set(seen) == {False, True}  # once there, the new version stays
    files = {path.name for path in folder.iterdir()}  # of a save that nothing disturbed
    assert killed(lambda: new.save_pretrained(folder, **new_form), at_change(len(seen) // 2, folder))
    new.save_pretrained(folder, **new_form)
    assert {path.name for path in folder.iterdir()} == files and not files & {STAGE, COMMITTED}


def test_finishing_may_be_killed_too(tmp_path):
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    folder, committed = tmp_path / "model", tmp_path / "committed"
    old.save_pretrained(folder)
    with replacing(folder) as stage:
        new.save_pretrained(stage, **SHARDS)
        shutil.copytree(stage, committed)
    shutil.rmtree(folder)
    old.save_pretrained(folder)
    shutil.copytree(committed, folder / COMMITTED)
    kills = 0
    while killed(lambda: finish_saving(folder), at_change(1, folder)):
        kills += 1  # each time it goes on where it was
        assert kills < 100
    assert kills > 5
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(folder), new)
    assert not {"model.safetensors", COMMITTED} & set(os.listdir(folder))


def test_an_old_single_file_does_not_outlive_new_shards(tmp_path):
    """transformers reads model.safetensors before it looks for an index."""
    tiny_model(seed=1).save_pretrained(tmp_path)
    (tmp_path / "model.fp16.safetensors").write_bytes(b"another variant")
    new = tiny_model(seed=2)
    new.save_pretrained(tmp_path, **SHARDS)
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(tmp_path), new)
    new.save_pretrained(tmp_path, max_shard_size="30KB")
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(tmp_path), new)
    counts = {name[-18:-12] for name in os.listdir(tmp_path) if "-of-" in name}
    assert len(counts) == 1  # shards of one generation
    new.save_pretrained(tmp_path)
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(tmp_path), new)
    expected = {"model.safetensors", "model.fp16.safetensors", "config.json", "generation_config.json", LICENSE}
    assert set(os.listdir(tmp_path)) == expected | {path.name for path in code_files()}


FULL = {
    "python": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_one_error_and_changes_nothing(kind, tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, written = modeling_utils.safe_save_file, []

    def write(tensors, filename, **kwargs):
        if written:
            raise FULL[kind]
        written.append(filename)
        real(tensors, filename, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", write)
    with pytest.raises(OSError, match="cannot be saved.*No space left on device.*What it held is intact"):
        tiny_model(seed=2).save_pretrained(tmp_path, **SHARDS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "new", **SHARDS)
    assert not (tmp_path / "new").exists()


def test_a_really_full_disk(small_disk):
    old = tiny_model(seed=1)
    old.save_pretrained(small_disk / "model")
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    with pytest.raises(OSError, match="No space left on device"):
        tiny_model(seed=2).save_pretrained(small_disk / "model")
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(small_disk / "model"), old)
    (small_disk / "ballast").unlink()
    old.save_pretrained(small_disk / "model", **SHARDS)


def test_an_error_in_the_body_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    for error in (KeyError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(tmp_path) as stage:
            (stage / "a").write_text("new")
            raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_folders_are_replaced_too_and_a_file_is_no_folder(tmp_path):
    (tmp_path / "x" / "sub").mkdir(parents=True)
    (tmp_path / "x" / "sub" / "old").touch()
    with replacing(tmp_path / "x") as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "new").touch()
    assert os.listdir(tmp_path / "x" / "sub") == ["new"]
    with pytest.raises(OSError, match="cannot be saved: (Not a directory|File exists)"):
        tiny_model().save_pretrained(tmp_path / "x" / "sub" / "new")


def test_weights_in_use_survive_a_save_over_their_file(tmp_path):
    """Loaded weights are mapped from the file; writing into it would change them, or end the process (SIGBUS)."""
    tiny_model(seed=1).save_pretrained(tmp_path)
    used = NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in used.state_dict().items()}
    tiny_model(seed=2).save_pretrained(tmp_path, **SHARDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in used.state_dict().items())
    used.save_pretrained(tmp_path)
    assert equal(NanoDeepSeekForCausalLM.from_pretrained(tmp_path), used)


def test_push_to_hub_uploads_the_same_files(tmp_path, monkeypatch):
    """Without a network: what transformers would upload, and under which name."""
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            pushed["repo"] = repo_id
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(modeling_utils, "hf_api", Hub)
    card = type("Card", (), {"save": lambda self, path: open(path, "w").close()})
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *a, **k: card())
    model = tiny_model()
    upload = lambda folder, *a, **k: pushed.update(files=set(os.listdir(folder)))  # noqa: E731
    monkeypatch.setattr(model, "_upload_modified_files", upload, raising=False)
    model.save_pretrained(tmp_path / "my_model", push_to_hub=True)
    assert pushed["repo"] == "my_model"
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", LICENSE}
    assert pushed["files"] == expected | {path.name for path in code_files()}
    assert pushed["files"] == set(os.listdir(tmp_path / "my_model"))


def test_an_older_adapter_does_not_stay_with_a_new_model(tmp_path):
    """transformers would take it for a part of the model."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    tiny_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*")) and (tmp_path / "notes.txt").is_file()
    NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
