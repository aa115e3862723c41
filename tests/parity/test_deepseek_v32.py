"""DeepSeek Sparse Attention against transformers' DeepseekV32ForCausalLM, and against DeepSeek's equations in fp64.

Every text is several times as long as index_topk: below it attention is dense, and nothing here would show.
"""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from modeling_nanodeepseek import LatentCache, NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.indexer import index_scores
from modeling_nanodeepseek.masks import Visibility
from modeling_nanodeepseek.rotary import RotaryEmbedding
from modeling_nanodeepseek.sparse_attention import DeepseekSparseAttention
from tests.conftest import SPARSE, TINY, YARN, assert_close, assert_same, tiny_config, tiny_model, tokens

CASES = {
    "yarn": {},
    "yarn-unequal-mscale": {"rope_parameters": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "default-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "dense": {"first_k_dense_replace": 3},
    "all-moe-tied-bias": {"first_k_dense_replace": 0, "tie_word_embeddings": True, "attention_bias": True},
    "all-of-the-width-rotated": {"index_head_dim": 6, "index_topk": 2},
}


def pair(overrides: dict, attention: str = "sdpa"):
    """Ours and transformers' with the same random weights."""
    settings = SPARSE | overrides
    ours = tiny_model(**settings)
    theirs_config = copy.deepcopy(TINY | settings) | {"num_key_value_heads": TINY["num_attention_heads"]}
    theirs_config.pop("sparse_form", None)
    theirs = DeepseekV32ForCausalLM(DeepseekV32Config(**theirs_config)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, theirs):
        model.set_attn_implementation(attention)
        model.set_experts_implementation("eager")
    return ours, theirs


def as_sets(indices: torch.Tensor, keys: int) -> torch.Tensor:
    """[B, T, K] -> [B, T, S], True where selected; -1 is none."""
    return F.one_hot(indices.long() + 1, keys + 1).sum(-2)[..., 1:].bool()


@torch.no_grad()
def outputs(model, ids, **inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and, per layer, the selected keys."""
    chosen = []

    def keep(module, args, indices):
        chosen.append(as_sets(indices, ids.shape[1]))

    name = "selector" if isinstance(model, NanoDeepSeekForCausalLM) else "indexer"
    hooks = [getattr(layer.self_attn, name).register_forward_hook(keep) for layer in model.model.layers]
    logits = model(ids, **inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, chosen


def assert_equal_selection(ours: list[torch.Tensor], theirs: list[torch.Tensor], visible: torch.Tensor, topk: int):
    """Where fewer than k keys are visible, transformers' k best are filled up with hidden ones."""
    assert len(ours) == len(theirs) == 3
    assert (visible.sum(-1) > topk).any()
    for layer, (a, b) in enumerate(zip(ours, theirs)):
        assert torch.equal(a, b & visible), layer


@pytest.mark.parametrize("form", ["gathered", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_selected_keys(case, form):
    ours, theirs = pair(CASES[case] | {"sparse_form": form}, "sdpa" if form == "gathered" else "eager")
    ids = tokens(2, 31)
    (logits, chosen), (expected, expected_chosen) = outputs(ours, ids), outputs(theirs, ids)
    causal = torch.ones(2, 31, 31, dtype=torch.bool).tril()
    assert_equal_selection(chosen, expected_chosen, causal, ours.config.index_topk)
    assert_close(expected, logits, 1e-5)


@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_left_padding(form):
    ours, theirs = pair({"sparse_form": form})
    ids, mask = tokens(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[0, :9] = 0
    mask[2, :1] = 0
    batch = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    (logits, chosen), (expected, expected_chosen) = outputs(ours, ids, **batch), outputs(theirs, ids, **batch)
    real = mask.bool()
    visible = torch.ones(23, 23, dtype=torch.bool).tril() & real[:, None]
    # Queries that are padding have no defined selection.
    sets = [[x[real] for x in layers] for layers in (chosen, expected_chosen)]
    assert_equal_selection(*sets, visible[real], 5)
    assert_close(expected[real], logits[real], 1e-5)


@torch.no_grad()
def test_greedy_generation():
    ours, theirs = pair({})
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


# -- the equations -----------------------------------------------------------------------------------------------------


def by_the_equations(layer: DeepseekSparseAttention, hidden: torch.Tensor, theta: torch.Tensor, k: int):
    """V3.2 report eq. 1 and 2 over MLA's (V2 report, appendix C), token by token and head by head, no tensor trick
    shared -> outputs [T, d], scores [T, T] (minus infinity beyond t), the set of each token."""
    P = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    n, r, v, c, H, j, i = 10, 6, 14, 22, 3, 24, 10

    def norm(x, weight):
        return weight * x / (x.pow(2).mean() + 1e-6).sqrt()

    def turned(x, t, pairs):
        out = x.clone()
        for (a, b), angle in zip(pairs, t * theta):
            out[a] = x[a] * angle.cos() - x[b] * angle.sin()
            out[b] = x[b] * angle.cos() + x[a] * angle.sin()
        return out

    interleaved, halves = [(0, 1), (2, 3), (4, 5)], [(0, 3), (1, 4), (2, 5)]
    queries, latents, rope_keys, index_queries, index_keys, index_weights = [], [], [], [], [], []
    for t, h in enumerate(hidden):
        c_q = norm(P["q_a_proj.weight"] @ h, P["q_a_layernorm.weight"])
        q = (P["q_b_proj.weight"] @ c_q).view(H, n + r)
        queries.append([(head[:n], turned(head[n:], t, interleaved)) for head in q])
        kv = P["kv_a_proj_with_mqa.weight"] @ h
        latents.append(norm(kv[:c], P["kv_a_layernorm.weight"]))
        rope_keys.append(turned(kv[c:], t, interleaved))
        q = (P["indexer.wq_b.weight"] @ c_q).view(j, i)
        index_queries.append([turned(head, t, halves) for head in q])  # the first six numbers, the rest as they are
        x = P["indexer.wk.weight"] @ h
        x = (x - x.mean()) / ((x - x.mean()).pow(2).mean() + 1e-6).sqrt()
        index_keys.append(turned(P["indexer.k_norm.weight"] * x + P["indexer.k_norm.bias"], t, halves))
        index_weights.append(P["indexer.weights_proj.weight"] @ h * j**-0.5)
    W = P["kv_b_proj.weight"].view(H, n + v, c)
    T = len(hidden)
    scores, outputs, chosen = torch.full((T, T), float("-inf"), dtype=torch.float64), [], []
    for t in range(T):
        for s in range(t + 1):
            products = [w * (q @ index_keys[s]).clamp(min=0) for w, q in zip(index_weights[t], index_queries[t])]
            scores[t, s] = i**-0.5 * sum(products)
        chosen.append(sorted(sorted(range(t + 1), key=lambda s: -scores[t, s])[:k]))
        heads = []
        for (q_nope, q_rope), w in zip(queries[t], W):
            logits = [layer.scaling * (q_nope @ (w[:n] @ latents[s]) + q_rope @ rope_keys[s]) for s in chosen[t]]
            weights = torch.stack(logits).softmax(0)
            heads.append(sum(a * (w[n:] @ latents[s]) for a, s in zip(weights, chosen[t])))
        outputs.append(P["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs), scores, chosen


@pytest.mark.parametrize("form", ["gathered", "masked"])
@torch.no_grad()
def test_the_equations(form):
    config = tiny_config(**SPARSE | {"sparse_form": form})
    layer = DeepseekSparseAttention(config, 0).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    hidden = torch.randn(1, 17, 40, dtype=torch.float64)
    turns = RotaryEmbedding(config)(hidden, torch.arange(17)[None])
    selected = []
    layer.selector.register_forward_hook(lambda module, args, indices: selected.append(indices))
    output, _ = layer(hidden, turns, visibility=Visibility(17))
    theta = RotaryEmbedding(config).inv_freq.double()
    expected, scores, chosen = by_the_equations(layer, hidden[0], theta, 5)
    assert selected[0].tolist() == [[s + [-1] * (5 - len(s)) for s in chosen]]
    index = layer.indexer(hidden, layer.query_latent(hidden), turns)
    visible = scores.isfinite()
    assert_close(scores[visible], index_scores(*index)[0][visible], 1e-6)  # cos and sin are fp32
    assert_close(expected, output[0], 1e-6)


# -- configs and checkpoints -------------------------------------------------------------------------------------------

NAMES = {
    "wq_b.weight": (24 * 10, 18),
    "wk.weight": (10, 40),
    "k_norm.weight": (10,),
    "k_norm.bias": (10,),
    "weights_proj.weight": (24, 40),
}


def test_official_parameter_names():
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny_model(**SPARSE).named_parameters()}
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn.indexer."
        assert {name.removeprefix(prefix): s for name, s in shapes.items() if name.startswith(prefix)} == NAMES


def test_a_config_that_transformers_writes(tmp_path):
    """It spells out every layer's kind, and a head_dim of its own that is not V3.2's."""
    _, theirs = pair({"first_k_dense_replace": 2})
    theirs.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert len(written["layer_types"]) == len(written["mlp_layer_types"]) == 3
    del written["first_k_dense_replace"]
    (tmp_path / "config.json").write_text(json.dumps(written | {"head_dim": 192}))
    read = NanoDeepSeekConfig.from_pretrained(tmp_path)
    expected = tiny_config(**SPARSE, first_k_dense_replace=2)
    for field in {*TINY, *SPARSE, "head_dim", "qk_head_dim", "dsa_stage", "scoring_func", "topk_method"}:
        assert getattr(read, field) == getattr(expected, field), field
    assert [read.is_moe_layer(i) for i in range(3)] == [False, False, True]
    assert torch.equal(RotaryEmbedding(read).inv_freq, theirs.model.rotary_emb.inv_freq)
    again = tmp_path / "again"
    read.save_pretrained(again)
    assert NanoDeepSeekConfig.from_pretrained(again).to_dict() == read.to_dict()


def test_configs_of_other_layers_are_refused():
    values = {"model_type": "deepseek_v32", "num_hidden_layers": 3}
    for name in ("indexed_attention", "deepseek_sparse_attention"):  # the second in transformers 5.17
        assert NanoDeepSeekConfig.from_dict(values | {"layer_types": [name] * 3}).index_topk == 2048
    with pytest.raises(ValueError, match=r"layer_types=\['indexed_attention', 'full_attention'\] is not possible"):
        NanoDeepSeekConfig.from_dict(values | {"layer_types": ["indexed_attention", "full_attention"]})
    with pytest.raises(ValueError, match=r"mlp_layer_types=.* dense layers must come first"):
        NanoDeepSeekConfig.from_dict(values | {"mlp_layer_types": ["dense", "sparse", "dense"]})


def test_a_published_config(tmp_path):
    """V3.2's own layout: rope_scaling beside rope_theta. It lacks what its class knows."""
    published = {key: value for key, value in TINY.items() if key != "rope_parameters"} | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "num_key_value_heads": 3,
        "rope_theta": 10000,
        "rope_scaling": {("type" if key == "rope_type" else key): value for key, value in YARN.items()},
        "index_topk": 5,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"},
        "transformers_version": "4.44.2",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    read = NanoDeepSeekConfig.from_pretrained(tmp_path)
    assert (read.index_topk, read.index_n_heads, read.index_head_dim) == (5, 64, 128)
    assert (read.scoring_func, read.topk_method, read.head_dim) == ("sigmoid", "noaux_tc", 6)
    assert torch.equal(RotaryEmbedding(read).inv_freq, RotaryEmbedding(tiny_config()).inv_freq)
    assert read.has_indexer and read.dsa_stage == "sparse" and not read.index_fp8


@pytest.mark.parametrize("ours_writes", [True, False])
def test_checkpoints_are_interchangeable(ours_writes, tmp_path):
    ours, theirs = pair({})
    written, twin = (ours, theirs) if ours_writes else (theirs, ours)
    written.save_pretrained(tmp_path)
    reader = DeepseekV32ForCausalLM if ours_writes else NanoDeepSeekForCausalLM
    settings = {"config": theirs.config} if ours_writes else {}  # ours reads a config of theirs, not theirs one of ours
    read, info = reader.from_pretrained(tmp_path, output_loading_info=True, **settings)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    read.set_experts_implementation("eager")
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    (logits, chosen), (expected, expected_chosen) = outputs(read, tokens()), outputs(twin, tokens())
    assert_same(expected, logits)
    assert all(map(torch.equal, chosen, expected_chosen))


# -- bf16 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_weights_are_computed_in_fp32(tmp_path):
    """w = W h: kept in fp32 when a checkpoint is read in bf16, and computed so where .to() rounded it, or autocast."""
    model = tiny_model(**SPARSE)
    model.save_pretrained(tmp_path)
    read = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in read.named_parameters():
        assert parameter.dtype == (torch.float32 if "weights_proj" in name else torch.bfloat16), name
    hidden, c_q = torch.randn(2, 9, 40).bfloat16(), torch.randn(2, 9, 18).bfloat16()
    turns = read.model.rotary_emb(hidden, torch.arange(9)[None])
    for case in (read, model, copy.deepcopy(model).to(torch.bfloat16)):
        indexer = case.model.layers[1].self_attn.indexer
        dtype = indexer.wk.weight.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            q, w, k = indexer(hidden.to(dtype), c_q.to(dtype), turns)
        expected = hidden.float() @ indexer.weights_proj.weight.float().mT * 24**-0.5 * 10**-0.5
        assert w.dtype == torch.float32
        assert_close(expected, w, 1e-6)
        assert index_scores(q, w, k).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_bf16(form):
    """Fed the selection of fp32, bf16 is off by its rounding; its own selection is mostly the same."""
    model, ids = tiny_model(**SPARSE | {"sparse_form": form, "n_routed_experts": None}), tokens(2, 31)
    exact = model(ids, output_index_topk_indices=True)
    model = model.to(torch.bfloat16)
    own = model(ids, output_index_topk_indices=True)
    replayed = model(ids, index_topk_indices=exact.index_topk_indices).logits
    assert replayed.dtype == torch.bfloat16
    assert_close(exact.logits, replayed.float(), 4e-2)
    for a, b in zip(exact.index_topk_indices, own.index_topk_indices):
        a, b = as_sets(a, 31), as_sets(b, 31)
        assert (a & b).sum() > 0.85 * a.sum()
    cache = LatentCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 13], 1)]
    assert_close(own.logits[:, :17].float(), parts[0].float(), 4e-2)
