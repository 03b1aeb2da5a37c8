"""The model to train and its tokenizer, by name or as they are, in the form that the configuration asks for."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import DiffusionConfig
from ..files import UserError
from ..models import Backbone, base_of, is_adapter, load_checkpoint, load_model, load_tokenizer
from ..models.block_attention import set_attention_form
from ..models.checks import check_finite
from ..models.refusals import refuse_split

logger = logging.get_logger(__name__)

TIMES_PER_BLOCK = ("fast_dllm",)  # backbones that were published with a time a block


def load_for_training(
    model: str | PreTrainedModel | PeftModel, args: DiffusionConfig, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """The model, checked, and attending as `args.attention` says."""
    if isinstance(model, str):
        how = args.load_options
        if is_adapter(model):
            loaded = load_checkpoint(model, is_trainable=True, **how)[0]
            choose_attention(loaded, args, adapted=True)
            return loaded
        given = {"dtype", "torch_dtype", "quantization_config", "load_in_8bit", "load_in_4bit"} & how.keys()
        if peft_config is None and not given:
            how["dtype"] = torch.float32
        model = load_model(model, **how)
    elif args.model_init_kwargs:
        raise UserError("model_init_kwargs are for a model given by name; this one is loaded already.")
    else:
        refuse_split(model)
        check_finite(model, "The model")
    adapted = peft_config is not None or isinstance(model, PeftModel)
    if not adapted:
        _warn_of_rounding(model, args)
    choose_attention(model, args, adapted)
    return model


def _warn_of_rounding(model: PreTrainedModel, args: DiffusionConfig) -> None:
    """Say so if all weights are trained in half precision, where most updates round to nothing."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if trained and not args.deepspeed:  # which keeps float32 copies of its own
        logger.warning(
            f"All weights are trained in {str(trained.pop()).removeprefix('torch.')}. At a learning rate of 1e-5 ten "
            "updates moved 3 % of a small model's weights, and 94 % in float32: most updates are smaller than what "
            "rounding keeps. Load the model in float32 (bf16=True still computes in bfloat16), or train an adapter."
        )


def load_tokenizer_of(model: str | PreTrainedModel | PeftModel, args: DiffusionConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model, or with an adapter's."""
    name = base_of(model) if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise UserError("The model was not loaded from a name or path, so pass its tokenizer as processing_class.")
    revision = args.load_options.get("revision") or "main"
    return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)


def choose_attention(model: PreTrainedModel | PeftModel, args: DiffusionConfig, adapted: bool) -> None:
    """Let a block-wise model attend as `args.attention` says, and say so in its config, with which it is saved.

    Raises:
        UserError: the model has no blocks; or the choice would be lost, as an adapter is saved without a config.
    """
    config: Any = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    before = getattr(config, "attention_form", "block")
    set_attention_form(config, args.attention)
    if adapted and getattr(config, "attention_form", "block") != before:
        raise UserError(
            f"attention='{args.attention}' is kept in the config.json of a model, and an adapter has none: whoever "
            f'loads it would run it in the other form. Write "attention_form": "{args.attention}" into the '
            "config.json of the model itself."
        )


def choose_times(args: DiffusionConfig, backbone: Backbone) -> None:
    """Write into the configuration what t is drawn for: a row, or a block, if that is how the model was published.

    Raises:
        UserError: a model without blocks, or anchors computed before training, which are kept one a row.
    """
    if args.noise_per is None:
        args.noise_per = "block" if backbone.block_size and backbone.name in TIMES_PER_BLOCK else "row"
    if args.noise_per == "row":
        return
    if backbone.block_size is None:
        raise UserError("noise_per='block' is for models that attend between blocks. Leave it out.")
    if getattr(args, "precompute_anchor", False):
        raise UserError(
            "precompute_anchor keeps one set of anchors a row, and with noise_per='block' each row comes twice. Set "
            "noise_per='row', or precompute_anchor=False."
        )
