"""Configuration of the trainers: TrainingArguments plus what the diffusion and the unlearning need."""

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from .files import UserError
from .objectives import OBJECTIVES

logger = logging.get_logger(__name__)

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")

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
    "include_for_metrics": "the figures of an evaluation are computed here, from no more than they need",
    "batch_eval_metrics": "the figures of an evaluation are means over all of its rows",
    "eval_use_gather_object": "the figures of an evaluation are tensors",
    "enable_jit_checkpoint": "SIGTERM ends a run with a checkpoint without it, and both would write one",
    "parallelism_config": "weights and sequences are not split; use DDP, FSDP2 or DeepSpeed",
    "debug": "its hooks look into the head's output, which is empty here: the head is fused with the loss",
    "dataloader_in_order": "a run would not repeat, and not resume where it stopped",
}
# Those that do nothing here, and why; a warning says so.
IGNORED = {
    "average_tokens_across_devices": "every row weighs the same on all devices",
    "prediction_loss_only": "an evaluation always gives all of its figures",
    "label_names": "rows have responses, not labels",
    "length_column_name": "lengths are counted in tokens",
    "do_train": "call train()",
    "do_predict": "call predict()",
    "local_rank": "the launcher's environment says it",
}

FILES = ("fsdp_config", "deepspeed", "accelerator_config")  # may name one instead of being a dict

_INTEGERS = {  # the smallest that makes sense
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_NUMBERS = {  # the smallest that makes sense, and whether it is excluded
    "num_train_epochs": (0, True),
    "learning_rate": (0, True),
    "weight_decay": (0, False),
    "adam_beta1": (0, False),
    "adam_beta2": (0, False),
    "adam_epsilon": (0, True),
    "max_grad_norm": (0, False),
    "warmup_steps": (0, False),
    "logging_steps": (0, False),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "eval_delay": (0, False),
    "neftune_noise_alpha": (0, True),
    "ddp_timeout": (0, True),
    **dict.fromkeys(("t_min", "t_max", "time_epsilon", "prompt_mask_ratio"), (-math.inf, False)),
}


@dataclass
class MDLMConfig(TrainingArguments):
    r"""
    Configuration of [`MDLMTrainer`], which fine-tunes a masked diffusion language model.

    Only the parameters that [`~transformers.TrainingArguments`] does not have, or whose defaults or meaning differ,
    are listed. Those of its parameters that would do harm here are refused (`REFUSED` says why), and those that do
    nothing are named in a warning (`IGNORED`). Values that make no sense are refused before anything is loaded.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, for a model given by name.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a model given by name may run code of its repository. LLaDA and Dream need none.

        > Parameters that control resuming

        force_resume (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint although settings or data that change the weights are not those of its run.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `1024`):
            Longest row in tokens. Responses are truncated, prompts never. `None` is the model's context length.
        pad_with_end_tokens (`bool`, *optional*, defaults to `False`):
            Fill each batch with end tokens that count as response, instead of padding, as LLaDA's instruction tuning
            did. A model trained this way ends short answers inside a longer block of masks.
        train_sampling_strategy (`str`, *optional*, defaults to `"random"`):
            `"random"`, `"sequential"`, or `"group_by_length"` (batches of rows of like length).
        data_seed (`int`, *optional*):
            Seed of the order of the rows; `seed` if not set. Times and masks follow `seed` alone.
        dataloader_drop_last (`bool`, *optional*, defaults to `False`):
            Leave out the rows of an epoch that do not fill a batch. An evaluation leaves out none.

        > Parameters that control the choice of the best model

        metric_for_best_model (`str`, *optional*), greater_is_better (`bool`, *optional*):
            A figure of an evaluation; [`MDLMTrainer`] and [`MDUTrainer`] say how they are named. A name that stands
            for no figure, or for one that does not tell a good model, is refused with those that there are. Unless
            the figure is a loss, say whether more is better.

        > Parameters that control the forward process

        t_min (`float`, *optional*, defaults to `0.0`), t_max (`float`, *optional*, defaults to `1.0`):
            t is uniform on [max(t_min, time_epsilon), t_max]. `t_min = t_max = 1` masks the whole response.
        time_epsilon (`float`, *optional*, defaults to `1e-3`):
            Smallest t.
        time_weighting (`bool`, *optional*, defaults to `True`):
            Weight the cross-entropy by 1/t, the bound on -log p. `False` averages it over the masked tokens instead,
            which has less variance. Read by [`MDLMTrainer`] only.
        prompt_mask_ratio (`float`, *optional*, defaults to `0.0`):
            Share of rows whose prompt takes part in the diffusion too, so that the model knows what to predict when
            the prompt is masked. Read by [`MDLMTrainer`] only.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, for a model given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether a model given by name may run code of its repository."}
    )
    force_resume: bool = field(
        default=False, metadata={"help": "Resume although settings or data differ from those of the checkpoint."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest row in tokens; responses are truncated, prompts never."}
    )
    pad_with_end_tokens: bool = field(
        default=False, metadata={"help": "Fill batches with end tokens that count as response."}
    )
    t_min: float = field(default=0.0, metadata={"help": "t is uniform on [max(t_min, time_epsilon), t_max]."})
    t_max: float = field(default=1.0, metadata={"help": "Largest t; t_min = t_max = 1 masks the whole response."})
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest t."})
    time_weighting: bool = field(default=True, metadata={"help": "Weight the cross-entropy by 1/t (fine-tuning)."})
    prompt_mask_ratio: float = field(
        default=0.0, metadata={"help": "Share of rows whose prompt takes part in the diffusion too (fine-tuning)."}
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows are tokenised here."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Off: a step runs several forward passes before its backward pass."}
    )
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self):
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise UserError("output_dir is empty; name a folder for checkpoints and the model.")
        self._check_numbers(_INTEGERS, _NUMBERS)
        self._check_direction()
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise UserError(f"An option that is given as a JSON object cannot be read: {error}.") from None
        except (ValueError, TypeError) as error:  # what transformers refuses is the user's mistake as well
            raise UserError(str(error)) from None
        self._check_arguments()
        self.check_values()

    def _check_numbers(self, integers: dict[str, int], numbers: dict[str, tuple[float, bool]]) -> None:
        unset = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None}
        for name, smallest in integers.items():
            value = getattr(self, name)
            if name not in unset and not (_is(value, Integral) and value >= smallest):
                raise UserError(f"{name} must be a whole number and at least {smallest}, got {value}.")
        for name, (smallest, excluded) in numbers.items():
            value = getattr(self, name)
            fits = _is(value, Real) and math.isfinite(value) and (value > smallest if excluded else value >= smallest)
            if name not in unset and not fits:
                bound = f" and {'larger than' if excluded else 'at least'} {smallest}" if smallest == 0 else ""
                raise UserError(f"{name} must be {'finite' if bound else 'a number'}{bound}, got {value}.")
        if not (_is(self.max_steps, Integral) and (self.max_steps == -1 or self.max_steps > 0)):
            raise UserError(
                f"max_steps must be a whole number from 1, or -1 for num_train_epochs, got {self.max_steps}."
            )
        if max(self.adam_beta1, self.adam_beta2) >= 1:
            raise UserError(
                f"adam_beta1 and adam_beta2 must be smaller than 1, got {self.adam_beta1} and {self.adam_beta2}."
            )
        if self.seed >= 2**32:
            raise UserError(f"seed must be smaller than 2**32, got {self.seed}.")

    def _check_direction(self) -> None:
        """transformers takes the largest of whatever does not end in "loss", which may be the worst model."""
        metric = self.metric_for_best_model
        clear = metric is None or (metric.endswith("loss") and not metric.endswith("forget_retain_loss"))
        if self.greater_is_better is None and not clear:
            raise UserError(f"Is more or less of metric_for_best_model = '{metric}' better? Set greater_is_better.")

    def _check_arguments(self) -> None:
        """Refuse arguments of transformers that would do harm, and name those that do nothing."""
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(type(self))}
        changed = {name for name in defaults if (getattr(self, name) or None) != (defaults[name] or None)}
        for name in sorted(changed & set(REFUSED)):
            raise UserError(f"{name} = {getattr(self, name)} is not supported: {REFUSED[name]}. Leave {name} out.")
        for name in sorted(changed & set(IGNORED)):
            logger.warning_once(f"{name} = {getattr(self, name)} does nothing: {IGNORED[name]}.")
        if self.do_eval and self.eval_strategy == IntervalStrategy.NO:
            logger.warning_once("do_eval = True does nothing: set eval_strategy, or call evaluate().")
        if self.accelerator_config.split_batches:
            raise UserError(
                "accelerator_config: split_batches is not supported: per_device_train_batch_size is the rows of each "
                "device here. Leave split_batches out."
            )
        for name in self._VALID_DICT_FIELDS:
            if isinstance(getattr(self, name), str) and name not in FILES:
                raise UserError(f"{name} must be a dict or a JSON object, got {getattr(self, name)!r}.")
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(f"report_to '{name}' is unknown; choose of {', '.join(INTEGRATION_TO_CALLBACK)}.")
        for name, strategy, steps in (
            ("logging_steps", self.logging_strategy, IntervalStrategy.STEPS),
            ("save_steps", self.save_strategy, SaveStrategy.STEPS),
        ):
            if strategy == steps and getattr(self, name) == 0:
                raise UserError(f"{name} must be larger than 0, got 0. Or set {name[:-6]}_strategy to 'no'.")

    def check_values(self) -> None:
        """Refuse values that contradict each other, also after some were set anew (a search for hyperparameters).

        Raises:
            UserError: naming the parameter, its value and what it may be.
        """
        self._check_numbers(_INTEGERS, _NUMBERS)
        if not 0 < self.time_epsilon < 1:
            raise UserError(f"time_epsilon must lie between 0 and 1, got {self.time_epsilon}.")
        if not 0 <= self.t_min <= 1 or not 0 < self.t_max <= 1:
            raise UserError(f"t_min and t_max must lie in [0, 1], got t_min = {self.t_min}, t_max = {self.t_max}.")
        if self.t_min > self.t_max:
            raise UserError(f"t_min = {self.t_min} is larger than t_max = {self.t_max}; swap them.")
        if self.max_length is not None and not (_is(self.max_length, Integral) and self.max_length >= 2):
            raise UserError(f"max_length = {self.max_length} leaves no room for a prompt and a response.")
        if not 0 <= self.prompt_mask_ratio <= 1:
            raise UserError(f"prompt_mask_ratio is a share in [0, 1], got {self.prompt_mask_ratio}.")
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise UserError(
                f"train_sampling_strategy '{self.train_sampling_strategy}' is not supported; use one of "
                f"{', '.join(SAMPLING_STRATEGIES)}."
            )


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass
class MDUConfig(MDLMConfig):
    r"""
    Configuration of [`MDUTrainer`], which makes a masked diffusion language model forget.

        L = L_forget + retain_weight * L_retain

    Only the parameters that [`MDLMConfig`] does not have, or whose defaults differ, are listed. The defaults of
    learning rate and batch size are those of the MDU paper (arXiv 2605.18253).

    Parameters:
        > Parameters that control the forget loss

        loss_type (`str`, *optional*, defaults to `"mdu"`):
            `"mdu"`, `"ga"`, `"npo"`, `"simnpo"`, `"wga"` or `"dpo"`; see `mdu_trainer.objectives`. `"ga"` with a
            retain set is the papers' GD.
        tau (`float`, *optional*, defaults to `0.0`):
            MDU: multiplies the anchor's logits. 0 is the uniform distribution, 1 the prompt-masked prediction.
        kl_reduction (`str`, *optional*, defaults to `"sequence"`):
            MDU: `"sequence"` averages over the masked tokens of each row, then over rows (the paper's equation).
            `"token"` averages over the masked tokens of all rows of an update.
        anchor_source (`str`, *optional*, defaults to `"initial"`):
            MDU: whose prompt-masked prediction is the anchor. `"initial"` is the model at the start; `"current"` is
            the model in training, without gradient.
        precompute_anchor (`bool`, *optional*, defaults to `False`):
            MDU at tau > 0: compute all anchors before training, into `anchor_cache` in the output folder, and keep no
            copy of the model. A resumed run reads what is there. The file is derived from forget data and is not for
            sharing.
        beta (`float`, *optional*):
            Inverse temperature of NPO (0.2 if not set), SimNPO (2.5) and DPO (0.1).
        gamma (`float`, *optional*, defaults to `0.0`):
            Margin of SimNPO.
        alpha (`float`, *optional*, defaults to `1.0`):
            Exponent of WGA's weights.
        loss_options (`dict`, *optional*):
            Options of an objective of your own; see `mdu_trainer.objectives.register_objective`.

        > Parameters that control the retain loss

        retain_loss_type (`str`, *optional*, defaults to `"nelbo"`):
            `"nelbo"` is the masked-diffusion bound a token; `"kl"` the divergence from the model at the start.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            lambda. 0 to unlearn without a retain set.

        > Parameters that control the copy of the model at the start (losses that need one, models without adapters)

        reference_precision (`str`, *optional*, defaults to `"full"`):
            `"full"`, or `"8bit"` for the linear layers but the head (needs bitsandbytes).
        reference_device (`str`, *optional*):
            Where the copy is kept and run, e.g. `"cpu"`. The model's device if not set.

        > Parameters that control the model card

        forget_description (`str`, *optional*):
            One line on what is to be forgotten, in your own words. It is published: name nobody, quote nothing. If
            not set, the card names the data set's split.
    """

    loss_type: str = field(default="mdu", metadata={"help": "Forget loss.", "choices": OBJECTIVES.keys()})
    tau: float = field(default=0.0, metadata={"help": "MDU: multiplies the anchor's logits."})
    kl_reduction: str = field(
        default="sequence",
        metadata={"help": "MDU: average the KL over each row, or over all tokens.", "choices": ["sequence", "token"]},
    )
    anchor_source: str = field(
        default="initial",
        metadata={"help": "MDU: the anchor is the model's at the start, or now.", "choices": ["initial", "current"]},
    )
    precompute_anchor: bool = field(
        default=False, metadata={"help": "MDU: compute all anchors before training and keep no copy of the model."}
    )
    beta: float | None = field(default=None, metadata={"help": "Inverse temperature of NPO, SimNPO and DPO."})
    gamma: float = field(default=0.0, metadata={"help": "Margin of SimNPO."})
    alpha: float = field(default=1.0, metadata={"help": "Exponent of WGA's weights."})
    loss_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of an objective of your own, as JSON."}
    )
    retain_loss_type: str = field(default="nelbo", metadata={"help": "Retain loss.", "choices": ["nelbo", "kl"]})
    retain_weight: float = field(default=1.0, metadata={"help": "lambda; 0 to unlearn without a retain set."})

    reference_precision: str = field(
        default="full", metadata={"help": "Precision of the copy at the start.", "choices": ["full", "8bit"]}
    )
    reference_device: str | None = field(
        default=None, metadata={"help": "Where the copy at the start is kept, e.g. cpu; the model's device if unset."}
    )
    forget_description: str | None = field(
        default=None, metadata={"help": "One line for the model card on what is to be forgotten; it is published."}
    )

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Forget rows, and as many retain rows, per device and micro-batch."}
    )
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-batches an update."})
    _VALID_DICT_FIELDS = [*MDLMConfig._VALID_DICT_FIELDS, "loss_options"]

    def check_values(self) -> None:
        """As in `MDLMConfig`, and the options of the losses."""
        super().check_values()
        for name in ("loss_type", "kl_reduction", "anchor_source", "retain_loss_type", "reference_precision"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise UserError(f"{name} '{getattr(self, name)}' is unknown; choose one of {', '.join(choices)}.")
        self._check_numbers({}, {name: (0, False) for name in ("tau", "retain_weight")} | {"beta": (0, True)})
        for name in ("gamma", "alpha"):
            if not (_is(getattr(self, name), Real) and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be finite, got {getattr(self, name)}.")
        unknown = set(self.loss_options or ()) - set(OBJECTIVES[self.loss_type].options)
        if unknown:
            raise UserError(
                f"loss_options: '{self.loss_type}' has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(OBJECTIVES[self.loss_type].options) or 'none'}."
            )
        if self.reference_device is not None:
            try:
                torch.device(self.reference_device)
            except RuntimeError:
                raise UserError(
                    f"reference_device '{self.reference_device}' is no device; name one like 'cpu' or 'cuda:0'."
                ) from None
        if self.precompute_anchor:
            self._check_precompute_anchor()
        if self.pad_with_end_tokens or self.prompt_mask_ratio or not self.time_weighting:
            raise UserError(
                "pad_with_end_tokens, prompt_mask_ratio and time_weighting=False are options of fine-tuning "
                "(MDLMConfig); unlearning does not read them."
            )

    def _check_precompute_anchor(self) -> None:
        if self.loss_type != "mdu" or self.tau == 0 or self.anchor_source == "current":
            raise UserError(
                "precompute_anchor is for loss_type='mdu' at tau > 0 with anchor_source='initial'; here no anchor is "
                "read that could be computed before training. Leave it out."
            )
        if self.retain_weight and self.retain_loss_type == "kl":
            raise UserError(
                "retain_loss_type='kl' asks the model at the start in every step, so precompute_anchor would not free "
                "its copy. Use retain_loss_type='nelbo', or leave precompute_anchor out."
            )
        if self.reference_precision != "full" or self.reference_device is not None:
            raise UserError(
                "reference_precision and reference_device are of a copy that precompute_anchor does without. Leave "
                "them out."
            )
