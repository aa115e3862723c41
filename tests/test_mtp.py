"""Multi-token prediction: the modules and their loss against a transcription of the report, on disk and in training."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from modeling_nanodeepseek import (
    NanoDeepSeekForCausalLM,
    NanoDeepSeekForSequenceClassification,
    NanoDeepSeekModel,
    update_expert_bias,
)
from modeling_nanodeepseek.decoder import NanoDeepSeekDecoderLayer
from modeling_nanodeepseek.mtp import further_targets
from modeling_nanodeepseek.stacking import CheckpointError
from tests.conftest import EARLIER_TRANSFORMERS, SPARSE, assert_close, checkpoint_activations, tiny_model, tokens

# Dense attention, selected keys, the baseline; the expert-choosing bias is uneven in all (tiny_model).
KINDS = {
    "mla": {},
    "dsa": SPARSE,
    "gqa": {
        "attention_type": "gqa",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def mtp_model(depth: int = 2, kind: str = "mla", **overrides) -> NanoDeepSeekForCausalLM:
    return tiny_model(num_nextn_predict_layers=depth, **KINDS[kind] | overrides)


def mtp_parameters(model) -> dict[str, torch.nn.Parameter]:
    first = model.config.num_hidden_layers
    return {
        n: p for n, p in model.named_parameters() if n.startswith("model.layers.") and int(n.split(".")[2]) >= first
    }


def rms_norm(x, weight, eps: float = 1e-6):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def transcribed(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per module and for one row of ids, h^k of the positions 0..T-1-k, each from the report's equations: only tokens
    that exist, and layers that see no more than these."""
    L, T = model.config.num_hidden_layers, ids.shape[1]
    hidden = model.model(ids).last_hidden_state
    embeddings = model.model.embed_tokens.weight
    states = []
    for k in range(1, model.config.num_nextn_predict_layers + 1):
        module = model.model.layers[L + k - 1]
        rows = [
            torch.cat(
                (
                    rms_norm(embeddings[ids[0, i + k]], module.enorm.weight),
                    rms_norm(hidden[0, i], module.hnorm.weight),
                )
            )
            for i in range(T - k)
        ]
        mixed = torch.stack(rows)[None] @ module.eh_proj.weight.T
        layer = NanoDeepSeekDecoderLayer(model.config, L + k - 1).to(mixed.dtype)
        layer.load_state_dict({n: p for n, p in module.state_dict().items() if n in layer.state_dict()})
        for name, parameter in module.named_parameters():  # the same parameters, so that gradients reach them
            if name in dict(layer.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, parameter)
        layer.train(model.training)
        positions = torch.arange(T - k)[None]
        mask = torch.ones(T - k, T - k, dtype=torch.bool).tril()[None, None]
        turns = model.model.rotary_emb(mixed, positions)
        hidden = rms_norm(layer(mixed, attention_mask=mask, position_embeddings=turns), module.shared_head.norm.weight)
        states.append(hidden)
    return states


def transcribed_losses(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """L^k = -1/(T - 1) sum_i log P^k_i[t_{i+k+1}], of one row: T - 1 are the targets of the next-token loss."""
    losses = []
    for k, hidden in enumerate(transcribed(model, ids), start=1):
        log_p = (hidden[0] @ model.lm_head.weight.T).log_softmax(-1)
        terms = [log_p[i, ids[0, i + k + 1]] for i in range(ids.shape[1] - k - 1)]
        losses.append(-torch.stack(terms).sum() / (ids.shape[1] - 1))
    return losses


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_modules_and_their_loss_are_the_reports(kind):
    """Values and every gradient: of the modules, the decoder, the embedding and the head."""
    model = mtp_model(3, kind, aux_loss_alpha=0.0, mtp_loss_coef=0.7).double().train()
    model.set_experts_implementation("eager")
    ids = tokens(1, 13)
    output = model(ids, labels=ids, output_mtp_hidden_states=True)
    losses = transcribed_losses(model, ids)
    for k, (expected, state) in enumerate(zip(transcribed(model, ids), output.mtp_hidden_states), start=1):
        assert_close(expected, state[:, : 13 - k], 1e-7, f"h^{k}")  # the router computes in fp32
    assert_close(torch.stack(losses), output.mtp_depth_losses, 1e-7)
    assert_close(torch.stack(losses).mean(), output.mtp_loss, 1e-7)
    assert_close(output.ce_loss + 0.7 * output.mtp_loss, output.loss, 1e-7)
    assert output.mtp_targets.tolist() == [11, 10, 9]
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(output.ce_loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    further = torch.autograd.grad(0.7 * torch.stack(losses).mean(), list(parameters.values()), allow_unused=True)
    actual = torch.autograd.grad(output.loss, list(parameters.values()))
    for name, a, b, gradient in zip(parameters, expected, further, actual):
        total = sum(part for part in (a, b) if part is not None)
        assert_close(total, gradient, 1e-6, name)  # the router computes in fp32
        assert b is not None and (b != 0).any(), f"{name} learns nothing from multi-token prediction"


def test_accuracy_counts_likeliest_tokens():
    model = mtp_model(2).train()
    ids = tokens(3, 17)
    output = model(ids, labels=ids, output_mtp_hidden_states=True)
    for k, state in enumerate(output.mtp_hidden_states, start=1):
        guesses = model.lm_head(state).argmax(-1)[:, : -k - 1]
        assert output.mtp_correct[k - 1] == (guesses == ids[:, k + 1 :]).sum()
        assert output.mtp_targets[k - 1] == 3 * (17 - k - 1)
    with torch.no_grad():  # make module 1 right everywhere it can be
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = output.mtp_hidden_states[0][0, 0]
    ids = torch.full((1, 9), 5)
    output = model(ids, labels=ids)
    assert output.mtp_correct[0] > 0


def test_targets_of_documents_and_padding():
    """-100 where the true token is another document's, padding's, or none."""
    shift = torch.tensor([[11, 12, 13, 14, 15, 16, 17, -100]])  # of 10 11 12 | 13 14 15 16 17
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    assert further_targets(1, shift).tolist() == [[12, 13, 14, 15, 16, 17, -100, -100]]
    assert further_targets(1, shift, None, positions).tolist() == [[12, -100, -100, 15, 16, 17, -100, -100]]
    assert further_targets(2, shift, None, positions).tolist() == [[-100, -100, -100, 16, 17, -100, -100, -100]]
    right = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    assert further_targets(1, shift, right).tolist() == [[12, 13, 14, 15, -100, -100, -100, -100]]
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert further_targets(1, shift, left).tolist() == [[-100, -100, 14, 15, 16, 17, -100, -100]]
    answers = torch.tensor([[-100, -100, -100, 14, -100, 16, 17, -100]])  # what the main loss ignores is no target
    assert further_targets(1, answers).tolist() == [[-100, -100, 14, -100, 16, 17, -100, -100]]
    assert further_targets(9, shift).tolist() == [[-100] * 8]
    assert further_targets(7, shift).tolist() == [[-100] * 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["packed", "left", "right"])
def test_packed_and_padded_rows_are_their_documents(how, kind):
    model = mtp_model(2, kind, aux_loss_alpha=0.0, index_loss_coef=0.0).double().train()
    model.set_experts_implementation("eager")
    documents = [tokens(1, n, seed=n) for n in (9, 4, 14)]
    items = sum(document.numel() - 1 for document in documents)
    alone = [model(d, labels=d, num_items_in_batch=items) for d in documents]
    expected = sum(output.mtp_depth_losses for output in alone)
    if how == "packed":
        ids = torch.cat(documents, 1)
        labels = torch.cat([torch.cat((torch.full((1, 1), -100), d[:, 1:]), 1) for d in documents], 1)
        batch = {"position_ids": torch.cat([torch.arange(d.numel()) for d in documents])[None]}
    else:
        pads = [(14 - d.numel(), 0) if how == "left" else (0, 14 - d.numel()) for d in documents]
        pad = torch.nn.functional.pad
        ids = torch.cat([pad(d, p, value=3) for d, p in zip(documents, pads)])
        unseen = [torch.cat((torch.full((1, 1), -100), d[:, 1:]), 1) for d in documents]  # padding does not predict
        labels = torch.cat([pad(d, p, value=-100) for d, p in zip(unseen, pads)])
        batch = {"attention_mask": torch.cat([pad(torch.ones_like(d), p) for d, p in zip(documents, pads)])}
    output = model(ids, labels=labels, num_items_in_batch=items, **batch)
    assert_close(expected, output.mtp_depth_losses, 1e-7)
    assert output.mtp_targets.tolist() == sum(o.mtp_targets for o in alone).tolist()
    gradients = []
    for loss in (sum(o.loss for o in alone), output.loss):
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for expected, actual in zip(*gradients):
        assert_close(expected, actual, 1e-6)


@pytest.mark.parametrize("plain_head", [True, False], ids=["chunked", "logits"])
def test_a_detached_trunk_learns_nothing_from_it(plain_head):
    model = mtp_model(2, mtp_detach_trunk=True, aux_loss_alpha=0.0).train()
    if not plain_head:
        model.lm_head.register_forward_hook(lambda *call: None)
    ids = tokens()
    output = model(ids, labels=ids)
    own = mtp_parameters(model)
    others = {n: p for n, p in model.named_parameters() if n not in own}
    found = torch.autograd.grad(output.mtp_loss, list(others.values()), allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in found)
    assert all((g != 0).any() for g in torch.autograd.grad(output.mtp_loss, list(own.values())))
    attached = mtp_model(2, aux_loss_alpha=0.0).train()(ids, labels=ids)
    assert_close(attached.loss, output.loss, 1e-6)


def test_heads_that_are_more_than_a_product():
    ids = tokens()
    expected = mtp_model(2).train()(ids, labels=ids)
    model = mtp_model(2).train()
    model.lm_head.register_forward_hook(lambda *call: None)
    actual = model(ids, labels=ids)
    assert_close(expected.mtp_depth_losses, actual.mtp_depth_losses, 1e-6)
    assert expected.mtp_correct.tolist() == actual.mtp_correct.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_is_the_whole_batch(kind):
    model = mtp_model(2, kind).double().train()
    model.set_experts_implementation("eager")
    ids = tokens(4, 19)
    whole = model(ids, labels=ids)
    expected = torch.autograd.grad(whole.loss, [p for p in model.parameters() if p.requires_grad])
    parts = [model(part, labels=part, num_items_in_batch=4 * 18) for part in ids.split([1, 3])]
    actual = torch.autograd.grad(sum(p.loss for p in parts), [p for p in model.parameters() if p.requires_grad])
    assert_close(whole.mtp_loss, sum(p.mtp_loss for p in parts), 1e-7)
    for a, b in zip(expected, actual):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant, kind):
    off = {"aux_loss_alpha": 0.0, "index_loss_coef": 0.0} if reentrant else {}  # losses that are refused there
    ids, gradients = tokens(), []
    for checkpointed in (False, True):
        model = mtp_model(2, kind, **off).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        counts = [layer.mlp.gate.tokens_per_expert.sum().item() for layer in model.model.layers[1:]]
        assert counts == [ids.numel() * 3] * 4
    for name, expected in gradients[0].items():
        assert_close(expected, gradients[1][name], 1e-6, name)


def test_a_detached_trunk_under_reentrant_checkpoints_is_refused():
    """Nothing that enters a module wants a gradient, so nothing in it would get one."""
    model = mtp_model(2, mtp_detach_trunk=True, aux_loss_alpha=0.0).train()
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(ValueError, match="no gradient under reentrant .* mtp_detach_trunk=False"):
        model(tokens(), labels=tokens())


def test_quantised_weights_stay_frozen():
    model = mtp_model(1, "dsa")
    for owner, name in (
        (model.model.layers[3].eh_proj, "weight"),
        (model.model.layers[0].self_attn.indexer.wk, "weight"),
    ):
        packed = torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.uint8), requires_grad=False)
        setattr(owner, name, packed)
    model.freeze_for_stage()
    assert not model.model.layers[3].eh_proj.weight.requires_grad and model.model.layers[3].enorm.weight.requires_grad


def test_what_is_recorded_is_the_decoders():
    """And can be replayed; modules choose keys of their own."""
    model, ids = mtp_model(2, "dsa").train(), tokens()
    model.set_attn_implementation("eager")
    flags = {"output_index_topk_indices": True, "output_index_recall": True, "output_attentions": True}
    output = model(ids, labels=ids, output_router_logits=True, **flags)
    assert len(output.index_topk_indices) == len(output.index_recall) == len(output.attentions) == 3
    assert len(output.router_logits) == 2
    again = model(ids, labels=ids, index_topk_indices=output.index_topk_indices)
    assert_close(output.loss, again.loss, 1e-6)


def test_resting_modules_are_not_in_the_load():
    loads = []
    for depth in (0, 2):
        model = tiny_model(num_nextn_predict_layers=depth, mtp_loss_coef=0.0).train()
        model.load_state_dict(mtp_model(2).state_dict(), strict=depth == 2)
        model(tokens(), labels=tokens())
        loads.append(update_expert_bias(model, gamma=0.01).metrics())
    assert loads[0] == pytest.approx(loads[1])


def test_bf16_stays_close():
    ids = tokens()
    exact = mtp_model(2).train()(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mtp_model(2).train()(ids, labels=ids)
    pure = mtp_model(2).bfloat16().train()(ids, labels=ids)
    assert_close(exact.mtp_depth_losses, mixed.mtp_depth_losses, 0.02)
    assert_close(exact.mtp_depth_losses, pure.mtp_depth_losses.float(), 0.05)


def test_evaluation_and_inference_leave_them_alone():
    model = mtp_model(2)
    ids = tokens()
    with torch.no_grad():
        output = model(ids, labels=ids)
        assert output.mtp_loss is None and output.mtp_hidden_states is None and output.last_hidden_state is None
        assert torch.equal(output.loss, output.ce_loss)
        without = tiny_model(num_nextn_predict_layers=0)
        without.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(without(ids).logits, output.logits)
        output = model(ids, output_mtp_hidden_states=True, output_hidden_states=True, output_last_hidden_state=True)
    assert [state.shape for state in output.mtp_hidden_states] == [(2, 31, 40)] * 2
    assert len(output.hidden_states) == 4 and torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.logits is not None
    routed = model.train()(ids, labels=ids, output_router_logits=True)
    assert len(routed.router_logits) == 2  # the layers with experts; of the modules' the loss alone knows


def test_frozen_modules_are_not_run():
    """With mtp_loss_coef=0, in the decoder alone, and in a classifier: nothing would use their gradients."""
    ids = tokens()
    model = mtp_model(2, mtp_loss_coef=0.0).train()
    output = model(ids, labels=ids)
    assert output.mtp_loss is None
    output.loss.backward()
    own = mtp_parameters(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in own) == (parameter.grad is not None), name
    assert not any(p.requires_grad for n, p in NanoDeepSeekModel(model.config).named_parameters() if "layers.3" in n)
    classifier = NanoDeepSeekForSequenceClassification(model.config)
    assert not any(p.requires_grad for n, p in classifier.named_parameters() if "layers.4" in n)
    assert all(p.requires_grad for p in mtp_model(2).parameters())


def test_warm_up_teaches_their_indexers_alone():
    model = mtp_model(2, "dsa", dsa_stage="warmup").train()
    ids = tokens()
    output = model(ids, labels=ids)
    assert output.mtp_loss is None
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".indexer." in name), name
        assert parameter.grad is None or (parameter.grad != 0).any()
    model.set_dsa_stage("sparse")
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.mtp_loss is not None and all(p.grad is not None for p in model.parameters())


def test_the_indexer_of_a_module_learns_from_its_kl_alone():
    model = mtp_model(1, "dsa", aux_loss_alpha=0.0).train()
    ids = tokens()
    output = model(ids, labels=ids)
    indexers = [p for n, p in model.named_parameters() if ".indexer." in n]
    assert all(g is None for g in torch.autograd.grad(output.mtp_loss, indexers, allow_unused=True, retain_graph=True))
    found = torch.autograd.grad(output.index_loss, list(model.parameters()), allow_unused=True)
    for (name, _), gradient in zip(model.named_parameters(), found):
        assert (gradient is not None) == (".indexer." in name), name


# -- on disk -----------------------------------------------------------------------------------------------------------

OFFICIAL_KEYS = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}


def test_modules_in_a_wrapper_are_modules():
    """As accelerate's and torch's checkpointing of activations put layers into another module."""
    plain, wrapped, ids = mtp_model().train(), mtp_model().train(), tokens()
    for layer in range(len(wrapped.model.layers)):
        wrapped.model.layers[layer] = checkpoint_wrapper(wrapped.model.layers[layer])
    for model in (plain, wrapped):
        output = model(ids, labels=ids)
        output.loss.backward()
        assert output.mtp_depth_losses.shape == (2,)
    for (name, expected), actual in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert_close(expected.grad, actual.grad, 1e-6, name)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    """Under the official names, once each; bit for bit."""
    model = mtp_model(2, kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (3, 4):
        names = {n.removeprefix(f"model.layers.{layer}.") for n in stored if n.startswith(f"model.layers.{layer}.")}
        assert OFFICIAL_KEYS < names and "mlp.experts.7.down_proj.weight" in names
        assert not any("embed_tokens" in name or "head.weight" in name for name in names)
    assert not any("layers.5" in name for name in stored)
    loaded, info = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(p.requires_grad for p in mtp_parameters(loaded).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    resumed = mtp_model(2, kind, seed=7)
    resumed.load_state_dict(stored)  # as a Trainer resumes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_copies_of_the_shared_tensors_are_ignored(tmp_path):
    model = mtp_model(1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    copies = {
        "embed_tokens.weight": stored["model.embed_tokens.weight"],
        "shared_head.head.weight": stored["lm_head.weight"],
    }
    extra = {f"model.layers.3.{name}": tensor.clone() for name, tensor in copies.items()}
    save_file(stored | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.model.layers[3].eh_proj.weight, model.model.layers[3].eh_proj.weight)


def test_a_tensor_without_a_place_is_an_error(tmp_path):
    mtp_model(1).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors") | {"model.layers.3.self_attn.o_proj.bias": torch.ones(40)}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.o_proj\.bias has no place"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("gone", ["all", "one"])
def test_missing_tensors_are_an_error(gone, tmp_path):
    mtp_model(1).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.3." if gone == "all" else "model.layers.3.eh_proj.weight"
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(lost)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\..*is missing.*num_nextn_predict_layers=0"):
        NanoDeepSeekForCausalLM.from_pretrained(tmp_path)
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0)
    assert len(model.model.layers) == 3


def test_layers_without_a_module_to_read_them_are_unexpected(tmp_path):
    mtp_model(2).save_pretrained(tmp_path)
    model, info = NanoDeepSeekForCausalLM.from_pretrained(
        tmp_path, num_nextn_predict_layers=1, output_loading_info=True
    )
    assert all(name.startswith("model.layers.4.") for name in info["unexpected_keys"]) and info["unexpected_keys"]
    assert len(model.model.predictors) == 1


@pytest.mark.parametrize("values", [{"num_nextn_predict_layers": -1}, {"mtp_loss_coef": -0.1}])
def test_impossible_settings(values):
    with pytest.raises(StrictDataclassError, match=next(iter(values))):
        tiny_model(**values)


def test_cached_tokens_do_not_teach():
    model = mtp_model(1).train()
    ids = tokens()
    cache = model.model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="multi-token prediction needs the whole text"):
        model(ids, labels=ids, past_key_values=cache)


# -- transformers' own reader ------------------------------------------------------------------------------------------


@pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="MtpModel has no forward_layer, one module at a time")
@pytest.mark.parametrize("kind", ["mla", "dsa"])
def test_transformers_reads_the_modules(kind, tmp_path):
    """MtpModel takes them from a saved checkpoint, and computes the same states."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model = mtp_model(2, kind).double()
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    model = NanoDeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    theirs = MtpModel.from_pretrained(model).double().eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        output = model(ids, output_mtp_hidden_states=True, output_last_hidden_state=True)
        state, cache = output.last_hidden_state, MtpCache(config=model.config.get_mtp_config())
        for k in (1, 2):
            positions = torch.arange(k, 12)[None]
            state = theirs.forward_layer(k - 1, state[:, : 12 - k], positions, cache, input_ids=ids[:, k:])
            assert_close(state, output.mtp_hidden_states[k - 1][:, : 12 - k], 1e-6, f"h^{k}")
