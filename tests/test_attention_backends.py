"""Every attention backend, in both forms of MLA, in GQA and with selected keys: padded, packed and cached batches are
separate documents.

The reference is eager attention, expanded, on each document alone.
"""

import functools
import importlib.util

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

from modeling_nanodeepseek import LatentCache, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.attention import MultiHeadLatentAttention
from modeling_nanodeepseek.masks import flash_lengths, packed_documents
from tests.attention_backends import BACKENDS, use_backend
from tests.conftest import EARLIER_TORCH, SPARSE, assert_close, rms_ratio, tiny_config, tiny_model, tokens

KINDS = {
    "expanded": {"attention_form": "expanded"},
    "absorbed": {"attention_form": "absorbed"},
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "gqa-one-key-head": {"attention_type": "gqa", "num_key_value_heads": 1, "head_dim": 6, "qk_norm": True},
    "dsa": SPARSE,
    "dsa-gathered": SPARSE | {"sparse_form": "gathered"},
}
REFERENCES = {"absorbed": "expanded", "dsa-gathered": "dsa"}
LENGTHS = (7, 5, 1, 11)
DOCUMENTS = [tokens(1, n, seed=n)[0] for n in LENGTHS]
PROBES = torch.randn(sum(LENGTHS), 97, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).split(LENGTHS)
DENSE = {"n_routed_experts": None, "num_hidden_layers": 2}


def double_model(kind: str, **overrides) -> NanoDeepSeekForCausalLM:
    return tiny_model(**DENSE | KINDS[kind] | overrides).double()


def lay_out(rows: list[list[int | str]], with_mask: bool) -> dict[str, torch.Tensor]:
    """Rows of documents (their number) and runs of padding ("pad3") as a batch; positions start anew."""
    ids, positions, mask = [], [], []
    for row in rows:
        parts = [DOCUMENTS[x] if isinstance(x, int) else torch.full((int(x[3:]),), 3) for x in row]
        real = [torch.full((len(p),), isinstance(x, int)) for x, p in zip(row, parts)]
        ids.append(torch.cat(parts))
        mask.append(torch.cat(real).long())
        positions.append(torch.cat([torch.arange(len(p)) * r for p, r in zip(parts, real)]))
    batch = {"input_ids": torch.stack(ids), "position_ids": torch.stack(positions)}
    return batch | ({"attention_mask": torch.stack(mask)} if with_mask else {})


# name: rows, with a mask?
LAYOUTS = {
    "causal": ([[3]], False),
    "right-padded": ([[0, "pad4"], [1, "pad6"], [2, "pad10"], [3]], True),
    "left-padded": ([["pad4", 0], ["pad6", 1], ["pad10", 2], [3]], True),
    "packed": ([[0, 1, 2, 3]], False),
    "packed-mask-of-ones": ([[0, 1, 2, 3]], True),
    "packed-rows": ([[0, 1], [2, 3]], False),
    "packed-rows-mask-of-ones": ([[0, 1], [2, 3]], True),
    "packed-beside-padding": ([["pad1", 0, 1, "pad2"], [2, 3, "pad3"]], True),
}


@functools.cache
@torch.enable_grad()
def reference(kind: str) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Logits of each document alone and the gradients of its probe."""
    model = use_backend(double_model(REFERENCES.get(kind, kind)), "eager")
    logits, gradients = [], []
    for document, probe in zip(DOCUMENTS, PROBES):
        model.zero_grad()
        logits.append(model(document[None]).logits[0])
        (logits[-1] * probe).sum().backward()
        # An indexer learns from its own loss alone.
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if ".indexer." not in name})
    return [x.detach() for x in logits], gradients


def by_document(values: torch.Tensor, rows: list[list[int | str]]) -> dict[int, torch.Tensor]:
    """The parts of [B, T, ...] that belong to the documents laid out by `rows`."""
    found = {}
    for row, row_values in zip(rows, values):
        sizes = [len(DOCUMENTS[x]) if isinstance(x, int) else int(x[3:]) for x in row]
        found |= {x: part for x, part in zip(row, row_values.split(sizes)) if isinstance(x, int)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("portable_backends")
def test_a_batch_is_its_documents(backend, kind, layout):
    """Logits, and the gradients of every parameter, in fp64."""
    rows, with_mask = LAYOUTS[layout]
    model = use_backend(double_model(kind), backend)
    logits = model(**lay_out(rows, with_mask)).logits
    assert logits.isfinite().all()  # of padding, too
    expected_logits, expected_gradients = reference(kind)
    parts = by_document(logits, rows)
    for document, part in parts.items():
        assert_close(expected_logits[document], part, 1e-10, f"document {document}")
    sum((part * PROBES[document]).sum() for document, part in parts.items()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".indexer." not in name}
    for name, gradient in gradients.items():
        expected = sum(expected_gradients[document][name] for document in parts)
        assert_close(expected, gradient, 1e-10, name)


@pytest.mark.parametrize("chunks", [[6, 1, 4], [1] * 11])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
@pytest.mark.usefixtures("portable_backends")
def test_a_cached_batch_is_its_documents(backend, kind, chunks):
    """Left-padded rows read in pieces, some of nothing but padding."""
    rows = LAYOUTS["left-padded"][0]
    batch = lay_out(rows, True)
    model = use_backend(double_model(kind), backend)
    cache, logits, end = model.model.new_cache(), [], 0
    for size in chunks:
        start, end = end, end + size
        piece = {name: batch[name][:, start:end] for name in ("input_ids", "position_ids")}
        mask = batch["attention_mask"][:, :end]
        logits.append(model(**piece, attention_mask=mask, past_key_values=cache).logits)
    for document, part in by_document(torch.cat(logits, 1), rows).items():
        assert_close(reference(kind)[0][document], part, 1e-10, f"document {document}")


WAYS = {"greedy": {}, "static": {"cache_implementation": "static", "disable_compile": True}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["auto", *KINDS])
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.usefixtures("portable_backends")
def test_generation_is_that_of_eager(backend, kind, way):
    if (backend, way) == ("flex_attention", "static"):
        pytest.skip("generate() of transformers 5.23 calls BlockMask.contiguous, which does not exist")
    batch = lay_out(LAYOUTS["left-padded"][0], True)
    batch.pop("position_ids")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | WAYS[way]
    model = tiny_model(**KINDS.get(kind, {}))
    expected = use_backend(model, "eager").generate(**batch, **settings)
    assert torch.equal(expected, use_backend(model, backend).generate(**batch, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths_too", [True, False])
@pytest.mark.usefixtures("portable_backends")
def test_batches_of_the_flattening_collator(lengths_too, backend):
    """transformers' collator for packed training: positions, and for flash the lengths."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_too)
    batch = collate([{"input_ids": document.tolist()} for document in DOCUMENTS])
    model = use_backend(double_model("expanded").train(), backend)
    output = model(**batch, skip_logits=False)
    assert_close(torch.cat(reference("expanded")[0]), output.logits[0], 1e-10)
    separate = [F.cross_entropy(x[:-1], d[1:], reduction="sum") for x, d in zip(reference("expanded")[0], DOCUMENTS)]
    assert output.loss.item() == pytest.approx(sum(separate).item() / (sum(LENGTHS) - len(LENGTHS)), rel=1e-6)


def test_where_documents_start():
    """By positions alone without padding; beside padding, positions may count it, skip it or be anything on it."""

    def found(positions, real=None):
        documents = packed_documents(torch.tensor([positions]), None if real is None else torch.tensor([real]))
        return None if documents is None else documents[0].tolist()

    assert found([0, 1, 2, 0, 0, 1]) == [0, 0, 0, 1, 2, 2]
    assert found([4, 5, 9, 10]) == [0, 0, 1, 1]
    assert found([3, 4, 5]) is None
    for one_document in ([0, 0, 0, 1, 2], [1, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 5, 6, 7]):  # left padding
        assert found(one_document, [0, 0, 1, 1, 1]) is None
    for one_document in ([0, 1, 1, 1, 2], [0, 1, 2, 3, 4], [0, 1, 0, 0, 2]):  # a hole
        assert found(one_document, [1, 1, 0, 0, 1]) is None
    assert found([0, 1, 2, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0]) == [0, 0, 0, 1, 1, 1, 1]
    assert found([0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]) == [0, 0, 0, 0, 1, 2]


def test_lengths_for_flash():
    lengths = flash_lengths(torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]))
    assert lengths["cu_seq_lens_q"].tolist() == lengths["cu_seq_lens_k"].tolist() == [0, 2, 5, 9, 10]
    assert lengths["cu_seq_lens_q"].dtype == torch.int32 and lengths["max_length_q"] == lengths["max_length_k"] == 4


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.usefixtures("portable_backends")
def test_a_mask_of_ones_own_under_flex(rows, kind, boolean):
    """flex adds every tensor it is given, so True would become +1."""
    model, ids = double_model(kind), tokens(2, 14)
    visible = torch.ones(14, 14, dtype=torch.bool).tril().triu(-3)[None, None].expand(rows, 1, -1, -1)
    mask = visible if boolean else torch.zeros(visible.shape).double().masked_fill(~visible, float("-inf"))
    expected = use_backend(model, "eager")(ids, attention_mask=mask).logits
    assert_close(expected, use_backend(model, "flex_attention")(ids, attention_mask=mask).logits, 1e-10)
    assert rms_ratio(expected, model(ids).logits) > 1e-3


@pytest.mark.usefixtures("portable_backends")
def test_flash_takes_no_mask_of_ones_own():
    model = use_backend(double_model("expanded"), "flash_attention_3")
    with pytest.raises(ValueError, match=r"'flash_attention_3' takes no 4-D mask \(given \(1, 1, 5, 5\)\).*sdpa"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5))


@pytest.mark.parametrize("backend", [*BACKENDS, "flash_attention_2", "kernels-community/flash-attn2", "someone's"])
@pytest.mark.parametrize("rank", [250, 251])  # with qk_rope_head_dim 6: 256, and one too many
def test_auto_absorbs_as_far_as_kernels_go(rank, backend):
    config = tiny_config(kv_lora_rank=rank)
    config._attn_implementation = backend
    layer = MultiHeadLatentAttention(config, 0)
    no_limit, limited = backend in ("eager", "sdpa"), "flash" in backend or backend == "flex_attention"
    assert layer.expands(1, 1000) is not (no_limit or limited and rank == 250)
    assert layer.expands(1000, 1000)
    config.attention_form = "absorbed"
    if "flash" in backend and rank == 251:
        with pytest.raises(ValueError, match="'absorbed' .* kv_lora_rank . qk_rope_head_dim is 257. Use .*'auto'"):
            layer.expands(1, 1000)
    else:
        assert not layer.expands(1000, 1000)
    config.attention_form = "expanded"
    assert layer.expands(1, 1000)


def test_the_backend_is_chosen_as_for_any_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert NanoDeepSeekForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    for backend in ("eager", "sdpa", "flex_attention"):
        model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, attn_implementation=backend)
        assert model.config._attn_implementation == backend
        assert model.model.layers[0].self_attn.config._attn_implementation == backend
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="fastest"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path, attn_implementation="fastest")
    with pytest.raises(ValueError, match="fastest"):
        model.set_attn_implementation("fastest")


def test_flash_that_is_not_installed_says_so(tmp_path):
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("kernels"):
        pytest.skip("it is installed")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="[Ff]lash"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2", dtype=torch.bfloat16)


@torch.no_grad()
def test_compiled_flex_on_a_cpu():
    """The real kernel, forward only: a CPU has no backward for it."""
    form = "expanded" if EARLIER_TORCH else "absorbed"  # before, its CPU kernel refuses values that are also the keys
    model = tiny_model(attention_form=form, num_attention_heads=4, **DENSE)
    batch = lay_out(*LAYOUTS["packed-beside-padding"])
    expected = use_backend(model, "eager")(**batch).logits
    actual = use_backend(model, "flex_attention")(**batch).logits
    real = batch["attention_mask"].bool()
    assert_close(expected[real], actual[real], 1e-5)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_SIZES = {
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def gpu_kind(kind: str) -> dict:
    return GPU_SIZES | ({"attention_form": kind} if kind != "gqa" else KINDS["gqa"] | {"head_dim": 64})


@needs_gpu
@pytest.mark.parametrize("layout", ["causal", "left-padded", "packed-rows", "packed-beside-padding"])
@pytest.mark.parametrize("kind", ["expanded", "absorbed", "gqa"])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_real_kernels_on_a_gpu(backend, kind, layout):
    """Heads of 192 and 128 as in V3: in bf16 no further from eager in fp32 than eager's own bf16 is, twice at most."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(backend)
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}")
    rows, with_mask = LAYOUTS[layout]
    batch = {name: x.cuda() for name, x in lay_out(rows, with_mask).items()}

    def run(attention: str, dtype: torch.dtype, attention_form: str):
        model = tiny_model(**DENSE | gpu_kind(kind) | {"attention_form": attention_form}).to("cuda", dtype)
        model.set_attn_implementation(attention)
        logits = torch.cat(list(by_document(model(**batch).logits, rows).values()))
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
        (logits * probe).sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    form = "auto" if kind == "gqa" else kind
    exact, rounded, actual = (
        run(*settings)
        for settings in (
            ("eager", torch.float32, "expanded"),
            ("eager", torch.bfloat16, form),
            (backend, torch.bfloat16, form),
        )
    )
    for expected, measure, value in zip(exact, rounded, actual):
        assert_close(expected, value, 2 * rms_ratio(expected, measure) + 1e-3)


@needs_gpu
@pytest.mark.parametrize("kind", ["expanded", "absorbed", "gqa"])
@torch.no_grad()
def test_flex_decodes_on_a_gpu(kind):
    model = tiny_model(**DENSE | gpu_kind(kind)).cuda()
    ids = tokens(2, 40).cuda()
    expected = use_backend(model, "eager")(ids).logits[:, 30:]
    use_backend(model, "flex_attention")
    cache = LatentCache(model.config) if kind != "gqa" else model.model.new_cache()
    model(ids[:, :30], past_key_values=cache)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    assert_close(expected, torch.cat(steps, 1), 1e-2)  # tensor cores round fp32 to tf32
