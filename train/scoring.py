r"""Perplexity and bits per byte of a model on documents.

    loss          = sum of -ln p(token | the tokens before it in its document) / number of tokens
    perplexity    = exp(loss), per token: depends on the tokenizer
    bits per byte = the same sum / (ln 2 * bytes of the documents in UTF-8): compares models of any tokenizer

A document is `<bos> text <eos>`, as in training (data.py): `<bos>` is given, every other token is predicted once, also
`<eos>`, because where a text ends is information. A tokenizer without `<bos>` begins with its `<eos>`. The bytes are
the text's alone. A document longer than the context is read in windows, see `windows`.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import pack
from .hardware import sum_dtype

Piece = tuple[list[int], int]  # tokens, and how many of them, the last ones, are scored
SORTED = 1024  # pieces of like length share a batch, among so many


def windows(tokens: list[int], context: int, stride: int) -> Iterator[Piece]:
    """Windows of at most `context` tokens that together score each token but the first once.

    The first window scores all its tokens; each further one reads on by `stride` tokens and scores those, so that each
    has at least `context - stride` tokens before it, or all there are.
    """
    scored = 1
    while scored < len(tokens):
        end = min(context if scored == 1 else scored + stride, len(tokens))
        yield tokens[max(0, end - context) : end], end - scored
        scored = end


def special_tokens(tokenizer: PreTrainedTokenizerBase, end: bool) -> tuple[int, list[int]]:
    """The token that a document begins with, and the ones it ends with, one or none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise ValueError("the tokenizer has neither bos_token nor eos_token: nothing to predict a first token from")
    if end and eos is None:
        raise ValueError("the tokenizer has no eos_token to predict at the end of a document: leave it out (--no-eos)")
    return eos if bos is None else bos, [eos] if end else []


def sliding(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, context: int, stride: int, end: bool = True
) -> Iterator[Piece]:
    """Each document by itself, in windows."""
    first, last = special_tokens(tokenizer, end)
    for batch in documents.iter(batch_size=64):
        for tokens in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            yield from windows([first, *tokens, *last], context, stride)


def packed(documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, cut: bool = True) -> Iterator[Piece]:
    """Documents cut where training's evaluation cuts them, at the ends of rows of `length` tokens: its figure."""
    for row in pack(documents, tokenizer, length, cut_documents=cut):
        ids, positions = row["input_ids"].tolist(), row["position_ids"].tolist()
        held = int(row["attention_mask"].sum())
        starts = [t for t in range(held) if positions[t] == 0]
        for start, stop in zip(starts, [*starts[1:], held]):
            if stop - start > 1:
                yield ids[start:stop], stop - start - 1


@torch.inference_mode()
def score(model: PreTrainedModel, pieces: Iterable[Piece], batch_size: int = 8) -> tuple[float, int]:
    """The sum of -ln p of every scored token, and their number. Batches are padded on the right and masked."""
    nats, count, pieces = 0.0, 0, iter(pieces)
    while block := sorted(islice(pieces, SORTED), key=lambda piece: len(piece[0])):
        for i in range(0, len(block), batch_size):
            batch = block[i : i + batch_size]
            rows = [torch.tensor(ids) for ids, _ in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            lengths = torch.tensor([len(row) for row in rows], device=model.device)
            mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, predicted, (tokens, scored) in zip(ids, logits, batch):
                start, stop = len(tokens) - scored, len(tokens)
                predicted = predicted[start - 1 : stop - 1]  # in fp32 a row at a time: a vocabulary can be large
                predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
                losses = F.cross_entropy(predicted, row[start:stop], reduction="none")
                nats, count = nats + losses.sum(dtype=sum_dtype(losses.device)).item(), count + scored
    return nats, count


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    context: int,
    stride: int | None = None,
    rows: int | None = None,
    end: bool = True,
    batch_size: int = 8,
    cut_documents: bool = True,
) -> dict:
    """The figures of a model on documents.

    Args:
        context, stride: for `windows`; stride defaults to half the context.
        rows: instead of those, cut documents as training's evaluation does in rows of so many tokens.
        end: predict `<eos>` too.
        cut_documents: of rows, the recipe's `data.cut_documents`.

    Raises: ValueError for a tokenizer that the model has no embeddings for, or a loss that is no number.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, and the model embeds only {embeddings}")
    stride = max(1, context // 2) if stride is None else stride
    if rows:
        pieces = packed(documents, tokenizer, rows, cut_documents)
    else:
        pieces = sliding(documents, tokenizer, context, stride, end)
    nats, tokens = score(model, tqdm(pieces, desc="scoring", unit="window", disable=None, leave=False), batch_size)
    if not math.isfinite(nats):
        raise ValueError(f"the model's loss on this data is {nats}")
    size = sum(len(text.encode()) for text in documents["text"])
    how = {"rows": rows} if rows else {"context": context, "stride": stride}
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / tokens),
        "loss": nats / tokens,
        "tokens": tokens,
        "bytes": size,
        "documents": len(documents),
        "eos_predicted": bool(rows) or end,
        **how,
    }
