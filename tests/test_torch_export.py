"""torch.export: the program gives the model's logits, at lengths and batches that it was not traced with.

What torch.compile does is tested with generation and experts.
"""

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from tests.conftest import SPARSE, assert_close, tiny_model, tokens

SHAPES = [(2, 31), (3, 17), (1, 90)]
ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
KINDS = {
    "mla, experts": ONE_LAYER,
    "gqa": {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2} | ONE_LAYER,
    "dsa, gathered": SPARSE | {"sparse_form": "gathered"} | ONE_LAYER,
    "dsa, masked": SPARSE | {"sparse_form": "masked"} | ONE_LAYER,
}


@torch.no_grad()
def exported(model, dynamic: bool):
    """The program of a forward without a cache, of any batch and of 8 to 512 tokens, or of the one shape."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=8, max=512)}
    shapes = {"input_ids": sizes, "use_cache": None} if dynamic else None
    return torch.export.export(model, (), {"input_ids": tokens(*SHAPES[0]), "use_cache": False}, dynamic_shapes=shapes)


def assert_equal_logits(model, program, shape: tuple[int, int]):
    ids = tokens(*shape, seed=7)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_close(expected, program.module()(input_ids=ids, use_cache=False).logits, 1e-5, str(shape))


# What torch before 2.13 exports of these holds at the traced length alone.
AT_ONE_LENGTH = ("gqa", "dsa, gathered") if Version(torch.__version__) < Version("2.13") else ()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_other_lengths(kind, tmp_path):
    if kind in AT_ONE_LENGTH:
        pytest.skip(f"torch {torch.__version__} traces the length as a constant here")
    tiny_model(**KINDS[kind]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    program = exported(model, dynamic=True)
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    for shape in SHAPES:
        assert_equal_logits(model, program, shape)


CHOSEN_BY_LENGTH = {"sparse_form": SPARSE, "attention_form": {"attention_form": "absorbed"}}


@pytest.mark.parametrize("kind", CHOSEN_BY_LENGTH)
def test_a_form_that_goes_by_the_length_is_exported_at_one_length(kind):
    model = tiny_model(**CHOSEN_BY_LENGTH[kind], **ONE_LAYER)
    assert_equal_logits(model, exported(model, dynamic=False), SHAPES[0])
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated|ConstraintViolation"):
        exported(model, dynamic=True)
