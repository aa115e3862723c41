"""Writes a trained model as a native DeepSeek checkpoint, for transformers' own classes, vLLM and SGLang.

python -m train.export --model runs/quickstart --output exported               deepseek_v3 or deepseek_v32, in bf16
python -m train.export --model runs/quickstart --output exported --fp8         projections in FP8 blocks; --ue8m0
python -m train.export --model runs/dsa_sparse --output exported --architecture deepseek_v3       without its indexer
"""

import argparse
import json
import sys

import torch

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.export import ARCHITECTURES, export_native

from .loading import load_config, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a checkpoint with its tokenizer")
    parser.add_argument("--output", required=True, help="folder to write; a checkpoint that it holds is replaced")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="default: deepseek_v32 if it selects keys")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is not FP8")
    parser.add_argument("--fp8", action="store_true", help="projections in e4m3 blocks of 128 x 128")
    parser.add_argument("--ue8m0", action="store_true", help="with --fp8: scales that are powers of two")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="of one file")
    args = parser.parse_args(arguments)
    try:
        load_config(args.model, "exported", ours=True)
        tokenizer = load_tokenizer(args.model)
        model = NanoDeepSeekForCausalLM.from_pretrained(args.model)
        folder = export_native(
            model,
            args.output,
            architecture=args.architecture,
            dtype=DTYPES[args.dtype],
            fp8=args.fp8,
            ue8m0=args.ue8m0,
            tokenizer=tokenizer,
            max_shard_bytes=round(args.max_shard_gb * 1e9),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    print(f"{folder}: {kind}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
