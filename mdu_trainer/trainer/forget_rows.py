"""What is checked of the rows to forget and to keep before anything is trained."""

from collections.abc import Sequence

from transformers.utils import logging

from ..config import MDUConfig
from ..data.rows import TokenizedRows, count_overlap
from ..files import UserError

logger = logging.get_logger(__name__)


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


def warn_of_overlap(parts: dict[str, TokenizedRows]) -> None:
    """Count the rows that are to be forgotten and kept at once."""
    overlap = count_overlap(parts["forget"], parts["retain"]) if "retain" in parts else 0
    if overlap:
        logger.warning(
            f"{overlap} of {len(parts['forget'])} forget rows are in the retain set too: they are trained to be "
            "forgotten and kept at once. Remove them from the retain set."
        )
