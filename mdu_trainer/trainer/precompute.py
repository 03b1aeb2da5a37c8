"""Compute all anchors of a run before it trains, so that no copy of the model is kept."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import Trainer

from ..data.rows import RowPairs
from ..divergence import Projection
from ..masking import forward_process
from ..models import weights_fingerprint
from .anchor_cache import FOLDER, AnchorBatch, AnchorCache, fingerprint_of
from .anchors import anchor_inputs
from .reference import head_of, trained_head


def compute_before_training(trainer: Trainer) -> None:
    """Compute all anchors of the run, if that is asked for and not done, and let go of the model they come from."""
    if not trainer.args.precompute_anchor or trainer._anchor_head is not None:
        return
    trainer._anchor_head = precompute_anchors(trainer)
    if trainer.args.anchor_checkpoint is not None or not isinstance(trainer.model, PeftModel):
        trainer.anchor = trainer.reference = None  # from now on the live model is not theta_0


def precompute_anchors(trainer: Trainer) -> Projection:
    """Put the anchors of all training steps, and of the eval sets given to the constructor, into their sets.

    Returns:
        theta_0's head, if it is trained, or that of another checkpoint; else a `Projection` without weights, which
        stands for the live one.
    """
    other = trainer.anchor.frozen  # None: theta_0 is the live model
    if other is None:
        trainer.distributed.place_whole(trainer.model)
        head = trained_head(trainer.model, trainer.args.device)
    else:
        head = head_of(other, trainer.args.device)
    size, weights = trainer.args.eval_batch_size, weights_fingerprint(trainer.model if other is None else other)
    sets = {} if trainer.train_dataset is None else {"train": (trainer.train_dataset, train_batches(trainer))}
    for stage, dataset in trainer._eval_sets.items():
        if "forget" in dataset.parts:  # others have no anchor
            sets[stage] = dataset, [range(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)]
    for stage, (dataset, batches) in sets.items():
        facts = (trainer.backbone, trainer.args.bf16, trainer.args.fp16, batches, vars(dataset.schedules["forget"]))
        facts += (dataset.masks, trainer.args.anchor_input)
        dataset.anchors = AnchorCache(
            Path(trainer.args.output_dir) / FOLDER / stage,
            fingerprint=fingerprint_of(weights, dataset.parts["forget"], *facts),
            batches=partial(_anchor_batches, trainer, dataset, batches),
        )
    return head or Projection(None)


def train_batches(trainer: Trainer) -> list[range]:
    """The counters of each micro-batch that training reads, those of the processes in turn."""
    args, size, batch_size = trainer.args, len(trainer.train_dataset), trainer.args.train_batch_size
    rows = batch_size * args.world_size
    rounds = size // rows if args.dataloader_drop_last else math.ceil(size / rows)  # of micro-batches, an epoch
    updates = math.ceil(rounds / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    batches = []
    for epoch in range(math.ceil(steps / updates)):
        left = (steps - epoch * updates) * args.gradient_accumulation_steps * rows
        start, stop = epoch * size, epoch * size + min(size, rounds * rows, left)
        batches += [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
    return batches


def _anchor_batches(trainer: Trainer, dataset: RowPairs, batches: list[range]) -> Iterator[AnchorBatch]:
    for counters in batches:
        features = [dataset[counter] for counter in counters]
        inputs = trainer._prepare_inputs(trainer.data_collator(features))
        noised = forward_process(inputs["forget"], trainer.backbone.mask_token_id)
        where = anchor_inputs(trainer, inputs["forget"], noised)
        predict = partial(trainer.anchor.projection, trainer.model, **where)
        keys = [(one["forget"]["visit"], one["forget"]["row"]) for one in features]
        yield AnchorBatch(keys, noised.num_masked.tolist(), predict)
