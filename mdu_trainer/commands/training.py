"""One unlearning of a command: trained and saved in a folder, or loaded from there if that is done already."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from ..config import MDUConfig
from ..files import UserError, read_json, typed
from ..trainer.checkpoints import CheckpointError, choose
from ..trainer.mdu import MDUTrainer
from .folders import TRAINED
from .loading import load
from .row_sets import answer_rows


def unlearn(
    config: MDUConfig, path: str, model_args: ModelConfig, forget: Dataset, retain: Dataset | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train a fresh copy of a model to forget and save it in the run's folder, or load it if that is done already.

    Args:
        config: of the run; `output_dir` is its folder.
        path: the model before.
        model_args: how it is loaded, and the adapter to train if any.
        forget, retain: questions and answers. No retain rows are read where `retain_weight` is 0.
    """
    if is_trained(Path(config.output_dir)):
        return load(config.output_dir, model_args, config.trust_remote_code)
    model, tokenizer = load(path, model_args, config.trust_remote_code, is_trainable=True)
    chats = bool(tokenizer.chat_template)
    trainer = MDUTrainer(
        model,
        config,
        train_dataset=answer_rows(forget, chats, refusals=config.loss_type == "dpo"),
        retain_dataset=answer_rows(retain, chats) if config.retain_weight else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=whole_checkpoint(config.output_dir))
    trainer.save_model()
    trainer.save_state()
    return trainer.model, tokenizer


def whole_checkpoint(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint that a killed training left behind, if there is one."""
    try:
        return choose(folder, True)
    except CheckpointError:
        return None


def is_trained(folder: Path) -> bool:
    """Whether a folder holds a model whose training was finished."""
    try:
        return bool(log_history(folder))
    except (OSError, UserError):  # not there, or cut short
        return False


def log_history(folder: Path) -> list[dict[str, Any]]:
    """Return the logs of a finished training.

    Raises:
        FileNotFoundError: the training was not finished.
        UserError: its file is damaged.
    """
    path = folder / TRAINED
    state = read_json(path, "the log of a training", f"delete {path} and train again")
    try:
        return typed(list[dict[str, Any]], typed(dict[str, Any], state)["log_history"])
    except (ValueError, KeyError):
        raise UserError(f"{path} is not the log of a training. Delete it and train again.") from None


def train_seconds(folder: Path) -> float:
    """How long a finished training took; 0 if its log does not say."""
    return next((log["train_runtime"] for log in log_history(folder) if "train_runtime" in log), 0.0)
