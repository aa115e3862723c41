"""Serving a model over HTTP, to OpenAI's clients and to `transformers chat`.

python -m train.serve --model runs/quickstart                              on http://localhost:8000/v1
python -m train.serve --model runs/quickstart --continuous-batching        requests share forwards
transformers chat runs/quickstart http://localhost:8000/v1 max_new_tokens=64

This is `transformers serve`, and takes its options. It looks for a model's class in the `transformers` namespace alone,
so ours is put there; and it lists what lies in the Hub's cache alone, so the list is replaced by the model it serves.
"""

import argparse
import sys
import time
from pathlib import Path

import transformers
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM
from modeling_nanodeepseek.checkpoints import weight_files
from modeling_nanodeepseek.continuous import check_continuous_batching

from .loading import load_config, load_tokenizer


def check_model(model: str, options: list[str]):
    """Raises ValueError or OSError for what `transformers serve` would end in a traceback for, or never find out."""
    config = load_config(model, "served")
    if not is_serve_available():
        raise ValueError("serving needs fastapi, uvicorn and openai: pip install 'transformers[serving]'")
    if not isinstance(config, NanoDeepSeekConfig):
        raise ValueError(f"--model {model!r} holds a {config.model_type!r}: `transformers serve {model}` serves it")
    named, served = config.architectures, [NanoDeepSeekForCausalLM.__name__]
    if named != served:  # the server takes the class from there
        raise ValueError(f"--model {model!r} has architectures={named!r} in its config.json; {served!r} can be served")
    weight_files(Path(model))  # a name on the Hub has none here yet
    if "--trust-remote-code" not in options:  # with it a tokenizer may be code
        load_tokenizer(model)
    if "--continuous-batching" in options:
        check_continuous_batching(config)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder (or Hub name) of a checkpoint with its tokenizer")
    args, options = parser.parse_known_args(argv)
    try:
        check_model(args.model, options)
        listed = {"id": args.model, "object": "model", "created": int(time.time()), "owned_by": "local"}
        ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [listed])
        transformers.NanoDeepSeekForCausalLM = NanoDeepSeekForCausalLM
        app(["serve", args.model, *options])  # loads the model before it listens; a request's errors are its answer
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
