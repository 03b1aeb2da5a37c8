"""The rows of a training side by side, and what chunks of plain text do not go with."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import DiffusionConfig, MDLMConfig, MDUConfig
from ..data.reading import check_table
from ..data.rows import RowPairs, TokenizedRows, in_order, shuffled
from ..data.sampling import length_grouped
from ..data.secrets import refuse_texts
from ..data.texts import of_text
from ..files import UserError
from ..models import Backbone
from ..objectives import OBJECTIVES
from .evaluating import schedules


def make_pairs(parts: dict[str, TokenizedRows], args: DiffusionConfig, backbone: Backbone) -> RowPairs:
    """Put the sets of a training side by side, in the order and with the masks that the configuration says.

    Raises:
        UserError: chunks of text were cut for another loss or tau.
    """
    _check_prompts_of_chunks(parts, args)
    rows, counts = args.train_batch_size * args.world_size, args.rows_a_counter
    by_length = {name: length_grouped(rows * counts.get(name, 1)) for name in parts}
    orders = {"random": shuffled, "sequential": in_order, "group_by_length": by_length}
    seed = args.seed if args.data_seed is None else args.data_seed
    masks = schedules(args, parts, block_size=backbone.block_size)
    return RowPairs(parts, seed, orders[args.train_sampling_strategy], masks, counts)


def prompt_share(args: DiffusionConfig) -> float:
    """The share of a chunk of text to forget that is its prompt: none where no anchor is predicted without it."""
    anchored = isinstance(args, MDUConfig) and OBJECTIVES[args.loss_type].anchor and args.tau > 0
    return args.prefix_share if anchored else 0.0


def check_chunks(rows: TokenizedRows, name: str, parts: Sequence[str], args: DiffusionConfig) -> TokenizedRows:
    """Return the rows of a set, unless they are chunks of text that an option does not go with.

    Args:
        rows: of the set.
        name: what messages call it.
        parts: "forget", "retain" or both: what it is read for.
        args: the configuration.

    Raises:
        UserError: naming the option.
    """
    if rows.prompt_share is None:
        return rows
    if isinstance(args, MDLMConfig) and args.pad_with_end_tokens:
        raise UserError(
            f"pad_with_end_tokens teaches where a response ends, and the {name} set has texts, whose chunks end "
            "anywhere. Leave it out."
        )
    generated = isinstance(args, MDUConfig) and args.forget_masking == "generated"
    if generated and "forget" in parts and not rows.prompt_share:
        raise UserError(
            f"forget_masking='generated' masks what the model generates for a prompt, and at this loss and tau the "
            f"texts of the {name} set have none. Take forget_masking='content', or tau above 0."
        )
    return rows


def check_texts(forget: Any, args: MDUConfig) -> None:
    """Refuse texts to forget that an option does not go with, before a model is loaded.

    Args:
        forget: the rows to forget, texts or not.
        args: the configuration.
    """
    if of_text(forget):
        check_table(forget, "forget", OBJECTIVES[args.loss_type].preferred)
        if args.counterfactual:
            refuse_texts(forget, "forget")
        check_chunks(TokenizedRows([], [], prompt_share=prompt_share(args)), "forget", ["forget"], args)


def _check_prompts_of_chunks(parts: Mapping[str, TokenizedRows], args: DiffusionConfig) -> None:
    cut = parts["forget"].prompt_share if "forget" in parts else None
    if cut is not None and cut != prompt_share(args):
        raise UserError(
            "Whether a chunk of text has a prompt depends on loss_type and tau, and was decided when the rows were "
            "prepared: make a trainer for each."
        )
