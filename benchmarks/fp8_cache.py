"""Measures what the FP8 form of the latent cache costs in accuracy and saves in memory, side by side with bf16.

    python -m benchmarks.fp8_cache [--model runs/quickstart] [--threads 2]

Every position is read from the cache, so one forward of a text is as wrong as decoding it token by token. Without
--model: random weights at V3's widths per head and latent (kv_lora_rank 512, rope 64), hidden_size 512, 4 layers,
random tokens. With it: also that checkpoint, on documents of the standard library that its training held out.

Prints one JSON object per model: relative RMS errors of the latents and of the logits, the mean KL divergence in nats
of the next-token distributions, how often the most likely token stays, the cross-entropy in nats per token, and bytes
per token and layer; for the fp32 model with the FP8 cache (`fp8`), and for the whole model in bf16 (`bf16`).
"""

import argparse
import json

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanodeepseek import Fp8LatentCache, LatentCache
from train.data import collate, hold_out, load_documents, pack
from train.models import build_model


def relative_rms(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return ((expected - actual.float()).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


def latent_error(exact: LatentCache, fp8: Fp8LatentCache) -> float:
    """Of the latents alone, without rope keys: the mean over layers."""
    errors = []
    for held, layer in zip(exact.layers, fp8.layers):
        rounded = layer.unpack(layer.pack(held.keys), torch.float)
        errors.append(relative_rms(held.keys[..., : layer.c], rounded[..., : layer.c]))
    return sum(errors) / len(errors)


@torch.no_grad()
def measure(model, batches: list[dict[str, torch.Tensor]]) -> dict:
    """`batches` of input_ids [B, T]; the first tokens of a row count like the others."""
    result: dict[str, dict] = {"fp8": {}, "bf16": {}}
    outputs = {"exact": [], "fp8": [], "bf16": []}
    for ids in batches:
        caches = {"exact": LatentCache(model.config), "fp8": Fp8LatentCache(model.config)}
        for name, cache in caches.items():
            outputs[name].append(model(ids, past_key_values=cache).logits)
    tokens = ids.numel() * model.config.num_hidden_layers
    result["fp8"]["latents"] = latent_error(caches["exact"], caches["fp8"])
    result["fp8"]["bytes_per_token"] = caches["fp8"].nbytes() / tokens
    model.to(torch.bfloat16)
    for ids in batches:
        cache = LatentCache(model.config)
        outputs["bf16"].append(model(ids, past_key_values=cache).logits.float())
    result["bf16"]["bytes_per_token"] = cache.nbytes() / tokens
    targets = torch.cat([ids[:, 1:].flatten() for ids in batches])
    logits = {name: torch.cat([part[:, :-1].flatten(0, 1) for part in parts]) for name, parts in outputs.items()}
    result["exact"] = {"cross_entropy": F.cross_entropy(logits["exact"], targets).item()}
    for name in ("fp8", "bf16"):
        result[name]["logits"] = relative_rms(logits["exact"], logits[name])
        logs = [logits[which].log_softmax(-1) for which in (name, "exact")]
        result[name]["kl"] = F.kl_div(*logs, log_target=True, reduction="batchmean").item()
        result[name]["same_best"] = (logits[name].argmax(-1) == logits["exact"].argmax(-1)).float().mean().item()
        result[name]["cross_entropy"] = F.cross_entropy(logits[name], targets).item()
    return result


def random_model() -> tuple:
    torch.manual_seed(0)
    widths = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = build_model("quickstart", hidden_size=512, intermediate_size=1536, initializer_range=0.05, **widths).eval()
    return model, [torch.randint(0, 4096, (2, 1024))]


def trained_model(folder: str) -> tuple:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    _, documents = hold_out(load_documents("stdlib"), 0.05)
    rows = pack(documents, tokenizer, 256)  # the length the quickstart is trained at
    return model, [collate([rows[i] for i in range(start, start + 8)])["input_ids"] for start in range(0, 64, 8)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in filter(None, ["random", args.model]):
        model, batches = random_model() if name == "random" else trained_model(name)
        model.set_experts_implementation("eager")
        tokens = sum(ids.numel() for ids in batches)
        print(json.dumps({"model": name, "torch": torch.__version__, "tokens": tokens} | measure(model, batches)))


if __name__ == "__main__":
    main()
