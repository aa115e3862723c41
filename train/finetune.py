"""Fine-tuning on chat: `accelerate launch --quiet -m train.finetune --config RECIPE [field=value ...]`.

Reads conversations, trains all weights of a checkpoint or (section `lora`) an adapter beside them on what the assistant
says, through transformers' Trainer or (engine=trl) TRL's SFTTrainer, and saves model or adapter with the tokenizer.
"""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, pipeline, set_seed

from modeling_nanodeepseek import ModelLoss, lora_targets

from . import pretrain
from .card import model_card
from .chat import PadConversations, load_conversations, pack_conversations, tokenize, use_chat_template
from .data import hold_out
from .recipe import FinetuneRecipe, LoraSection, recipe_from_command_line
from .trainer import NanoDeepSeekTrainer


def load_data(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple]:
    """Rows to train on and to validate on, with what was cut of each."""
    data = recipe.data
    conversations = load_conversations(data.source, data.messages_field)
    if data.validation is not None:
        parts = conversations, load_conversations(data.validation, data.messages_field)
    elif len(conversations) > 1:
        parts = hold_out(conversations, data.validation_share)
    else:
        raise ValueError(f"data.source {data.source!r} holds one conversation: give others as data.validation")
    return {name: rows_of(recipe, tokenizer, part) for name, part in zip(("training", "validation"), parts)}


def rows_of(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase, conversations) -> tuple:
    """Conversations as rows, packed or one in each, and what was cut."""
    length = recipe.data.sequence_length
    rows, cut = tokenize(conversations, tokenizer, length, recipe.data.workers)
    room = length if recipe.data.packing else 0  # none: then no row has room for a second one
    return pack_conversations(rows, room), cut


def with_adapter(model: PreTrainedModel, section: LoraSection) -> PreTrainedModel:
    """The model with a fresh adapter, all else frozen. Raises: ValueError without PEFT, or for parts it has not."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("the section lora needs PEFT: pip install 'peft>=0.19.1'") from error
    targets = lora_targets(model, section.targets, section.mtp)
    if section.dropout and targets["target_parameters"]:
        raise ValueError(
            f"lora.dropout={section.dropout:g} is not possible with routed experts, whose weights are adapted as a "
            "whole: set it to 0, or leave 'experts' out of lora.targets"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, **targets
    )
    return get_peft_model(model, config)


def engine(name: str) -> tuple[type[NanoDeepSeekTrainer], type[TrainingArguments], dict]:
    """The trainer, its kind of arguments, and what these need. Raises: ValueError where TRL is not installed."""
    if name == "trainer":
        return NanoDeepSeekTrainer, TrainingArguments, {}
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ValueError("engine=trl needs TRL: pip install 'trl>=1.16'") from error

    class NanoDeepSeekSFTTrainer(NanoDeepSeekTrainer, ModelLoss, SFTTrainer):
        """SFTTrainer with this project's optimizer, checkpoints and log, on the model's own loss."""

    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "gradient_checkpointing": False}
    return NanoDeepSeekSFTTrainer, SFTConfig, settings


def build_trainer(recipe: FinetuneRecipe) -> NanoDeepSeekTrainer:
    """Everything up to the first step: conversations read, model loaded, adapter added, rows packed."""
    trainer, arguments, settings = engine(recipe.engine)
    args = pretrain.training_arguments(recipe, arguments, **settings)
    with args.main_process_first(desc="preparing data"):
        tokenizer = pretrain.load_tokenizer(recipe, None)
        use_chat_template(tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = pretrain.load_model(recipe, tokenizer)
        data = load_data(recipe, tokenizer)
    set_seed(args.seed)
    if recipe.lora is not None:
        base = pretrain.checkpoint_of(recipe)
        if args.push_to_hub and Path(base).is_dir():
            raise ValueError(
                f"trainer.push_to_hub with the section lora is not possible: the adapter would name its model by a "
                f"folder of this machine, {recipe.model.checkpoint!r}. Push that model first and give its name on the "
                "Hub as model.checkpoint, or push what lora.merge saves."
            )
        if args.resume_from_checkpoint is None and Path(args.output_dir, "config.json").is_file():
            raise ValueError(
                f"output_dir {recipe.output_dir!r} holds a model, and an adapter saved beside it would be put on that: "
                "take another folder"
            )
        model = with_adapter(model, recipe.lora)
        model.active_peft_config.base_model_name_or_path = base  # a folder as an absolute path
    if args.process_index == 0:
        print("\n".join(f"{name}: {cut}" for name, (_, cut) in data.items()))
    return trainer(
        model,
        args,
        recipe=recipe,
        train_dataset=data["training"][0],
        eval_dataset=data["validation"][0],
        data_collator=PadConversations(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def answer(recipe: FinetuneRecipe, trainer: NanoDeepSeekTrainer):
    """Prints what the saved model, or the saved adapter on its model, answers to the recipe's prompt; then merges."""
    if recipe.prompt:
        talk = pipeline("text-generation", model=recipe.output_dir, device=trainer.args.device)
        messages = [{"role": "user", "content": recipe.prompt}]
        print(talk(messages, max_new_tokens=96, do_sample=False)[0]["generated_text"][-1]["content"])
    if recipe.lora is not None and recipe.lora.merge:
        merge(recipe, f"{recipe.output_dir}/merged", trainer)


def merge(recipe: FinetuneRecipe, folder: str, trainer: NanoDeepSeekTrainer):
    """Saves the model with the saved adapter in its weights, a checkpoint like any other, with a card of its own. Not
    the trainer's own model: that is saved again when it is pushed."""
    from peft import PeftModel

    tokenizer = trainer.processing_class
    model = pretrain.load_model(recipe, tokenizer)
    PeftModel.from_pretrained(model, recipe.output_dir).merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model_card(trainer, merged=True).save(f"{folder}/README.md")
    print(f"merged: {folder}")


def run(recipe: FinetuneRecipe) -> dict[str, float]:
    """Runs a recipe; returns the final metrics."""
    return pretrain.run(recipe, build_trainer, answer)


def main(argv: list[str] | None = None):
    pretrain.launch(run, recipe_from_command_line(__doc__.splitlines()[0], argv, FinetuneRecipe))


if __name__ == "__main__":
    main()
