"""Where the anchor's predictions come from."""

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ..divergence import Prediction
from ..masking import Noised
from ..models import evaluation_mode, hidden_at
from .precompute import precompute_anchors
from .reference import Reference


def make_reference(trainer: Trainer) -> Reference | None:
    """theta_0, where a loss compares with it."""
    args, objective = trainer.args, trainer.forget_objective
    anchored = objective.anchor and args.tau > 0 and args.anchor_source == "initial"
    retain_kl = args.retain_weight > 0 and args.retain_loss_type == "kl"
    if not (anchored or retain_kl or objective.reference):
        return None
    return Reference(
        trainer.model,
        trainer.distributed,
        keep_copy=not args.precompute_anchor,
        precision=args.reference_precision,
        device=args.reference_device,
    )


def compute_before_training(trainer: Trainer) -> None:
    """Compute all anchors of the run, if that is asked for and not done, and let go of the model they come from."""
    if trainer.args.precompute_anchor and trainer._anchor_head is None:
        trainer._anchor_head = precompute_anchors(trainer)
        if not isinstance(trainer.model, PeftModel):
            trainer.reference = None  # from now on the live model is not theta_0


def predict_anchor(trainer: Trainer, model: nn.Module, batch: dict[str, Tensor], noised: Noised) -> Prediction:
    """The anchor's prediction at the masked positions, without gradient: `[N, V]` before the head.

    Args:
        trainer: says whose prediction it is.
        model: in training, as the trainer wraps it.
        batch, noised: of the rows to forget, before and after the forward process.
    """
    if "anchor" in batch:  # computed before training
        return trainer._anchor_head._replace(hidden=batch["anchor"])
    where = (noised.anchor_ids, noised.attention_mask, noised.masked)
    if trainer.args.anchor_source == "initial":
        return trainer._theta_0.projection(model, *where, logit_shift=trainer.backbone.logit_shift)
    with evaluation_mode(model):
        return hidden_at(model, *where, logit_shift=trainer.backbone.logit_shift)
