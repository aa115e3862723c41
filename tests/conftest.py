"""Shared by all tests: small configs that switch everything on, poisoned memory, and a comparison by relative RMS."""

import os
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._device import _device_constructors

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from tests.attention_backends import portable_backends  # noqa: F401  (fixture)
from tests.small_run import corpus, tiny_recipe  # noqa: F401  (fixtures)

# transformers and torch before the releases that this project is developed on: what they lack is named where a test is
# skipped.
EARLIER_TRANSFORMERS = Version(transformers.__version__) < Version("5.23")
EARLIER_TORCH = torch.__version__ < (2, 13)

torch.set_num_threads(1)  # tests are small, and run two at a time

# `torch.device("meta")` recognises constructors by identity and remembers them at its first use: make that use now,
# before a test replaces any, or models meant for the meta device would be allocated.
_device_constructors()

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# Odd sizes wherever the architecture allows them; group-limited routing; YaRN; one dense layer, two with experts.
TINY = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 18,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 640,
    "rope_parameters": YARN | {"rope_theta": 10000.0},
}

# With the indexer's selection, of fewer keys than any test's text has. So many heads because a key for which all their
# products are negative scores exactly 0: of several such keys, who wins is an implementation's own affair.
SPARSE = {"index_topk": 5, "index_n_heads": 24, "index_head_dim": 10}


def tiny_config(**overrides) -> NanoDeepSeekConfig:
    return NanoDeepSeekConfig(**TINY | overrides)


def tiny_model(seed: int = 0, **overrides) -> NanoDeepSeekForCausalLM:
    """A tiny model whose weights are large enough, and router biases uneven enough, for every part to matter."""
    torch.manual_seed(seed)
    model = NanoDeepSeekForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model


def tokens(batch: int = 2, length: int = 31, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def rms_ratio(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected: the relative error that tolerances speak of."""
    assert expected.shape == actual.shape, (expected.shape, actual.shape)
    expected, actual = expected.detach().double(), actual.detach().double()
    return ((expected - actual).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp(min=1e-30)).item()


def assert_close(expected: torch.Tensor, actual: torch.Tensor, tolerance: float, what: str = ""):
    ratio = rms_ratio(expected, actual)
    assert ratio <= tolerance, f"{what}: relative RMS {ratio:.2e} > {tolerance:.0e}"  # NaN fails too


def assert_same(expected: torch.Tensor, actual: torch.Tensor, what: object = ""):
    """Equal but for the order of sums. Bits differ on CPUs (AMD's, by MKL) where the number of rows, and where a weight
    lies in memory (in a file that is mapped: anywhere), decide which kernel multiplies."""
    assert expected.dtype == actual.dtype
    assert_close(expected, actual, {torch.float64: 1e-13, torch.float32: 1e-6}.get(expected.dtype, 1e-2), str(what))


def checkpoint_activations(model, **settings):
    """Gradient checkpointing under the name this release of transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings or None)


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Of runs in this process only those of tests marked `report` draw the pictures of one."""
    if "report" not in request.keywords and "train.pretrain" in sys.modules:
        monkeypatch.setattr(sys.modules["train.pretrain"], "write_report", lambda folder: "none in tests")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a number that was never written shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.device.type != "meta" and not tensor.requires_grad:
            tensor.fill_(float("nan"))
        return tensor

    for name, function in real.items():
        monkeypatch.setattr(torch, name, lambda *a, _f=function, **k: poison(_f(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def graphs() -> int:
    """Graphs that torch.compile has made in this test, which uses `fresh_compiler`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of its own can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
