"""Measures our model against transformers' DeepseekV3ForCausalLM, or (--sparse) its DeepseekV32ForCausalLM: same
weights, same process, default settings of each.

    python -m benchmarks.against_transformers train --dtype float32 --threads 1
    python -m benchmarks.against_transformers prefill --dtype bfloat16 --threads 2 --context 2048
    python -m benchmarks.against_transformers decode --context 8192
    python -m benchmarks.against_transformers memory
    python -m benchmarks.against_transformers train --device cuda --dtype bfloat16 --compile
    python -m benchmarks.against_transformers decode --sparse --context 8192
    python -m benchmarks.against_transformers prefill --sparse --context 131072 --alone
    python -m benchmarks.against_transformers growth --sparse

train    one step: forward with labels, backward, AdamW; bf16 is autocast over fp32 weights, as Trainer(bf16=True) does.
prefill  a forward over the prompt that fills the cache and gives the last token's logits; bf16 is `model.to(bf16)`.
decode   greedy tokens one by one, each a forward on the cache, after a prompt of `--context` tokens.
growth   our token after 2048, 8192 and 32768 tokens, in turns; the ratio is the longest context's over the shortest's.
memory   the peak of a train step over what the process held before there was a model, each model in a process of its
         own: resident memory on a CPU, allocated memory on a GPU.

Equality comes first. In fp32 the two must agree to 1e-5 in the logits of 512 tokens, 1e-4 in every gradient, and 1e-3
after thousands of tokens, where a near tie of two experts may fall either way. In bf16 ours may be at most 1.2 times as
far from the fp32 result as theirs, and one rounding of bf16. With --sparse ours attends to what theirs selected, where
the two could differ by a near tie, and the selections are compared beside. The two take turns; the ratio is the median
of theirs over the median of ours, above 1 where ours is better. --alone measures ours without the other, and without
comparing: for contexts that the other cannot reach. The last line is one JSON object.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from train.hardware import resident_bytes
from train.recipe import REPOSITORY

# 6 layers, 512 wide, 8 heads, kv rank 128, q rank 192, 16 experts top-4 in 4 groups, vocabulary 8192: 46 M parameters.
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 16384,
}
# transformers' model has no balance loss: ours is switched off, both compute the same numbers.
CLASSES = {
    "ours": (NanoDeepSeekForCausalLM, NanoDeepSeekConfig, {"aux_loss_alpha": 0.0}),
    "transformers": (DeepseekV3ForCausalLM, DeepseekV3Config, {"num_key_value_heads": SIZES["num_attention_heads"]}),
}
# With few indexer heads many scores are exactly zero (ReLU), and the two choose differently among equals.
SPARSE_SIZES = {"index_topk": 256, "index_n_heads": 8, "index_head_dim": 32}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kinds(args: argparse.Namespace) -> list[str]:
    return ["ours"] if args.alone else list(CLASSES)


def build(kind: str, args: argparse.Namespace) -> torch.nn.Module:
    """The model of that kind; equal seeds give both the same weights, wide enough for every part to matter."""
    model_class, config_class, own = CLASSES[kind]
    if args.sparse and kind == "transformers":
        model_class, config_class = DeepseekV32ForCausalLM, DeepseekV32Config
    sizes = SIZES | (SPARSE_SIZES if args.sparse else {})
    sizes["max_position_embeddings"] = max(sizes["max_position_embeddings"], 2 * (args.context or 0))
    with torch.device(args.device):
        model = model_class(config_class(**copy.deepcopy(sizes), **own))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
    return model


def prompt(args: argparse.Namespace, batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
    return ids.to(args.device)


def synchronize(args: argparse.Namespace):
    if args.device == "cuda":
        torch.cuda.synchronize()


def relative_rms(expected: torch.Tensor, actual: torch.Tensor) -> float:
    expected, actual = expected.detach().double(), actual.detach().double()
    return ((expected - actual).pow(2).mean() / expected.pow(2).mean().clamp(min=1e-60)).sqrt().item()


def check(what: str, exact: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, args, tolerance: float) -> dict:
    """Refuses to time two models that do not compute the same; returns the errors it saw."""
    if args.dtype == "float32" and args.device == "cpu":
        error = relative_rms(theirs, ours)
        assert error <= tolerance, f"{what}: ours is {error:.1e} away from transformers'"
        return {"difference": error}
    errors = {"ours": relative_rms(exact, ours), "transformers": relative_rms(exact, theirs)}
    rounding = 2**-8 if args.dtype == "bfloat16" else tolerance
    assert errors["ours"] <= 1.2 * errors["transformers"] + rounding, f"{what}: errors against fp32 {errors}"
    return errors


def take_turns(steps: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of `--runs` calls of each function, in alternation, after one call of each that is not counted."""
    seconds = {name: [] for name in steps}
    for run in range(args.runs + 1 - args.alone):
        for name, step in steps.items():
            synchronize(args)
            start = time.perf_counter()
            step()
            synchronize(args)
            if run or args.alone:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, float]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    seconds = {f"{name}_s": value for name, value in median.items()}
    return seconds | ({"ratio": median["transformers"] / median["ours"]} if "transformers" in median else {})


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")


def compiled(model: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    return torch.compile(model) if args.compile else model


def train_step(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace, optimizer=None) -> torch.Tensor:
    with autocast(args):
        loss = model(ids, labels=ids).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def measure_train(args: argparse.Namespace) -> dict:
    ids = prompt(args, args.batch or 8, args.context or 512)
    gradients = {}
    for kind in ("exact", "ours", "transformers"):
        settings = args if kind != "exact" else argparse.Namespace(**vars(args) | {"dtype": "float32"})
        model = build("transformers" if kind == "exact" else kind, args).train()
        loss = train_step(model, ids[:2], settings)
        gradients[kind] = {"loss": loss} | {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {
        name: check(name, exact, gradients["ours"][name], gradients["transformers"][name], args, 1e-4)
        for name, exact in gradients["exact"].items()
    }
    del gradients
    steps = {}
    for kind in CLASSES:
        model = build(kind, args).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        run = compiled(model, args)
        steps[kind] = lambda run=run, optimizer=optimizer: train_step(run, ids, args, optimizer)
    worst = max(errors.values(), key=lambda error: max(error.values()))
    return {"tokens": ids.numel(), "worst_gradient": worst} | compare(take_turns(steps, args))


@torch.no_grad()
def last_logits(model: torch.nn.Module, ids: torch.Tensor, cache=None):
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output.past_key_values


@torch.no_grad()
def selections(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per layer the keys that transformers' indexer selects, [B, T, K]; -1 where it lists one that is not visible."""
    chosen = []
    indexers = [module for name, module in model.named_modules() if name.endswith(".indexer")]
    hooks = [indexer.register_forward_hook(lambda *call: chosen.append(call[-1])) for indexer in indexers]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    last = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)[:, None]
    return [indices.masked_fill(indices > last, -1) for indices in chosen]


@torch.no_grad()
def check_selections(models: dict[str, torch.nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Ours attends to what transformers' model selected: its logits, and how many rows of the first layer it would have
    selected otherwise (two scores may differ by a rounding alone; later layers follow)."""
    theirs = selections(models["transformers"], ids)
    replayed = models["ours"](ids, use_cache=False, index_topk_indices=theirs)
    own = models["ours"](ids, use_cache=False, output_index_topk_indices=True, logits_to_keep=1).index_topk_indices
    others = (own[0].sort(-1).values != theirs[0].sort(-1).values).any(-1).float().mean().item()
    assert others <= 0.002, f"{others:.2%} of the first layer's queries select other keys"
    return replayed.logits, {"rows_with_other_keys": others}


def inference_models(args: argparse.Namespace, ids: torch.Tensor) -> tuple[dict[str, torch.nn.Module], dict, dict]:
    """The models in `--dtype`, their caches of the whole prompt, and how far apart they are: all logits of 512 tokens,
    and in fp32 the last ones of the whole prompt and of one token more from the cache."""
    models = {kind: build(kind, args).eval() for kind in kinds(args)}
    caches = {}

    def run(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            first = models[kind](ids[:, :512], use_cache=False).logits
        last, caches[kind] = last_logits(models[kind], ids)
        after = last_logits(models[kind], ids[:, -1:], caches[kind])[0]
        return first, torch.stack((last, after))

    exact = None if args.alone or args.dtype == "float32" else run("transformers")
    for model in models.values():
        model.to(DTYPES[args.dtype])
    results = {kind: run(kind) for kind in models}
    if args.alone:
        return models, caches, {}
    (first, last), (their_first, their_last) = results["ours"], results["transformers"]
    others = {}
    if args.sparse and args.dtype == "float32":
        first, others = check_selections(models, ids[:, :512])
    errors = check("logits", their_first if exact is None else exact[0], first, their_first, args, 1e-5)
    if args.dtype == "float32" and not args.sparse:
        check("logits at the end", their_last, last, their_last, args, 1e-3)
    return models, caches, errors | others


def measure_prefill(args: argparse.Namespace) -> dict:
    ids = prompt(args, args.batch or 1, args.context or 2048)
    if args.alone:
        models, error = {"ours": build("ours", args).eval().to(DTYPES[args.dtype])}, {}
    else:
        models, _, error = inference_models(args, ids)
    runs = {kind: compiled(model, args) for kind, model in models.items()}
    steps = {kind: lambda run=run: last_logits(run, ids) for kind, run in runs.items()}
    seconds = take_turns(steps, args)
    peak = {"peak_bytes": resident_bytes("VmHWM:")} if args.alone and args.device == "cpu" else {}
    return {"logits": error, "context": ids.shape[1]} | peak | compare(seconds)


def bare_products(model: torch.nn.Module, batch: int) -> Callable[[], None]:
    """The products that a token cannot do without, each active weight once and nothing else: a bound for decoding.

    Where rows of a batch take different experts, more weights are active than counted here.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for experts in (module for module in model.modules() if hasattr(module, "gate_up_proj")):
        for stacked in (experts.gate_up_proj, experts.down_proj):
            weights += stacked[: SIZES["num_experts_per_tok"]].unbind()
    with torch.no_grad():
        rows = {width: weights[0].new_ones(batch, width) for width in {weight.shape[1] for weight in weights}}

    @torch.no_grad()
    def run():
        for weight in weights:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)

    return run


def decode(model: torch.nn.Module, ids: torch.Tensor, cache, tokens: int):
    """Greedy tokens after the prompt that the cache holds; what an earlier call wrote is cropped."""
    if cache.get_seq_length() > ids.shape[1]:
        cache.crop(ids.shape[1] - cache.get_seq_length())
    token = ids[:, :1]
    for _ in range(tokens):
        logits, _ = last_logits(model, token, cache)
        token = logits.argmax(-1, keepdim=True)


def measure_growth(args: argparse.Namespace, contexts: tuple[int, ...] = (2048, 8192, 32768), tokens: int = 16) -> dict:
    args.context, args.alone = contexts[-1], True
    model = build("ours", args).eval().to(DTYPES[args.dtype])
    prompts = {n: prompt(args, args.batch or 1, n) for n in contexts}
    caches = {n: last_logits(model, ids)[1] for n, ids in prompts.items()}
    steps = {n: lambda n=n: decode(model, prompts[n], caches[n], tokens) for n in contexts}
    seconds = {n: statistics.median(values) / tokens for n, values in take_turns(steps, args).items()}
    return {"s_per_token": seconds, "ratio": seconds[contexts[-1]] / seconds[contexts[0]]}


def measure_decode(args: argparse.Namespace, tokens: int = 16) -> dict:
    ids = prompt(args, args.batch or 1, args.context or 512)
    models, caches, error = inference_models(args, ids)
    runs = {kind: compiled(model, args) for kind, model in models.items()}
    steps = {kind: lambda kind=kind: decode(runs[kind], ids, caches[kind], tokens) for kind in runs}
    products = bare_products(models["ours"], len(ids))
    steps["products"] = lambda: [products() for _ in range(tokens)]
    result = compare(take_turns(steps, args))
    per_token = {f"{kind}_s_per_token": result.pop(f"{kind}_s") / tokens for kind in steps}
    return {"logits": error, "context": ids.shape[1]} | per_token | result


def peak_of_training(kind: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of two train steps, over those before the model was built. The second step has optimizer state
    and gradients, as every later one."""
    ids = prompt(args, args.batch or 8, args.context or 512)
    before = resident_bytes("VmRSS:")
    model = build(kind, args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for _ in range(2):
        train_step(model, ids, args, optimizer)
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_bytes("VmHWM:") - before


def measure_memory(args: argparse.Namespace) -> dict:
    peaks = {kind: [] for kind in CLASSES}
    for _ in range(args.runs):
        for kind in CLASSES:
            command = [sys.executable, "-m", "benchmarks.against_transformers", *sys.argv[1:], "--peak-of", kind]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
            peaks[kind].append(json.loads(done.stdout.splitlines()[-1]))
    median = {kind: statistics.median(values) for kind, values in peaks.items()}
    return {f"{kind}_bytes": value for kind, value in median.items()} | {
        "ratio": median["transformers"] / median["ours"],
        "ours_over_transformers": median["ours"] / median["transformers"],
    }


TASKS = {
    "train": measure_train,
    "prefill": measure_prefill,
    "decode": measure_decode,
    "growth": measure_growth,
    "memory": measure_memory,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--context", type=int, help="tokens per row; 512 to train and decode, 2048 to prefill")
    parser.add_argument("--batch", type=int, help="rows; 8 to train, else 1")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile for both models")
    parser.add_argument("--sparse", action="store_true", help="DeepSeek Sparse Attention, the 256 best keys")
    parser.add_argument("--alone", action="store_true", help="ours alone, not compared (prefill and decode)")
    parser.add_argument("--peak-of", choices=CLASSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of_training(args.peak_of, args))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    result = {"task": args.task, "device": where, "dtype": args.dtype, "threads": args.threads, "compile": args.compile}
    result |= {"sparse": args.sparse, "alone": args.alone}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(result | TASKS[args.task](args)))


if __name__ == "__main__":
    main()
