"""Writing with a trained model.

python -m train.generate --model runs/quickstart --prompt "def main():"       one prompt, streamed
python -m train.generate --model runs/quickstart --interactive                a prompt per line, streamed
python -m train.generate --model runs/quickstart --interactive --chat         a conversation
python -m train.generate --model runs/quickstart --input prompts.txt --output completions.jsonl    many at once
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import TextStreamer, set_seed

from .adapters import base_of_adapter
from .loading import load_model, load_tokenizer, position_limit


def number(kind: type, low: float, high: float = float("inf"), above: bool = False):
    """An argparse type: a number of this kind from `low` (or above it) to `high`."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            bound = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"{value} is not {bound}" + (f" and at most {high}" if high < 2**31 else "")
            )
        return value

    parse.__name__ = kind.__name__
    return parse


class Writer:
    """A model and its tokenizer, ready to continue texts.

    Args:
        model: folder (or Hub name) of a checkpoint with its tokenizer, or of an adapter.
        device: e.g. `cuda`; default a GPU if there is one.
        settings: for `generate()`: max_new_tokens, temperature, ...
    """

    def __init__(self, model: str, device: str | None = None, **settings):
        self.model = load_model(model, device, adapters=True)
        base = base_of_adapter(model)  # whose tokenizer counts if the adapter has none beside it
        vocabulary = base if base and not Path(model, "tokenizer_config.json").is_file() else model
        self.tokenizer = load_tokenizer(vocabulary, padding_side="left")
        self.settings = settings

    def encode(self, texts: list[str], add_special_tokens: bool = True):
        """Left-padded ids and mask on the model's device. Raises ValueError if no room is left to write in."""
        batch = self.tokenizer(texts, add_special_tokens=add_special_tokens, padding=True, return_tensors="pt")
        length, limit = batch["input_ids"].shape[1], position_limit(self.model.config)
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens; the model's max_position_embeddings is {limit}")
        return batch.to(self.model.device)

    @torch.inference_mode()
    def write(self, texts: list[str], streamer=None, add_special_tokens: bool = True) -> list[str]:
        """The continuation of each text, without the text."""
        batch = self.encode(texts, add_special_tokens)
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **self.settings,
        )
        return self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def stream(self, text: str, add_special_tokens: bool = True) -> str:
        """Continues one text, printing it as it comes."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.write([text], streamer, add_special_tokens)[0]


def converse(writer: Writer, chat: bool, lines=sys.stdin):
    """Reads a prompt per line until the end of input or `/quit`; with `chat` the whole conversation is the prompt."""
    messages: list[dict[str, str]] = []
    interactive = lines is sys.stdin and sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line or line.strip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            if not chat:
                writer.stream(line.rstrip("\n"))
                continue
            turns = [*messages, {"role": "user", "content": line.strip()}]
            prompt = writer.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            messages = [*turns, {"role": "assistant", "content": writer.stream(prompt, add_special_tokens=False)}]
        except ValueError as error:  # a prompt that is too long ends the turn, not the session
            print(f"error: {error}")


def complete_file(writer: Writer, source: Path, target: Path, batch_size: int) -> int:
    """Continues each non-empty line of `source`; writes `{"prompt", "completion"}` lines to `target`, all or none."""
    if not source.is_file():
        raise ValueError(f"--input {str(source)!r} does not exist")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"--output {str(target)!r} cannot be written: it must be a file in an existing folder")
    try:
        prompts = [line for line in source.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--input {str(source)!r} is not UTF-8: {error}") from error
    if not prompts:
        raise ValueError(f"--input {str(source)!r} holds no prompt")
    # Prompts of like length share a batch, so little is padded; the order of the file is kept in the output.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        completions |= dict(zip(chosen, writer.write([prompts[i] for i in chosen])))
    partial = target.with_name(target.name + ".partial")
    lines = [json.dumps({"prompt": p, "completion": completions[i]}) for i, p in enumerate(prompts)]
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(target)
    return len(prompts)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder (or Hub name) of a checkpoint, or of a LoRA adapter")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", help="continue this text")
    mode.add_argument("--interactive", action="store_true", help="continue each line typed")
    mode.add_argument("--input", type=Path, help="continue each line of this file")
    parser.add_argument("--output", type=Path, help="with --input: where to write JSON lines")
    parser.add_argument("--chat", action="store_true", help="with --interactive: use the chat template")
    parser.add_argument("--batch-size", type=number(int, 1), default=8)
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=128)
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=number(float, 0, 1, above=True), default=1.0)
    parser.add_argument("--use-mtp", action="store_true", help="draft with multi-token prediction; one text at a time")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    if args.chat and not args.interactive:
        parser.error("--chat goes with --interactive")
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        settings |= {"temperature": args.temperature, "top_p": args.top_p}
    if args.use_mtp:
        settings, args.batch_size = settings | {"use_mtp": True}, 1
    set_seed(args.seed)
    try:
        writer = Writer(args.model, args.device, **settings)
        if args.prompt is not None:
            writer.stream(args.prompt)
        elif args.interactive:
            converse(writer, args.chat)
        else:
            print(f"{complete_file(writer, args.input, args.output, args.batch_size)} completions: {args.output}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
