"""DeepSeek's layout on disk, stacked experts in memory, by every road weights are loaded."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modeling_nanodeepseek import NanoDeepSeekForCausalLM, NanoDeepSeekForSequenceClassification
from modeling_nanodeepseek.balancing import routers
from modeling_nanodeepseek.checkpoints import register_conversions
from modeling_nanodeepseek.remote_code import LICENSE, code_files
from modeling_nanodeepseek.stacking import awaited_experts
from tests.conftest import assert_close, assert_same, tiny_config, tiny_model, tokens


def keys_on_disk(folder) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_tensor(key).shape) for key in file.keys()}


def test_official_names_and_shapes_on_disk(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    keys = keys_on_disk(tmp_path)
    attention = {
        "q_a_proj.weight": (18, 40),
        "q_a_layernorm.weight": (18,),
        "q_b_proj.weight": (48, 18),
        "kv_a_proj_with_mqa.weight": (28, 40),
        "kv_a_layernorm.weight": (22,),
        "kv_b_proj.weight": (72, 22),
        "o_proj.weight": (40, 42),
    }
    expected = {"model.embed_tokens.weight": (97, 40), "lm_head.weight": (97, 40), "model.norm.weight": (40,)}
    for n in range(3):
        layer = f"model.layers.{n}"
        expected |= {f"{layer}.{norm}.weight": (40,) for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{layer}.self_attn.{key}": shape for key, shape in attention.items()}
        widths = {"": 56} if n == 0 else {"shared_experts.": 48} | {f"experts.{e}.": 24 for e in range(8)}
        for part, width in widths.items():
            expected |= {f"{layer}.mlp.{part}{name}_proj.weight": (width, 40) for name in ("gate", "up")}
            expected[f"{layer}.mlp.{part}down_proj.weight"] = (40, width)
        if n > 0:
            expected |= {f"{layer}.mlp.gate.weight": (8, 40), f"{layer}.mlp.gate.e_score_correction_bias": (8,)}
    assert keys == expected


def official_state_dict(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize("overrides", [{}, {"gated_mlp": False, "hidden_act": "relu2"}], ids=["gated", "plain"])
def test_plain_load_state_dict_restores_every_expert(overrides, tmp_path):
    """What a resuming Trainer calls; transformers' own models silently keep fresh experts here."""
    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path)
    fresh = tiny_model(seed=7, **overrides)
    result = fresh.load_state_dict(official_state_dict(tmp_path), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_missing_expert_is_reported(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = official_state_dict(tmp_path)
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    absent = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"Missing key.*{absent}"):
        tiny_model().load_state_dict(weights)
    for name in [name for name in weights if ".layers.1.mlp.experts." in name]:
        del weights[name]
    with pytest.raises(RuntimeError, match="Missing key.*model.layers.1.mlp.experts.gate_up_proj"):
        tiny_model().load_state_dict(weights)


def test_conversions_may_be_registered_again(tmp_path):
    """As a copy of the code does that was loaded from a checkpoint's folder beside the installed one."""
    register_conversions()
    model = tiny_model()
    model.save_pretrained(tmp_path)
    read, info = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name


def test_experts_may_come_in_shards_but_all_must_come(tmp_path):
    """transformers loads shards one by one with strict=False; what is missing in the end would be fresh weights."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    items = list(official_state_dict(tmp_path).items())
    items = items[0::3] + items[1::3] + items[2::3]  # no layer is whole in a shard
    fresh = tiny_model(seed=7)
    shards = [dict(items[start : start + 30]) for start in range(0, len(items), 30)]
    late = shards.pop(1)
    for shard in shards:
        fresh.load_state_dict(shard, strict=False)
    lacking = awaited_experts(fresh)
    assert lacking and set(lacking) == {name for name in late if ".experts." in name}
    with pytest.raises(RuntimeError, match=f"lacks experts: {lacking[0]} is missing"):
        fresh(tokens())
    fresh.load_state_dict(late, strict=False)
    assert not awaited_experts(fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert_same(fresh(tokens()).logits, model(tokens()).logits)


def test_experts_that_do_not_fit_are_reported(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = official_state_dict(tmp_path)
    weights["model.layers.2.mlp.experts.3.down_proj.weight"] = torch.zeros(5, 5)
    with pytest.raises(RuntimeError, match=r"experts.3.down_proj.weight is \[5, 5\], not \[40, 24\]"):
        tiny_model().load_state_dict(weights, strict=False)
    fewer = tiny_model(n_routed_experts=4, n_group=2)
    with pytest.raises(RuntimeError, match=r"experts.4 is there, and the model has 4 experts"):
        fewer.load_state_dict(official_state_dict(tmp_path), strict=False)


BIAS = 0.123456789  # bf16 and fp16 would make 0.1235 and 0.12347 of it


def biased_model(**overrides):
    model = tiny_model(**overrides)
    for gate in routers(model):
        gate.e_score_correction_bias[::2] = BIAS
    return model


def assert_biases_are_exact(model, message=""):
    for gate in routers(model):
        assert gate.e_score_correction_bias.dtype == torch.float32, message
        assert torch.equal(gate.e_score_correction_bias[::2], torch.full((4,), BIAS)), message


LOADS = {
    "plain": {},
    "device map": {"device_map": "cpu"},
    "low memory": {"low_cpu_mem_usage": True},
    "automatic dtype": {"dtype": "auto"},
}


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "20KB"}], ids=["one", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_round_trip_changes_no_bit(dtype, tied, form, tmp_path):
    """Saved in a dtype and loaded on every road: the logits, the buffers (rotary frequencies are not on disk) and,
    saved once more, every byte of every file."""
    model = biased_model(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "a", **form)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert ("model.safetensors.index.json" in names) == bool(form)
    assert {name for name in names if "safetensors.index" not in name and "-of-" not in name} == {
        "config.json", "generation_config.json", *([] if form else ["model.safetensors"]),
        *(path.name for path in code_files()),
        LICENSE,
    }  # fmt: skip
    expected = model(tokens()).logits
    for road, settings in LOADS.items():
        read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "a", **{"dtype": dtype} | settings)
        assert read.dtype == dtype, road
        assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied, road
        for (name, a), (_, b) in zip(model.named_buffers(), read.named_buffers(), strict=True):
            assert b.dtype == torch.float32 and torch.equal(a, b), (road, name)
        assert_biases_are_exact(read, road)
        for (name, a), (_, b) in zip(model.state_dict().items(), read.state_dict().items(), strict=True):
            assert torch.equal(a, b), (road, name)
        assert_same(read(tokens()).logits, expected, road)
    read.save_pretrained(tmp_path / "b", **form)
    assert {path.name for path in (tmp_path / "b").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_while_loading_is_the_cast_of_the_model(dtype, tmp_path):
    model = biased_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_biases_are_exact(read)
    assert read.dtype == dtype
    for (name, a), (_, b) in zip(model.to(dtype).state_dict().items(), read.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert_same(model(tokens()).logits, read(tokens()).logits)


def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    return model


CASTS = {
    "to(bf16)": lambda model: model.to(torch.bfloat16),
    "to(device, bf16)": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "double()": lambda model: model.double(),
    "there and back": lambda model: model.half().float(),
    "autocast": autocast,
    "of a part": lambda model: model.model.layers[1].mlp.to(torch.bfloat16) and model,
    "deepcopy": lambda model: copy.deepcopy(model).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_router_biases_stay_exact_under(cast, tmp_path):
    model = CASTS[cast](biased_model())
    assert_biases_are_exact(model)
    model.save_pretrained(tmp_path)
    stored = official_state_dict(tmp_path)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("bias")} == {torch.float32}
    assert_biases_are_exact(NanoDeepSeekForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("how", ["from_config", "default dtype"])
def test_a_model_built_in_bf16_has_fp32_biases(how):
    if how == "from_config":
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = NanoDeepSeekForCausalLM(tiny_config())
        finally:
            torch.set_default_dtype(torch.float32)
    assert model.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq)


def empty_by_torch(model, folder):
    with torch.device("meta"):
        empty = NanoDeepSeekForCausalLM(model.config)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    return empty


def test_a_classifier_whose_config_names_no_class_lends_its_decoder(tmp_path):
    """As published folders name none of ours, whose head is asked for: this one's own is another."""
    classifier = NanoDeepSeekForSequenceClassification(tiny_config())
    classifier.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "architectures"}))
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(tensor, read.model.state_dict()[name]), name


def empty_by_accelerate(model, folder):
    with init_empty_weights():
        empty = NanoDeepSeekForCausalLM(model.config)
    return load_checkpoint_and_dispatch(empty, str(folder))


@pytest.mark.parametrize("build", [empty_by_torch, empty_by_accelerate])
def test_a_model_built_on_the_meta_device(build, tmp_path):
    """Rotary frequencies are in no checkpoint; fresh memory holds NaN here, so they must have been computed anew."""
    model = biased_model()
    model.save_pretrained(tmp_path)
    filled = build(model, tmp_path).eval()
    assert_biases_are_exact(filled)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), filled.buffers(), strict=True))
    assert_same(filled(tokens()).logits, model(tokens()).logits)


def test_from_pretrained_within_the_meta_device_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path)


def test_tied_embeddings_are_stored_once(tmp_path):
    model = NanoDeepSeekForCausalLM(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in keys_on_disk(tmp_path)


def test_base_and_head_read_each_other(tmp_path):
    """A base model's checkpoint lacks the head alone; the base model ignores the head of another."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("base", "whole"):
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state), folder
    headed = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(headed.model(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)
    assert 0 < headed.lm_head.weight.std() < 0.1  # fresh


FRESH_PROCESS = """
import json, sys, threading, time
import torch
from transformers import AutoModel, AutoModelForCausalLM
import modeling_nanodeepseek

def memory(field):  # MB
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

class Peak(threading.Thread):
    def run(self):
        self.start_at = self.top = memory("RssAnon")
        self.going = True
        while self.going:
            self.top = max(self.top, memory("RssAnon"))
            time.sleep(0.0005)

def peak_of(work):
    watch = Peak(daemon=True)
    watch.start()
    time.sleep(0.01)
    result = work()
    watch.going = False
    watch.join()
    return result, watch.top - watch.start_at

small, large, target = sys.argv[1:]
ids = torch.arange(60).view(2, 30)
logits = AutoModelForCausalLM.from_pretrained(small)(ids).logits.detach()
hidden = AutoModel.from_pretrained(small)(ids).last_hidden_state.detach()
report = {"logits": logits.tolist(), "hidden": hidden.tolist()}
AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16).save_pretrained(target)  # imports what it needs
model, report["load"] = peak_of(lambda: AutoModelForCausalLM.from_pretrained(large))
_, report["save"] = peak_of(lambda: model.save_pretrained(target))
del model
_, report["bf16"] = peak_of(lambda: AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16))
print(json.dumps(report))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_another_process_loads_it_within_its_size(tmp_path):
    """AutoModel and AutoModelForCausalLM; and memory: a model of 173 MB is never there twice.

    Counted is anonymous memory: pages of the mapped file are the system's to take back. Measured with transformers
    5.23: loading 161 MB (weights that need no stacking stay mapped), in bf16 160 MB for 86 MB of weights, saving 72 MB.
    """
    model = tiny_model()
    model.save_pretrained(tmp_path / "small")
    sizes = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 6, "n_routed_experts": 16}
    widths = {"intermediate_size": 1024, "moe_intermediate_size": 256, "n_group": 1, "topk_group": 1}
    large = NanoDeepSeekForCausalLM(tiny_config(**sizes, **widths))
    large.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")) / 2**20
    assert size > 150
    command = [sys.executable, "-c", FRESH_PROCESS, *(str(tmp_path / x) for x in ("small", "large", "target"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    ids = torch.arange(60).view(2, 30)
    assert_close(model(ids).logits, torch.tensor(report["logits"]), 1e-6)
    assert_close(model.model(ids).last_hidden_state, torch.tensor(report["hidden"]), 1e-6)
    assert report["load"] < 1.2 * size and report["bf16"] < 1.2 * size and report["save"] < 0.7 * size, report


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


def edit(change):
    """A damage done to the tensors of a single file."""

    def damage(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def edit_json(name, change):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def shard(folder, number=1):
    return sorted(folder.glob("*-of-*.safetensors"))[number]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def pickle_instead(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")


def pickle_in_disguise(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "model.safetensors")


INDEX, CONFIG, WEIGHTS = "model.safetensors.index.json", "config.json", "model.safetensors"
LAYER = "model.layers.1"
DAMAGED = {  # what is done to one file, or to shards if it says so; words of the message
    "half": (lambda f: cut(f / WEIGHTS, 30_000), [WEIGHTS, "no complete safetensors file", "restore"]),
    "one byte less": (lambda f: cut(f / WEIGHTS, -1), [WEIGHTS, "no complete safetensors file"]),
    "one byte more": (lambda f: (f / WEIGHTS).open("ab").write(b"x"), [WEIGHTS, "no complete safetensors file"]),
    "nothing": (lambda f: cut(f / WEIGHTS, 0), [WEIGHTS, "header too small"]),
    "noise": (lambda f: (f / WEIGHTS).write_bytes(bytes(range(256)) * 40), [WEIGHTS, "header"]),
    "zeros": (lambda f: (f / WEIGHTS).write_bytes(bytes(9000)), [WEIGHTS, "header"]),
    "endless header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x0f{}"), [WEIGHTS, "header too large"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["no file named model.safetensors"]),
    "pickle": (pickle_instead, ["pytorch_model.bin", "can run any code", "safetensors"]),
    "pickle in disguise": (pickle_in_disguise, [WEIGHTS, "no complete safetensors file"]),
    "no config": (lambda f: (f / CONFIG).unlink(), ["has no config.json"]),
    "half a config": (lambda f: cut(f / CONFIG, 100), [CONFIG, "not valid JSON"]),
    "a config in binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), [CONFIG, "not valid JSON"]),
    "a list as config": (lambda f: (f / CONFIG).write_text("[1]"), [CONFIG, "JSON object", "list"]),
    "another model": (
        lambda f: LlamaConfig().save_pretrained(f), ["type 'llama'", "'nanodeepseek'", "AutoModelForCausalLM"]
    ),
    "other dimensions": (
        edit_json(CONFIG, lambda c: c.update(intermediate_size=64)),
        ["model.layers.0.mlp.gate_proj.weight is [56, 40], not [64, 40]", "config.json was changed"],
    ),
    "other experts": (
        edit_json(CONFIG, lambda c: c.update(moe_intermediate_size=32)),
        [f"{LAYER}.mlp.experts.0.gate_proj.weight is [24, 40], not [32, 40]", "and 51 more"],
    ),
    "more experts": (
        edit_json(CONFIG, lambda c: c.update(n_routed_experts=16)),
        [f"{LAYER}.mlp.experts.8.gate_proj.weight is missing"],
    ),
    "fewer experts": (
        edit_json(CONFIG, lambda c: c.update(n_routed_experts=4, n_group=2)),
        [f"{LAYER}.mlp.experts.4", "has 4 experts"],
    ),
    "more layers": (
        edit_json(CONFIG, lambda c: c.update(num_hidden_layers=4)), ["model.layers.3.input_layernorm.weight is missing"]
    ),
    "an expert missing": (
        edit(lambda t: t.pop(f"{LAYER}.mlp.experts.5.up_proj.weight")),
        [f"{LAYER}.mlp.experts.5.up_proj.weight is missing"],
    ),
    "the last experts missing": (
        edit(lambda t: [t.pop(name) for name in list(t) if ".experts.7." in name]),
        [f"{LAYER}.mlp.experts.7.gate_proj.weight is missing"],
    ),
    "all experts missing": (
        edit(lambda t: [t.pop(name) for name in list(t) if f"{LAYER}.mlp.experts" in name]),
        [f"{LAYER}.mlp.experts.gate_up_proj is missing", f"{LAYER}.mlp.experts.down_proj is missing"],
    ),
    "a misshapen expert": (
        edit(lambda t: t.update({f"{LAYER}.mlp.experts.5.up_proj.weight": torch.zeros(3, 3)})),
        [f"{LAYER}.mlp.experts.5.up_proj.weight is [3, 3], not [24, 40]"],
    ),
    "a projection missing": (
        edit(lambda t: t.pop(f"{LAYER}.self_attn.o_proj.weight")), [f"{LAYER}.self_attn.o_proj.weight is missing"]
    ),
    "the head missing": (edit(lambda t: t.pop("lm_head.weight")), ["lm_head.weight is missing"]),
    "a bias missing": (
        edit(lambda t: t.pop(f"{LAYER}.mlp.gate.e_score_correction_bias")), ["e_score_correction_bias is missing"]
    ),
    "shards: one missing": (lambda f: shard(f).unlink(), ["model-00002-of-", "is missing", INDEX, "Restore it"]),
    "shards: one cut": (lambda f: cut(shard(f), -10), ["model-00002-of-", "no complete safetensors file"]),
    "shards: half an index": (lambda f: cut(f / INDEX, 300), [INDEX, "no index of weights", "'weight_map'"]),
    "shards: an empty index": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "no index of weights"]),
    "shards: a strange index": (
        edit_json(INDEX, lambda i: i.update(weight_map={"a": 3})), [INDEX, "no index of weights"]
    ),
    "shards: an absent file": (
        edit_json(INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "gone.safetensors"})),
        ["gone.safetensors", "is missing"],
    ),
    "shards: an absent tensor": (
        edit_json(INDEX, lambda i: i["weight_map"].update({"model.x": i["weight_map"]["lm_head.weight"]})),
        ["lacks model.x", INDEX],
    ),
    "shards: a file elsewhere": (
        edit_json(INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../one/model.safetensors"})),
        [INDEX, "outside its folder"],
    ),
    "shards: an index that forgets a file": (
        lambda f: edit_json(
            INDEX, lambda i: i.update(weight_map={t: n for t, n in i["weight_map"].items() if n != shard(f).name})
        )(f),
        ["is missing"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder / "one")
    tiny_model().save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_one_clear_error(case, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    damage, words = DAMAGED[case]
    shutil.copytree(whole / "one", tmp_path / "one")
    folder = tmp_path / "model"
    shutil.copytree(whole / ("shards" if case.startswith("shards") else "one"), folder)
    damage(folder)
    with pytest.raises(OSError) as caught:
        NanoDeepSeekForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 900, message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "evil").exists()
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_pickles_are_refused_on_request_too(whole):
    with pytest.raises(ValueError, match="use_safetensors=False is not possible"):
        NanoDeepSeekForCausalLM.from_pretrained(whole / "one", use_safetensors=False)


def test_names_on_the_hub_are_read_as_safetensors_too(monkeypatch):
    given = {}
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, name, **k: given.update(k)))
    NanoDeepSeekForCausalLM.from_pretrained("somebody/model")
    assert given["use_safetensors"] is True


def test_missing_weights_on_request(whole, tmp_path):
    """`ignore_mismatched_sizes=True` says that fresh weights are wanted."""
    shutil.copytree(whole / "one", tmp_path / "model")
    edit(lambda t: t.pop(f"{LAYER}.self_attn.o_proj.weight"))(tmp_path / "model")
    read = NanoDeepSeekForCausalLM.from_pretrained(
        tmp_path / "model", ignore_mismatched_sizes=True, intermediate_size=64
    )
    fresh, stored = read.state_dict(), tiny_model().state_dict()
    changed = {name for name in stored if fresh[name].shape != stored[name].shape}
    assert changed == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    same = {name for name in stored.keys() - changed if torch.equal(fresh[name], stored[name])}
    assert stored.keys() - changed - same == {f"{LAYER}.self_attn.o_proj.weight"}


def test_nothing_but_safetensors_and_code_is_written(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    model.model.save_pretrained(tmp_path / "c")
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".py", ""}  # the last is the licence of the code


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.1.mlp.gate.weight_scale_inv"])
def test_tensors_without_a_place_are_refused(name, tmp_path):
    """A bias that the config does not know, scales of weights that are no longer plain: without them all is wrong."""
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.ones(40)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"{name} has no place in the model"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
