"""What tests of generation share: models, prompts, and the loop that generate() is compared with."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from modeling_nanodeepseek import Fp8LatentCache, LatentCache
from tests.conftest import SPARSE
from tests.conftest import tokens as any_tokens

GQA = {"attention_type": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "mla": {},
    "mla-expanded": {"attention_form": "expanded"},
    "mla-absorbed": {"attention_form": "absorbed"},
    "gqa": GQA,
    "dsa": SPARSE,
}
kinds = pytest.mark.parametrize("kind", KINDS)
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}


def tokens(*args, **kwargs) -> torch.Tensor:
    """Prompts without 0, the padding token: generate() takes it for padding where no mask is given."""
    return any_tokens(*args, **kwargs).clamp(min=1)


def choose_best(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def by_hand(model, ids: torch.Tensor, new: int = 8, choose=choose_best, read=None) -> torch.Tensor:
    """ids [B, T] with `new` tokens more; `read(ids)` gives logits, by default a forward of everything, uncached."""
    for _ in range(new):
        logits = model(ids, use_cache=False).logits if read is None else read(ids)
        ids = torch.cat((ids, choose(logits[:, -1])), -1)
    return ids


def padded(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one batch, and its mask; the padding is a token that would show."""
    length = max(map(len, rows))
    ends = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, end, value=3) for row, end in zip(rows, ends)])
    return ids, torch.stack([F.pad(torch.ones_like(row), end) for row, end in zip(rows, ends)])


def a_cache(name: str, model):
    return {
        "latent": lambda: LatentCache(model.config),
        "fp8": lambda: Fp8LatentCache(model.config),
        "transformers": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[name]()
