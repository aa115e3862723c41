"""A recipe: one YAML file that states a whole run. Unknown fields, wrong types and impossible values are refused.

Any field can be set on the command line by its dotted path, the value in YAML:

    accelerate launch --quiet -m train.pretrain --config configuration/recipes/quickstart.yaml \
        optimizer.matrix_lr=0.01 model.overrides.attention_type=gqa 'data.source=[a.txt, b.txt]'
"""

import argparse
import difflib
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from transformers import TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent


Rate = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Fields of TrainingArguments whose wrong values would surface as something else, in the middle of a run.
AT_LEAST_ONE = {
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
}

# Fields of TrainingArguments that a recipe has its own for: Trainer's optimizer and schedule are not used.
OURS = {
    "output_dir": "output_dir",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "optim": "optimizer.name",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer",
    "learning_rate": "optimizer.matrix_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup",
}

# Of some of them only one value is honoured, or trains what the recipe says; the reason why.
NO_PREDICTIONS = "an evaluation adds up its losses batch by batch, and keeps no predictions"
NO_LIGER = "Liger has no kernels for this model"
ONLY = {
    "label_smoothing_factor": (
        0.0,
        "Trainer would compute a loss of its own, of labels that are not shifted, without multi-token prediction, "
        "balancing and the indexer",
    ),
    "average_tokens_across_devices": (
        True,
        "each loss term is a share of the mean over the tokens of all processes, and they would not add up to it",
    ),
    "auto_find_batch_size": (False, "what is logged, planned and kept for a resume goes by steps of one size"),
    "ignore_data_skip": (False, "a resume goes on with the rows that come next, and skipping takes no time"),
    "dataloader_in_order": (True, "a resume skips the rows that come first, and these would be others"),
    "label_names": (["labels"], "that is what the targets in the rows are called"),
    "use_liger_kernel": (False, NO_LIGER),
    "liger_kernel_config": (None, NO_LIGER),
    "eval_accumulation_steps": (None, NO_PREDICTIONS),
    "eval_do_concat_batches": (True, NO_PREDICTIONS),
    "eval_use_gather_object": (False, NO_PREDICTIONS),
    "include_for_metrics": ([], NO_PREDICTIONS),
    "batch_eval_metrics": (False, NO_PREDICTIONS),
    "do_train": (True, "a recipe trains; train.evaluate evaluates a checkpoint alone"),
    "do_eval": (True, "a run ends with an evaluation"),
    "do_predict": (False, "train.generate writes"),
    "local_rank": (-1, "the launcher numbers the processes, in their environment"),
}

# The same of accelerator_config.
ONLY_OF_ACCELERATOR = {
    "split_batches": (False, "per_device_train_batch_size is of one process; make it smaller"),
    "even_batches": (True, "processes with fewer batches than others would leave those waiting"),
    "use_seedable_sampler": (True, "no resume could find the order of the rows again"),
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ContextSection(Section):
    """A longer context for a checkpoint, by YaRN: V3 extended 4096 tokens in two phases, to 32K and 128K, both with the
    factor of the end, 40 (report section 4.3)."""

    length: int = Field(ge=2)  # tokens; the new max_position_embeddings
    factor: float | None = Field(default=None, ge=1)  # default: the config's, or length / original if that is more
    original: int | None = Field(default=None, ge=2)  # the length before any extension; default: what the config says
    # Default: what a config already has that is YaRN's; else these of V3's report.
    beta_fast: float | None = Field(default=None, gt=0)  # 32
    beta_slow: float | None = Field(default=None, gt=0)  # 1
    mscale_all_dim: float | None = Field(default=None, ge=0)  # 1; scores grow by (0.1 mscale_all_dim ln factor + 1)^2


class ModelSection(Section):
    """What is trained: a model size by name or file (fresh weights), or a checkpoint folder to continue; and for sparse
    attention which stage of it."""

    config: str | None = None  # a name in configuration/models/, or the path of a config.json
    checkpoint: str | None = None
    variant: str | None = None  # a name in configuration/variants.json
    overrides: dict[str, Any] = Field(default_factory=dict)  # config fields, e.g. attention_type: gqa
    dsa_stage: Literal["dense", "warmup", "sparse"] | None = None  # default: what the config or checkpoint says
    indexer: dict[str, Any] | None = None  # index_topk and other index_* fields of a fresh one, for a model without
    context: ContextSection | None = None  # the checkpoint's context, extended

    @model_validator(mode="after")
    def one_origin(self):
        if (self.config is None) == (self.checkpoint is None):
            raise ValueError("give either config (fresh weights) or checkpoint (a folder to continue from)")
        if self.checkpoint is not None and (self.overrides or self.variant):
            raise ValueError("variant and overrides go with config; a checkpoint has its own configuration")
        if self.context is not None and self.checkpoint is None:
            raise ValueError("context extends a checkpoint; a fresh model's context is max_position_embeddings")
        return self

    @model_validator(mode="after")
    def trains_a_fresh_indexer(self):
        if self.indexer is None:
            return self
        if "index_topk" not in self.indexer:
            raise ValueError("indexer needs index_topk, the number of keys that each query will attend to")
        if self.dsa_stage == "sparse":
            raise ValueError(
                "dsa_stage='sparse' with a fresh indexer would attend to keys chosen at random: train it in "
                "dsa_stage='warmup' first, and give the model saved there as checkpoint, without indexer"
            )
        return self


class TokenizerSection(Section):
    """`path` of a tokenizer to use; without it a byte-level BPE of `vocab_size` tokens is trained on the data."""

    path: str | None = None
    vocab_size: int = Field(default=4096, ge=272)  # 256 bytes, special tokens, and something to learn
    train_megabytes: float = Field(default=20.0, gt=0)  # at most so much text is read to train it


class DataSection(Section):
    """`source`: `stdlib`, `synthetic`, a file, a folder, a list of those, `{dataset: name, ...}` for
    `datasets.load_dataset`, or `{synthetic: kind, ...}` (`synthetic.py`)."""

    source: str | list[str] | dict[str, Any]
    validation: str | list[str] | dict[str, Any] | None = None  # default: held out of the source
    validation_share: float = Field(default=0.04, gt=0, lt=1)  # of the documents (or of the text, if it is only one)
    text_field: str = "text"
    document_start: str | None = None  # rows are lines: join them, a document starting at each that matches (a regex)
    sequence_length: int = Field(ge=2)
    fim_rate: float = Field(default=0.0, ge=0, le=1)  # documents trained on as prefix, suffix, middle; V3: 0.1
    cut_documents: bool = True  # where a row ends; else rows are padded, and only what is longer than one is cut
    streaming: bool = False  # read, tokenise and pack while training; for sources larger than disk or patience
    validation_documents: int = Field(default=1000, ge=1)  # held out when streaming: the first so many
    workers: int = Field(default=1, ge=1)

    @property
    def held_out_documents(self) -> int:
        """At the beginning of a stream."""
        return self.validation_documents if self.streaming and self.validation is None else 0

    @model_validator(mode="after")
    def regular_expression(self):
        if self.document_start is None:
            return self
        if self.streaming:
            raise ValueError("document_start joins rows of a source that is read whole: streaming must be false")
        try:
            re.compile(self.document_start)
        except re.error as error:
            raise ValueError(f"document_start={self.document_start!r} is no regular expression: {error}") from None
        return self


class ChatSection(Section):
    """`source`: `docstrings`, a .jsonl, .json or .parquet file of conversations, a folder of these, a list, or
    `{dataset: name, ...}` for `datasets.load_dataset`."""

    source: str | list[str] | dict[str, Any]
    validation: str | list[str] | dict[str, Any] | None = None  # default: held out of the source
    validation_share: float = Field(default=0.04, gt=0, lt=1)  # of the conversations
    messages_field: str = "messages"  # the column; of each row a list of {role, content}
    sequence_length: int = Field(ge=2)  # longer conversations are cut
    packing: bool = True  # several conversations in a row, apart from each other; else one
    workers: int = Field(default=1, ge=1)


class LoraSection(Section):
    """Low-rank adapters beside frozen weights; without this section all weights are trained."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)  # the factors' product counts alpha / rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # not for routed experts
    targets: list[Literal["attention", "mlp", "shared_experts", "experts"]] | None = None  # default: all there are
    mtp: bool | None = None  # modules of multi-token prediction too; default: where they learn
    merge: bool = False  # also save the model with the adapter merged, in `merged/`


class OptimizerSection(Section):
    """`muon`: Muon for hidden matrices, AdamW for the rest; `adamw`: AdamW for all (then `matrix_lr` is its rate)."""

    name: Literal["muon", "adamw"] = "muon"
    matrix_lr: Rate = 0.02
    embedding_lr: Rate = 0.2
    head_lr: Rate = 0.004
    scalar_lr: Rate = 0.01  # norm weights, biases
    router_lr: Rate | None = None  # default: scalar_lr. A slower router gives the biases time to balance it
    weight_decay: Rate = 0.1  # matrices only
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum: Beta = 0.95
    ns_steps: int = Field(default=5, ge=1, lt=100)


class BatchRampSection(Section):
    """Sequences per step grow linearly over the first `tokens` of the run, from `start` to the whole batch
    (per_device_train_batch_size x gradient_accumulation_steps x processes), in whole micro-batches of all processes.
    V3: from 3072 to 15360 over 469 of 14,800 billion tokens."""

    start: int = Field(ge=1)
    tokens: float = Field(gt=0)


TRAPEZOID, V3 = {"decay", "final"}, {"constant_until", "cosine_until", "floor", "tail_from", "tail"}


class ScheduleSection(Section):
    """Learning-rate factor against progress, the share of the run's tokens that were seen.

    `trapezoid`: linear warm-up, constant, then linear decay over the share `decay` to `final`.
    `v3`: linear warm-up, constant, cosine to `floor`, constant, a last stretch at `tail`. Defaults are V3's: constant
    to 10 of 14.8 trillion tokens, cosine from 2.2e-4 to 2.2e-5 over 4.3, then 0.333, then 7.3e-6 for 0.167.
    """

    kind: Literal["trapezoid", "v3"] = "trapezoid"
    warmup: float = Field(default=0.01, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=1)  # in place of the share; V3: 2000
    decay: float = Field(default=0.4, ge=0, le=1)
    final: float = Field(default=0.0, ge=0, le=1)
    constant_until: float = Field(default=10 / 14.8, ge=0, le=1)
    cosine_until: float = Field(default=14.3 / 14.8, ge=0, le=1)
    floor: float = Field(default=0.1, ge=0, le=1)
    tail_from: float = Field(default=14.633 / 14.8, ge=0, le=1)
    tail: float = Field(default=7.3 / 220, ge=0, le=1)
    batch_ramp: BatchRampSection | None = None
    max_seconds: float | None = Field(default=None, gt=0)  # ends the run, fully decayed, if max_steps has not

    @model_validator(mode="after")
    def fits(self):
        default = {name: field.default for name, field in type(self).model_fields.items()}
        others = V3 if self.kind == "trapezoid" else TRAPEZOID
        for name in sorted(others):
            if getattr(self, name) != default[name]:
                raise ValueError(f"{name}={getattr(self, name)} is no field of kind={self.kind!r}")
        if self.warmup_steps is not None and self.warmup != default["warmup"]:
            raise ValueError(f"give warmup={self.warmup} (a share) or warmup_steps={self.warmup_steps}, not both")
        warmup = 0.0 if self.warmup_steps is not None else self.warmup
        if self.kind == "trapezoid" and warmup + self.decay > 1:
            raise ValueError(f"warmup + decay = {warmup + self.decay} exceeds the whole run, 1")
        ends = [warmup, self.constant_until, self.cosine_until, self.tail_from]
        if self.kind == "v3" and ends != sorted(ends):
            raise ValueError(f"warmup, constant_until, cosine_until, tail_from must not fall, and are {ends}")
        if self.batch_ramp is not None and self.max_seconds is not None:
            raise ValueError("batch_ramp goes by tokens and max_seconds by time: give one of them")
        return self


class BalanceSection(Section):
    """Loss-free balancing: step `gamma` until `freeze_at` (share of the run), then 0, as in V3's pre-training.

    With `final_gamma` the step goes there from `gamma` in equal ratios, for short runs: large enough at first to reach
    every expert, small at last so that biases come to rest.
    """

    gamma: float = Field(default=1e-3, ge=0)
    final_gamma: float | None = Field(default=None, gt=0)
    freeze_at: float = Field(default=0.97, ge=0, le=1)
    centre: bool = False

    def step(self, progress: float) -> float:
        """gamma at `progress` in 0..1: gamma (final_gamma / gamma)^(progress / freeze_at), then 0."""
        if progress >= self.freeze_at or not self.gamma:
            return 0.0
        return self.gamma * ((self.final_gamma or self.gamma) / self.gamma) ** (progress / self.freeze_at)


class MtpSection(Section):
    """Weight of multi-token prediction's loss: `coef` until `switch_at` (share of the run), then `final_coef`.

    The defaults are V3's pre-training: 0.3 for 10 of 14.8 trillion tokens, then 0.1.
    """

    coef: float = Field(default=0.3, gt=0)
    final_coef: float = Field(default=0.1, gt=0)  # at 0 the modules would still move, by what optimizers remember
    switch_at: float = Field(default=10 / 14.8, ge=0, le=1)
    detach_trunk: bool = False  # the loss reaches the modules alone


class PipelineSection(Section):
    """How `train.pipeline` spreads the layers over processes, and in which order their micro-batches run."""

    schedule: Literal["1f1b", "zb1p", "zbv", "dualpipev"] = "1f1b"  # zbv, dualpipev: two stages on each process
    layers: list[Annotated[int, Field(ge=1)]] | None = None  # decoder layers of each stage; default: evenly


class ParallelSection(Section):
    """What accelerate's launch files cannot express."""

    expert: int = Field(default=1, ge=1)  # processes among which each layer's experts are spread (fsdp2_ep.yaml)


class CardSection(Section):
    """What the model card (README.md) says beyond what the run knows: identifiers as the Hub has them."""

    title: str | None = Field(default=None, min_length=1)  # default: the name of output_dir
    license: str = Field(default="apache-2.0", pattern=r"^[a-z0-9][a-z0-9.-]*$")  # of the weights
    license_name: str | None = None  # of a license that is "other"
    license_link: str | None = None
    language: list[Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]] | None = None  # ISO 639

    @model_validator(mode="after")
    def other_licenses_have_names(self):
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError("license_name goes with license: other, and must then be given")
        return self


class Recipe(Section):
    output_dir: str
    model: ModelSection
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    balance: BalanceSection = Field(default_factory=BalanceSection)
    mtp: MtpSection | None = None  # for a model with num_nextn_predict_layers; default: its config's mtp_loss_coef
    pipeline: PipelineSection | None = None  # for train.pipeline
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    # auto: bf16 where the hardware multiplies it natively; fp8: the same, the products of linear layers in FP8 blocks
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    fp8_scales: Literal["fp32", "ue8m0"] = "fp32"  # ue8m0: powers of two
    card: CardSection = Field(default_factory=CardSection)
    threads: int | None = Field(default=None, ge=1)  # CPU threads; default: this process's share of the cores
    prompt: str | None = None  # text to continue when the run has ended
    trainer: dict[str, Any] = Field(default_factory=dict)  # fields of transformers.TrainingArguments

    @model_validator(mode="after")
    def known_training_arguments(self):
        known = set(inspect.signature(TrainingArguments).parameters)
        for key, value in self.trainer.items():
            if key.endswith("_strategy") and value is False:
                self.trainer[key] = "no"  # what YAML 1.1 makes of an unquoted no
            if key in OURS:
                raise ValueError(f"trainer.{key} is set by the recipe's field {OURS[key]}")
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"trainer.{key} is no field of transformers.TrainingArguments{hint}")
            self.trainer[key] = self._training_argument(key, self.trainer[key])
        return self

    @model_validator(mode="after")
    def streams_by_steps(self):
        reason = "schedule.batch_ramp" if self.schedule.batch_ramp else "data.streaming"
        streams = self.schedule.batch_ramp is not None or (isinstance(self.data, DataSection) and self.data.streaming)
        if streams and self.trainer.get("max_steps", -1) < 1:
            raise ValueError(f"{reason} needs trainer.max_steps: a stream of sequences has no epochs")
        if streams and self.trainer.get("dataloader_num_workers", 0):
            raise ValueError(f"{reason} reads in the training process: trainer.dataloader_num_workers must be 0")
        if streams and self.trainer.get("data_seed") is not None:
            raise ValueError(
                f"trainer.data_seed={self.trainer['data_seed']} is not honoured with {reason}, whose order is by "
                "trainer.seed: leave it out"
            )
        if streams and self.trainer.get("train_sampling_strategy", "random") != "random":
            raise ValueError(
                f"trainer.train_sampling_strategy={self.trainer['train_sampling_strategy']!r} is not honoured with "
                f"{reason}, which has an order of its own: leave it out"
            )
        return self

    @staticmethod
    def _training_argument(key: str, value: Any) -> Any:
        """The value as TrainingArguments annotates it (1e-3, a string in YAML 1.1, becomes a number); it checks nothing
        itself, so what its annotations do not allow is refused here."""
        hints = get_type_hints(TrainingArguments) | {"resume_from_checkpoint": str | bool | None}  # true: the last one
        hint = hints.get(key, Any)
        try:
            value = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            problems = "; ".join(sorted({e["msg"] for e in error.errors()}))
            raise ValueError(f"trainer.{key}={value!r} is not possible: {problems}") from None
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in AT_LEAST_ONE and numeric and value <= 0:
            raise ValueError(f"trainer.{key}={value!r} is not possible: it must be above 0")
        given = [(ONLY, f"trainer.{key}", key, value)]
        if key == "accelerator_config" and value is not None:
            if isinstance(value, str):
                raise ValueError(f"trainer.{key}={value!r} is not possible: give the fields themselves, no file")
            given += [(ONLY_OF_ACCELERATOR, f"trainer.{key}.{name}", name, part) for name, part in value.items()]
        for table, field, name, found in given:
            if name in table and found is not None and found != table[name][0]:  # None: as if it were not given
                only, reason = table[name]
                raise ValueError(f"{field}={found!r} is not possible, only {only!r}: {reason}")
        if key == "max_steps" and numeric and (value < -1 or value == 0):
            raise ValueError(
                f"trainer.max_steps={value!r} is not possible: at least 1, or -1 to go by num_train_epochs"
            )
        return value

    @model_validator(mode="after")
    def scales_go_with_fp8(self):
        if self.fp8_scales != "fp32" and self.precision in ("bf16", "fp32"):
            raise ValueError(f"fp8_scales={self.fp8_scales!r} goes with precision: fp8, and that is {self.precision!r}")
        return self


class FinetuneRecipe(Recipe):
    """A recipe for `train.finetune`: a checkpoint and conversations."""

    data: ChatSection
    lora: LoraSection | None = None
    engine: Literal["trainer", "trl"] = "trainer"  # transformers' Trainer, or TRL's SFTTrainer: the same losses
    balance: BalanceSection = Field(default_factory=lambda: BalanceSection(gamma=0.0))

    @model_validator(mode="after")
    def keeps_the_batch(self):
        if self.schedule.batch_ramp is not None:
            raise ValueError("schedule.batch_ramp is for pretraining")
        return self

    @model_validator(mode="after")
    def starts_from_a_checkpoint(self):
        if self.model.checkpoint is None:
            raise ValueError("fine-tuning needs model.checkpoint, the folder of a trained model")
        return self

    @model_validator(mode="after")
    def is_not_spread(self):
        if self.parallel.expert > 1:
            raise ValueError(f"parallel.expert={self.parallel.expert} is for pretraining only")
        if self.pipeline is not None:
            raise ValueError("the section pipeline is for pretraining only (train.pipeline)")
        return self

    @model_validator(mode="after")
    def suits_an_adapter(self):
        if self.lora is None:
            return self
        if self.optimizer.name != "adamw":
            raise ValueError("lora needs optimizer.name=adamw: Muon is for whole matrices, not for the factors of one")
        if self.precision == "fp8":
            raise ValueError("precision: fp8 is for training whole weights; with lora use bf16, fp32 or auto")
        if self.balance.gamma:
            raise ValueError(
                f"balance.gamma={self.balance.gamma:g} is not possible with lora: the routers' biases are the model's, "
                "and an adapter does not hold them. Leave it out, or set it to 0"
            )
        return self


def resolve(path: str) -> Path:
    """A path as given if it exists, else relative to the repository, so that recipes work from any folder."""
    given = Path(path).expanduser()
    return given if given.exists() or given.is_absolute() else REPOSITORY / path


def load_recipe(path: str, overrides: list[str] = (), kind: type[Recipe] = Recipe) -> Recipe:
    """Reads a recipe of this kind and applies `dotted.field=value` overrides.

    Raises: ValueError with every problem, one per line.
    """
    file = resolve(path)
    if not file.is_file():
        raise ValueError(f"recipe {path!r} does not exist")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path!r} must be a mapping of sections, and is {type(values).__name__}")
    for override in overrides:
        _set(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']} (given {e['input']!r})" for e in error.errors()
        ]
        raise ValueError(f"recipe {path!r} cannot be used:\n" + "\n".join(lines)) from None


def _set(values: dict, override: str):
    field, equals, text = override.removeprefix("--").partition("=")
    if not equals or not field:
        raise ValueError(f"override {override!r} must read field=value, e.g. optimizer.matrix_lr=0.01")
    *path, last = field.split(".")
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {name!r} is not a section")
    try:
        values[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r} is not valid YAML: {error}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def recipe_from_command_line(description: str, argv: list[str] | None = None, kind: type[Recipe] = Recipe) -> Recipe:
    """`--config recipe.yaml [field=value ...]`; problems end the program with one message."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a recipe, e.g. configuration/recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. optimizer.matrix_lr=0.01")
    args, rest = parser.parse_known_args(argv)
    try:
        return load_recipe(args.config, [*args.overrides, *rest], kind)
    except ValueError as error:
        parser.error(str(error))
