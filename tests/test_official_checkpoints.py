"""DeepSeek's own checkpoints, as published: every tensor arrives where it belongs, with its value, or nothing does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, TorchAoConfig

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM, NanoDeepSeekModel, lora_targets
from modeling_nanodeepseek.export import native_tensors
from modeling_nanodeepseek.fp8 import Fp8Experts, Fp8Linear
from modeling_nanodeepseek.stacking import CheckpointError
from tests import official
from tests.conftest import EARLIER_TRANSFORMERS, assert_close, assert_same, tokens

KINDS = [("v2-lite", None), ("v3", None), ("v3", "float"), ("v3.1", "ue8m0"), ("v3.2", None), ("v3.2", "ue8m0")]


def load(folder, **settings) -> NanoDeepSeekForCausalLM:
    return NanoDeepSeekForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@pytest.mark.parametrize("family, fp8", KINDS)
def test_every_tensor_arrives(family, fp8, tmp_path):
    meant = official.write(tmp_path, family, fp8)
    model, info = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    held = native_tensors(model, sparse=True)
    copies = {name for name in held if ".layers." in name and name.endswith(("embed_tokens.weight", "head.weight"))}
    assert held.keys() - copies == meant.keys() and bool(copies) == (family != "v2-lite")
    for name, tensor in meant.items():
        assert torch.equal(held[name], tensor), name
    # Nothing is left of how the weights were stored: the model is trained and saved as any other.
    assert "quantization_config" not in model.config.to_dict() and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("family, fp8", KINDS)
def test_the_logits_are_those_of_the_native_class(family, fp8, tmp_path):
    """Its classes read the plain form of the same weights; their own reading of FP8 fails on partial blocks."""
    if family == "v3.2" and EARLIER_TRANSFORMERS:
        pytest.skip("DeepseekV32's published config and keys are read by later transformers")
    meant = official.write(tmp_path / "published", family, fp8)
    plain = tmp_path / "plain"
    plain.mkdir()
    config = {**official.FAMILIES[family], "num_nextn_predict_layers": 0}
    (plain / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "auto_map"}))
    main = {name: tensor for name, tensor in meant.items() if "layers.3." not in name}
    save_file(main, plain / "model.safetensors", metadata={"format": "pt"})
    native = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64, experts_implementation="eager").eval()
    ours = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float64).eval()
    ids = tokens(2, 31)
    assert_close(native(ids).logits, ours(ids).logits, 1e-5)  # theirs has routers in fp32


def test_the_dtype_is_the_checkpoints(tmp_path):
    """Of a config without one too, where transformers would take that of the blocks."""
    official.write(tmp_path, "v3", "float")
    assert NanoDeepSeekForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("stored", ["F8_E8M0", "U8"])
def test_scales_of_one_byte(stored, tmp_path):
    meant = official.write(tmp_path, "v3", "ue8m0", shards=1)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        exponents = (tensors[name].log2() + 127).to(torch.uint8)
        tensors[name] = exponents if stored == "U8" else exponents.view(torch.float8_e8m0fnu)
    save_file(tensors, file, metadata={"format": "pt"})
    held = native_tensors(load(tmp_path), sparse=True)
    assert all(torch.equal(held[name], tensor) for name, tensor in meant.items())


def test_the_base_model_and_its_checkpoint(tmp_path):
    """Without a head; and a checkpoint of the base model, whose keys lack the prefix, into the whole."""
    official.write(tmp_path, "v3", "float", shards=1)
    whole = load(tmp_path)
    base = NanoDeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(1, 9)
    assert torch.equal(whole.model(ids).last_hidden_state, base(ids).last_hidden_state)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = {n.removeprefix("model."): t for n, t in load_file(file).items() if not n.startswith("lm_head")}
    save_file(tensors, file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for settings in ({}, {"quantization_config": FineGrainedFP8Config()}):
        again = NanoDeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32, **settings).eval()
        assert_same(base(ids).last_hidden_state, again(ids).last_hidden_state)


@pytest.mark.parametrize("family", ["v3", "v3.2"])
def test_kept_in_fp8(family, tmp_path):
    """The same numbers as dequantised, in a third of fp32's memory; drafts too. Nothing learns."""
    official.write(tmp_path, family, "float")
    plain, kept = load(tmp_path), load(tmp_path, quantization_config=FineGrainedFP8Config())
    ids = tokens(2, 31)
    assert_same(plain(ids).logits, kept(ids).logits)
    for settings in ({}, {"use_mtp": True}):
        texts = [m.generate(ids[:1], max_new_tokens=6, do_sample=False, **settings) for m in (plain, kept)]
        assert torch.equal(*texts)
    quantized = {name for name in official.shapes(official.FAMILIES[family]) if official.is_fp8(name)}
    linears = {f"{name}.weight" for name, module in kept.named_modules() if isinstance(module, Fp8Linear)}
    assert linears == {n for n in quantized if ".mlp.experts." not in n and not n.endswith("kv_b_proj.weight")}
    assert sum(isinstance(module, Fp8Experts) for module in kept.modules()) == 3
    assert kept.get_memory_footprint() < 0.45 * plain.get_memory_footprint()
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    with pytest.raises(ValueError, match="keeps FP8 weights is for inference, and is not saved"):
        kept.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept.set_dsa_stage("dense")
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    with pytest.raises(ValueError, match="LoRA is not possible on weights kept in FP8"):
        lora_targets(kept)
    kept = load(tmp_path, quantization_config=FineGrainedFP8Config())
    embeds = kept.model.embed_tokens(ids).requires_grad_()
    with pytest.raises(ValueError, match="do not train"):
        kept(inputs_embeds=embeds)
    half = kept.to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert half.model.layers[0].mlp.up_proj.weight_scale_inv.dtype == torch.float32
    if family == "v3":  # rounded scores choose other keys
        assert_close(plain(ids).logits, half(ids).logits.float(), 0.2)


def test_dequantized_by_name(tmp_path):
    official.write(tmp_path, "v3", "float")
    model = load(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert_same(model(tokens(1, 9)).logits, load(tmp_path)(tokens(1, 9)).logits)
    assert all(parameter.requires_grad for parameter in model.parameters())


def edit(folder, change):
    """Applies `change` to the dict of all tensors, in one file."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
HEAD = "model.layers.3.shared_head.head.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def rename(old: str, new: str):
    """Of a weight and its scales."""
    return lambda t: t.update({new + end: t.pop(old + end) for end in ("", "_scale_inv")})


def transpose(tensors: dict, *names: str):
    for name in names:
        weight = tensors[name].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
        tensors |= {name: weight, f"{name}_scale_inv": tensors[f"{name}_scale_inv"].T.contiguous()}


WRONG = {
    "a head of its own": (
        lambda t: t[HEAD][-1, -1].add_(1.0),
        f"{HEAD} is not a copy of lm_head.weight.*num_nextn_predict_layers=0 loads",
    ),
    "an embedding of another shape": (
        lambda t: t.update({HEAD.replace("shared_head.head", "embed_tokens"): torch.ones(1, 272)}),
        "layers.3.embed_tokens.weight is not a copy of model.embed_tokens.weight",
    ),
    "grid": (
        lambda t: t.update({KV_A + "_scale_inv": torch.ones(1, 2)}),
        rf"{KV_A}_scale_inv is \[1, 2\], not \[3, 3\]",
    ),
    "transposed": (lambda t: t.update({EXPERT + "_scale_inv": torch.ones(3, 1)}), r"is \[3, 1\], not \[1, 3\]"),
    "no scale": (lambda t: t.pop(EXPERT + "_scale_inv"), f"{EXPERT} is FP8 and has no {EXPERT}_scale_inv"),
    "no weight": (lambda t: t.pop(EXPERT), f"{EXPERT}_scale_inv has no FP8 weight beside it"),
    "plain": (lambda t: t.update({EXPERT: t[EXPERT].float()}), f"{EXPERT}_scale_inv has no FP8 weight beside it"),
    "e5m2": (
        lambda t: t.update({EXPERT: t[EXPERT].float().to(torch.float8_e5m2)}),
        f"{EXPERT} is F8_E5M2, not F8_E4M3",
    ),
    "integer scales": (
        lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 3, dtype=torch.int32)}),
        f"{EXPERT}_scale_inv is I32, not one of F32",
    ),
    "a vector": (
        lambda t: t.update({"model.norm.weight": torch.ones(272).to(torch.float8_e4m3fn)}),
        "model.norm.weight is FP8 and has no",
    ),
    "a vector with scales": (
        lambda t: t.update({
            "model.norm.weight": torch.ones(272).to(torch.float8_e4m3fn), "model.norm.weight_scale_inv": torch.ones(3)
        }),
        r"model.norm.weight is \[272\], no matrix",
    ),
    "no expert": (
        lambda t: [t.pop(EXPERT), t.pop(EXPERT + "_scale_inv")],
        f"{EXPERT} is missing",
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "a bias of the head": (
        lambda t: t.update({"lm_head.bias": torch.ones(97)}), "lm_head.bias has no place in the model"
    ),
    "a bias of a norm": (
        lambda t: t.update({"model.norm.bias": torch.ones(272)}), "model.norm.bias has no place in the model"
    ),
    "an expert's number": (
        lambda t: [rename(EXPERT.replace("up", part), EXPERT.replace("up", part).replace(".3.", ".8."))(t)
                   for part in ("gate", "up", "down")],
        "experts.8 is there, and the model has 8 experts",
    ),
    "the number of a part": (rename(EXPERT, EXPERT.replace(".3.", ".8.")), f"{EXPERT} is missing"),
    "one expert more": (
        lambda t: t.update({n.replace("experts.3", "experts.8"): t[n].clone() for n in list(t) if ".experts.3." in n}),
        "experts.8 is there, and the model has 8 experts",
    ),
    "a transposed layer": (lambda t: transpose(t, O_PROJ), rf"{O_PROJ} is \[124, 272\], not \[272, 124\]"),
    "transposed experts": (
        lambda t: transpose(t, *(EXPERT.replace("3.up", f"{e}.down") for e in range(8))),
        r"experts.0.down_proj.weight is \[24, 272\], not \[272, 24\]",
    ),
    "a layer's shape": (
        lambda t: t.update({O_PROJ: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{O_PROJ}_scale_inv": torch.ones(1, 1)}),
        rf"{O_PROJ} is \[8, 8\], not \[272, 124\]",
    ),
    "an expert's shape": (
        lambda t: t.update({EXPERT: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{EXPERT}_scale_inv": torch.ones(1, 1)}),
        rf"{EXPERT} is \[8, 8\], not \[24, 272\]",
    ),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        r"model.norm.weight is \[7\], not \[272\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kept", [False, True], ids=["dequantized", "kept"])
def test_one_error_for_what_does_not_belong_together(wrong, kept, tmp_path):
    change, message = WRONG[wrong]
    official.write(tmp_path, "v3", "float")
    edit(tmp_path, change)
    settings = {"quantization_config": FineGrainedFP8Config()} if kept else {}
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **settings)


def test_a_tied_embedding_is_what_heads_are_copies_of(tmp_path):
    official.write(tmp_path, "v3")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit(tmp_path, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}) or t.pop("lm_head.weight"))
    load(tmp_path)
    edit(tmp_path, lambda t: t[HEAD].add_(1.0))
    with pytest.raises(CheckpointError, match=f"{HEAD} is not a copy of model.embed_tokens.weight"):
        load(tmp_path)


def test_a_config_used_again_keeps_nothing(tmp_path):
    """A model is what its modules are, not what its config was once read for."""
    official.write(tmp_path, "v3", "float")
    kept = load(tmp_path, quantization_config=FineGrainedFP8Config())
    fresh = NanoDeepSeekForCausalLM(kept.config)
    assert kept.keeps_fp8 and not fresh.keeps_fp8 and all(p.requires_grad for p in fresh.parameters())
    fresh.save_pretrained(tmp_path / "fresh")
    lora_targets(fresh)


@pytest.mark.parametrize("family", ["v2-lite", "v3"])
def test_layers_beyond_the_config(family, tmp_path):
    """A smaller num_hidden_layers is one error; modules of multi-token prediction may be left out."""
    official.write(tmp_path, family)
    edit(tmp_path, lambda t: HEAD in t and t[HEAD].add_(1.0))
    settings = {"num_nextn_predict_layers": 0} if family == "v3" else {}
    load(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.input_layernorm.weight has no place"):
        load(tmp_path, num_hidden_layers=2, **settings)


@pytest.mark.parametrize(
    "field, value",
    [("weight_block_size", None), ("weight_block_size", [128]), ("fmt", "e5m2"), ("activation_scheme", "static")],
)
def test_fp8_of_another_kind_is_refused(field, value, tmp_path):
    official.write(tmp_path, "v3", "float")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantization_config has {field}="):
        load(tmp_path)


def test_fp8_that_the_config_does_not_mention(tmp_path):
    official.write(tmp_path, "v3", "float")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is FP8, and config.json has no quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [False, True], ids=["dequantized", "kept"])
def test_offloaded_to_disk(kept, tmp_path):
    """What lies on disk is what was read, not the blocks without their scales."""
    official.write(tmp_path / "fp8", "v3", "float")
    settings = {"quantization_config": FineGrainedFP8Config()} if kept else {}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(4)}
    model = load(tmp_path / "fp8", device_map=places, offload_folder=tmp_path / "offloaded", **settings)
    ids = tokens(1, 9)
    assert_same(load(tmp_path / "fp8")(ids).logits, model(ids).logits)


def test_another_quantization_is_refused(tmp_path):
    configs = pytest.importorskip("torchao.quantization")
    official.write(tmp_path, "v3", "float")
    with pytest.raises(ValueError, match="holds FP8 weights, which another quantization_config would read"):
        load(tmp_path, quantization_config=TorchAoConfig(configs.Int8WeightOnlyConfig()))


@pytest.mark.parametrize("settings", [{"modules_to_not_convert": ["o_proj"]}, {"weight_block_size": (64, 64)}])
def test_settings_that_would_not_be_followed(settings, tmp_path):
    official.write(tmp_path, "v3", "float")
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* is not possible: dequantize alone"):
        load(tmp_path, quantization_config=FineGrainedFP8Config(**settings))


def test_a_config_from_elsewhere(tmp_path):
    """The folder says what its weights are, and each call whether FP8 is kept."""
    official.write(tmp_path / "fp8", "v3", "float")
    official.write(tmp_path / "plain", "v3")
    kept = load(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert any(isinstance(module, Fp8Experts) for module in kept.modules())
    ids = tokens(1, 9)
    for folder, config in (("fp8", NanoDeepSeekConfig.from_dict(kept.config.to_dict())), ("plain", kept.config)):
        model = load(tmp_path / folder, config=config)
        assert_same(model(ids).logits, load(tmp_path / folder)(ids).logits)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path / "again")
    with_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_same(with_auto.eval()(ids).logits, model(ids).logits)


def test_scales_are_fp32_whatever_the_default(tmp_path):
    official.write(tmp_path, "v3", "float")
    expected = load(tmp_path)(tokens(1, 9)).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load(tmp_path, quantization_config=FineGrainedFP8Config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(model(tokens(1, 9)).logits, expected)


def test_biases_beside_fp8(tmp_path):
    """No official checkpoint has them; the config can."""
    official.write(tmp_path, "v3", "float", shards=1)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def add_biases(tensors):
        for name in [n for n in tensors if n.endswith(("q_a_proj.weight", "mqa.weight", "o_proj.weight"))]:
            tensors[name.removesuffix("weight") + "bias"] = torch.randn(tensors[name].shape[0])

    edit(tmp_path, add_biases)
    plain, kept = load(tmp_path), load(tmp_path, quantization_config=FineGrainedFP8Config())
    assert plain.model.layers[0].self_attn.o_proj.bias.any()
    assert_same(plain(tokens(1, 9)).logits, kept(tokens(1, 9)).logits)


def test_weights_of_another_architecture(tmp_path):
    """An indexer's tensors where the config has none: one error, by their names."""
    official.write(tmp_path, "v3.2")
    (tmp_path / "config.json").write_text(json.dumps(official.FAMILIES["v3"]))
    with pytest.raises(CheckpointError, match=r"indexer\.k_norm\.bias has no place in the model"):
        load(tmp_path)


def test_saving_over_published_shards(tmp_path):
    """Theirs are counted with six digits; beside the new file they would be read by who looks for all of them."""
    official.write(tmp_path, "v3", "float")
    model = load(tmp_path)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_nothing_to_keep(tmp_path):
    official.write(tmp_path, "v3")
    with pytest.raises(ValueError, match="holds no FP8 weights to keep"):
        load(tmp_path, quantization_config=FineGrainedFP8Config())


DAMAGE = {
    "cut short": (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-100]), "no complete safetensors file"),
    "missing": (lambda folder, shard: shard.unlink(), "is missing, and model.safetensors.index.json says"),
    "absent file": (
        lambda folder, shard: rewrite_index(folder, lambda m: m.update({"lm_head.weight": "nowhere.safetensors"})),
        "nowhere.safetensors' is missing",
    ),
    "pickle": (
        lambda folder, shard: [
            [file.unlink() for file in folder.glob("model*")],
            torch.save({}, folder / "pytorch_model.bin"),
        ],
        "pickled weights",
    ),
}


def rewrite_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_error_for_damaged_files(damage, tmp_path):
    harm, message = DAMAGE[damage]
    official.write(tmp_path, "v3", "float")
    harm(tmp_path, sorted(tmp_path.glob("*.safetensors"))[1])
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


PEAK = """
import sys, threading, time, torch
from transformers import FineGrainedFP8Config
from modeling_nanodeepseek import NanoDeepSeekForCausalLM
torch.set_num_threads(1)
def own():  # without mapped files, which cost nothing that the system cannot take back
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.001)

before = peak = own()
threading.Thread(target=watch, daemon=True).start()
settings = {"quantization_config": FineGrainedFP8Config()} if sys.argv[2] == "kept" else {}
model = NanoDeepSeekForCausalLM.from_pretrained(sys.argv[1], **settings)
print((peak - before) / 1024, model.get_memory_footprint() / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory")
@pytest.mark.parametrize("mode", ["dequantized", "kept"])
def test_memory_is_bounded(mode, tmp_path, monkeypatch):
    """Reading costs the model and a few tensors more, not another copy: files are mapped, and read tensor by tensor."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 32, "num_hidden_layers": 4}
    monkeypatch.setitem(official.FAMILIES, "v3", official.FAMILIES["v3"] | sizes)
    official.write(tmp_path, "v3", "float", shards=8)
    command = [sys.executable, "-c", PEAK, str(tmp_path), mode]
    in_order = os.environ | {
        "HF_DEACTIVATE_ASYNC_LOAD": "1"
    }  # how far threads read ahead depends on the machine's load
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=in_order)
    grown, size = map(float, run.stdout.split())
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) / 2**20
    assert size > (0.9 if mode == "kept" else 1.7) * files
    # Dequantised, a layer's experts are 96 MiB: pieces, the stack they make, and the next ones, read meanwhile.
    # Twice the layers add as much to `size`, and nothing to that.
    beside = 50 if mode == "kept" else 350
    assert grown < size + beside < size + files + (0 if mode == "kept" else 200), (grown, size, files)
