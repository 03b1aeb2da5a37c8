"""What the model generates for the prompts of rows to forget, by which their tokens are masked.

The ids are kept in the output folder, in a file for its owner's eyes alone: derived from forget data, they are never
published, and never written as text. A file is read again where model, rows and facts are the same. What was generated
by weights in training is in the run's checkpoints, so that a resumed run goes on with the same masks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..data.encoding import special_ids
from ..data.forget_masks import ForgetMasks
from ..data.rows import RowPairs, TokenizedRows
from ..files import Record, UserError
from ..inference.config import DiffusionGenerationConfig
from ..inference.generation import generate_ids
from ..models import weights_fingerprint
from .anchor_cache import fingerprint_of
from .checkpoints import CheckpointError

logger = logging.get_logger(__name__)

FOLDER = "rollouts"
IN_CHECKPOINT = "rollouts.json"
MOST_STEPS = 128  # denoising steps of a response


@dataclass(frozen=True)
class Rollout(Record):
    """The tokens that a model generated for each row of a data set.

    Attributes:
        fingerprint: of the model at the start, the rows, and all else that the tokens depend on.
        epoch: at whose start they were generated.
        tokens: of each row the different ids, in order.
    """

    kind: ClassVar[str] = "record of generated tokens"
    remedy: ClassVar[str] = "delete it, and the tokens are generated anew"
    indent: ClassVar[int | None] = None
    private: ClassVar[bool] = True

    fingerprint: str
    epoch: int
    tokens: list[list[int]]


def set_masks(trainer: Trainer, dataset: RowPairs, stage: str | None = None) -> None:
    """Say which tokens of the rows to forget are masked, where chance does not say it alone and it is not said yet.

    Args:
        trainer: whose model generates tokens, if these decide.
        dataset: a set in training or to evaluate on; one without rows to forget is left alone.
        stage: name of the file that keeps the tokens; without it nothing is kept.

    Raises:
        UserError: there is no room to generate.
    """
    args = trainer.args
    if dataset.masks is None and dataset is trainer.train_dataset:
        trainer.remove_callback(NewRollouts)  # of an earlier trial of a search
    by_chance = args.forget_masking == "random" and args.mask_special_tokens
    if by_chance or dataset.masks is not None or "forget" not in dataset.parts:
        return
    special = tuple(sorted(special_ids(trainer._tokenizer, trainer.backbone)))
    masks, rows = ForgetMasks(args.forget_masking, special), dataset.parts["forget"]
    if args.forget_masking == "generated":
        check_room(rows, trainer.backbone.context_length)
        rollout = _kept_or_new(trainer, rows, stage)
        masks = _masks_of(masks, rollout, rows)
        if dataset is trainer.train_dataset:
            trainer._rollout = rollout
            if args.rollout_every is not None:
                trainer.add_callback(NewRollouts(trainer))
    dataset.masks = masks


def check_room(rows: TokenizedRows, context_length: int | None) -> None:
    """Refuse rows after whose prompts the longest response does not fit into the model's context."""
    longest = _longest(rows)
    crowded = sum(len(prompt) + longest > (context_length or float("inf")) for prompt in rows.prompt_ids)
    if crowded:
        raise UserError(
            f"forget_masking='generated' decodes as many tokens as the longest response has, here {longest}, and "
            f"{crowded} of {len(rows)} prompts leave no room for them in the model's context of {context_length}. "
            "Lower max_length, which shortens responses, shorten the prompts, or take forget_masking='content'."
        )


class NewRollouts(TrainerCallback):
    """Lets the model in training generate anew every `rollout_every` epochs."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Renew the masks of the rows to forget, unless they are this epoch's already: it may have been resumed."""
        trainer, every = self.trainer, self.trainer.args.rollout_every
        epoch = int(state.epoch or 0) // every * every
        if epoch == trainer._rollout.epoch:
            return
        dataset = trainer.train_dataset
        tokens = _generated(trainer, trainer.model_wrapped, dataset.parts["forget"])
        trainer._rollout = Rollout(trainer._rollout.fingerprint, epoch, tokens)
        dataset.masks = _masks_of(dataset.masks, trainer._rollout, dataset.parts["forget"])


def save_rollout(trainer: Trainer, folder: str | Path) -> None:
    """Put the tokens in use into a checkpoint, if later weights generate anew."""
    if trainer.args.rollout_every is not None and trainer.args.should_save:
        trainer._rollout.save(Path(folder) / IN_CHECKPOINT)


def load_rollout(trainer: Trainer, folder: str | Path) -> None:
    """Go on with the tokens of a checkpoint, if later weights generate anew.

    Raises:
        CheckpointError: it has none, or those of another model or other rows.
    """
    if trainer.args.rollout_every is None:
        return
    path, dataset = Path(folder) / IN_CHECKPOINT, trainer.train_dataset
    known = Rollout.load(path) if path.is_file() else None
    if known is None or known.fingerprint != trainer._rollout.fingerprint:
        what = "has no tokens" if known is None else "has tokens of another model, or for other rows"
        raise CheckpointError(
            f"{folder} {what} ({IN_CHECKPOINT}), by which the masks of rollout_every are made. Resume from a "
            "checkpoint of this run written with save_only_model=False, or start anew."
        )
    trainer._rollout = known
    dataset.masks = _masks_of(dataset.masks, known, dataset.parts["forget"])


def _masks_of(masks: ForgetMasks, rollout: Rollout, rows: TokenizedRows) -> ForgetMasks:
    """The masks by these tokens, with a warning that counts the rows that have none of them."""
    masks = replace(masks, generated=tuple(map(tuple, rollout.tokens)))
    bare = masks.count_bare(rows.completion_ids)
    if bare:
        logger.warning(
            f"forget_masking='generated': of {len(rows)} rows to forget, {bare} have no token that the model "
            "generates for their prompt. All of their content is masked."
        )
    return masks


def _kept_or_new(trainer: Trainer, rows: TokenizedRows, stage: str | None) -> Rollout:
    """The tokens in the file, or new ones of the model as it is now."""
    precision = (trainer.args.bf16, trainer.args.fp16, MOST_STEPS)
    fingerprint = fingerprint_of(weights_fingerprint(trainer.model), rows, trainer.backbone, *precision)
    path = Path(trainer.args.output_dir) / FOLDER / f"{stage}.json"
    found: list[Rollout | None] = [None]
    if stage is not None and PartialState().is_main_process:
        found = [_read(path, fingerprint)]
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    trainer.distributed.place_whole(trainer.model, "forget_masking='generated'", "forget_masking='content'")
    rollout = Rollout(fingerprint, 0, _generated(trainer, trainer.model, rows))
    if stage is not None and trainer.args.should_save:
        rollout.save(path)
    return rollout


def _read(path: Path, fingerprint: str) -> Rollout | None:
    if not path.is_file():
        return None
    try:
        kept = Rollout.load(path)
    except UserError:
        kept = None
    if kept is not None and kept.fingerprint == fingerprint:
        return kept
    why = "cannot be read" if kept is None else "is of another model, data set or configuration"
    logger.warning(f"{path} {why}: its tokens are generated anew.")
    return None


def _generated(trainer: Trainer, model: Any, rows: TokenizedRows) -> list[list[int]]:
    """Decode greedily; every process decodes all rows, as sharded weights ask for, and takes the main one's tokens."""
    args, longest = trainer.args, _longest(rows)
    config = DiffusionGenerationConfig(longest, steps=min(longest, MOST_STEPS), batch_size=args.eval_batch_size)
    show = PartialState().is_main_process and not args.disable_tqdm
    with trainer.accelerator.autocast():
        responses = generate_ids(model, rows.prompt_ids, config, trainer.backbone, show_progress=show)
    tokens = [[sorted({*response}) for response in responses]]
    broadcast_object_list(tokens)
    return tokens[0]


def _longest(rows: TokenizedRows) -> int:
    return max(len(response) for response in rows.completion_ids)
