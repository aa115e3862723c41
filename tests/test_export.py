"""Native checkpoints that we write: transformers' own classes read them with equal logits, and so do we."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_nanodeepseek import NanoDeepSeekForCausalLM, NanoDeepSeekForTokenClassification, NanoDeepSeekModel
from modeling_nanodeepseek.export import ExportError, export_native
from modeling_nanodeepseek.fp8 import quantize
from modeling_nanodeepseek.saving import SaveError
from tests import official
from tests.conftest import EARLIER_TRANSFORMERS, SPARSE, assert_close, tiny_config, tiny_model, tokens

needs_v32 = pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="another DeepseekV32 before transformers 5.23")
KINDS = {
    "v3": {},
    "no query latent": {"q_lora_rank": None},
    "dense feed-forward": {"n_routed_experts": None, "num_nextn_predict_layers": 1},
    "experts in no layer": {"first_k_dense_replace": 5, "num_nextn_predict_layers": 1},
    "no shared experts": {"n_shared_experts": 0},
    "tied": {"tie_word_embeddings": True},
    "no YaRN": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "two modules": {"num_nextn_predict_layers": 2},
    "v3.2": SPARSE | {"num_nextn_predict_layers": 1},
}
# Sizes whose blocks transformers reads rightly: rows that fill blocks, or fewer than one.
ROUND = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "num_attention_heads": 2,
}  # fmt: skip


def native(folder, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_native_classes_have_the_same_logits(kind, tmp_path):
    if kind == "v3.2" and EARLIER_TRANSFORMERS:
        pytest.skip("another DeepseekV32 before transformers 5.23")
    model = tiny_model(**KINDS[kind]).double()
    assert export_native(model, tmp_path, dtype=torch.float64) == tmp_path
    theirs = native(tmp_path)
    assert type(theirs).__name__ == ("DeepseekV32ForCausalLM" if kind == "v3.2" else "DeepseekV3ForCausalLM")
    ids = tokens(2, 31)
    assert_close(model(ids).logits, theirs(ids).logits, 1e-6)
    ours, info = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values())
    for (name, a), b in zip(model.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(a, b), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # a tied head too: not every engine ties
        assert torch.equal(file.get_tensor("lm_head.weight"), model.lm_head.weight)


def test_a_compiled_model_is_exported_as_it_was(tmp_path):
    model, ids = tiny_model(), tokens(1, 9)
    export_native(torch.compile(model, backend="eager"), tmp_path, dtype=torch.float32)
    assert_close(model(ids).logits, native(tmp_path, torch.float32)(ids).logits, 1e-5)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("sparse", [pytest.param(True, marks=needs_v32), False], ids=["v3.2", "v3"])
def test_fp8_agrees_in_both_directions(sparse, ue8m0, tmp_path):
    """Ours out, theirs in: the same weights as ours read; and theirs out (plain), ours in."""
    model = tiny_model(**ROUND, **(SPARSE | {"index_n_heads": 32, "index_head_dim": 64} if sparse else {}))
    export_native(model, tmp_path / "fp8", dtype=torch.float32, fp8=True, ue8m0=ue8m0)
    theirs = native(tmp_path / "fp8", torch.float32).double()
    ours = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32).eval().double()
    ids = tokens(2, 31)
    assert_close(theirs(ids).logits, ours(ids).logits, 1e-6)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    for (name, exact), read in zip(model.named_parameters(), ours.parameters()):
        ratio = ((exact - read).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        quantized = exact.ndim > 1 and not any(
            part in name for part in ("embed", "lm_head", "gate.weight", "weights_proj")
        )
        assert (0.005 < ratio < 0.04) if quantized else ratio == 0, (name, ratio)
    # It cannot save what it dequantised; the same weights in a model of its own making can be saved.
    fresh = type(theirs)(theirs.config)
    fresh.load_state_dict(theirs.state_dict())
    fresh.save_pretrained(tmp_path / "plain")
    again = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
    assert_close(theirs(ids).logits, again(ids).logits, 1e-6)


def test_blocks_that_are_not_full(tmp_path):
    """As those of the official 576 rows. transformers stops at them: once it does not, the warning may go."""
    official.write(tmp_path / "in", "v3")
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "in")
    with pytest.warns(UserWarning, match="do not read FP8 blocks that are not full: .*self_attn.kv_a_proj_with_mqa"):
        export_native(model, tmp_path / "out", fp8=True)
    NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises((ValueError, RuntimeError)):
        native(tmp_path / "out", torch.float32)


@pytest.mark.parametrize("family, fp8", [("v3", None), ("v3", "float"), ("v3.2", "ue8m0")])
def test_a_published_checkpoint_comes_out_as_it_went_in(family, fp8, tmp_path):
    """The same keys, dtypes and config; with power-of-two scales, and without FP8, the same bits."""
    official.write(tmp_path / "in", family, fp8)
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "in")
    export_native(model, tmp_path / "out", fp8=fp8 is not None, ue8m0=fp8 == "ue8m0", max_shard_bytes=300_000)
    before, after = ({}, {})
    for folder, tensors in (("in", before), ("out", after)):
        for file in (tmp_path / folder).glob("*.safetensors"):
            assert folder == "in" or file.stat().st_size < 320_000
            tensors |= load_file(file)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype), name
        if fp8 != "float":
            same = tensor.float(), after[name].float()
            if name.endswith("_scale_inv") or name + "_scale_inv" in before:
                # A block's largest number may be below half of 448: then both forms stand for the same weights.
                continue
            assert torch.equal(*same), name
    again = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        if fp8 != "float":
            assert torch.equal(a, b), name
        else:
            assert_close(a.float(), b.float(), 0.04, name)
    published, written = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out"))
    unsaid = {"auto_map", "transformers_version"}
    assert {k: v for k, v in published.items() if k not in unsaid} == {
        k: written.get(k) for k in published.keys() - unsaid
    }


def test_fp8_is_what_official_checkpoints_hold_in_fp8(tmp_path):
    config = official.FAMILIES["v3.2"]
    official.write(tmp_path / "in", "v3.2", None)
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    export_native(model, tmp_path / "out", fp8=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    quantized = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name in official.shapes(config) if official.is_fp8(name)}
    assert stored.keys() == official.shapes(config).keys() | {f"{name}_scale_inv" for name in quantized}
    name = "model.layers.3.mlp.experts.5.down_proj.weight"
    weight, scale = quantize(model.model.layers[3].mlp.experts.down_proj[5].detach())
    assert torch.equal(stored[name].float(), weight.float()) and torch.equal(stored[f"{name}_scale_inv"], scale)
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(stored[f"model.layers.3.{copy}.weight"], stored[f"{original}.weight"])


def test_an_indexer_may_be_left_out(tmp_path):
    model = tiny_model(**SPARSE)
    export_native(model, tmp_path, architecture="deepseek_v3", dtype=torch.float64)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "indexer" in name]
    ids = tokens(2, 31)
    model.set_dsa_stage("dense")
    export_native(model, tmp_path / "again", dtype=torch.float64)  # which attends to all keys: the default then
    stored = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path, tmp_path / "again")]
    assert stored[0] == stored[1]
    assert_close(model.double()(ids).logits, native(tmp_path)(ids).logits, 1e-6)


REFUSED = {
    "attention_type": {"attention_type": "gqa", "q_lora_rank": None},
    "hidden_act": {"hidden_act": "relu2"},
    "gated_mlp": {"gated_mlp": False},
    "rms_norm_weight": {"rms_norm_weight": False},
    "adaptive_expert_threshold": {"adaptive_expert_threshold": 0.5},
    "scoring_func": {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "rope_interleave": {"rope_interleave": False},
    "attention_bias": {"attention_bias": True},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "moe_layer_freq": {"moe_layer_freq": 2},
    "index_fp8": SPARSE | {"index_fp8": True},
    "index_window": SPARSE | {"index_window": 2},
    "index_global_tokens": SPARSE | {"index_global_tokens": 1},
    "index_pattern": SPARSE | {"index_pattern": "fixed", "index_window": 5},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(field, tmp_path):
    model = NanoDeepSeekForCausalLM(tiny_config(**REFUSED[field]))
    with pytest.raises(ExportError, match=rf"{field}=.*: \w+"):
        export_native(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path):
    model = tiny_model()
    with pytest.raises(ExportError, match="index_topk=None: deepseek_v32 selects keys"):
        export_native(model, tmp_path / "out", architecture="deepseek_v32")
    for stage in ("dense", "warmup"):
        resting = tiny_model(**SPARSE, dsa_stage=stage)
        with pytest.raises(ExportError, match=f"dsa_stage='{stage}': deepseek_v32 attends to selected keys"):
            export_native(resting, tmp_path / "out", architecture="deepseek_v32")
    with pytest.raises(ValueError, match="architecture='llama' is not possible"):
        export_native(model, tmp_path / "out", architecture="llama")
    with pytest.raises(ValueError, match="needs fp8=True"):
        export_native(model, tmp_path / "out", ue8m0=True)
    prompted = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ExportError, match="PeftModelForCausalLM is not exported"):
        export_native(prompted, tmp_path / "out")
    for kind in (NanoDeepSeekModel, NanoDeepSeekForTokenClassification):
        with pytest.raises(ExportError, match=f"{kind.__name__} is not exported"):
            export_native(kind(tiny_config()), tmp_path / "out")
    offloaded = tiny_model()
    offloaded.model.norm.to("meta")
    with pytest.raises(ExportError, match="model.norm.weight is offloaded"):
        export_native(offloaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # which would be put on the exported model
        (tmp_path / "out" / name).write_text("{}")
    export_native(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize(
    "field, size, width", [("moe_intermediate_size", 192, "2 x 96"), ("kv_lora_rank", 160, "2 x 80")]
)
def test_blocks_that_others_would_misread(field, size, width, tmp_path):
    """transformers takes a block's size from the quotient of two shapes, here wrongly and without a word."""
    model = tiny_model(**{**ROUND, "qk_nope_head_dim": 32, "v_head_dim": 32, field: size})
    with pytest.raises(ExportError, match=f"would be taken for {width}"):
        export_native(model, tmp_path / "out", fp8=True)
    assert not (tmp_path / "out").exists()
    export_native(model, tmp_path / "out")


def test_a_full_disk_leaves_the_old_version(small_disk):
    model = tiny_model()
    export_native(model, small_disk / "out")
    before = {file.name: file.read_bytes() for file in (small_disk / "out").iterdir()}
    with pytest.raises(SaveError, match="cannot be saved"):
        export_native(tiny_model(vocab_size=30_000), small_disk / "out")
    assert {file.name: file.read_bytes() for file in (small_disk / "out").iterdir()} == before


def test_one_export_replaces_another(tmp_path):
    """Shards of the old one would be read beside the new."""
    export_native(tiny_model(), tmp_path, max_shard_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    export_native(tiny_model(seed=1), tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_generation_config_and_tokenizer_come_along(tmp_path):
    from train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a b c d e f g"] * 20, vocab_size=270)
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    export_native(model, tmp_path, tokenizer=tokenizer)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == tokenizer.get_vocab() and read.chat_template == tokenizer.chat_template
    assert native(tmp_path).generation_config.temperature == 0.7
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == len(tokenizer)
