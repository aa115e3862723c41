"""The stages of sparse training: what learns in each, and the indexer's loss against a transcription of the report."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_nanodeepseek import (
    LatentCache,
    NanoDeepSeekForCausalLM,
    NanoDeepSeekForSequenceClassification,
    update_expert_bias,
)
from modeling_nanodeepseek import indexer as indexer_file
from modeling_nanodeepseek.balancing import routers
from modeling_nanodeepseek.indexer import LightningIndexer
from tests.conftest import assert_close, checkpoint_activations, rms_ratio, tiny_config, tiny_model, tokens

INDEXER = {"index_topk": 5, "index_n_heads": 6, "index_head_dim": 8}
STAGES = ("warmup", "sparse")


def stage_model(stage: str, **overrides) -> NanoDeepSeekForCausalLM:
    return tiny_model(**INDEXER | {"dsa_stage": stage} | overrides).train()


def indexer_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".indexer." in name}


def backbone_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".indexer." not in name}


def gradients(loss, parameters: dict) -> dict[str, torch.Tensor | None]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return dict(zip(parameters, found))


def layout(kind: str) -> tuple[dict, torch.Tensor]:
    """A batch [2, 31] with labels, and who sees whom in it, [2, 31, 31]. index_topk is 5: documents of 3 and 4 tokens,
    and the first queries of every other, see fewer keys."""
    ids = tokens()
    B, T = ids.shape
    batch, labels = {"input_ids": ids}, ids.clone()
    real, documents = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long)
    if "padded" in kind:
        real[0, :4], real[1, 23:] = False, False
        labels[~real] = -100
        batch["attention_mask"] = real.long()
    if "packed" in kind:
        positions = torch.arange(T).expand(B, T).clone()
        for row, starts in enumerate(((7, 11, 14), (3, 20))):
            for start in starts:
                documents[row, start:] += 1
                positions[row, start:] = torch.arange(T - start)
                labels[row, start] = -100
        batch["position_ids"] = positions
    if "partial" in kind:
        labels[0, :13], labels[1, 5:9] = -100, -100
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    visible = causal & real[:, None] & (documents[:, :, None] == documents[:, None])
    return batch | {"labels": labels}, visible


LAYOUTS = ("plain", "padded", "packed", "packed and padded", "partial")


def observe(model, batch):
    """What eager attention and the indexers compute: per layer the weights [B, H, T, S] and (q, w, k)."""
    seen, handles = [], []
    for module in model.modules():
        if isinstance(module, LightningIndexer):
            handles.append(module.register_forward_hook(lambda m, a, output: seen.append(output)))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(attentions) == model.config.num_hidden_layers
    return attentions, seen


def literal_scores(q, w, k):
    """Report eq. 1; both constant factors are in w."""
    return torch.einsum("btj,btjs->bts", w, torch.einsum("btji,bsi->btjs", q, k).relu())


def chosen_keys(scores, visible, topk):
    """The `topk` visible keys of the highest scores; of equal ones (ReLU makes them: 0) the later."""
    backwards = scores.masked_fill(~visible, float("-inf")).flip(-1)
    best = scores.shape[-1] - 1 - backwards.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(visible).scatter(-1, best, True) & visible


def literal_loss(model, batch, visible, items=None) -> torch.Tensor:
    """The report's section 2.1.1, query by query."""
    attentions, seen = observe(model, batch)
    targets = batch["labels"][:, 1:] != -100
    total = 0.0
    for weights, (q, w, k) in zip(attentions, seen):
        scores, allowed = literal_scores(q, w, k), visible
        if model.config.dsa_stage == "sparse":
            allowed = chosen_keys(scores.detach(), visible, model.config.index_topk)
        for row, query in targets.nonzero().tolist():
            keys = allowed[row, query].nonzero().flatten()
            if len(keys) == 0:
                continue
            summed = weights[row, :, query, keys].detach().sum(0)
            p = summed / summed.sum()
            log_q = scores[row, query, keys].log_softmax(0)
            total = total + (p * (p.log() - log_q)).sum()
    return total / (targets.sum() if items is None else items)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_is_the_reports(stage, kind):
    batch, visible = layout(kind)
    model = stage_model(stage).double()
    parameters = indexer_parameters(model)
    expected = literal_loss(model, batch, visible)
    wanted = gradients(expected, parameters)
    for form in ("gathered", "masked"):
        model.config.sparse_form = form
        loss = model(**batch).index_loss
        assert loss > 0.1
        assert_close(expected, loss, 1e-6, form)
        for name, gradient in gradients(loss, parameters).items():
            assert_close(wanted[name], gradient, 1e-5, f"{form} {name}")


@pytest.mark.parametrize("numbers", [1, 1000, 10**9])
@pytest.mark.parametrize("stage", STAGES)
def test_chunks_change_nothing(stage, numbers, monkeypatch):
    batch, visible = layout("packed and padded")
    model = stage_model(stage).double()
    whole = model(**batch)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setitem(indexer_file.CHUNK_NUMBERS, "cpu", numbers)
    loss = model(**batch).loss
    loss.backward()
    assert_close(whole.loss, loss, 1e-12)
    for name, gradient in expected.items():
        assert_close(gradient, model.get_parameter(name).grad, 1e-9, name)


@pytest.mark.parametrize("stage", STAGES)
def test_each_part_learns_from_its_own_loss(stage):
    """Also where nothing is frozen, and down to the embeddings."""
    model = stage_model(stage, aux_loss_alpha=0.1)
    model.requires_grad_(True)
    ids = tokens()
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, labels=ids)
    indexer, backbone = indexer_parameters(model), backbone_parameters(model) | {"embedded": embedded}
    backbone.pop("model.embed_tokens.weight")
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(output.index_loss, indexer).values())
    assert all(g is None for g in gradients(output.index_loss, backbone).values())
    assert all(g is None for g in gradients(output.ce_loss, indexer).values())
    assert all(g is not None for g in gradients(output.ce_loss, backbone).values())
    if stage == "sparse":
        whole = gradients(output.loss, indexer)
        for name, gradient in gradients(output.index_loss, indexer).items():
            assert torch.equal(gradient, whole[name]), name
    expected = output.ce_loss + output.index_loss
    if stage == "sparse":
        expected = expected + 0.1 * output.balance_loss
    assert_close(expected, output.loss, 1e-6)


def test_the_losses_weight():
    batch, _ = layout("plain")
    output = stage_model("sparse", index_loss_coef=0.25, aux_loss_alpha=0.0)(**batch)
    assert_close(output.ce_loss + 0.25 * output.index_loss, output.loss, 1e-6)
    output = stage_model("sparse", index_loss_coef=0.0, aux_loss_alpha=0.0)(**batch)
    assert output.index_loss is None and torch.equal(output.loss, output.ce_loss)


def test_warm_up_changes_the_indexer_alone():
    """One step of an optimizer that was given every parameter: all else is bit-equal, biases and counts too."""
    model = stage_model("warmup", aux_loss_alpha=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    output = model(tokens(), labels=tokens())
    assert output.balance_loss is None and not output.ce_loss.requires_grad
    output.loss.backward()
    optimizer.step()
    assert all(gate.tokens_per_expert is None for gate in routers(model))
    assert update_expert_bias(model, gamma=0.5, centre=True) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor) == (".indexer." not in name), name
    for name, tensor in model.named_buffers():
        assert torch.equal(buffers[name], tensor), name


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_is_the_whole_batch(stage):
    batch, visible = layout("packed partial")
    model = stage_model(stage).double()
    targets = int((batch["labels"][:, 1:] != -100).sum())
    whole = model(**batch, num_items_in_batch=targets)
    assert_close(literal_loss(model, batch, visible, items=targets), whole.index_loss, 1e-6)
    parameters = indexer_parameters(model)
    expected = gradients(whole.index_loss, parameters)
    parts = [model(**{n: t[i : i + 1] for n, t in batch.items()}, num_items_in_batch=targets) for i in (0, 1)]
    assert_close(whole.index_loss, sum(part.index_loss for part in parts), 1e-12)
    assert_close(model(**batch).index_loss, whole.index_loss, 1e-12)
    for name, gradient in gradients(sum(part.index_loss for part in parts), parameters).items():
        assert_close(expected[name], gradient, 1e-9, name)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointed_activations(stage):
    batch, _ = layout("packed and padded")
    results = []
    for checkpointed in (False, True):
        model = stage_model(stage, aux_loss_alpha=0.1)
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        output = model(**batch)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((output.loss.detach(), output.index_loss.detach(), grads))
    (loss, kl, grads), (again, kl_again, grads_again) = results
    assert torch.equal(loss, again) and torch.equal(kl, kl_again)
    assert grads.keys() == grads_again.keys()
    for name, gradient in grads.items():
        assert_close(gradient, grads_again[name], 1e-6, name)


@pytest.mark.parametrize("stage", STAGES)
def test_reentrant_checkpoints_are_refused(stage):
    model = stage_model(stage, aux_loss_alpha=0.0)
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(ValueError, match="indexer's loss has no gradient.*use_reentrant.*index_loss_coef=0"):
        model(tokens(), labels=tokens())
    with torch.no_grad():
        assert model(tokens(), labels=tokens()).index_loss > 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_close(stage, autocast):
    """KL within a few of bf16's roundings, 2^-8, of fp32's; gradients coarser, since ReLU's derivative jumps."""
    batch, _ = layout("packed and padded")
    exact = stage_model(stage, n_routed_experts=None, num_hidden_layers=1)
    rough = stage_model(stage, n_routed_experts=None, num_hidden_layers=1)
    if stage == "sparse":  # the same keys: which are chosen may turn on a rounding
        visible = exact.eval()(**{n: t for n, t in batch.items() if n != "labels"}, output_index_topk_indices=True)
        batch["index_topk_indices"] = visible.index_topk_indices
        exact.train()
    if not autocast:
        rough.to(torch.bfloat16)
    expected = exact(**batch)
    expected.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = rough(**batch)
    output.loss.backward()
    assert output.index_loss.dtype == torch.float32
    assert_close(expected.index_loss, output.index_loss, 0.03)
    for (name, a), b in zip(exact.named_parameters(), rough.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert b.grad.dtype == b.dtype and rms_ratio(a.grad, b.grad) < 0.2, name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_recall_is_the_mass_on_the_chosen_keys(kind):
    batch, visible = layout(kind)
    model = stage_model("warmup").double().eval()
    attentions, seen = observe(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found = model(**inputs, output_index_recall=True).index_recall
    many = visible.sum(-1) > 5
    assert many.any() and not many.all()
    for weights, (q, w, k), recall in zip(attentions, seen, found, strict=True):
        kept = chosen_keys(literal_scores(q, w, k), visible, 5)
        expected = (weights.mean(1) * kept).sum(-1)
        assert torch.equal(recall.isnan(), ~many)
        assert (expected[many] < 0.95).any()
        assert_close(expected[many], recall[many], 1e-6)
    # The first layer's input is the same in every stage.
    model.set_dsa_stage("sparse")
    sparse = model(**inputs, output_index_recall=True).index_recall
    assert_close(found[0][many], sparse[0][many], 1e-12)


def trained(model) -> set[str]:
    """What requires gradients: indexer, rest."""
    return {"indexer" if ".indexer." in name else "rest" for name, p in model.named_parameters() if p.requires_grad}


def untrained(model) -> set[str]:
    return {"indexer" if ".indexer." in name else "rest" for name, p in model.named_parameters() if not p.requires_grad}


LEARNS = {"dense": ({"rest"}, {"indexer"}), "warmup": ({"indexer"}, {"rest"}), "sparse": ({"rest", "indexer"}, set())}


def test_stages_of_a_model(tmp_path):
    """What is frozen follows the stage, also in a model read from disk."""
    model = stage_model("sparse")
    for stage in ("warmup", "dense", "sparse", "dense", "warmup"):
        model.set_dsa_stage(stage)
        assert (trained(model), untrained(model)) == LEARNS[stage]
        model.save_pretrained(tmp_path)
        again = NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
        assert again.config.dsa_stage == stage and (trained(again), untrained(again)) == LEARNS[stage]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
    model.config.index_loss_coef = 0.0
    model.set_dsa_stage("sparse")
    assert (trained(model), untrained(model)) == ({"rest"}, {"indexer"})


def test_dense_stage_is_the_model_without_an_indexer():
    batch, _ = layout("packed and padded")
    with_one, without = stage_model("dense"), tiny_model().train()
    without.load_state_dict({n: t for n, t in with_one.state_dict().items() if ".indexer." not in n})
    a, b = with_one(**batch), without(**batch)
    assert a.index_loss is None and torch.equal(a.loss, b.loss)
    a.loss.backward(), b.loss.backward()
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter.grad, with_one.get_parameter(name).grad), name


def test_a_dense_model_gets_an_indexer():
    dense = tiny_model(tie_word_embeddings=True).train()
    batch, _ = layout("packed")
    model = dense.with_indexer(**INDEXER)
    assert (
        model.config.dsa_stage == "warmup" and model.training and (trained(model), untrained(model)) == LEARNS["warmup"]
    )
    assert dense.config.index_topk is None and trained(dense) == {"rest"}
    for name, tensor in dense.state_dict().items():
        assert model.state_dict()[name].data_ptr() == tensor.data_ptr(), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(**batch).ce_loss, dense(**batch).ce_loss)
    fresh = indexer_parameters(model)
    assert len(fresh) == 5 * 3 and {p.dtype for p in fresh.values()} == {torch.float32}
    assert 0.01 < fresh["model.layers.0.self_attn.indexer.wq_b.weight"].std() < 0.03  # initializer_range

    half = tiny_model().to(torch.bfloat16).with_indexer(**INDEXER)
    dtypes = {name.split(".indexer.")[1]: p.dtype for name, p in indexer_parameters(half).items()}
    assert dtypes.pop("weights_proj.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


def test_a_classifier_freezes_its_indexer():
    """It computes no loss for it, and a parameter without a gradient stops DDP."""
    for stage in ("dense", "warmup", "sparse"):
        model = NanoDeepSeekForSequenceClassification(tiny_config(**INDEXER, dsa_stage=stage, pad_token_id=0))
        assert (trained(model), untrained(model)) == ({"rest"}, {"indexer"})
        model.set_dsa_stage("sparse")
        assert (trained(model), untrained(model)) == ({"rest"}, {"indexer"})
        model.train()(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        assert all((p.grad is None) == (".indexer." in name) for name, p in model.named_parameters())


REFUSED = {
    "unknown stage": (lambda: stage_model("sparse").set_dsa_stage("cool"), "dsa_stage='cool'.*'dense', 'warmup'"),
    "warm-up of nothing": (lambda: tiny_model().set_dsa_stage("warmup"), "no indexer.*with_indexer"),
    "a config of that": (lambda: tiny_config(dsa_stage="warmup"), "dsa_stage='warmup'.*no indexer"),
    "a loss of no weight": (lambda: stage_model("warmup", index_loss_coef=0.0), "index_loss_coef=0.0.*warmup"),
    "sparse without keys": (lambda: tiny_model().set_dsa_stage("sparse"), "selects no keys.*'warmup' first"),
    "warm-up of a pattern": (
        lambda: tiny_model(index_topk=5, index_pattern="fixed", index_window=5).set_dsa_stage("warmup"),
        "fixed pattern has no indexer",
    ),
    "a second indexer": (
        lambda: stage_model("dense").with_indexer(index_topk=7),
        "has an indexer already.*index_topk=5",
    ),
    "another field": (
        lambda: tiny_model().with_indexer(index_topk=5, hidden_size=8),
        "begin with 'index_'.*hidden_size",
    ),
    "a misspelt field": (lambda: tiny_model().with_indexer(index_topk=5, index_head=8), "index_head.*did you mean"),
    "no query latent": (lambda: tiny_model(q_lora_rank=None).with_indexer(**INDEXER), "q_lora_rank=None.*query latent"),
    "grouped queries": (
        lambda: tiny_model(attention_type="gqa", num_key_value_heads=3, head_dim=8).with_indexer(**INDEXER),
        "index_topk=5.*MLA alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_stages(case):
    build, message = REFUSED[case]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        build()


@pytest.mark.parametrize("stage", ["spares", "warm-up"])
def test_a_stage_misspelt_by_hand(stage):
    model = stage_model("sparse")
    model.config.dsa_stage = stage
    with pytest.raises(ValueError, match="dsa_stage='?.*is not possible: allowed are"):
        model(tokens())


def test_the_number_of_keys_changed_by_hand():
    """All that depends on it follows: the choice, the mask, and when attention is dense."""
    ids, real = tokens(), torch.ones(2, 31, dtype=torch.long)
    real[0, :6] = 0
    for before, after in ((20, 5), (5, 20), (64, 5), (5, 64)):
        model = tiny_model(**INDEXER | {"index_topk": before})
        model.config.index_topk = after
        expected = tiny_model(**INDEXER | {"index_topk": after})(ids, attention_mask=real).logits
        assert_close(expected, model(ids, attention_mask=real).logits, 1e-6)


def test_a_refused_stage_leaves_the_model_alone():
    model = tiny_model()
    with pytest.raises(ValueError):
        model.set_dsa_stage("warmup")
    assert model.config.dsa_stage == "sparse" and trained(model) == {"rest"}


# -- beside other parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_runs_a_layer_twice_however_many_chunks(stage, monkeypatch):
    """Gradients are taken in the forward, where a checkpoint's hooks would run the layer again for every chunk."""
    monkeypatch.setitem(indexer_file.CHUNK_NUMBERS, "cpu", 500)
    calls = []
    original = indexer_file.kl_divergence
    monkeypatch.setattr(indexer_file, "kl_divergence", lambda *args: (calls.append(1), original(*args))[1])
    counts = []
    for checkpointed in (False, True):
        model = stage_model(stage)
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        calls.clear()
        output = model(tokens(), labels=tokens(), output_index_topk_indices=True)
        output.loss.backward()
        counts.append(len(calls))
        assert len(output.index_topk_indices) == 3
    assert counts[0] > 6 and counts[1] == 2 * counts[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_loss_without_gradients(mode):
    model, ids = stage_model("sparse"), tokens()
    expected = model(ids, labels=ids).index_loss
    with mode():
        assert_close(expected, model(ids, labels=ids).index_loss, 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_cached_tokens_do_not_teach(stage):
    model, ids = stage_model(stage), tokens()
    with torch.no_grad():
        cache = model(ids[:, :10], past_key_values=LatentCache(model.config)).past_key_values
    with pytest.raises(ValueError, match="holds 10 tokens, and the indexer's loss needs the whole text"):
        model(ids[:, 10:], past_key_values=cache, labels=ids[:, 10:])


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_packed_documents_stay_apart(stage):
    torch._dynamo.reset()
    model, (batch, _) = stage_model(stage), layout("packed")
    expected = model(**batch)
    actual = torch.compile(model, backend="eager")(**batch)
    assert_close(expected.ce_loss, actual.ce_loss, 1e-5)
    assert_close(expected.index_loss, actual.index_loss, 1e-5)


def test_adapters_of_the_whole_indexer():
    """weights_proj too: its product is in fp32, but through its module, which others may wrap."""
    peft = pytest.importorskip("peft")
    targets = ["wq_b", "wk", "weights_proj"]
    model = peft.get_peft_model(stage_model("sparse"), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 3 * 2 and all(gradient.abs().sum() > 0 for gradient in trained.values())
    with torch.no_grad():
        adapted = model.eval()(input_ids=tokens()).logits
        merged = model.merge_and_unload()
        assert_close(adapted, merged(tokens()).logits, 1e-4)
        assert rms_ratio(stage_model("sparse").eval()(tokens()).logits, adapted) > 0.1


def test_offloaded_weights_reach_the_indexer():
    accelerate = pytest.importorskip("accelerate")
    model = stage_model("sparse").eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        assert_close(expected, accelerate.cpu_offload(model, torch.device("cpu"))(tokens()).logits, 1e-5)


def test_a_static_cache_under_autocast():
    model, ids = stage_model("sparse").eval(), tokens(2, 12)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(ids, **settings)
        actual = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(expected[:, :16], actual[:, :16])  # then roundings part: the forms run at other lengths


def test_an_indexer_for_a_model_keeps_what_it_had():
    model = tiny_model(index_topk=6, index_pattern="fixed", index_window=4, index_global_tokens=2)
    model.generation_config.max_new_tokens = 77
    given = model.with_indexer(index_topk=3, index_n_heads=3, index_head_dim=8)
    assert (given.config.index_window, given.config.index_global_tokens) == (0, 0)
    assert given.generation_config.max_new_tokens == 77
    on_meta = tiny_model().to("meta").with_indexer(**INDEXER)
    assert all(tensor.is_meta for tensor in [*on_meta.parameters(), *on_meta.buffers()])


def test_nothing_selected_is_none():
    output = stage_model("dense")(tokens(), output_index_topk_indices=True, output_index_recall=True)
    assert output.index_topk_indices is None and output.index_recall is None
