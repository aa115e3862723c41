"""Speed and memory of generation against the length of the context, for any causal language model.

A context of N tokens is a prompt of N - W random ones, read in one forward that fills the cache (prefill), and W
written one by one from it, greedily (decode). Figures are medians over runs after one that is not counted.
"""

import inspect
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel

from modeling_nanodeepseek import Fp8LatentCache, LatentCache, NanoDeepSeekConfig

from .hardware import resident_bytes, use_threads
from .loading import load_config, load_model, position_limit

CACHES = ("default", "fp8")


def check_contexts(config, contexts: list[int], written: int):
    """Raises ValueError for contexts that are longer than the model's limit, or too short to write so much in."""
    for context in contexts:
        if context > position_limit(config):
            raise ValueError(f"--speed {context} exceeds the model's max_position_embeddings={position_limit(config)}")
        if context <= written:
            raise ValueError(f"--speed {context} leaves no prompt: {written} tokens of it are written (--written)")


def new_cache(model: PreTrainedModel, kind: str) -> Cache | None:
    """An empty cache; None for the one that the model makes itself."""
    if kind == "default":
        return None
    if not isinstance(model.config, NanoDeepSeekConfig):
        raise ValueError(f"--cache {kind} is for nanodeepseek models, and this is a {model.config.model_type!r}")
    return Fp8LatentCache(model.config)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the states that a cache holds, without reserves."""
    if isinstance(cache, LatentCache):
        return cache.nbytes()
    return sum(part.nbytes for layer in cache.layers for part in vars(layer).values() if isinstance(part, torch.Tensor))


class PeakMemory:
    """The largest memory taken since `start`: allocated on a GPU; of a CPU's process the resident memory beyond what it
    was when this was made, before there was a model, which only Linux tells."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known = sys.platform == "linux"
        self.before = resident_bytes("VmRSS:") if self.known else 0

    def start(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.known:
            with suppress(PermissionError):  # in some containers; contexts grow, and so does the peak
                Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM:") - self.before if self.known else None


@torch.inference_mode()
def generate_once(model: PreTrainedModel, ids: torch.Tensor, written: int, cache: Cache | None) -> tuple:
    """Seconds to read `ids`, seconds to write, and the cache."""
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def forward(tokens: torch.Tensor, cache: Cache | None):
        output = model(tokens, past_key_values=cache, use_cache=True, **kept)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        return token, output.past_key_values

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    begin = now()
    token, cache = forward(ids, cache)
    middle = now()
    for _ in range(written):
        token, cache = forward(token, cache)
    return middle - begin, now() - middle, cache


def measure(
    model: str,
    contexts: list[int],
    written: int = 16,
    runs: int = 3,
    rows: int = 1,
    cache: str = "default",
    device: str | None = None,
    dtype: str = "auto",
    overrides: dict | None = None,
    threads: int | None = None,
) -> list[dict]:
    """Of each context, the shortest first: tokens per second of prefill and decode, peak memory, bytes of the cache.

    Args:
        written: tokens of the context that are written, the rest is read.
        rows: texts at a time; tokens per second are of all of them.
        threads: CPU threads; default: all cores.
    """
    check_contexts(load_config(model, **overrides or {}), contexts, written)
    use_threads(threads)
    memory = PeakMemory(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    loaded = load_model(model, device, dtype, **overrides or {})
    vocabulary, results = loaded.get_input_embeddings().num_embeddings, []
    for context in sorted(contexts):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (rows, context - written), generator=generator).to(loaded.device)
        memory.start()
        seconds = []
        for _ in range(runs + 1):
            filled = None  # the last run's: two would count twice
            *times, filled = generate_once(loaded, ids, written, new_cache(loaded, cache))
            seconds.append(times)
        prefill, decode = (statistics.median(times) for times in zip(*seconds[1:]))
        held = cache_bytes(filled)
        results.append(
            {
                "context": context,
                "prefill_tokens_per_second": ids.numel() / prefill,
                "decode_tokens_per_second": rows * written / decode,
                "peak_memory_bytes": memory.read(),
                "cache_bytes": held,
                "cache_bytes_per_token": held / (rows * context),
            }
        )
    return results


def measure_apart(*args, **kwargs) -> list[dict]:
    """`measure` in a process of its own, so that the peak of its memory is the model's."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, *args, **kwargs).result()
    except BrokenProcessPool as error:
        raise ValueError("the process that measured --speed was ended from outside: out of memory?") from error
