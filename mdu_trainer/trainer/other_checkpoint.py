"""Another checkpoint beside the model in training: what is known of it before its weights are read."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from ..files import UserError
from ..models import load_tokenizer
from ..models.loading import load_config


def config_of(trainer: Trainer, name: str, unreadable: str, where: str, remedy: str) -> PreTrainedConfig:
    """The config of a checkpoint whose vocabulary is as large as that of the model in training.

    Args:
        trainer: of the model in training.
        name: of the checkpoint, on the Hub or a folder.
        unreadable, where: how the messages begin: that it cannot be read, and that it does not fit.
        remedy: how they end.

    Raises:
        UserError: the checkpoint cannot be read, or has a vocabulary of another size.
    """
    try:
        config = load_config(name, trust_remote_code=trainer.args.trust_remote_code)
    except OSError as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(f"{unreadable}: {cause} {remedy}") from None
    size, own = (one.get_text_config().vocab_size for one in (config, trainer.model.config))
    if size != own:
        raise UserError(f"{where} has a vocabulary of {size} tokens, the model in training {own}. {remedy}")
    return config


def tokenizer_of(trainer: Trainer, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None where it comes without one."""
    try:
        return load_tokenizer(name, trust_remote_code=trainer.args.trust_remote_code)
    except (OSError, UserError):
        return None
