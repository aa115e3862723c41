"""What a model costs, before anything is allocated: parameters, cache, memory, operations, tokens per second.

    python -m train.plan --model deepseek-v3.2 --device h800 --devices 2048 --precision fp8
    python -m train.plan --model quickstart --sequence 256 --batch 24        # on this machine, whose peak is measured

--model is a name in configuration/models/, a config.json, or a folder with one. Memory of training is by the formula of
`memory.training_bytes`; parameters, gradients and optimizer sharded over the devices as FSDP does.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from modeling_nanodeepseek import NanoDeepSeekConfig

from .accounting import (
    cache_bytes,
    count_parameters,
    decode_flops_per_token,
    fp8_cache_bytes,
    prefill_flops_per_token,
    selects,
    training_flops_per_token,
)
from .hardware import DEVICES, Device, multiplies_bf16, runtime_bytes, this_machine, use_threads
from .loading import ODD_VALUES, possible_config
from .memory import training_bytes
from .models import build_config

# The share of the peak that training reaches. V3's published 180K GPU hours per trillion tokens on H800 are 1543 tokens
# per second and GPU, which is 0.41 of the peak in bf16 and 0.20 of that in FP8, in which it trained. fp32: what the
# quickstart reaches on two CPU cores, 0.30 to 0.36.
UTILISATION = {"bf16": 0.4, "fp32": 0.33, "fp8": 0.2}
ITEMSIZE = {"bf16": 2, "fp32": 4, "fp8": 1}


def load_config(model: str) -> NanoDeepSeekConfig:
    folder = Path(model).expanduser()
    with possible_config(model, *ODD_VALUES):
        return build_config(str(folder / "config.json") if folder.is_dir() else model)


def parameters(config: NanoDeepSeekConfig) -> dict[str, float]:
    """Counts; `active` with the input embedding, `active_published` without it, as reports count."""
    counts = count_parameters(config)
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {
        "total": counts["total"],
        "active": counts["active"],
        "active_published": counts["active"] - lookup,
        "mtp": counts["mtp"],
    }


def cache(config: NanoDeepSeekConfig) -> dict[str, float]:
    """Bytes per token in all layers, and those of other attentions with as many heads of as many numbers."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    mla = config.attention_type == "mla"
    width = config.v_head_dim if mla else config.head_dim
    sizes = {"bf16": cache_bytes(config), "bf16_per_layer": cache_bytes(config) // layers}
    if mla:
        sizes["fp8"] = fp8_cache_bytes(config)
        sizes["fp8_per_layer"] = sizes["fp8"] // layers
        if config.has_indexer:
            sizes["fp8_index_fp8"] = fp8_cache_bytes(config, index_in_fp8=True)
        sizes["mla_expanded"] = 2 * layers * heads * (config.qk_head_dim + config.v_head_dim)
    return sizes | {"mha": 4 * layers * heads * width, "gqa_8": 4 * layers * min(8, heads) * width}


def training(config, device: Device, kind: str, args: argparse.Namespace) -> dict:
    """Operations, tokens per second, and memory of each device, kept whole and checkpointed."""
    flops = training_flops_per_token(config, args.sequence)
    rate = device.flops[args.precision] * args.utilisation * args.devices / flops
    sizes = {"length": args.sequence, "batch": args.batch, "bf16": args.precision != "fp32"}
    sizes |= {"optimizer": args.optimizer, "on_cpu": kind == "cpu"}

    whole, checkpointed = (training_bytes(config, checkpointing=checked, **sizes) for checked in (False, True))
    halved = training_bytes(config, devices=2, **sizes)  # what is sharded, and what sharding takes

    def memory(devices: int, checkpointing: bool) -> dict[str, float]:
        parts = dict(checkpointed if checkpointing else whole)
        if devices > 1:
            parts["copies"] = halved["copies"]
            parts |= {part: parts[part] / devices for part in ("weights", "gradients", "optimizer")}
        parts["runtime"] = runtime_bytes(kind)
        return parts | {"sum": sum(parts.values())}

    counts = (2**power for power in range(17))
    fits = next((count for count in counts if memory(count, True)["sum"] <= 0.9 * device.memory), None)
    return {
        "flops_per_token": flops,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / args.devices,
        "device_hours_per_billion_tokens": 1e9 / rate * args.devices / 3600,
        "memory": memory(args.devices, False),
        "memory_checkpointed": memory(args.devices, True),
        "fits_on_devices": fits,
    }


def inference(config, device: Device, counts: dict, args: argparse.Namespace) -> dict:
    """Operations per token, memory of all devices together, and tokens per second at most (ideally spread).

    A decoded token takes the longer of its operations at the device's peak, and of reading what it needs: all weights
    that its batch of B rows activates (of E experts E (1 - (1 - K/E)^B) in the mean), and each row's cache, of which
    sparse attention reads the chosen keys' latents and the indexer all its own.
    """
    item, rows, context = ITEMSIZE[args.precision], args.batch, args.context
    per_token = cache_bytes(config) if args.precision != "fp32" else cache_bytes(config, 4)
    if args.precision == "fp8" and config.attention_type == "mla":
        per_token = fp8_cache_bytes(config, index_in_fp8=True)
    E, K = config.n_routed_experts or 1, config.num_experts_per_tok if config.n_routed_experts else 1
    resting = counts["total"] - counts["active"]  # the experts that one token does not meet
    shares = E / (E - K) * (1 - (1 - K / E) ** rows) - K / (E - K) if E > K else 0.0
    lookup = counts["active"] - counts["active_published"]
    weights = item * (counts["active_published"] + shares * resting)
    layers = config.num_hidden_layers
    read = context * per_token
    if selects(config) and context > config.index_topk:
        index = layers * config.index_width * item
        read = config.index_topk * (per_token - index) + context * index
    decode = decode_flops_per_token(config, context)
    seconds = max(rows * decode / device.flops[args.precision], (weights + rows * read) / device.bandwidth)
    prefill = prefill_flops_per_token(config, context)
    return {
        "context": context,
        "prefill_flops_per_token": prefill,
        "decode_flops_per_token": decode,
        "weight_bytes": item * counts["total"],
        "cache_bytes": rows * context * per_token,
        "memory": item * counts["total"] + rows * context * per_token,
        "read_per_step": weights + rows * read,
        "embedding_bytes": item * lookup,
        "prefill_tokens_per_second": args.devices * args.utilisation * device.flops[args.precision] / prefill,
        "decode_tokens_per_second_at_most": args.devices * rows / seconds,
    }


def plan(args: argparse.Namespace) -> dict:
    """All of it, as numbers: FLOPs, bytes, tokens per second.

    Raises: ValueError for what does not fit together.
    """
    config = load_config(args.model)
    limit = config.max_position_embeddings
    args.sequence = min(4096, limit) if args.sequence is None else args.sequence
    args.context = limit if args.context is None else args.context
    for name in ("sequence", "context"):
        if not 1 <= getattr(args, name) <= config.position_limit:
            raise ValueError(f"--{name} {getattr(args, name)} must lie in 1..{limit}, the model's positions")
    for name in ("devices", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: there is none on this machine; by data sheet there are {', '.join(DEVICES)}")
    if args.precision is None:
        here = kind in ("cpu", "cuda")
        args.precision = "bf16" if not here or multiplies_bf16(torch.device(kind)) else "fp32"
    if kind in ("cpu", "cuda"):
        use_threads()
    device = this_machine(kind, args.precision) if kind in ("cpu", "cuda") else DEVICES[kind]
    if args.precision not in device.flops:
        raise ValueError(
            f"--precision {args.precision}: {device.name} has no peak for it, but {', '.join(device.flops)}"
        )
    args.utilisation = UTILISATION[args.precision] if args.utilisation is None else args.utilisation
    if not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation {args.utilisation:g} must lie in (0, 1]")
    counts = parameters(config)
    machine = {"device": device.name, "devices": args.devices, "precision": args.precision}
    machine |= {"peak_flops": device.flops[args.precision], "utilisation": args.utilisation}
    machine |= {"memory_bytes": device.memory, "bandwidth": device.bandwidth, "measured": kind in ("cpu", "cuda")}
    return {
        "model": args.model,
        "parameters": counts,
        "cache_bytes_per_token": cache(config),
        "machine": machine,
        "training": {"sequence": args.sequence, "batch_per_device": args.batch, "optimizer": args.optimizer}
        | training(config, device, kind, args),
        "inference": inference(config, device, counts, args),
    }


def amount(value: float, unit: str = "") -> str:
    """1234567 -> 1.23 M; decimal prefixes."""
    if value == 0:
        return f"0 {unit}".strip()
    power = min(5, max(0, int(math.log10(abs(value)) // 3)))
    return f"{value / 1000**power:.{3 if power == 0 and value < 10 else 4}g} {'_kMGTP'[power].strip('_')}{unit}".strip()


def table(numbers: dict) -> str:
    """The same as text."""
    counts, caches, machine = numbers["parameters"], numbers["cache_bytes_per_token"], numbers["machine"]
    train, infer = numbers["training"], numbers["inference"]
    rows: list[tuple[str, str] | str] = [f"{numbers['model']}: parameters"]
    rows += [("total", f"{counts['total']:,}")]
    rows += [("active per token", f"{counts['active']:,} ({counts['active_published']:,} without the input embedding)")]
    if counts["mtp"]:
        share = counts["mtp"] / (counts["total"] + counts["mtp"])
        rows += [("multi-token prediction", f"{counts['mtp']:,} more, {share:.1%} of all that is trained")]
    rows += ["cache, bytes per token"]
    rows += [("bf16", f"{caches['bf16']:,} ({caches['bf16_per_layer']:,} a layer)")]
    if "fp8" in caches:
        rows += [("latents in FP8", f"{caches['fp8']:,} ({caches['fp8_per_layer']:,} a layer)")]
    if "fp8_index_fp8" in caches:
        rows += [("and the indexer's keys in FP8", f"{caches['fp8_index_fp8']:,}")]
    for key, name in (("mha", "as many heads of MHA, bf16"), ("gqa_8", "GQA of 8"), ("mla_expanded", "MLA, expanded")):
        if key in caches:
            rows += [(name, f"{caches[key]:,}: this is {caches['bf16'] / caches[key]:.1%} of it")]
    how = "measured" if machine["measured"] else "by data sheet"
    rows += [f"machine: {machine['devices']} x {machine['device']}, {machine['precision']}"]
    rows += [
        ("peak of each", f"{amount(machine['peak_flops'], 'FLOP/s')} ({how}), {machine['utilisation']:.0%} of it used")
    ]
    rows += [("memory of each", f"{amount(machine['memory_bytes'], 'B')}, {amount(machine['bandwidth'], 'B/s')}")]
    rows += [f"training: {train['batch_per_device']} x {train['sequence']:,} tokens a device, {train['optimizer']}"]
    rows += [("operations per token", amount(train["flops_per_token"], "FLOP"))]
    each = f"{amount(train['tokens_per_second_per_device'])} a device" if machine["devices"] > 1 else "estimated"
    rows += [("tokens per second", f"{amount(train['tokens_per_second'])} ({each})")]
    rows += [("device hours per billion tokens", amount(train["device_hours_per_billion_tokens"]))]
    for key, name in (("memory", "memory of each device"), ("memory_checkpointed", "with checkpointing")):
        parts = ", ".join(f"{part} {amount(size, 'B')}" for part, size in train[key].items() if part != "sum" and size)
        rows += [(name, f"{amount(train[key]['sum'], 'B')}: {parts}")]
    fits = train["fits_on_devices"]
    alone = f"{fits:,} device(s)" if fits else "no number of devices: what each holds whole is too much"
    rows += [("fits by FSDP alone, checkpointed, on", alone)]
    rows += [f"inference: {train['batch_per_device']} x {infer['context']:,} tokens"]
    rows += [("operations per token read", amount(infer["prefill_flops_per_token"], "FLOP"))]
    rows += [("operations per token written", amount(infer["decode_flops_per_token"], "FLOP"))]
    held = f"weights {amount(infer['weight_bytes'], 'B')}, cache {amount(infer['cache_bytes'], 'B')}"
    rows += [("memory, all devices", f"{amount(infer['memory'], 'B')}: {held}")]
    rows += [("tokens read per second", amount(infer["prefill_tokens_per_second"]))]
    rows += [("tokens written per second, at most", amount(infer["decode_tokens_per_second_at_most"]))]
    return "\n".join(row if isinstance(row, str) else f"  {row[0]:<36} {row[1]}" for row in rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name in configuration/models/, a config.json, or its folder")
    parser.add_argument("--device", choices=[*DEVICES, "cpu", "cuda"], help="cpu and cuda: this machine's, measured")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument(
        "--sequence", type=int, help="tokens of a training row; default 4096, or all that fit the model"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows of a device at a time")
    parser.add_argument("--context", type=int, help="tokens of a row in inference; default: the model's longest")
    parser.add_argument(
        "--precision", choices=list(UTILISATION), help="of products; default: what the device is fast in"
    )
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument(
        "--utilisation", type=float, help="share of the peak; default bf16 0.4, FP8 0.2 (V3's own), fp32 0.33"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        numbers = plan(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(numbers, indent=2) if args.json else table(numbers))


if __name__ == "__main__":
    main()
