"""generate(use_mtp=True): what is written is what plain decoding writes, whatever the modules draft."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from modeling_nanodeepseek import LatentCache, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.mtp import DraftReport
from tests.conftest import tiny_model, tokens
from tests.test_mtp import KINDS, mtp_model

FORMS = ("expanded", "absorbed")


@torch.no_grad()
def taught(depth: int = 2, kind: str = "mla", **overrides) -> NanoDeepSeekForCausalLM:
    """A model in double precision whose modules guess right now and then: its text hardly depends on the context, and
    goes on from a token as the modules see it do."""
    model = mtp_model(depth, kind, **overrides).double()
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.mul_(0.05)
    for module in model.model.predictors:
        d = model.config.hidden_size
        module.eh_proj.weight.copy_(torch.cat((torch.eye(d), 0.05 * torch.randn(d, d)), dim=1))
        module.shared_head.norm.weight.copy_(model.model.norm.weight)
        module.enorm.weight.fill_(1.0)
    return model


def write(model, prompt, new: int = 40, **settings):
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return model.generate(prompt, max_new_tokens=new, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy(depth, drafts, kind):
    model = taught(depth, kind)
    asked = {} if drafts is None else {"num_assistant_tokens": drafts}
    accepted = 0
    for length in (1, 2, 9):
        prompt = tokens(1, length, seed=length)
        assert torch.equal(write(model, prompt), write(model, prompt, use_mtp=True, **asked))
        report = model.draft_report
        assert report.drafted >= report.accepted and report.steps + report.accepted == 39  # one token is the prompt's
        assert report.drafted > (drafts or depth) * (report.steps - (drafts or depth) - 1)
        assert report.tokens_per_step == 1 + report.accepted / report.steps
        accepted += report.accepted
    assert accepted > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_module_reads_is_what_it_is_trained_on(kind):
    """The states of final positions in the modules' caches give the drafts that a forward over the whole text gives."""
    model = taught(3, kind)
    prompt = tokens(1, 9)
    real = model.model.predict_further
    seen = []

    def watch(module, states, ahead, position_ids, mask, cache):
        output = real(module, states, ahead, position_ids, mask, cache)
        seen.append((model.model.predictors.index(module), position_ids[0, -1].item(), ahead[0].tolist(), output))
        return output

    model.model.predict_further = watch
    text = write(model, prompt, use_mtp=True)
    with torch.no_grad():
        states = model(text, output_mtp_hidden_states=True).mtp_hidden_states
    compared = 0

    def is_true(k: int, position: int, ahead: list[int]) -> bool:
        """Whether the tokens that module k + 1 read up to this position are those of the text."""
        return ahead == text[0, position - len(ahead) + k + 2 : position + k + 2].tolist()

    for k, position, ahead, output in seen:
        before = [call[:3] for call in seen if call[0] <= k and call[1] == position]
        if all(is_true(*call) for call in before):
            expected = states[k][:, position + 1 - len(ahead) : position + 1]
            assert (expected - output).abs().max() < 1e-5 * expected.abs().max(), (k, position)
            compared += 1
    assert compared > 25


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_attention(form):
    model = taught(2, attention_form=form)
    prompt = tokens(1, 9)
    assert torch.equal(write(model, prompt), write(model, prompt, use_mtp=True))


@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_both_forms_of_sparse_attention(form):
    model = taught(2, "dsa", sparse_form=form)
    prompt = tokens(1, 9)
    assert torch.equal(write(model, prompt), write(model, prompt, use_mtp=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_prompt(kind):
    model, prompt = taught(2, kind), tokens(1, 9)
    padded = torch.nn.functional.pad(prompt, (4, 0))
    mask = (torch.arange(13) >= 4).long()[None]
    plain = write(model, prompt)
    drafted = write(model, padded, use_mtp=True, attention_mask=mask)
    assert torch.equal(plain, drafted[:, 4:])
    alone = write(model, prompt, use_mtp=True)
    accepted = model.draft_report.accepted
    write(model, padded, use_mtp=True, attention_mask=mask)
    assert torch.equal(plain, alone) and model.draft_report.accepted == accepted  # the modules see no padding either


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_holds_the_beginning(kind):
    model, prompt = taught(2, kind), tokens(1, 20)
    cache = model.model.new_cache()
    with torch.no_grad():
        model(prompt[:, :12], past_key_values=cache)
    assert torch.equal(write(model, prompt), write(model, prompt, use_mtp=True, past_key_values=cache))
    assert cache.get_seq_length() == 20 + 40 - 1


def test_the_caches_hold_what_was_accepted():
    model, prompt = taught(2), tokens(1, 9)
    output = write(model, prompt, use_mtp=True, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    plain = write(model, prompt, return_dict_in_generate=True, output_scores=True)
    assert len(output.scores) == len(plain.scores) == 40
    for a, b in zip(plain.scores, output.scores):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_it_ends_where_plain_decoding_ends():
    model, prompt = taught(3), tokens(1, 9)
    text = write(model, prompt)[0, 9:].tolist()
    for at in (1, 4, 5, 6, 17):
        end = text[at]
        plain = write(model, prompt, eos_token_id=end)
        assert torch.equal(plain, write(model, prompt, eos_token_id=end, use_mtp=True))
    for new in (1, 2, 3, 4, 5):
        assert torch.equal(write(model, prompt, new), write(model, prompt, new, use_mtp=True))


def test_the_last_position():
    """Drafts do not reach beyond max_position_embeddings, where the model would refuse them."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = taught(3, max_position_embeddings=30, rope_parameters=rope)
    prompt = tokens(1, 9)
    plain = write(model, prompt, 22)
    assert plain.shape[1] == 31
    assert torch.equal(plain, write(model, prompt, 22, use_mtp=True))


class Damped(LogitsProcessor):
    """Halves the score of the token written last: depends on the text."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids[0, -1]] -= 3.0
        return scores


def test_processors_reach_drafts():
    model, prompt = taught(2), tokens(1, 9)
    for settings in ({"logits_processor": LogitsProcessorList([Damped()])}, {"repetition_penalty": 1.3}):
        assert torch.equal(write(model, prompt, **settings), write(model, prompt, use_mtp=True, **settings))
    assert model.draft_report.accepted > 0


@torch.no_grad()
def last_two(model, prompt: torch.Tensor, new: int, words: int, temperature: float = 1.0, top_k: int = 0):
    """The joint distribution of the last two of `new` tokens sampled from the first `words`: of all texts' logits."""
    texts, chances = prompt, torch.ones(1, dtype=torch.double)
    for _ in range(new):
        logits = model(texts).logits[:, -1, :words].double() / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        chances = (chances[:, None] * logits.softmax(-1)).flatten()
        texts = torch.cat((texts.repeat_interleave(words, 0), torch.arange(words).repeat(len(texts))[:, None]), 1)
    return chances.view(-1, words, words).sum(0)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"temperature": 0.6, "top_k": 4}], ids=["plain", "warped"])
def test_sampling_is_distributed_as_plain_sampling(settings):
    """Of 4 tokens the joint distribution of the last two, by a chi-square test."""
    model, prompt, words, runs = taught(2), tokens(1, 5), 6, 900
    others = list(range(words, model.config.vocab_size))
    torch.manual_seed(0)
    found, accepted = torch.zeros(words, words), 0
    for _ in range(runs):
        text = write(model, prompt, 4, use_mtp=True, do_sample=True, suppress_tokens=others, **settings)[0, -2:]
        found[text[0], text[1]] += 1
        accepted += model.draft_report.accepted
    assert accepted > runs / 4
    expected = runs * last_two(model, prompt, 4, words, **settings)
    cells = expected >= 5
    statistic = ((found - expected) ** 2 / expected)[cells].sum()
    freedom = cells.sum()
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom, accepted)


def test_streaming():
    class Words:
        """Stands in for a tokenizer: transformers' streamer asks it for text alone."""

        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    model, prompt = taught(2).float(), tokens(1, 9)
    pieces = []

    class Collecting(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    text = write(model, prompt, use_mtp=True, streamer=Collecting(Words(), skip_prompt=True))
    assert "".join(pieces).split() == [str(i) for i in text[0, 9:].tolist()]


def test_pipeline(tmp_path):
    from train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["words of a text, and more words of a text"] * 30, 280)
    model = mtp_model(1, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    speak = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = speak("words of", **settings)[0]["generated_text"]
    assert plain == speak("words of", use_mtp=True, **settings)[0]["generated_text"]
    report = speak.model.draft_report
    assert isinstance(report, DraftReport) and report.drafted >= 10


IMPOSSIBLE = {
    "no modules": (lambda: tiny_model(), {}, "no modules of multi-token prediction.*num_nextn_predict_layers=0"),
    "no drafts": (lambda: mtp_model(1), {"num_assistant_tokens": 0}, "num_assistant_tokens=0"),
    "beams": (lambda: mtp_model(1), {"num_beams": 3}, "num_beams=3 is not possible"),
    "static": (lambda: mtp_model(1), {"cache_implementation": "static"}, "not supported with Static"),
    "no cache": (lambda: mtp_model(1), {"use_cache": False}, "requires `use_cache=True`"),
    "several rows": (lambda: mtp_model(1), {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
    "stop strings": (lambda: mtp_model(1), {"stop_strings": ["a"]}, "stop_strings=.*not possible"),
    "time": (lambda: mtp_model(1), {"max_time": 1.0}, "max_time=1.0"),
    "guidance": (lambda: mtp_model(1), {"guidance_scale": 1.7}, "guidance_scale=1.7"),
    "ensemble": (lambda: mtp_model(1), {"assistant_ensemble_weight": 0.3}, "assistant_ensemble_weight=0.3"),
    "lookup": (lambda: mtp_model(1), {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "early exit": (lambda: mtp_model(1), {"assistant_early_exit": 1}, "assistant_early_exit=1"),
    "assistant": (lambda: mtp_model(1), {"assistant_model": tiny_model()}, "not possible with an assistant_model"),
    "criteria": (
        lambda: mtp_model(1),
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(7)])},
        "use_mtp=True with stopping_criteria",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible(case):
    build, settings, message = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=message):
        write(build(), tokens(1, 5), use_mtp=True, **settings)


def test_embeddings_are_refused():
    model = mtp_model(1)
    with pytest.raises(ValueError, match="not possible with .* inputs_embeds"):
        model.generate(inputs_embeds=model.model.embed_tokens(tokens(1, 5)), use_mtp=True, max_new_tokens=3)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size = 1"):
        write(mtp_model(1), tokens(2, 5), use_mtp=True)


def test_the_cache_of_a_module_grows_like_any():
    model = taught(1)
    prompt = tokens(1, 9)
    text = write(model, prompt, 200, use_mtp=True, past_key_values=LatentCache(model.config))
    assert torch.equal(text, write(model, prompt, 200))
