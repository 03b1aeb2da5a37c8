"""The arguments of transformers: which are refused, which do nothing here, and which values make sense."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..files import UserError
from .trackers import check_trackers

logger = logging.get_logger(__name__)

# Arguments of transformers that would do harm here, and what to do instead. All others but those below are honoured.
REFUSED = {
    "label_smoothing_factor": "the losses are divergences and bounds, which have no labels to smooth",
    "remove_unused_columns": "rows are tokenised when the trainer is made, and nothing would be left of them",
    "auto_find_batch_size": (
        "after an out-of-memory error it would start anew on weights that updates have changed already, with fewer "
        "rows an update. Lower per_device_train_batch_size and raise gradient_accumulation_steps in its place"
    ),
    "bf16_full_eval": "the first evaluation would round the weights in training for good. Use bf16",
    "fp16_full_eval": "the first evaluation would round the weights in training for good. Use fp16",
    "use_liger_kernel": "it is for causal models; the head is fused with the loss here anyway",
    "liger_kernel_config": "it is for causal models; the head is fused with the loss here anyway",
    "use_cache": "a model that attends in both directions has nothing to cache",
    "include_for_metrics": "the scores of an evaluation are computed here, from no more than they need",
    "batch_eval_metrics": "the scores of an evaluation are means over all of its rows",
    "eval_use_gather_object": "the scores of an evaluation are tensors",
    "enable_jit_checkpoint": "SIGTERM ends a run with a checkpoint without it, and both would write one",
    "parallelism_config": "weights and sequences are not split; use DDP, FSDP2 or DeepSpeed",
    "debug": "its hooks look into the head's output, which is empty here: the head is fused with the loss",
    "dataloader_in_order": "a run would not repeat, and not resume where it stopped",
}
# Those that do nothing here, and why; a warning says so.
IGNORED = {
    "average_tokens_across_devices": "every row weighs the same on all devices",
    "prediction_loss_only": "an evaluation always gives all of its scores",
    "label_names": "rows have responses, not labels",
    "length_column_name": "lengths are counted in tokens",
    "do_train": "call train()",
    "do_predict": "call predict()",
    "local_rank": "the launcher's environment says it",
}

FILES = ("fsdp_config", "deepspeed", "accelerator_config")  # may name one instead of being a dict

POSITIVE, NOT_NEGATIVE = "finite and larger than 0", "finite and at least 0"
NUMBERS = {
    **dict.fromkeys("num_train_epochs learning_rate adam_epsilon neftune_noise_alpha ddp_timeout".split(), POSITIVE),
    **dict.fromkeys("weight_decay adam_beta1 adam_beta2 max_grad_norm warmup_steps".split(), NOT_NEGATIVE),
    **dict.fromkeys("logging_steps save_steps eval_steps eval_delay".split(), NOT_NEGATIVE),
}
WHOLE_NUMBERS = {  # the smallest that makes sense
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}


def is_whole(value: Any, smallest: int) -> bool:
    """Whether a value is a whole number, and not too small."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= smallest


def check_numbers(config: TrainingArguments, bounds: Mapping[str, str]) -> None:
    """Refuse values that are no finite numbers, or out of bounds. Options that are None by default may be None.

    Args:
        config: the configuration.
        bounds: option -> what it must be: `POSITIVE`, `NOT_NEGATIVE`, or other words for any finite number.
    """
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is None and type(config).__dataclass_fields__[name].default is None:
            continue
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or (bound == POSITIVE and value <= 0) or (bound == NOT_NEGATIVE and value < 0):
            raise UserError(f"{name} must be {bound}, got {value}.")


def check_training(config: TrainingArguments) -> None:
    """Refuse numbers of transformers' arguments that make no sense."""
    for name, smallest in WHOLE_NUMBERS.items():
        value = getattr(config, name)
        unset = value is None and type(config).__dataclass_fields__[name].default is None
        if not unset and not is_whole(value, smallest):
            raise UserError(f"{name} must be a whole number and at least {smallest}, got {value}.")
    check_numbers(config, NUMBERS)
    if not is_whole(config.max_steps, -1) or config.max_steps == 0:
        raise UserError(
            f"max_steps must be a whole number from 1, or -1 for num_train_epochs, got {config.max_steps}."
        )
    if max(config.adam_beta1, config.adam_beta2) >= 1:
        raise UserError(
            f"adam_beta1 and adam_beta2 must be smaller than 1, got {config.adam_beta1} and {config.adam_beta2}."
        )
    if config.seed >= 2**32:
        raise UserError(f"seed must be smaller than 2**32, got {config.seed}.")


def check_direction(config: TrainingArguments) -> None:
    """Refuse a metric without a direction: transformers takes the largest, unless the name ends in "loss"."""
    metric = config.metric_for_best_model
    clear = metric is None or (metric.endswith("loss") and not metric.endswith("forget_retain_loss"))
    if config.greater_is_better is None and not clear:
        raise UserError(f"Is more or less of metric_for_best_model = '{metric}' better? Set greater_is_better.")


def check_arguments(config: TrainingArguments) -> None:
    """Refuse arguments of transformers that would do harm, and name those that do nothing."""
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(config)}
    changed = {name for name in defaults if (getattr(config, name) or None) != (defaults[name] or None)}
    for name in sorted(changed & set(REFUSED)):
        raise UserError(f"{name} = {getattr(config, name)} is not supported: {REFUSED[name]}. Leave {name} out.")
    for name in sorted(changed & set(IGNORED)):
        logger.warning_once(f"{name} = {getattr(config, name)} does nothing: {IGNORED[name]}.")
    if config.do_eval and config.eval_strategy == IntervalStrategy.NO:
        logger.warning_once("do_eval = True does nothing: set eval_strategy, or call evaluate().")
    if getattr(config.accelerator_config, "split_batches", False):
        raise UserError(
            "accelerator_config: split_batches is not supported: per_device_train_batch_size is the rows of each "
            "device here. Leave split_batches out."
        )
    for name in config._VALID_DICT_FIELDS:
        if isinstance(getattr(config, name), str) and name not in FILES:
            raise UserError(f"{name} must be a dict or a JSON object, got {getattr(config, name)!r}.")
    for name in config.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"report_to '{name}' is unknown; choose of {', '.join(INTEGRATION_TO_CALLBACK)}.")
    check_trackers(config, config.report_to or ())
    for name, strategy, steps in (
        ("logging_steps", config.logging_strategy, IntervalStrategy.STEPS),
        ("save_steps", config.save_strategy, SaveStrategy.STEPS),
    ):
        if strategy == steps and getattr(config, name) == 0:
            raise UserError(f"{name} must be larger than 0, got 0. Or set {name[:-6]}_strategy to 'no'.")
