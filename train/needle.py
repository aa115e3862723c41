"""Needle in a haystack: `python -m train.needle --model runs/extend_2 --lengths 128 256 512 [--output needle.json]`.

A fact ("The code of jade is heron.") lies at some depth of filler that names no code; at the end its beginning stands
again, and the model must go on with the value. Prints, for each length and depth, how often it does, as a table, and
writes the same as JSON. Any checkpoint: the words are common English ones, but a model that was never taught to look
back fails at every length.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .loading import load_model, load_tokenizer
from .pretrain import folder_or_name
from .synthetic import FACT, KEYS, VALUES, fact, filler


def haystack(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, chooser: random.Random
) -> tuple[list[int], list[int]]:
    """The prompt's tokens, with the answer's: as many sentences of filler as fit into `length` tokens of both.

    `depth` is the share of the filler in front of the fact. Raises: ValueError for a length without room for any.
    """
    key, value = chooser.choice(KEYS), chooser.choice(VALUES)

    def encode(sentences: list[str]) -> list[int]:
        return tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]

    question = FACT.format(key)
    answer = encode([f"{question} {value}"])[len(encode([question])) :]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(begin) - len(encode([fact(key, value), question])) - len(answer)
    sentences: list[str] = []
    while len(encode([*sentences, ""])) < room:
        sentences.append(filler(chooser))
    if not sentences[:-1]:
        raise ValueError(f"--lengths {length} leaves no room for filler beside the fact and the question")
    sentences = sentences[:-1]
    sentences.insert(round(depth * len(sentences)), fact(key, value))
    return begin + encode([*sentences, question]), answer


@torch.no_grad()
def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, count: int, seed: int = 0
) -> dict[str, float]:
    """Of `count` haystacks: `accuracy`, the share that the model continues greedily with the whole value, and `nats`,
    the mean cross-entropy of its tokens."""
    right, nats, tokens = 0, 0.0, 0
    for i in range(count):
        prompt, answer = haystack(tokenizer, length, depth, random.Random(f"{seed} {length} {depth} {i}"))
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(ids[:, :-1], use_cache=False).logits[0, -len(answer) :].float()
        target = ids[0, -len(answer) :]
        right += bool((logits.argmax(-1) == target).all())  # then each token is the one that greedy decoding takes
        nats += F.cross_entropy(logits, target, reduction="sum").item()
        tokens += len(answer)
    return {"accuracy": right / count, "nats": nats / tokens}


def table(report: dict) -> str:
    head = "  length  " + "".join(f"depth {depth:>4.0%}  " for depth in report["depths"]) + "  all"
    lines = []
    for length, row in zip(report["lengths"], report["accuracy"]):
        cells = "".join(f"{share:>10.0%}  " for share in row)
        lines.append(f"{length:>8}  {cells}{sum(row) / len(row):>5.0%}")
    return "\n".join([head, *lines])


def needle(
    folder: str, lengths: list[int], depths: list[float], count: int, seed: int = 0, longer: bool = False
) -> dict:
    """The report of a checkpoint.

    Args:
        longer: read lengths beyond the model's max_position_embeddings too, with the rotary positions as they are.

    Raises: ValueError for a length that is longer without it.
    """
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    limit = model.config.max_position_embeddings
    if max(lengths) > limit:
        if not longer:
            raise ValueError(f"--lengths {max(lengths)} is beyond the model's {limit} positions; --beyond reads on")
        model.config.max_position_embeddings = max(lengths)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    cells = [[recall(model, tokenizer, length, depth, count, seed) for depth in depths] for length in lengths]
    report = {"model": folder, "max_position_embeddings": limit, "lengths": lengths, "depths": depths, "count": count}
    return report | {name: [[cell[name] for cell in row] for row in cells] for name in ("accuracy", "nats")}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--lengths", nargs="+", type=int, required=True, help="tokens of prompt and answer, at most")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--count", type=int, default=20, help="haystacks of each length and depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beyond", action="store_true", help="also lengths beyond max_position_embeddings")
    parser.add_argument("--output", help="a JSON file")
    args = parser.parse_args(argv)
    if args.count < 1 or not all(0 <= depth <= 1 for depth in args.depths):
        parser.error("--count is at least 1, and --depths lie in 0..1")
    output = Path(args.output) if args.output else None
    if output is not None and (not output.parent.is_dir() or output.is_dir()):
        sys.exit(f"error: --output {args.output!r} cannot be written: it must be a file in an existing folder")
    try:
        folder = folder_or_name(args.model, "--model")
        report = needle(folder, args.lengths, args.depths, args.count, args.seed, args.beyond)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
