"""The plan of a model: V3's and V3.2's published figures, the memory that autograd keeps, what is refused."""

import json
from argparse import Namespace

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import tiny_config, tiny_model, tokens
from train.accounting import cache_bytes, decode_flops_per_token, fp8_cache_bytes, prefill_flops_per_token
from train.hardware import DEVICES, copy_bandwidth
from train.memory import activation_bytes, training_bytes
from train.models import build_config
from train.plan import build_parser, inference, main, parameters, plan

V3 = {"index_topk": None}


@pytest.fixture(scope="module")
def v32() -> dict:
    arguments = "--model deepseek-v3.2 --device h800 --devices 2048 --precision fp8 --context 131072"
    return plan(build_parser().parse_args(arguments.split()))


def test_parameters_of_v32(v32):
    assert v32["parameters"] == {
        "total": 671_877_944_064,
        "active": 38_403_822_336,
        "active_published": 37_477_143_296,
        "mtp": 11_624_027_648,
    }


def test_cache_of_v3_and_v32(v32):
    v3 = build_config("deepseek-v3.2", **V3)
    assert cache_bytes(v3) == 70_272 == 61 * 1152 and fp8_cache_bytes(v3) == 61 * 656
    caches = v32["cache_bytes_per_token"]
    assert caches["bf16"] == 61 * (1152 + 256) and caches["fp8"] == 61 * (656 + 256)
    assert caches["fp8_index_fp8"] == 61 * (656 + 132)
    for other, share in (("mha", 0.0176), ("mla_expanded", 0.0141), ("gqa_8", 0.281)):  # spec: without the indexer
        assert cache_bytes(v3) / caches[other] == pytest.approx(share, abs=0.0005), other
    with pytest.raises(ValueError, match="attention_type='mla', not 'gqa'"):
        fp8_cache_bytes(build_config("small", "moe_only"))


def test_operations_by_hand():
    v32, v3 = build_config("deepseek-v3.2"), build_config("deepseek-v3.2", **V3)
    model, index, head = 36_624_596_992, 851_509_248, 129_280 * 7168
    assert prefill_flops_per_token(v3, 4096) == 2 * (model - head) + 61 * 81_920 * 2048
    assert decode_flops_per_token(v3, 4096) == 2 * model + 61 * 278_528 * 4096  # 2 * 128 * (2 * 512 + 64)
    chosen = 61 * 278_528 * 2048 + 2 * index + 61 * 16_384 * 131_072
    assert decode_flops_per_token(v32, 131_072) == 2 * model + chosen
    read = 61 * 81_920 * (2048 - 2048**2 / 16_384) + 2 * index + 61 * 16_384 * 4096
    assert prefill_flops_per_token(v32, 8192) == 2 * (model - head) + read


def test_v3s_gpu_hours(v32, capsys):
    """2664K H800 hours for 14.8T tokens are 1543 tokens per second and GPU, at the utilisation that the plan states."""
    published = 14.8e12 / 2664e3 / 3600
    assert published == pytest.approx(1543, abs=1)
    training = v32["training"]
    assert training["tokens_per_second_per_device"] == pytest.approx(published, rel=0.03)
    assert training["device_hours_per_billion_tokens"] * 14.8e3 == pytest.approx(2664e3, rel=0.03)
    assert training["flops_per_token"] == pytest.approx(261.5e9, rel=1e-3)
    # Weights in one byte and a row of 128K; a decoded token reads what is active, and of the cache the chosen latents.
    inference = v32["inference"]
    assert inference["weight_bytes"] == 671_877_944_064 and inference["cache_bytes"] == 131_072 * 61 * 788
    read = 37_477_143_296 + 61 * (2048 * 660 + 131_072 * 128)
    assert inference["read_per_step"] == pytest.approx(read, rel=1e-3)


def test_decoding_in_batches_reads_more_experts():
    config = build_config("deepseek-v3.2")
    counts = parameters(config)

    def read(batch: int) -> float:
        args = Namespace(precision="bf16", batch=batch, context=1, devices=1, utilisation=0.4)
        return inference(config, DEVICES["h200"], counts, args)["read_per_step"] / 2

    whole = 671_877_944_064 - 129_280 * 7168  # the input embedding is looked up
    assert read(1) == pytest.approx(37_477_143_296, rel=1e-3) and read(4096) == pytest.approx(whole, rel=1e-3)
    layer = 58 * 44_040_192  # one expert of each layer; of 256, two rows meet 8 + 8 * 248 / 256
    assert read(2) - read(1) == pytest.approx(layer * 8 * 248 / 256, rel=1e-3)


def kept_for_backward(model, ids) -> float:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids)
    return sum(kept.values())


SIZES = {"hidden_size": 64, "v_head_dim": 16, "num_attention_heads": 4}
MODELS = {
    "mla-moe": {},
    "dense": {"n_routed_experts": None},
    "no-query-rank": {"q_lora_rank": None},
    "mtp": {"num_nextn_predict_layers": 2},
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 2, "head_dim": 16, "qk_norm": True},
    "sparse": {"index_topk": 32, "index_n_heads": 4, "index_head_dim": 16, "sparse_form": "gathered"},
}


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name):
    model, ids = tiny_model(**SIZES, **MODELS[name]).train(), tokens(2, 128)
    heads = 1 + model.config.num_nextn_predict_layers
    kept = kept_for_backward(model, ids) - 4 * heads * model.lm_head.weight.numel()  # the head's gradient
    expected = ids.numel() * activation_bytes(model.config, 128, on_cpu=True)
    assert expected == pytest.approx(kept, rel=0.15 if name == "sparse" else 0.06)


def test_memory_by_hand():
    config = build_config("quickstart")
    sizes = {"length": 256, "batch": 24, "on_cpu": True}
    adamw, muon = training_bytes(config, **sizes), training_bytes(config, optimizer="muon", **sizes)
    trained = 11_033_264 - 3 * 16  # without the routers' biases
    assert adamw["weights"] == adamw["gradients"] == adamw["optimizer"] / 2 == 4 * trained
    other = 2 * 4096 * 256 + 3 * 16 * 256 + 9 * 256 + 4 * 96  # embedding, head, routers, norms
    assert muon["optimizer"] == 4 * trained + 4 * other
    spread = training_bytes(config, devices=4, **sizes)
    assert spread["weights"] == trained and spread["activations"] == adamw["activations"] and spread["copies"] > 0
    checkpointed = training_bytes(config, checkpointing=True, **sizes)
    assert checkpointed["activations"] < 0.5 * adamw["activations"]
    assert training_bytes(config, bf16=True, **sizes)["copies"] == 2 * trained
    warmup = tiny_config(index_topk=5, index_n_heads=6, index_head_dim=8, dsa_stage="warmup")
    parts = training_bytes(warmup, length=32, batch=1)
    assert parts["gradients"] < 0.2 * parts["weights"] and parts["activations"] < 4 * 3 * 32 * 3 * 70


def test_the_command(capsys, tmp_path):
    main(["--model", "v32-full", "--device", "h200", "--devices", "512"])
    printed = capsys.readouterr().out
    for words in (
        "948,490,640,640",
        "cache, bytes per token",
        "512 x h200, bf16",
        "with checkpointing",
        "tokens written per second",
    ):
        assert words in printed, words
    folder = tmp_path / "model"
    tiny_config(index_topk=5, index_n_heads=6, index_head_dim=8).save_pretrained(folder)
    main(["--model", str(folder), "--device", "cpu", "--precision", "fp32", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["machine"]["measured"] and numbers["training"]["sequence"] == 640
    assert numbers["training"]["fits_on_devices"] == 1 and numbers["inference"]["context"] == 640
    rate = numbers["machine"]["peak_flops"] * numbers["machine"]["utilisation"]
    training = numbers["training"]
    assert training["tokens_per_second"] == pytest.approx(rate / training["flops_per_token"])
    assert copy_bandwidth(torch.device("cpu"), seconds=0.0) > 1e7 and DEVICES["h100"].flops["bf16"] == 989e12


def test_another_familys_config_is_refused(tmp_path, capsys):
    file = tmp_path / "config.json"
    for config, message in (
        (LlamaConfig().to_dict(), "holds a model of type 'llama'"),
        ({"model_type": "nanodeepseek", "num_attention_heads": 0}, "error: config of .*: num_attention_heads=0"),
        ({"model_type": "nanodeepseek", "dtype": "floaty"}, "error: config of .*'floaty'"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(SystemExit, match=message) as caught:
            main(["--model", str(file), "--device", "h100"])
        assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model absent --device h100", "model 'absent' is neither a file nor one of"),
        ("--model small --device h100 --sequence 5000", "--sequence 5000 must lie in 1..4096"),
        ("--model small --device h100 --devices 0", "--devices 0 must be at least 1"),
        ("--model small --device h100 --sequence 0", "--sequence 0 must lie in 1..4096"),
        ("--model small --device h100 --context 0", "--context 0 must lie in 1..4096"),
        ("--model small --device h100 --utilisation 0", "--utilisation 0 must lie in"),
        ("--model small --device a100 --precision fp8", "--precision fp8: a100 has no peak for it, but bf16, fp32"),
        ("--model small --device h100 --utilisation 1.5", "--utilisation 1.5 must lie in"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments.split())
