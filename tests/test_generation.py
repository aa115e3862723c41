"""generate() in every mode, against loops that feed the whole sequence anew for each token and know no cache."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from modeling_nanodeepseek import Fp8LatentCache, LatentCache
from tests.conftest import SPARSE, assert_close, tiny_model
from tests.generating import GQA, KINDS, SETTINGS, a_cache, by_hand, choose_best, kinds, padded, tokens
from tests.parity.test_deepseek_v3 import pair


def uneven_rows() -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]


# -- greedy, end of sequence, what generate() returns ------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy(kind, attention):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 7)
    model.set_attn_implementation(attention)
    expected = by_hand(model, ids)
    for use_cache in (True, False):
        assert torch.equal(expected, model.generate(ids, use_cache=use_cache, **SETTINGS))


@kinds
def test_what_it_returns(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 7)
    flags = {"output_logits": True, "output_scores": True, "output_hidden_states": True}
    output = model.generate(ids, return_dict_in_generate=True, **flags, **SETTINGS)
    with torch.no_grad():
        full = model(output.sequences, output_hidden_states=True)
    assert_close(full.logits[:, 6:-1], torch.stack(output.logits, 1), 1e-5)
    assert torch.equal(torch.stack(output.scores, 1), torch.stack(output.logits, 1))
    for layer in range(4):
        states = torch.cat([step[layer] for step in output.hidden_states], 1)
        assert_close(full.hidden_states[layer][:, :-1], states, 1e-5)
    assert output.past_key_values.get_seq_length() == 14  # the last token is never fed
    assert type(output.past_key_values) is (DynamicCache if kind == "gqa" else LatentCache)


def test_a_row_ends_at_its_end_token_and_is_padded():
    model, ids = tiny_model(), tokens(3, 7)
    free = by_hand(model, ids)
    end = int(free[1, 7 + 3])  # what the second row writes as its fourth token
    expected = free.clone()
    for row in expected:
        where = (row[7:] == end).nonzero()
        if len(where):
            row[7 + int(where[0]) + 1 :] = 5
    actual = model.generate(ids, **SETTINGS | {"eos_token_id": end, "pad_token_id": 5})
    assert (expected[1, 11:] == 5).all() and not (expected == 5)[:, 7:].all(-1).any()
    assert torch.equal(expected[:, : actual.shape[1]], actual) and (expected[:, actual.shape[1] :] == 5).all()


# -- sampling ----------------------------------------------------------------------------------------------------------


@kinds
def test_sampling(kind):
    """The same draws from the same distributions, so the same tokens."""
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 7)

    def draw(logits):
        return torch.multinomial((logits / 1.3).softmax(-1), 1)

    torch.manual_seed(3)
    expected = by_hand(model, ids, choose=draw)
    torch.manual_seed(3)
    sampling = SETTINGS | {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 1.0}
    assert torch.equal(expected, model.generate(ids, **sampling))
    assert not torch.equal(expected, by_hand(model, ids))


def test_num_return_sequences():
    """Each prompt's samples stand together, and are drawn as if the prompt had been given so many times."""
    model, ids = tiny_model(), tokens(2, 7)
    torch.manual_seed(4)
    expected = by_hand(model, ids.repeat_interleave(3, 0), choose=lambda x: torch.multinomial(x.softmax(-1), 1))
    torch.manual_seed(4)
    actual = model.generate(ids, num_return_sequences=3, **SETTINGS | {"do_sample": True, "top_k": 0})
    assert torch.equal(expected, actual) and len(set(map(tuple, actual.tolist()))) == 6


# -- beam search -------------------------------------------------------------------------------------------------------


def beams_by_hand(model, ids: torch.Tensor, beams: int, new: int) -> torch.Tensor:
    """[T] -> the `beams` best continuations found, best first, keeping the `beams` best prefixes at each token."""
    kept = [(0.0, ids)]
    for _ in range(new):
        grown = []
        for score, row in kept:
            with torch.no_grad():
                logs = model(row[None], use_cache=False).logits[0, -1].log_softmax(-1)
            grown += [(score + log.item(), torch.cat((row, torch.tensor([i])))) for i, log in enumerate(logs)]
        kept = sorted(grown, key=lambda beam: -beam[0])[:beams]
    return torch.stack([row for _, row in kept])


@kinds
def test_beam_search(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 7, seed=2)
    expected = torch.cat([beams_by_hand(model, row, beams=3, new=6) for row in ids])
    settings = SETTINGS | {"max_new_tokens": 6, "num_beams": 3}
    assert torch.equal(expected, model.generate(ids, num_return_sequences=3, **settings))
    assert torch.equal(expected[::3], model.generate(ids, **settings))
    assert not torch.equal(expected[::3], by_hand(model, ids, 6))  # else greedy would have passed


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("sampled", [True, False])
def test_beams_equal_those_of_transformers(sampled, form):
    """With beams that end, a length penalty, left padding, and sampled beams: the same as DeepseekV3's."""
    ours, theirs = pair({"attention_form": form}, "sdpa")
    ids, mask = padded(uneven_rows())
    results = []
    for model in (ours, theirs):
        torch.manual_seed(6)
        settings = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7, "do_sample": sampled}
        settings |= {"eos_token_id": list(range(0, 97, 7)), "pad_token_id": 0, "max_new_tokens": 12}
        results.append(model.generate(ids, attention_mask=mask, top_k=0, **settings))
    assert torch.equal(*results)
    assert (results[0][:, 9:] == 0).any()  # some ended early


# -- assisted and prompt-lookup decoding -------------------------------------------------------------------------------


def count_forwards(model, monkeypatch) -> list[int]:
    """The number of tokens in each forward from now on."""
    fed, forward = [], type(model).forward

    def counted(self, input_ids=None, **kwargs):
        if self is model:
            fed.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return fed


@kinds
def test_assisted_decoding(kind, monkeypatch):
    """A draft that is often right and often wrong: the same tokens as without, in fewer forwards."""
    model, ids = tiny_model(**KINDS[kind]), tokens(1, 7)
    assistant = tiny_model(**KINDS[kind])
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    expected = by_hand(model, ids, 40)
    fed = count_forwards(model, monkeypatch)
    output = model.generate(
        ids, assistant_model=assistant, return_dict_in_generate=True, **SETTINGS | {"max_new_tokens": 40}
    )
    assert torch.equal(expected, output.sequences)
    assert output.past_key_values.get_seq_length() == 46  # rejected tokens are gone from the cache
    assert len(fed) < 36  # some drafts were accepted
    assert sum(fed) > 46 + 3  # and some rejected


def test_assisted_by_another_architecture():
    model, ids = tiny_model(), tokens(1, 7)
    assistant = tiny_model(seed=1, num_hidden_layers=1, n_routed_experts=None, **GQA)
    assert torch.equal(by_hand(model, ids), model.generate(ids, assistant_model=assistant, **SETTINGS))


@kinds
def test_prompt_lookup(kind, monkeypatch):
    """A prompt that holds what the model will write again; the same tokens in fewer forwards."""
    model = tiny_model(**KINDS[kind])
    ids = by_hand(model, tokens(1, 4, seed=3), 40)
    expected = by_hand(model, ids, 40)
    fed = count_forwards(model, monkeypatch)
    actual = model.generate(ids, prompt_lookup_num_tokens=4, **SETTINGS | {"max_new_tokens": 40})
    assert torch.equal(expected, actual)
    assert len(fed) < 40 and sum(fed) > 44 + 40


def test_drafts_by_an_early_exit():
    model = tiny_model(eos_token_id=None)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1, 9), **settings)
    assert torch.equal(expected, model.generate(tokens(1, 9), assistant_early_exit=2, **settings))
    assert torch.equal(expected, model.generate(tokens(1, 9), **settings))


# -- batches, padding, masks -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("cache, attention", [("dynamic", "eager"), ("static", "sdpa"), ("quantized", "sdpa")])
def test_a_batch_is_its_rows(cache, attention, kind):
    if kind == "gqa" and cache == "quantized":
        pytest.skip("the FP8 form holds latents")
    model = tiny_model(**KINDS[kind])
    model.set_attn_implementation(attention)
    rows = uneven_rows()
    ids, mask = padded(rows)
    settings = SETTINGS | {"cache_implementation": cache}
    for row, written in zip(rows, model.generate(ids, attention_mask=mask, **settings)[:, 9:]):
        assert torch.equal(model.generate(row[None], **settings)[0, len(row) :], written)


@kinds
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_continuing_after_right_padding(static, kind):
    """A right-padded prompt in the cache, then tokens with their own positions: each row as if it were alone."""
    model, rows = tiny_model(**KINDS[kind]), uneven_rows()
    ids, mask = padded(rows, "right")
    lengths = mask.sum(-1, keepdim=True)
    cache = StaticCache(config=model.config, max_cache_len=24) if static else model.model.new_cache()
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    chosen = choose_best(logits[torch.arange(3), lengths[:, 0] - 1])
    written = [chosen]
    for step in range(7):
        mask = F.pad(mask, (0, 1), value=1)
        logits = model(chosen, attention_mask=mask, position_ids=lengths + step, past_key_values=cache).logits
        chosen = choose_best(logits[:, -1])
        written.append(chosen)
    for row, actual in zip(rows, torch.cat(written, -1)):
        assert torch.equal(by_hand(model, row[None])[0, len(row) :], actual)


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("boolean", [True, False])
@torch.no_grad()
def test_4d_masks_equal_2d_masks(boolean, attention, kind):
    """The mask of padding and causality written out, at the prompt and at each token after it."""
    model = tiny_model(**KINDS[kind])
    model.set_attn_implementation(attention)
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in (13, 8)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    visible = torch.ones(13, 13, dtype=torch.bool).tril() & mask[:, None, None].bool()
    visible |= torch.eye(13, dtype=torch.bool)  # a query that sees nothing has no defined output
    written_out = visible if boolean else additive(visible)
    cache, logits = model.model.new_cache(), []
    for start, end in ((0, 9), (9, 12), (12, 13)):
        part = written_out[:, :, start:end, :end]
        logits.append(
            model(
                ids[:, start:end],
                attention_mask=part,
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
        )
    assert_close(expected[mask.bool()], torch.cat(logits, 1)[mask.bool()], 1e-5)


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("boolean", [True, False])
@torch.no_grad()
def test_a_tree_of_continuations(boolean, attention, kind):
    """Several continuations of a cached prompt in one forward, each seeing its ancestors alone, as speculative
    decoding over a tree needs it: every branch equals that branch read alone."""
    model, prompt = tiny_model(**KINDS[kind]), tokens(1, 7)
    model.set_attn_implementation(attention)
    parents = [None, 0, 0, 1, 2, None]
    nodes = tokens(1, len(parents), seed=8)
    paths = []
    for node, parent in enumerate(parents):
        paths.append(([] if parent is None else paths[parent]) + [node])
    visible = torch.zeros(1, 1, 6, 7 + 6, dtype=torch.bool)
    visible[..., :7] = True
    for node, path in enumerate(paths):
        visible[..., node, [7 + ancestor for ancestor in path]] = True
    cache = model.model.new_cache()
    model(prompt, past_key_values=cache)
    logits = model(
        nodes,
        attention_mask=visible if boolean else additive(visible),
        position_ids=torch.tensor([[6 + len(path) for path in paths]]),
        past_key_values=cache,
    ).logits
    for node, path in enumerate(paths):
        alone = model(torch.cat((prompt, nodes[:, path]), -1), use_cache=False).logits
        assert_close(alone[0, -1], logits[0, node], 1e-5, f"node {node}")


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_mask_per_head(attention, form):
    """A mask that differs by head, and sees forward, against the eager expanded reference."""
    visible = torch.rand(2, 3, 11, 11) < 0.5
    visible |= torch.eye(11, dtype=torch.bool)
    reference = tiny_model(attention_form="expanded")
    reference.set_attn_implementation("eager")
    expected = reference(tokens(2, 11), attention_mask=visible).logits
    model = tiny_model(attention_form=form)
    model.set_attn_implementation(attention)
    for mask in (visible, additive(visible)):
        assert_close(expected, model(tokens(2, 11), attention_mask=mask).logits, 1e-5)


def test_a_mask_per_head_or_in_between_selects_no_keys():
    """Keys are selected for all heads at once, or not."""
    model, ids = tiny_model(**SPARSE), tokens(2, 11)
    visible = torch.ones(2, 3, 11, 11, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[2, 3, 11, 11\].* second dim must be 1"):
        model(ids, attention_mask=visible)
    with pytest.raises(ValueError, match="between 0 and minus infinity"):
        model(ids, attention_mask=additive(visible[:, :1]) / 3e38)
    with pytest.raises(ValueError, match="is_causal=False is not possible with index_topk"):
        model(ids, is_causal=False)


# -- other inputs and outputs ------------------------------------------------------------------------------------------


@kinds
def test_embeddings_for_ids(kind):
    model, (ids, mask) = tiny_model(**KINDS[kind]), padded(uneven_rows())
    embeds = model.get_input_embeddings()(ids).detach()
    expected = model.generate(ids, attention_mask=mask, **SETTINGS)[:, 9:]
    assert torch.equal(expected, model.generate(inputs_embeds=embeds, attention_mask=mask, **SETTINGS))
    static = model.generate(inputs_embeds=embeds, attention_mask=mask, cache_implementation="static", **SETTINGS)
    assert torch.equal(expected, static)


@torch.no_grad()
def test_logits_to_keep():
    model, ids = tiny_model(), tokens(2, 13)
    full = model(ids).logits
    assert_close(full, model(ids, logits_to_keep=0).logits, 1e-6)
    assert_close(full[:, -3:], model(ids, logits_to_keep=3).logits, 1e-6)
    assert_close(full[:, [2, 9, 4]], model(ids, logits_to_keep=torch.tensor([2, 9, 4])).logits, 1e-6)
    cache = LatentCache(model.config)
    model(ids[:, :8], past_key_values=cache, logits_to_keep=1)
    assert_close(full[:, -2:], model(ids[:, 8:], past_key_values=cache, logits_to_keep=2).logits, 1e-5)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_streaming(mode):
    """The prompt, then every token in order as it is chosen, then the end."""
    model, ids, streamer = tiny_model(), tokens(1, 7), Recorder()
    output = model.generate(ids, streamer=streamer, **SETTINGS, **mode)
    assert torch.equal(streamer.puts[0], ids) and streamer.ended == 1
    assert torch.equal(torch.cat([put.flatten() for put in streamer.puts]), output[0])
    assert mode == {"prompt_lookup_num_tokens": 3} or all(put.shape == (1,) for put in streamer.puts[1:])


# -- continuing, chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", ["latent", "fp8", "transformers", "static"])
@pytest.mark.parametrize("kind", ["mla-expanded", "mla-absorbed", "dsa"])
def test_a_conversation(kind, cached):
    """Three turns on one cache: each equals reading everything so far from the beginning."""
    model, rows = tiny_model(**KINDS[kind]), uneven_rows()
    ids, mask = padded(rows)
    kept = a_cache(cached, model)
    for turn in range(3):
        said = tokens(3, (5, 1, 3)[turn], seed=20 + turn)
        ids, mask = torch.cat((ids, said), -1), F.pad(mask, (0, said.shape[1]), value=1)
        expected = model.generate(ids, attention_mask=mask, past_key_values=a_cache(cached, model), **SETTINGS)
        actual = model.generate(ids, attention_mask=mask, past_key_values=kept, **SETTINGS)
        assert torch.equal(expected, actual), turn
        mask = F.pad(mask, (0, actual.shape[1] - ids.shape[1]), value=1)
        ids = actual
        assert int(kept.get_seq_length()) == ids.shape[1] - 1


@pytest.mark.parametrize("cached", ["latent", "fp8", "transformers"])
def test_one_prompt_many_questions(cached):
    """A cached prompt is copied for each question; the copies share nothing."""
    model, prompt = tiny_model(), tokens(1, 9)
    kept = a_cache(cached, model)
    with torch.no_grad():
        model(prompt, past_key_values=kept)
    for seed in range(3):
        ids = torch.cat((prompt, tokens(1, 4, seed=30 + seed)), -1)
        expected = model.generate(ids, past_key_values=a_cache(cached, model), **SETTINGS)
        assert torch.equal(expected, model.generate(ids, past_key_values=copy.deepcopy(kept), **SETTINGS))
    assert kept.get_seq_length() == 9


@pytest.mark.parametrize("cached", ["latent", "fp8"])
def test_only_the_news(cached):
    """The new tokens alone, with a mask of everything."""
    model, prompt, more = tiny_model(), tokens(2, 9), tokens(2, 4, seed=9)
    kept = a_cache(cached, model)
    with torch.no_grad():
        model(prompt, past_key_values=kept)
    everything = torch.cat((prompt, more), -1)
    expected = model.generate(everything, past_key_values=a_cache(cached, model), **SETTINGS)[:, 13:]
    mask = torch.ones_like(everything)
    assert torch.equal(expected, model.generate(more, attention_mask=mask, past_key_values=kept, **SETTINGS)[:, 4:])


@kinds
@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized"])
def test_chunked_prefill(cache, chunk, kind):
    if kind == "gqa" and cache == "quantized":
        pytest.skip("the FP8 form holds latents")
    model, (ids, mask) = tiny_model(**KINDS[kind]), padded(uneven_rows())
    settings = SETTINGS | {"cache_implementation": cache, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, prefill_chunk_size=chunk, **settings))


# -- which cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "dynamic", "static", "quantized"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "samples"])
@pytest.mark.parametrize("kind", ["mla", "dsa"])
def test_caches_in_every_mode(kind, mode, implementation):
    model, (ids, mask) = tiny_model(**KINDS[kind]), padded(uneven_rows())
    modes = {"greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 2}}
    settings = SETTINGS | modes[mode] | {"attention_mask": mask, "cache_implementation": implementation}
    kind = {"static": StaticCache, "quantized": Fp8LatentCache}.get(implementation, LatentCache)
    torch.manual_seed(2)
    output = model.generate(ids, return_dict_in_generate=True, **settings)
    assert type(output.past_key_values) is kind
    torch.manual_seed(2)
    if implementation == "quantized":  # against the same rounding, in a cache of one's own
        settings = settings | {"cache_implementation": None, "past_key_values": Fp8LatentCache(model.config)}
    else:
        settings = settings | {"cache_implementation": None, "use_cache": False}
    assert torch.equal(output.sequences, model.generate(ids, **settings))


def test_the_quantised_cache_of_generate():
    model, ids = tiny_model(), tokens(2, 7)
    settings = SETTINGS | {"cache_implementation": "quantized", "return_dict_in_generate": True}
    output = model.generate(ids, cache_config={"backend": "fp8"}, **settings)
    assert type(output.past_key_values) is Fp8LatentCache
    assert output.past_key_values.nbytes() == 2 * 14 * 3 * (22 + 4 + 2 * 6)
    for wrong in ({"backend": "quanto"}, {"backend": "fp8", "nbits": 4}):
        with pytest.raises(ValueError, match=r"cache_config=.*not possible for MLA: only \{'backend': 'fp8'\}"):
            model.generate(ids, cache_config=wrong, **settings)


def test_the_choice_of_cache_is_saved_with_the_model(tmp_path):
    model, ids = tiny_model(), tokens(2, 7)
    model.generation_config.update(cache_implementation="quantized", cache_config={"backend": "fp8"})
    model.save_pretrained(tmp_path)
    output = type(model).from_pretrained(tmp_path).generate(ids, return_dict_in_generate=True, **SETTINGS)
    assert type(output.past_key_values) is Fp8LatentCache


@pytest.mark.parametrize("kind", ["mla", "gqa", "dsa"])
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloading(implementation, kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 7)
    settings = SETTINGS | {"cache_implementation": implementation}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            model.generate(ids, **settings)
        return
    model, ids = model.cuda(), ids.cuda()
    output = model.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(by_hand(model, ids), output.sequences)
    if implementation == "offloaded":
        assert [layer.keys.device.type for layer in output.past_key_values.layers].count("cpu") >= 2
