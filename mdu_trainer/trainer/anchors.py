"""Where the anchor's predictions come from, and of what input.

anchor_source    whose prediction             kept beside the model in training
"initial"        theta_0                      a copy (none with adapters)
"current"        the model in training        nothing
"ema"            its moving average           a copy (of what is trained, with adapters)
NAME             another checkpoint           that checkpoint
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..divergence import Prediction
from ..files import UserError
from ..masking import Noised
from ..models import (
    base_of,
    evaluation_mode,
    hidden_at,
    is_adapter,
    load_checkpoint,
    load_model,
    position_ids,
    resolve_backbone,
)
from ..models.block_attention import set_attention_form
from .average import MovingAverage, UpdateAverage
from .loading import choose_attention
from .other_checkpoint import config_of, tokenizer_of
from .reference import Reference

logger = logging.get_logger(__name__)

NAME_IT = "Name a checkpoint of the same family as the model in training, such as that from before fine-tuning."


def make_reference(trainer: Trainer) -> Reference | None:
    """theta_0, where a loss compares with it."""
    args, objective = trainer.args, trainer.forget_objective
    anchored = objective.anchor and args.tau > 0 and args.anchor_source == "initial"
    retain_kl = args.retain_weight > 0 and args.retain_loss_type == "kl"
    if not (anchored or retain_kl or objective.reference):
        return None
    of_checkpoint = args.anchor_checkpoint is not None and isinstance(trainer.model, PeftModel)
    how = {} if of_checkpoint else {"precision": args.reference_precision, "device": args.reference_device}
    return Reference(trainer.model, trainer.distributed, keep_copy=not args.precompute_anchor, **how)


def make_anchor(trainer: Trainer) -> Reference | None:
    """The model whose prediction is the anchor; None if there is no anchor, or the model in training gives it.

    Raises:
        UserError: a checkpoint that does not fit, weights that cannot be averaged, or a model from which no prompt can
            be hidden.
    """
    args = trainer.args
    trainer.remove_callback(UpdateAverage)  # of an earlier trial of a search
    if not (trainer.forget_objective.anchor and args.tau > 0):
        return None
    anchor = trainer.reference if args.anchor_source == "initial" else None
    if args.anchor_checkpoint is not None:
        anchor = _of_checkpoint(trainer, args.anchor_checkpoint)
    elif args.anchor_source == "ema":
        anchor = MovingAverage(trainer.model, trainer.distributed, args.anchor_ema_decay, args.reference_device)
        _say_cost("ema", anchor.average.values(), "copy of all weights that are trained")
        trainer.add_callback(UpdateAverage(trainer))
    if args.anchor_input == "hidden_prompt":
        position_ids(_asked(trainer, anchor), torch.zeros(1, 1, dtype=torch.long))
    return anchor


def predict_anchor(trainer: Trainer, model: nn.Module, batch: dict[str, Tensor], noised: Noised) -> Prediction:
    """The anchor's prediction at the masked positions, without gradient: `[N, V]` before the head.

    Args:
        trainer: says whose prediction it is.
        model: in training, as the trainer wraps it.
        batch, noised: of the rows to forget, before and after the forward process.
    """
    if "anchor" in batch:  # computed before training
        return trainer._anchor_head._replace(hidden=batch["anchor"])
    where = anchor_inputs(trainer, batch, noised)
    if trainer.args.anchor_source == "current":
        with evaluation_mode(model):
            return hidden_at(model, **where)
    if trainer.anchor is None:
        raise UserError(
            "The anchors of this eval set were not computed before training. Pass it to the constructor, or set "
            "precompute_anchor=False."
        )
    return trainer.anchor.projection(model, **where)


def anchor_inputs(trainer: Trainer, batch: dict[str, Tensor], noised: Noised) -> dict[str, Any]:
    """What the anchor is predicted from, as `hidden_at` takes it, `[B, L]` each.

    What is hidden is hidden from block-wise models in the clean tokens, too.

    A hidden prompt is masked, too: where tokens are predicted one position earlier (Dream), the first one of the
    response is predicted at the last of the prompt.
    """
    where: dict[str, Any] = {"attention_mask": noised.attention_mask, "selected": noised.masked}
    own = trainer.args.anchor_input == "prompt"
    where["input_ids"] = noised.input_ids if own else noised.anchor_ids
    where |= trainer.backbone.form(noised.clean_ids if own else noised.clean_anchor_ids)
    if trainer.args.anchor_input == "hidden_prompt":
        where["attention_mask"] = noised.attention_mask * batch["completion_mask"]
        where["position_ids"] = position_ids(_asked(trainer, trainer.anchor), noised.anchor_ids)
    return where


def _asked(trainer: Trainer, anchor: Reference | None) -> nn.Module:
    """A model that counts positions as the anchor's does: that of another checkpoint, or the one in training."""
    other = trainer.args.anchor_checkpoint is not None and anchor is not None
    return anchor.frozen if other else trainer.accelerator.unwrap_model(trainer.model)


def _of_checkpoint(trainer: Trainer, name: str) -> Reference:
    """The model of a checkpoint, in the precision of the model in training, once it is known to fit."""
    args = trainer.args
    _check_checkpoint(trainer, name)
    how = {"trust_remote_code": args.trust_remote_code, "dtype": trainer.model.dtype}
    model: PreTrainedModel = (
        load_checkpoint(name, **how)[0].merge_and_unload() if is_adapter(name) else load_model(name, **how)
    )
    choose_attention(model, args, adapted=False)
    reference = Reference.of_frozen(
        model,
        trainer.distributed,
        precision=args.reference_precision,
        device=args.reference_device,
        whole=args.precompute_anchor,
    )
    _say_cost(name, model.parameters(), "model")
    return reference


def _check_checkpoint(trainer: Trainer, name: str) -> None:
    """Refuse a checkpoint whose predictions cannot be compared, before its weights are read."""
    where, base = f"anchor_source: {name}", base_of(name)
    unreadable = f"anchor_source '{name}' is none of initial, current and ema, and no checkpoint that can be read"
    config = config_of(trainer, base, unreadable, where, NAME_IT)
    tokenizer = tokenizer_of(trainer, base) or trainer.processing_class
    own, others = trainer.processing_class.get_vocab(), tokenizer.get_vocab()
    moved = sum(own.get(token) != others.get(token) for token in own.keys() | others.keys())
    if moved:
        raise UserError(f"{where} has another tokenizer: {moved} tokens have other ids, or are not there. {NAME_IT}")
    try:
        set_attention_form(config, trainer.args.attention)
        backbone = resolve_backbone(config, tokenizer)
    except UserError as error:
        raise UserError(f"{where} cannot be compared with. {error}") from None
    for fact, words in (
        ("mask_token_id", "mask token id"),
        ("logit_shift", "logit shift"),
        ("block_size", "block size"),
    ):
        values = [getattr(one, fact) for one in (backbone, trainer.backbone)]
        if values[0] != values[1]:
            raise UserError(f"{where} has another {words}: {values[0]}, the model in training {values[1]}. {NAME_IT}")


def _say_cost(source: str, weights: object, what: str) -> None:
    """Say what a source keeps in memory beside the model in training."""
    weights = list(weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 2**30
    device = weights[0].device if weights else "cpu"
    logger.warning(f"anchor_source='{source}': a further {what} is kept, {size:.2f} GiB, on {device}.")
