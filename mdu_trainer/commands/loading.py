"""Models as a command line names them: checked before any work, loaded with TRL's options, called by their method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from ..evaluation.runner import processes
from ..files import UserError
from ..models import load_checkpoint
from ..provenance.facts import Facts
from . import task
from .checks import check_once, check_revision, check_source


@dataclass
class ModelsConfig(ModelConfig):
    """TRL's `ModelConfig` with several models, which are loaded alike."""

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "The unlearned models: Hub ids, or folders of models or adapters."}
    )


def load(
    path: str, model_args: ModelConfig, trust_remote_code: bool = False, is_trainable: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer as the command line asks for them. A folder with an adapter loads with its base.

    Args:
        path: a Hub id, or a folder.
        model_args: revision, dtype, attention and quantization.
        trust_remote_code: whether the model may run code of its own.
        is_trainable: whether an adapter is going to be trained on; it is frozen otherwise.

    Raises:
        UserError: as `mdu_trainer.models.load_checkpoint`.
    """
    quantization = get_quantization_config(model_args)
    with task(f"loading {path}"):
        model, tokenizer = load_checkpoint(
            path,
            trust_remote_code=trust_remote_code,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization,
            is_trainable=is_trainable,
        )
        if quantization is None:
            model.to(processes().device)
    return model, tokenizer


def check_models(model_args: ModelConfig, **paths: str | Sequence[str] | None) -> None:
    """Refuse models that neither a folder nor the Hub can have, before any work.

    Args:
        model_args: has the revision.
        **paths: option -> the model or the models that it gives; None for those left out.
    """
    check_revision(model_args.model_revision, "model_revision")
    for option, given in paths.items():
        for path in [given] if isinstance(given, str) else given or ():
            check_source(path, option, "model")


def check_model(model_args: ModelConfig) -> None:
    """Refuse a command line without a model, or with one that cannot be; see `check_models`."""
    if model_args.model_name_or_path is None:
        raise UserError("Which model? Pass --model_name_or_path.")
    check_models(model_args, model_name_or_path=model_args.model_name_or_path)


def check_compared(model_args: ModelsConfig, base: str | None, **others: str | None) -> None:
    """Refuse a comparison without unlearned models, or without the one before, and models that cannot be.

    Args:
        model_args: the unlearned models.
        base: the model before.
        **others: option -> another model, None if it is left out.
    """
    if not model_args.model_name_or_path or base is None:
        raise UserError(
            "Which models? Pass --model_name_or_path UNLEARNED [UNLEARNED ...], and --base with the model before."
        )
    check_once(model_args, "model_name_or_path")
    check_models(model_args, model_name_or_path=model_args.model_name_or_path, base=base, **others)


def facts_of(path: str) -> Facts | None:
    """Return what a checkpoint keeps about its unlearning, None if it keeps nothing."""
    try:
        return Facts.load(path)
    except (OSError, ValueError):
        return None


def model_names(paths: list[str], reserved: tuple[str, ...] = ("base",)) -> list[str]:
    """Return what tables and cards call each model: its method where the folder knows it, else the folder's name.

    Args:
        paths: of the models.
        reserved: names that mean other models.
    """
    names = [facts.name if (facts := facts_of(path)) else Path(path).name for path in paths]
    return [
        path if names.count(name) > 1 or name in reserved else name for name, path in zip(names, paths, strict=True)
    ]
