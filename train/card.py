"""The model card of a run: README.md with front matter for the Hub, and what the run knows about its model in words.

Facts only: sizes are counted, losses are those of the log, and what the recipe does not say (a language, a licence of
the data) is not guessed. Names that come from the recipe are escaped; of local paths the last part alone is shown.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from modeling_nanodeepseek import NanoDeepSeekConfig

from .accounting import cache_bytes, count_parameters
from .optimizers import parameter_groups
from .recipe import FinetuneRecipe, Recipe, resolve

# Names by which `datasets` reads files of one's own: no data sets of the Hub.
FILE_READERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "sql", "text", "webdataset"}
REQUIRES = {"transformers": "5.17", "torch": "2.11"}  # the floors of setup.cfg
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

BODY = """
# {title}

{kind} of DeepSeek's architecture ({parts}), trained from {origin} with nanoDeepSeek.

## Use it

```python
{use}
```

The model's code lies beside its weights{of_base}, and `trust_remote_code=True` runs it: read it first, and pin a
`revision`. It needs transformers >= {transformers} and torch >= {torch}. Where the package `modeling_nanodeepseek` is
installed and imported, that is used instead, and `trust_remote_code` is not needed.

## Size

{size}

## Data

{data}

## Training

{training}

## Results

{results}

## Limits

{tuned}, and was measured on nothing but what was held out: it writes in the manner of its data, errors and biases
included. {scale}

## Licence

{licence}
"""


LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)  # which reads config.json, too
"""
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name, base = {name}, {base}
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
model = PeftModel.from_pretrained(model, name)
tokenizer = AutoTokenizer.from_pretrained(name)
"""
CONTINUE = """inputs = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
ASK = """messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
BITS_PER_BYTE = """

Bits per byte = -log2 of the probability of the held-out text, over its bytes in UTF-8: a figure to compare with others
on the same text alone."""


def one_line(text: str) -> str:
    return " ".join(text.split())


def escape(text: str) -> str:
    """Text for a line of Markdown, with no meaning but its own: one line, no HTML, no markup."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~>])", r"\\\1", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Text as a code span, whatever backticks it holds; also in a table."""
    text = one_line(text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def hub_datasets(source) -> list[str]:
    """The data sets of a source that `datasets` loads by their name on the Hub."""
    if isinstance(source, list):
        return list(dict.fromkeys(name for part in source for name in hub_datasets(part)))
    name = str(source["dataset"]) if isinstance(source, dict) else ""
    on_hub = HUB_ID.fullmatch(name) and name not in FILE_READERS and not Path(name).exists()
    return [name] if on_hub else []


WORDS = {
    "stdlib": "the source of Python's standard library",
    "docstrings": "what functions of Python's standard library do, asked and answered from their docstrings",
}


def describe_source(source) -> str:
    """A data source in words, escaped."""
    if isinstance(source, list):
        return "; ".join(describe_source(part) for part in source)
    if isinstance(source, dict):
        name = hub_datasets(source)[0] if hub_datasets(source) else Path(str(source["dataset"])).name
        chosen = [f"{key} {code(str(source[key]))}" for key in ("name", "revision", "split") if source.get(key)]
        return ", ".join([f"data set {code(name)}", *chosen])
    if source in WORDS:
        return WORDS[source]
    return f"the text in {code(Path(source).expanduser().absolute().name)}"


def base_model(recipe: Recipe) -> str | None:
    """The model on the Hub that the run started from, if it did."""
    checkpoint = recipe.model.checkpoint
    return checkpoint if checkpoint and not resolve(checkpoint).is_dir() and HUB_ID.fullmatch(checkpoint) else None


def last(history: list[dict], key: str) -> float | None:
    """The last finite value of a key of the log."""
    found = [entry[key] for entry in history if math.isfinite(entry.get(key, math.nan))]
    return found[-1] if found else None


def size_rows(config: NanoDeepSeekConfig, counts: dict[str, int]) -> dict[str, Any]:
    rows = {"parameters": f"{counts['total']:,}", "active per token": f"{counts['active']:,}"}
    if counts["mtp"]:
        depth = config.num_nextn_predict_layers
        rows["of multi-token prediction, not counted above"] = f"{counts['mtp']:,} in {depth} module(s)"
    rows |= {"layers": config.num_hidden_layers, "width": config.hidden_size}
    rows["attention"] = f"{config.attention_type.upper()}, {config.num_attention_heads} heads"
    if config.index_topk is not None:
        rows["attention"] += f"; sparse ({config.index_pattern}, stage {config.dsa_stage}): {config.index_topk} keys"
    if config.n_routed_experts:
        rows["experts"] = (
            f"{config.n_routed_experts} routed, {config.num_experts_per_tok} per token; {config.n_shared_experts} "
            f"shared; from layer {config.first_k_dense_replace} on"
        )
    rows["vocabulary"] = f"{config.vocab_size:,}"
    rows["context"] = f"{config.max_position_embeddings:,} tokens"
    rows["cache"] = f"{cache_bytes(config):,} bytes per token in bf16, all layers"
    return rows


def data_rows(trainer: Trainer) -> dict[str, Any]:
    recipe = trainer.recipe
    chats = isinstance(recipe, FinetuneRecipe)
    data = {"source": describe_source(recipe.data.source)}
    kind = "conversations" if chats else "documents"
    held_out = f"{recipe.data.validation_share:.1%} of the {kind}, chosen by the hash of their names"
    validation = recipe.data.validation
    data["held out"] = held_out if validation is None else describe_source(validation)
    length = recipe.data.sequence_length
    rows, further = len(trainer.train_dataset), len(trainer.eval_dataset)
    data["rows"] = f"{rows:,} for training, {further:,} held out, of {'at most ' if chats else ''}{length:,} tokens"
    data["tokenizer"] = f"{len(trainer.processing_class):,} tokens"
    return data


def training_rows(trainer: Trainer) -> dict[str, Any]:
    recipe, args, state = trainer.recipe, trainer.args, trainer.state
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length, steps = recipe.data.sequence_length, state.global_step
    passes = last(state.log_history, "epoch")
    optimizers = "; ".join(
        f"{group['name']} by {'Muon' if group['muon'] else 'AdamW'} at {group['lr']:g}"
        for group in parameter_groups(trainer.model, recipe.optimizer)
    )
    schedule, rows = recipe.schedule, {}
    if isinstance(recipe, FinetuneRecipe):
        rows["rows seen"] = (
            f"{steps * rows_per_step:,}: {steps:,} steps of {rows_per_step}, of at most {length:,} tokens"
        )
        rows["learned"] = "what the assistant says"
        if recipe.lora is not None:
            rows["LoRA"] = f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}; the weights of the base stay"
    else:
        rows["tokens seen"] = (
            f"{steps * rows_per_step * length:,}: {steps:,} steps of {rows_per_step} rows of {length:,}"
        )
    if passes is not None:
        rows["passes over the data"] = f"{passes:.3g}"
    rows |= {
        "optimizer": optimizers,
        "betas, weight decay": f"{recipe.optimizer.betas}, {recipe.optimizer.weight_decay:g} on matrices",
        "schedule": f"warm-up over {schedule.warmup:.0%}, decay over {schedule.decay:.0%} to {schedule.final:g}",
        "gradient norm at most": f"{args.max_grad_norm:g}",
    }
    if trainer.model.config.n_routed_experts:
        rows["balancing"] = (
            f"biases by {recipe.balance.gamma:g} a step until {recipe.balance.freeze_at:.0%}; sequence-wise loss "
            f"times {trainer.model.config.aux_loss_alpha:g}"
        )
    rows["precision, seed"] = f"{'bf16' if args.bf16 else 'fp32'}, {args.seed}"
    return rows


RESULTS = {
    "ce_loss": "training cross-entropy, nats per token",
    "balance_loss": "training balance loss, before its factor",
    "index_kl": "training KL of the indexer, per layer",
    "mtp_loss_1": "training loss of the first multi-token module",
    "eval_loss": "held-out cross-entropy, nats per token",
    "eval_bits_per_byte": "held-out bits per byte",
    "eval_index_recall": "attention mass on the selected keys, held out",
    "eval_mtp_accuracy_1": "second token right, held out",
}


def card_data(trainer: Trainer, title: str) -> ModelCardData:
    """The front matter: what the Hub searches by."""
    recipe, config, history = trainer.recipe, trainer.model.config, trainer.state.log_history
    named = hub_datasets(recipe.data.source)
    held_out = {"bits_per_byte": "eval_bits_per_byte", "loss": "eval_loss"}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=named[0] if len(named) == 1 else "held-out",
            dataset_name="held-out text",
            metric_type=metric,
            metric_name=RESULTS[key],
            metric_value=round(last(history, key), 4),
        )
        for metric, key in held_out.items()
        if last(history, key) is not None
    ]
    adapter = getattr(recipe, "lora", None) is not None
    tags = ["nanodeepseek", "deepseek", config.attention_type, "lora" if adapter else "custom_code"]
    tags += ["moe"] if config.n_routed_experts else []
    tags += ["sparse-attention"] if config.index_topk is not None else []
    tags += ["multi-token-prediction"] if config.num_nextn_predict_layers else []
    return ModelCardData(
        license=recipe.card.license,
        license_name=recipe.card.license_name and one_line(recipe.card.license_name),
        license_link=recipe.card.license_link,
        language=recipe.card.language,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=named or None,
        base_model=base_model(recipe),
        model_name=one_line(title) if results else None,
        eval_results=results or None,
    )


def usage(trainer: Trainer, title: str, adapter: bool, chats: bool) -> str:
    """The lines of Python that load the model and let it speak."""
    recipe = trainer.recipe
    base = base_model(recipe) or Path(recipe.model.checkpoint or "").name
    load = (LOAD_ADAPTER if adapter else LOAD).format(
        name=json.dumps(trainer.hub_model_id or title), base=json.dumps(base)
    )
    return load + (ASK if chats else CONTINUE).format(
        prompt=json.dumps(recipe.prompt or ("Hello" if chats else "Once"))
    )


def model_card(trainer: Trainer) -> ModelCard:
    """The card of a trainer's model in its present state."""
    recipe, config, history = trainer.recipe, trainer.model.config, trainer.state.log_history
    title = recipe.card.title or Path(recipe.output_dir).absolute().name
    parts = ["multi-head latent attention" if config.attention_type == "mla" else "grouped-query attention"]
    parts += ["mixture of experts with loss-free balancing"] if config.n_routed_experts else []
    parts += ["lightning indexer"] if config.has_indexer else []
    parts += ["multi-token prediction"] if config.num_nextn_predict_layers else []
    checkpoint, chats = recipe.model.checkpoint, isinstance(recipe, FinetuneRecipe)
    adapter = chats and recipe.lora is not None
    origin = f"the weights of {code(base_model(recipe) or Path(checkpoint).name)}" if checkpoint else "fresh weights"
    results = {words: f"{last(history, key):.4f}" for key, words in RESULTS.items() if last(history, key) is not None}
    counts = count_parameters(config)
    licence = code(recipe.card.license if recipe.card.license != "other" else recipe.card.license_name)
    body = BODY.format(
        title=escape(title),
        parts=", ".join(parts),
        origin=origin,
        kind="A LoRA adapter for a language model" if adapter else "A language model",
        use=usage(trainer, title, adapter, chats),
        of_base=" in the base model's repository" if adapter else "",
        tuned="It was tuned on the conversations above and not for safety"
        if chats
        else "It was not tuned for instructions or for safety",
        **REQUIRES,
        size=table(size_rows(config, counts)),
        data=table(data_rows(trainer)),
        training=table(training_rows(trainer)),
        results=(table(results) if results else "Nothing was logged.")
        + (BITS_PER_BYTE if RESULTS["eval_bits_per_byte"] in results else ""),
        scale=f"It has {counts['total']:,} parameters: do not expect facts of it." if counts["total"] < 1e9 else "",
        licence=f"Weights: {licence}. The code beside them: Apache-2.0. The data has its own licence.",
    )
    return ModelCard(f"---\n{card_data(trainer, title).to_yaml()}\n---\n{body}")
