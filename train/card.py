"""The model card of a run: README.md with front matter for the Hub, and what the run knows about its model in words.

Facts only: sizes are counted, losses are those of the log, and what the recipe does not say (a language, a licence of
the data) is not guessed. Names that come from the recipe are escaped; of local paths the last part alone is shown.
"""

import html
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from modeling_nanodeepseek import NanoDeepSeekConfig
from modeling_nanodeepseek.remote_code import LICENSE

from .accounting import cache_bytes, count_parameters
from .fp8 import precision_of
from .optimizers import parameter_groups
from .recipe import FinetuneRecipe, Recipe, ScheduleSection, resolve
from .steps import rows_per_step

# Names by which `datasets` reads files of one's own: no data sets of the Hub.
FILE_READERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "sql", "text", "webdataset"}
REQUIRES = {"transformers": "5.17", "torch": "2.11"}  # the floors of setup.cfg
CODE_LICENCE = f"Apache-2.0 (`{LICENSE}`)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

BODY = """
# {title}

{opening} with nanoDeepSeek.

## Use it

```python
{use}
```

The model's code lies {code_lies}, and `trust_remote_code=True` runs it: read it first, and pin a `revision`. It needs
transformers >= {transformers} and torch >= {torch}. Where the package `modeling_nanodeepseek` is installed and
imported, that is used instead, and `trust_remote_code` is not needed.

## Size

{size_of}{size}

## Data

{data}

## Training

{training}

## Results

{results}

## Limits

{tuned}, and was measured on nothing but what was held out: it writes in the manner of its data, errors and biases
included.{scale}

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
    name = str(source.get("dataset", "")) if isinstance(source, dict) else ""
    on_hub = HUB_ID.fullmatch(name) and name not in FILE_READERS and not Path(name).exists()
    return [name] if on_hub else []


WORDS = {
    "stdlib": "the source of Python's standard library",
    "synthetic": "synthetic documents",
    "docstrings": "what functions of Python's standard library do, asked and answered from their docstrings",
}


def describe_source(source, files: str = "text") -> str:
    """A data source in words, escaped; `files` says what files hold."""
    if isinstance(source, list):
        return "; ".join(describe_source(part, files) for part in source)
    if isinstance(source, dict) and "synthetic" in source:
        return f"synthetic documents, kind {code(str(source['synthetic']))}"
    if isinstance(source, dict):
        name = hub_datasets(source)[0] if hub_datasets(source) else Path(str(source["dataset"])).name
        chosen = [f"{key} {code(str(source[key]))}" for key in ("name", "revision", "split") if source.get(key)]
        return ", ".join([f"data set {code(name)}", *chosen])
    if source in WORDS:
        return WORDS[source]
    return f"the {files} in {code(Path(source).expanduser().absolute().name)}"


def base_model(recipe: Recipe) -> str | None:
    """The model on the Hub that the run started from, if it did."""
    checkpoint = recipe.model.checkpoint
    return checkpoint if checkpoint and not resolve(checkpoint).is_dir() and HUB_ID.fullmatch(checkpoint) else None


def last(history: list[dict], key: str) -> float | None:
    """The last finite value of a key of the log."""
    found = [entry[key] for entry in history if math.isfinite(entry.get(key, math.nan))]
    return found[-1] if found else None


STAGES = {
    "dense": "dense, with an indexer not in use, for",
    "warmup": "dense, with an indexer in warm-up, for",
    "sparse": "sparse,",
}


def size_rows(config: NanoDeepSeekConfig, counts: dict[str, int]) -> dict[str, Any]:
    rows = {"parameters": f"{counts['total']:,}", "active per token": f"{counts['active']:,}"}
    if counts["mtp"]:
        depth = config.num_nextn_predict_layers
        rows["of multi-token prediction, not counted above"] = f"{counts['mtp']:,} in {depth} module(s)"
    rows |= {"layers": config.num_hidden_layers, "width": config.hidden_size}
    rows["attention"] = f"{config.attention_type.upper()}, {config.num_attention_heads} heads"
    if config.index_topk is not None:
        chosen = f"{config.index_topk} keys per query ({config.index_pattern})"
        rows["attention"] += f"; {STAGES[config.dsa_stage]} {chosen}"
    if config.n_routed_experts:
        rows["experts"] = (
            f"{config.n_routed_experts} routed, {config.num_experts_per_tok} per token; {config.n_shared_experts} "
            f"shared; from layer {config.first_k_dense_replace} on"
        )
    rows["vocabulary"] = f"{config.vocab_size:,}"
    rows["context"] = f"{config.max_position_embeddings:,} tokens"
    rows["cache"] = f"{cache_bytes(config):,} bytes per token in bf16, all layers"
    return rows


def describe_schedule(schedule: ScheduleSection) -> str:
    steps = schedule.warmup_steps
    warmup = f"warm-up over {schedule.warmup:.0%}" if steps is None else f"warm-up over {steps:,} steps"
    if schedule.kind == "trapezoid":
        return f"{warmup}, decay over {schedule.decay:.0%} to {schedule.final:g}"
    return (
        f"{warmup}, constant until {schedule.constant_until:.1%}, cosine to {schedule.floor:g} until "
        f"{schedule.cosine_until:.1%}, {schedule.tail:.3g} from {schedule.tail_from:.1%}"
    )


def training_rows(trainer: Trainer) -> dict[str, Any]:
    """What all kinds of runs have."""
    recipe, args, config, rows = trainer.recipe, trainer.args, trainer.model.config, {}
    passes = last(trainer.state.log_history, "epoch") if trainer.plan is None else None
    if passes is not None:
        rows["passes over the data"] = f"{passes:.3g}"
    parameters = list(trainer.model.parameters())
    if not all(parameter.requires_grad for parameter in parameters):
        rows["parameters that learned"] = f"{sum(p.numel() for p in parameters if p.requires_grad):,}"
    rows["optimizer"] = "; ".join(
        f"{group['name']} by {'Muon' if group['muon'] else 'AdamW'} at {group['lr']:g}"
        for group in parameter_groups(trainer.model, recipe.optimizer)
    )
    rows["betas, weight decay"] = f"{recipe.optimizer.betas}, {recipe.optimizer.weight_decay:g} on matrices"
    schedule = recipe.schedule
    limit = f", of the steps or of {schedule.max_seconds:g} s, whatever ends first" if schedule.max_seconds else ""
    rows["schedule"] = describe_schedule(schedule) + limit
    rows["gradient norm at most"] = f"{args.max_grad_norm:g}"
    if config.n_routed_experts and not (config.index_topk is not None and config.dsa_stage == "warmup"):
        balance = recipe.balance
        falls = f" to {balance.final_gamma:g}" if balance.final_gamma else ""
        moves = f"biases by {balance.gamma:g}{falls} a step until {balance.freeze_at:.0%}"
        biases = moves if balance.gamma else "biases rest"
        rows["balancing"] = f"{biases}; sequence-wise loss times {config.aux_loss_alpha:g}"
    rows["precision, seed"] = f"{precision_of(args, recipe.precision)}, {args.seed}"
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


@dataclass
class Kind:
    """What the cards of different kinds of models say differently."""

    opening: str
    use: str
    unit: str  # of the data: documents, conversations
    rows: str  # how long its rows are
    seen: dict[str, str]
    tuned: str
    licences: str  # beside that of the weights
    note: str = ""  # on the results
    size_of: str = ""
    code_lies: str = "beside its weights"
    library: str = "transformers"
    tag: str = "custom_code"


def origin(recipe: Recipe) -> str:
    """In words, where the weights came from."""
    checkpoint = recipe.model.checkpoint
    return f"the weights of {code(base_model(recipe) or Path(checkpoint).name)}" if checkpoint else "fresh weights"


def pretrained(trainer: Trainer, name: str) -> Kind:
    recipe, steps, plan, rows = trainer.recipe, trainer.state.global_step, trainer.plan, rows_per_step(trainer.args)
    length = recipe.data.sequence_length
    rows_seen = steps * rows if plan is None else plan.rows[min(steps, len(plan.rows) - 1)]
    up_to = "" if rows_seen == steps * rows else "up to "
    return Kind(
        opening=f"A language model of {architecture(trainer.model.config)}, trained from {origin(recipe)}",
        use=LOAD.format(name=json.dumps(name)) + CONTINUE.format(prompt=json.dumps(recipe.prompt or "Once")),
        unit="documents",
        rows=f"{length:,} tokens",
        seen={"tokens seen": f"{rows_seen * length:,}: {steps:,} steps of {up_to}{rows} rows of {length:,}"},
        tuned="It was not tuned for instructions or for safety",
        licences=f"The code beside them: {CODE_LICENCE}. The data has its own licence"
        + (", and so has the model that it started from." if recipe.model.checkpoint else "."),
    )


def finetuned(trainer: Trainer, name: str) -> Kind:
    recipe, steps, rows = trainer.recipe, trainer.state.global_step, rows_per_step(trainer.args)
    length = f"at most {recipe.data.sequence_length:,} tokens"
    seen = {
        "rows seen": f"{steps * rows:,}: {steps:,} steps of {rows}, of {length}",
        "learned": "what the assistant says",
    }
    if recipe.lora is not None:
        seen["LoRA"] = f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, merged into the weights"
    return Kind(
        opening=f"A language model of {architecture(trainer.model.config)}, fine-tuned from {origin(recipe)}",
        use=LOAD.format(name=json.dumps(name)) + ASK.format(prompt=json.dumps(recipe.prompt or "Hello")),
        unit="conversations",
        rows=length,
        seen=seen,
        tuned="It was tuned on the conversations above and not for safety",
        licences=f"The code beside them: {CODE_LICENCE}. The data has its own licence, and so has the model that it "
        "started from.",
        note="\nLosses are those of what the assistant says, and of the token that ends it.",
    )


def adapter(trainer: Trainer, name: str) -> Kind:
    recipe, whole = trainer.recipe, finetuned(trainer, name)
    base = json.dumps(base_model(recipe) or Path(recipe.model.checkpoint).name)
    rank = f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}; the weights of the base stay"
    return replace(
        whole,
        opening=f"A LoRA adapter for a language model of {architecture(trainer.model.config)}, trained beside "
        f"{origin(recipe)}",
        use=LOAD_ADAPTER.format(name=json.dumps(name), base=base)
        + ASK.format(prompt=json.dumps(recipe.prompt or "Hello")),
        seen=whole.seen | {"LoRA": rank},
        licences="The data has its own licence, and so has the model that it is for.",
        size_of="Of the model that it is for:\n\n",
        code_lies="in the base model's repository",
        library="peft",
        tag="lora",
    )


def architecture(config: NanoDeepSeekConfig) -> str:
    parts = ["multi-head latent attention" if config.attention_type == "mla" else "grouped-query attention"]
    parts += ["mixture of experts with loss-free balancing"] if config.n_routed_experts else []
    parts += ["lightning indexer"] if config.has_indexer else []
    parts += ["multi-token prediction"] if config.num_nextn_predict_layers else []
    return f"DeepSeek's architecture ({', '.join(parts)})"


def data_rows(trainer: Trainer, kind: Kind) -> dict[str, str]:
    data, files = trainer.recipe.data, "text" if kind.unit == "documents" else kind.unit
    share = f"{data.validation_share:.1%} of the {kind.unit}, chosen by the hash of their names"
    if kind.unit == "documents" and data.held_out_documents:
        share = f"the first {data.held_out_documents:,} {kind.unit}"
    rows = f"{len(trainer.train_dataset):,}" if trainer.plan is None else "a stream"
    further = len(trainer.eval_dataset)
    return {
        "source": describe_source(data.source, files),
        "held out": share if data.validation is None else describe_source(data.validation, files),
        "rows": f"{rows} for training, {further:,} held out, of {kind.rows}",
        "tokenizer": f"{len(trainer.processing_class):,} tokens",
    }


def kind_of(trainer: Trainer, merged: bool = False) -> Kind:
    recipe, of_kind = trainer.recipe, pretrained
    if isinstance(recipe, FinetuneRecipe):
        of_kind = adapter if recipe.lora is not None and not merged else finetuned
    title = recipe.card.title or Path(recipe.output_dir).absolute().name
    return of_kind(trainer, trainer.hub_model_id or title)


def tables(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What a card and a report say of a run, by heading."""
    kind, config = kind_of(trainer), trainer.model.config
    training = kind.seen | training_rows(trainer)
    return {
        "Model": size_rows(config, count_parameters(config)),
        "Data": data_rows(trainer, kind),
        "Training": training,
    }


def card_data(trainer: Trainer, title: str, kind: Kind) -> ModelCardData:
    """The front matter: what the Hub searches by."""
    recipe, config, history = trainer.recipe, trainer.model.config, trainer.state.log_history
    named = hub_datasets(recipe.data.source)
    held_out = {"bits_per_byte": "eval_bits_per_byte", "loss": "eval_loss"}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=named[0] if len(named) == 1 else "held-out",
            dataset_name=f"held-out {kind.unit}",
            metric_type=metric,
            metric_name=RESULTS[key],
            metric_value=round(last(history, key), 4),
        )
        for metric, key in held_out.items()
        if last(history, key) is not None
    ]
    tags = ["nanodeepseek", "deepseek", config.attention_type, kind.tag]
    tags += ["moe"] if config.n_routed_experts else []
    tags += ["sparse-attention"] if config.index_topk is not None else []
    tags += ["multi-token-prediction"] if config.num_nextn_predict_layers else []
    return ModelCardData(
        license=recipe.card.license,
        license_name=recipe.card.license_name and one_line(recipe.card.license_name),
        license_link=recipe.card.license_link,
        language=recipe.card.language,
        library_name=kind.library,
        pipeline_tag="text-generation",
        tags=tags,
        datasets=named or None,
        base_model=base_model(recipe),
        model_name=one_line(title) if results else None,
        eval_results=results or None,
    )


def model_card(trainer: Trainer, merged: bool = False) -> ModelCard:
    """The card of a trainer's model in its present state; `merged`: of its adapter in the model that it is for."""
    recipe, config, history = trainer.recipe, trainer.model.config, trainer.state.log_history
    title = recipe.card.title or Path(recipe.output_dir).absolute().name
    kind = kind_of(trainer, merged)
    results = {words: f"{last(history, key):.4f}" for key, words in RESULTS.items() if last(history, key) is not None}
    notes = kind.note + (BITS_PER_BYTE if RESULTS["eval_bits_per_byte"] in results else "")
    counts = count_parameters(config)
    licence = code(recipe.card.license if recipe.card.license != "other" else recipe.card.license_name)
    body = BODY.format(
        title=escape(title),
        opening=kind.opening,
        use=kind.use,
        code_lies=kind.code_lies,
        size_of=kind.size_of,
        tuned=kind.tuned,
        **REQUIRES,
        size=table(size_rows(config, counts)),
        data=table(data_rows(trainer, kind)),
        training=table(kind.seen | training_rows(trainer)),
        results=f"{table(results)}\n{notes}".rstrip() if results else "Nothing was logged.",
        scale=f" It has {counts['total']:,} parameters: do not expect facts of it." if counts["total"] < 1e9 else "",
        licence=f"Weights: {licence}. {kind.licences}",
    )
    return ModelCard(f"---\n{card_data(trainer, title, kind).to_yaml()}\n---\n{body}")
