"""The model that a comparison starts from: one that is taught the rows first, or a small one from scratch."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from trl import ModelConfig, get_peft_config

from ..config import MDLMConfig, MDUConfig
from ..data.texts import of_text
from ..files import UserError
from ..testing import SMALLEST_VOCABULARY, dataset_texts, tiny_mdlm, train_tokenizer
from ..trainer.mdlm import MDLMTrainer
from .checks import check_above_zero, check_least
from .loading import load
from .row_sets import answer_rows
from .training import is_trained

HEADS = 4  # of a model from scratch
SHARED = (  # options of the unlearning that the fine-tuning follows
    "seed",
    "bf16",
    "dataloader_pin_memory",
    "activation_checkpointing",
    "gradient_checkpointing",
    "report_to",
    "logging_steps",
    "max_length",
    "attention",
    "noise_per",
    "disable_tqdm",
)


@dataclass
class FinetuningArguments:
    """Whether a model is taught the rows first, and the size of one from scratch."""

    finetune_epochs: float = field(default=0, metadata={"help": "Fine-tune on all rows first, for N epochs."})
    finetune_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the fine-tuning."})
    finetune_batch_size: int = field(default=16, metadata={"help": "Rows a fine-tuning step on each device."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a model from scratch."})
    num_layers: int = field(default=3, metadata={"help": "Layers of a model from scratch."})
    vocab_size: int = field(default=512, metadata={"help": "Byte-level BPE tokens of a model from scratch."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a block of a model from scratch, which then attends between blocks."},
    )


def check_finetuning(args: FinetuningArguments, model_args: ModelConfig) -> None:
    """Refuse what no model can be fine-tuned with, or made of from scratch."""
    check_least(args, finetune_epochs=0, finetune_batch_size=1)
    check_above_zero(args, "finetune_learning_rate")
    if model_args.model_name_or_path is not None and args.block_size is not None:
        raise UserError("--block_size is of a model from scratch; one that is named has its own. Leave it out.")
    if model_args.model_name_or_path is None:
        if args.block_size is not None:
            check_least(args, block_size=2)
        check_least(args, hidden_size=HEADS, num_layers=1, vocab_size=SMALLEST_VOCABULARY)
        if args.hidden_size % (2 * HEADS):
            raise UserError(f"--hidden_size must be a multiple of {2 * HEADS}, got {args.hidden_size}.")


def finetune(
    folder: Path,
    args: FinetuningArguments,
    config: MDUConfig,
    model_args: ModelConfig,
    rows: Dataset,
    vocabulary: Dataset,
) -> str:
    """Teach rows to the model that the command line names, or to one from scratch, and save it in a folder.

    The tokenizer of one from scratch learns from the rows of `vocabulary` alone: what is to be forgotten must not be
    among its tokens.

    Returns:
        The folder, also if a finished model lies there already.
    """
    name, learned = model_args.model_name_or_path, ["text"] if of_text(vocabulary) else ["question", "answer"]
    if is_trained(folder):
        return str(folder)
    if name is None:
        tokenizer = train_tokenizer(dataset_texts(vocabulary.select_columns(learned)), args.vocab_size)
        size = (args.hidden_size, args.num_layers, HEADS)
        model = tiny_mdlm(tokenizer, *size, seed=config.seed, block_size=args.block_size)
    else:
        model, tokenizer = load(name, model_args, config.trust_remote_code, is_trainable=True)
    trainer = MDLMTrainer(
        model,
        finetune_config(folder, args, config, from_scratch=name is None, texts=of_text(rows)),
        train_dataset=answer_rows(rows, conversational=bool(tokenizer.chat_template)),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def finetune_config(
    folder: Path, args: FinetuningArguments, config: MDUConfig, from_scratch: bool, texts: bool = False
) -> MDLMConfig:
    """Return the fine-tuning's configuration: the unlearning's where it is not set here."""
    return MDLMConfig(
        output_dir=str(folder),
        num_train_epochs=args.finetune_epochs,
        learning_rate=args.finetune_learning_rate,
        per_device_train_batch_size=args.finetune_batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        adam_beta2=0.98,
        save_strategy="no",
        pad_with_end_tokens=not texts,  # whose chunks end anywhere
        time_weighting=not from_scratch,  # a small model from scratch learns faster without the variance of 1/t
        prompt_mask_ratio=0.2,
        **{name: getattr(config, name) for name in SHARED if hasattr(config, name)},  # by version of transformers
    )
