"""FP8 training against a transcription of the recipe, tile by tile; what is converted; whole runs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.losses import Head
from tests.conftest import assert_close, checkpoint_activations, rms_ratio, tiny_model, tokens
from tests.small_run import TINY_MODEL
from train import fp8, pretrain
from train.fp8 import Fp8BlockLinear, Fp8Product, convert_to_fp8, fp8_modules, trains_in_fp8
from train.recipe import REPOSITORY, FinetuneRecipe, load_recipe

V32 = {"num_nextn_predict_layers": 1, "index_topk": 6, "index_n_heads": 2, "index_head_dim": 10}
GQA = {"attention_type": "gqa", "num_key_value_heads": 1, "head_dim": 12, "n_routed_experts": None}
HALF_ULP = 2**-4  # E4M3 has three bits behind the point: the largest relative rounding error, of what is not subnormal


# -- the recipe, word by word ------------------------------------------------------------------------------------------


def tiles(values: torch.Tensor, rows: int, columns: int, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 numbers in fp64 and the scale each of them has, tile by tile."""
    q, s = (torch.empty(values.shape, dtype=torch.float64) for _ in range(2))
    for i in range(0, values.shape[0], rows):
        for j in range(0, values.shape[1], columns):
            part = values[i : i + rows, j : j + columns].float()
            scale = part.abs().max() / 448 if part.any() else torch.tensor(1.0)
            scale = 2.0 ** torch.ceil(torch.log2(scale)) if ue8m0 else scale
            q[i : i + rows, j : j + columns] = (part / scale).to(torch.float8_e4m3fn).double()
            s[i : i + rows, j : j + columns] = scale
    return q, s


def literal_product(a, b, a_rows: int, b_columns: int, ue8m0: bool) -> torch.Tensor:
    """a [M, K] times b [K, N], in tiles of a_rows by 128 and of 128 by b_columns: partial sums of 128 terms of E4M3
    numbers, each times both scales, one of a's row and one of b's column."""
    q_a, s_a = tiles(a, a_rows, 128, ue8m0)
    q_b, s_b = tiles(b, 128, b_columns, ue8m0)
    parts = [slice(k, k + 128) for k in range(0, a.shape[1], 128)]
    return sum((q_a[:, k] @ q_b[k]) * s_a[:, k.start, None] * s_b[k.start] for k in parts)


def literal(x, weight, g, ue8m0=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, dx, dW."""
    y = literal_product(x, weight.mT, 1, 128, ue8m0)
    dx = None if g is None else literal_product(g, weight, 1, 128, ue8m0)
    return y, dx, None if g is None else literal_product(g.mT, x, 1, 1, ue8m0)


def uneven(*shape: int) -> torch.Tensor:
    """Numbers whose size changes from row to row and from column to column, and rows and columns of zeros."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None] * torch.logspace(2, -2, shape[-1])
    x[..., 1, :] = 0
    x[..., :, 2] = 0
    return x


@pytest.mark.parametrize("ue8m0", [False, True])
def test_the_three_products_are_the_recipes(ue8m0):
    """Sizes that fill no block; several tiles along each dimension."""
    linear = nn.Linear(200, 136)
    with torch.no_grad():
        linear.weight.copy_(uneven(136, 200))
    layer = Fp8BlockLinear(linear, ue8m0)
    x, g = uneven(150, 200).requires_grad_(), uneven(150, 136)
    y = layer(x.view(3, 50, 200))
    y.backward(g.view(3, 50, 136))
    expected = literal(x.detach(), linear.weight.detach(), g, ue8m0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    for name, right, ours in zip(
        ("y", "dx", "dW"), expected, (y.flatten(0, 1) - linear.bias, x.grad, linear.weight.grad)
    ):
        assert_close(right, ours, 1e-5, name)
        assert (right - ours).abs().max() <= 1e-5 * right.abs().max(), name
    assert torch.equal(linear.bias.grad, g.view(3, 50, 136).sum((0, 1)))


@pytest.mark.parametrize(
    "right, wrong, moved",
    [((1, 128), (128, 1), "y dx"), ((128, 1), (1, 128), "dW"), ((128, 128), (1, 128), "y dx")],
)
def test_tiles_of_another_shape_are_seen(right, wrong, moved, monkeypatch):
    """Tiles turned round, or rows instead of blocks, move the products they are in by far more than the tolerance."""
    x, weight, g = uneven(150, 200), uneven(136, 200), uneven(150, 136)
    expected, real = literal(x, weight, g), fp8.rounded
    monkeypatch.setattr(fp8, "rounded", lambda v, block, u: real(v, wrong if block == right else block, u))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = Fp8Product.apply(x, weight, torch.float32, False)
    ours = y, *torch.autograd.grad(y, (x, weight), g)
    off = {name for name, a, b in zip(("y", "dx", "dW"), expected, ours) if rms_ratio(a, b) > 1e-3}
    assert off == set(moved.split())


def test_products_are_within_what_three_bits_allow():
    """|y - exact| <= ((1 + h)^2 - 1) sum |x| |w|, h half a unit in the last place, for numbers that are not subnormal
    in their tile; and not zero."""
    sizes = ((90, 300), (140, 300), (90, 140))
    x, weight, g = (torch.rand(s).add(0.05).mul(torch.randn(s).sign()).double().requires_grad_() for s in sizes)
    exact = F.linear(x, weight)
    exact = exact, *torch.autograd.grad(exact, (x, weight), g)
    y = Fp8Product.apply(x, weight, torch.float64, False)
    rounded = y, *torch.autograd.grad(y, (x, weight), g)
    x, weight, g = x.abs(), weight.abs(), g.abs()
    for a, b, size in zip(exact, rounded, (x @ weight.mT, g @ weight, g.mT @ x)):
        assert ((a - b).abs() <= ((1 + HALF_ULP) ** 2 - 1) * size).all()
        assert 0.005 < rms_ratio(a, b) < 0.1


def test_what_is_not_finite_stays_so():
    """A NaN must reach the loss, where training stops: neither rounding nor scales may hide it."""
    for value in ("nan", "inf"):
        x = torch.ones(3, 200)
        x[1, 150] = float(value)
        finite = Fp8Product.apply(x, torch.ones(5, 200), torch.float32, False).isfinite().all(1)
        assert finite.tolist() == [True, False, True]


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated, ue8m0", [(True, False), (False, True)])
def test_experts_are_made_of_the_same_products(gated, ue8m0):
    """Values and gradients, for experts with no token, with one and with more than a tile; one choice is of none."""
    sizes = {"hidden_size": 136, "moe_intermediate_size": 72, "n_routed_experts": 4, "num_experts_per_tok": 2}
    groups = {"n_group": 1, "topk_group": 1, "num_hidden_layers": 2, "gated_mlp": gated}
    experts = convert_to_fp8(tiny_model(**sizes, **groups), ue8m0).model.layers[1].mlp.experts
    hidden, weights = torch.randn(150, 136).requires_grad_(), torch.rand(150, 2).requires_grad_()
    indices = torch.tensor([[0, 3]]).repeat(150, 1)  # 3 and 0 get nearly all, 1 one, 2 none
    indices[7, 0], indices[9, 1] = 1, 4
    g = torch.randn(150, 136)
    up, down = experts.up_weight(), experts.down_proj
    output = experts(hidden, indices, weights)
    ours = output, *torch.autograd.grad(output, (hidden, weights, up, down), g)
    expected = [torch.zeros_like(t, dtype=torch.float64) for t in (hidden, hidden, weights, up, down)]
    for e in range(4):
        token, slot = (indices == e).nonzero(as_tuple=True)
        x, w, g_e = hidden[token].detach(), weights[token, slot].detach()[:, None], g[token]
        h = literal(x, up[e].detach(), None, ue8m0)[0].requires_grad_()
        a = experts.activate(h)
        y, da, ddown = literal((a.detach() * w).float(), down[e].detach(), g_e, ue8m0)
        (dh,) = torch.autograd.grad(a, h, da * w)
        _, dx, dup = literal(x, up[e].detach(), dh.float(), ue8m0)
        expected[0].index_add_(0, token, y)
        expected[1].index_add_(0, token, dx)
        expected[2][token, slot] = (da * a.detach()).sum(-1)
        expected[3][e], expected[4][e] = dup, ddown
    for name, right, mine in zip(("y", "dx", "dw", "dWup", "dWdown"), expected, ours):
        # What is rounded a second time may fall to the other side of a step of E4M3, where fp32 and fp64 differ.
        assert_close(right, mine, 2e-3, name)
        off = ((right - mine).abs() > 1e-4 * right.abs().max()).float().mean()
        assert off < 0.01, f"{name}: {off:.1%}"
    assert not ours[3][2].any() and not ours[4][2].any() and not ours[2][9, 1]
    # Where no token goes anywhere the weights have gradients all the same, zeros, which other processes wait for.
    gradients = torch.autograd.grad(experts(hidden, torch.full_like(indices, 4), weights).sum(), (up, down))
    assert not any(gradient.any() for gradient in gradients)


# -- what is converted -------------------------------------------------------------------------------------------------

ATTENTION = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
MLP = "gate_proj up_proj down_proj"


def names(layer: int, attention: str, *mlp: str) -> list[str]:
    parts = [f"self_attn.{name}" for name in attention.split()] + [f"mlp.{name}" for name in mlp]
    return [f"model.layers.{layer}.{name}" for name in parts]


def test_the_exact_list():
    """V3.2's parts with its module of multi-token prediction, and the other attention with dense layers alone."""
    index, moe = "indexer.wq_b indexer.wk", ["experts", *(f"shared_experts.{name}" for name in MLP.split())]
    v32 = tiny_model(**V32, num_hidden_layers=2, attention_bias=True)
    expected = names(0, f"{ATTENTION} {index}", *MLP.split())
    expected += names(1, f"{ATTENTION} {index}", *moe) + names(2, f"{ATTENTION} {index}", *moe)
    gqa = tiny_model(**GQA, num_hidden_layers=1)
    for model, listed in ((v32, expected), (gqa, names(0, "q_proj k_proj v_proj o_proj", *MLP.split()))):
        before = {name: parameter for name, parameter in model.named_parameters()}
        assert sorted(fp8_modules(model)) == sorted(listed)
        assert convert_to_fp8(model) is model and sorted(fp8_modules(model)) == sorted(listed)
        now = {n for n, m in model.named_modules() if isinstance(m, Fp8BlockLinear)}
        assert now == {name for name in listed if not name.endswith(".experts")}
        assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert type(v32.lm_head) is Head and type(v32.model.layers[2].eh_proj) is nn.Linear
    assert v32.config._experts_implementation == "fp8_blocks"
    assert "fp8_blocks" not in v32.config.to_json_string()


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_gradients_of_a_step(kind):
    """Each product adds an independent relative error of 2^0.5 times 0.026, what E4M3 rounds numbers of all sizes by;
    n products n^0.5 times that, and twice as much where the softmax's gradient is a difference. With checkpoints the
    same to the bit, and no token sees a later one."""
    changes = {"num_hidden_layers": 2, "n_routed_experts": None, "rope_parameters": {"rope_theta": 1e4}}
    plain = tiny_model(**(GQA if kind == "gqa" else {}) | changes, vocab_size=97)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 2:
                parameter.mul_(parameter.shape[1] ** -0.5 / 0.2)  # as at the start of training: products keep sizes
    gradients = {}
    for how in ("plain", "fp8", "checkpointed"):
        model = plain if how == "plain" else convert_to_fp8(plain)
        if how == "checkpointed":
            checkpoint_activations(model)
        model.train().zero_grad()
        model(tokens(4, 40), labels=tokens(4, 40)).loss.backward()
        gradients[how] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    products = 2 * 2 * (8 if kind == "mla" else 7)  # forward and backward, two layers
    bound = 2 * products**0.5 * 2**0.5 * 0.026
    for name, gradient in gradients["plain"].items():
        ratio = rms_ratio(gradient, gradients["fp8"][name])
        assert 0.003 < ratio < bound, (name, ratio, bound)
        assert torch.equal(gradients["fp8"][name], gradients["checkpointed"][name]), name
    a, b = tokens(), tokens()
    b[:, 20:] = 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(a).logits[:, :20], model(b).logits[:, :20])


def test_the_absorbed_form_uses_the_same_weights():
    """MLA's decoding form takes kv_b_proj as a matrix: the rounded one, of whatever dtype the model is."""
    model = convert_to_fp8(tiny_model(n_routed_experts=None))
    logits = []
    for form in ("expanded", "absorbed"):
        model.config.attention_form = form
        logits.append(model(tokens()).logits)
    plain = tiny_model(n_routed_experts=None)(tokens()).logits
    # The expanded form rounds the latents too, the absorbed one does not: closer to each other than to the plain model.
    assert rms_ratio(*logits) < 0.8 * rms_ratio(plain, logits[0])
    assert model.bfloat16()(tokens()).logits.dtype == torch.bfloat16


# -- torchao's kernels -------------------------------------------------------------------------------------------------


def test_torchao_is_called_as_it_wants_and_named_where_it_cannot(monkeypatch):
    """With a stand-in that has its kernels' conditions; they themselves need a GPU."""
    seen = []

    def apply(x, weight, block):
        assert block == 128 and x.is_contiguous() and all(size % 128 == 0 for size in (*x.shape, *weight.shape))
        seen.append(x.shape)
        return Fp8Product.apply(x, weight, torch.bfloat16, False)

    stand_in = SimpleNamespace(fp8_blockwise_mm=SimpleNamespace(apply=apply))
    monkeypatch.setitem(sys.modules, "torchao.prototype.blockwise_fp8_training.linear", stand_in)
    assert fp8._disagreement(torch.device("cpu")) < 0.005 and seen == [(128, 256)]
    stand_in.fp8_blockwise_mm.apply = lambda x, weight, block: 1.05 * apply(x, weight, block)
    assert fp8._disagreement(torch.device("cpu")) > 0.04
    assert "not for cpu" in fp8.torchao_cannot(torch.device("cpu"))
    assert fp8.fits_torchao(torch.empty(256, 128)) and not fp8.fits_torchao(torch.empty(576, 128))
    if not torch.cuda.is_available():
        assert "torchao: " in fp8.torchao_cannot(torch.device("cuda"))  # whatever went wrong, it is named


# -- runs --------------------------------------------------------------------------------------------------------------

SPARSE_MTP = TINY_MODEL | {"q_lora_rank": 10, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
SPARSE_MTP |= {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_run(stage, tiny_recipe, capsys, tmp_path):
    """All parts on, with accumulation and evaluation; what is saved is a model like any other, in fp32."""
    model = {"overrides": SPARSE_MTP, "dsa_stage": stage}
    trainer = {"gradient_accumulation_steps": 2, "max_steps": 4}
    metrics = pretrain.run(tiny_recipe(model=model, precision="fp8", trainer=trainer))
    printed = capsys.readouterr().out
    assert "fp8, fp32 outside its products" in printed or "fp8, bf16 outside its products" in printed
    assert "FP8: 30 linear layers, 2 stacks of experts; " in printed
    loaded = NanoDeepSeekForCausalLM.from_pretrained(tmp_path / "run")
    assert not [m for m in loaded.modules() if isinstance(m, Fp8BlockLinear)]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert "fp8_blocks" not in (tmp_path / "run" / "config.json").read_text() and metrics["eval_loss"] > 0
    assert "fp8" in (tmp_path / "run" / "README.md").read_text()


def test_resuming_is_as_if_uninterrupted(tiny_recipe, tmp_path):
    losses = {}
    for folder, checkpoint in (("whole", None), ("rest", str(tmp_path / "whole" / "checkpoint-2"))):
        trainer = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        recipe = tiny_recipe(output_dir=str(tmp_path / folder), precision="fp8", trainer=trainer)
        run = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
        run.train(resume_from_checkpoint=checkpoint)
        losses[folder] = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    assert losses["rest"] == losses["whole"] and len(losses["whole"]) == 4


def test_the_launch_file_leads_to_the_same_conversion(tiny_recipe, monkeypatch):
    """What `accelerate launch` makes of configuration/accelerate/fp8.yaml; accelerate itself converts nothing."""
    pytest.importorskip("torchao")
    settings = yaml.safe_load((REPOSITORY / "configuration" / "accelerate" / "fp8.yaml").read_text())
    assert settings["mixed_precision"] == "fp8"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", settings["mixed_precision"])
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", settings["fp8_config"]["backend"])
    recipe = tiny_recipe(model={"overrides": SPARSE_MTP}, trainer={"max_steps": 1})
    assert recipe.precision == "auto"
    trainer = pretrain.build_trainer(recipe, pretrain.training_arguments(recipe))
    listed = [name for name in fp8_modules(trainer.model) if not name.endswith(".experts")]
    trainer.train()
    kinds = {n: type(m) for n, m in trainer.model.named_modules() if isinstance(m, nn.Linear)}
    assert [name for name, kind in kinds.items() if kind is Fp8BlockLinear] == listed
    homes = {kind.__module__.partition(".")[0] for kind in kinds.values()}
    assert homes == {"torch", "modeling_nanodeepseek", "train"}
    assert trainer.accelerator.mixed_precision == "fp8" and 0 < trainer.evaluate()["eval_loss"] < 10
    assert trains_in_fp8("fp8")
    with pytest.raises(ValueError, match="mixed_precision: fp8, the recipe precision: bf16"):
        pretrain.training_arguments(tiny_recipe(precision="bf16"))
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "TE")
    with pytest.raises(ValueError, match="backend: TE"):
        pretrain.training_arguments(tiny_recipe())


def test_the_launch_file_as_it_stands(tiny_recipe, tmp_path):
    pytest.importorskip("torchao")
    recipe = tiny_recipe(trainer={"max_steps": 1, "use_cpu": True, "report_to": []})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/fp8.yaml"]
    command += ["-m", "train.pretrain", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stacks of experts; " in done.stdout and (tmp_path / "run" / "model.safetensors").is_file()


def test_settings_that_would_not_be_followed_are_refused(tiny_recipe):
    with pytest.raises(ValueError, match="fp8_scales='ue8m0' goes with precision: fp8"):
        tiny_recipe(precision="fp32", fp8_scales="ue8m0")
    with pytest.raises(ValueError, match="precision: fp8 is for training whole weights"):
        load_recipe("configuration/recipes/finetune_lora.yaml", ["precision=fp8"], FinetuneRecipe)
