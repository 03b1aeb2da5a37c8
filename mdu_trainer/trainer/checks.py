"""Checks before anything is loaded or trained."""

from collections.abc import Callable, Sequence
from typing import Any

from ..config import MDUConfig
from ..files import UserError


def check_source(model: Any, model_init: Callable | None, optimizers: tuple) -> None:
    """Refuse a model that is given twice or not at all, and optimizers of one that is made anew for each run."""
    if (model is None) == (model_init is None):
        raise UserError("Pass the model to train, or as model_init a function that makes it; one of the two.")
    if model_init is not None and any(part is not None for part in optimizers):
        raise UserError("optimizers are of one model, and model_init makes a new one for each run. Leave them out.")


def check_retain(args: MDUConfig, has_forget: bool, has_retain: bool) -> None:
    """Refuse a retain set that would not be read, and a retain loss without one, before a model is loaded."""
    if has_forget and args.retain_weight > 0 and not has_retain:
        raise UserError(
            f"retain_weight is {args.retain_weight:g} but there is no retain set. Pass retain_dataset, or set "
            "retain_weight=0 to unlearn without one."
        )
    if args.retain_weight == 0 and has_retain:
        raise UserError(
            "A retain set is given but retain_weight is 0, so it would not be read. Set retain_weight (the papers "
            "use 1), or leave the retain set out."
        )


def check_prompts(prompts: Sequence[Sequence[int]], mask_token_id: int) -> None:
    """Refuse empty prompts where theta_0's own prediction is the anchor."""
    bare = sum(all(token == mask_token_id for token in prompt) for prompt in prompts)
    if bare:
        raise UserError(
            f"{bare} of {len(prompts)} forget rows have an empty prompt. At tau = 1 the model's own prediction is "
            "their anchor, so they would never be forgotten. Take a smaller tau, or give them a prompt."
        )
