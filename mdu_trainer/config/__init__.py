"""Configuration of the trainers: TrainingArguments plus what the diffusion and the unlearning need."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import TrainingArguments

from ..files import UserError
from ..objectives import OBJECTIVES
from .arguments import (
    NOT_NEGATIVE,
    POSITIVE,
    check_arguments,
    check_direction,
    check_numbers,
    check_training,
    is_whole,
)

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")


@dataclass
class DiffusionConfig(TrainingArguments):
    r"""
    The options that fine-tuning ([`MDLMConfig`]) and unlearning ([`MDUConfig`]) share.

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
        train_sampling_strategy (`str`, *optional*, defaults to `"random"`):
            `"random"`, `"sequential"`, or `"group_by_length"` (batches of rows of like length).
        data_seed (`int`, *optional*):
            Seed of the order of the rows; `seed` if not set. Times and masks follow `seed` alone.
        dataloader_drop_last (`bool`, *optional*, defaults to `False`):
            Leave out the rows of an epoch that do not fill a batch. An evaluation leaves out none.

        > Parameters that control the choice of the best model

        metric_for_best_model (`str`, *optional*), greater_is_better (`bool`, *optional*):
            A score of an evaluation; [`MDLMTrainer`] and [`MDUTrainer`] say how they are named. A name that stands
            for no score, or for one that does not tell a good model, is refused with those that there are. Unless
            the score is a loss, say whether more is better.

        > Parameters that control the forward process

        t_min (`float`, *optional*, defaults to `0.0`), t_max (`float`, *optional*, defaults to `1.0`):
            t is uniform on [max(t_min, time_epsilon), t_max]. `t_min = t_max = 1` masks the whole response.
        time_epsilon (`float`, *optional*, defaults to `1e-3`):
            Smallest t.
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
    t_min: float = field(default=0.0, metadata={"help": "t is uniform on [max(t_min, time_epsilon), t_max]."})
    t_max: float = field(default=1.0, metadata={"help": "Largest t; t_min = t_max = 1 masks the whole response."})
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest t."})

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows are tokenised here."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Off: a step runs several forward passes before its backward pass."}
    )
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self):
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise UserError("output_dir is empty; name a folder for checkpoints and the model.")
        check_training(self)
        check_direction(self)
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise UserError(f"An option that is given as a JSON object cannot be read: {error}.") from None
        except (ValueError, TypeError) as error:  # what transformers refuses is the user's mistake as well
            raise UserError(str(error)) from None
        check_arguments(self)
        self.check_values()

    def check_values(self) -> None:
        """Refuse values that contradict each other, also after some were set anew (a search for hyperparameters).

        Raises:
            UserError: naming the parameter, its value and what it may be.
        """
        check_training(self)
        check_numbers(self, dict.fromkeys(("t_min", "t_max", "time_epsilon"), "a number"))
        if not 0 < self.time_epsilon < 1:
            raise UserError(f"time_epsilon must lie between 0 and 1, got {self.time_epsilon}.")
        if not 0 <= self.t_min <= 1 or not 0 < self.t_max <= 1:
            raise UserError(f"t_min and t_max must lie in [0, 1], got t_min = {self.t_min}, t_max = {self.t_max}.")
        if self.t_min > self.t_max:
            raise UserError(f"t_min = {self.t_min} is larger than t_max = {self.t_max}; swap them.")
        if self.max_length is not None and not is_whole(self.max_length, 2):
            raise UserError(f"max_length = {self.max_length} leaves no room for a prompt and a response.")
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise UserError(
                f"train_sampling_strategy '{self.train_sampling_strategy}' is not supported; use one of "
                f"{', '.join(SAMPLING_STRATEGIES)}."
            )

    @property
    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `load_model`."""
        return {"trust_remote_code": self.trust_remote_code} | cast(dict, self.model_init_kwargs or {})

    @property
    def mask_options(self) -> dict[str, float]:
        """The options of `masking.MaskSchedule`."""
        return {name: getattr(self, name) for name in ("t_min", "t_max", "time_epsilon")}


@dataclass
class MDLMConfig(DiffusionConfig):
    r"""
    Configuration of [`MDLMTrainer`], which fine-tunes a masked diffusion language model.

    Only the parameters that [`DiffusionConfig`] does not have are listed.

    Parameters:
        pad_with_end_tokens (`bool`, *optional*, defaults to `False`):
            Fill each batch with end tokens that count as response, instead of padding, as LLaDA's instruction tuning
            did. A model trained this way ends short answers inside a longer block of masks.
        time_weighting (`bool`, *optional*, defaults to `True`):
            Weight the cross-entropy by 1/t, the bound on -log p. `False` averages it over the masked tokens instead,
            which has less variance.
        prompt_mask_ratio (`float`, *optional*, defaults to `0.0`):
            Share of rows whose prompt takes part in the diffusion too, so that the model knows what to predict when
            the prompt is masked.
    """

    pad_with_end_tokens: bool = field(
        default=False, metadata={"help": "Fill batches with end tokens that count as response."}
    )
    time_weighting: bool = field(default=True, metadata={"help": "Weight the cross-entropy by 1/t."})
    prompt_mask_ratio: float = field(
        default=0.0, metadata={"help": "Share of rows whose prompt takes part in the diffusion too."}
    )

    def check_values(self) -> None:
        """As in `DiffusionConfig`, and the options of fine-tuning."""
        super().check_values()
        check_numbers(self, {"prompt_mask_ratio": "a number"})
        if not 0 <= self.prompt_mask_ratio <= 1:
            raise UserError(f"prompt_mask_ratio is a share in [0, 1], got {self.prompt_mask_ratio}.")

    @property
    def mask_options(self) -> dict[str, float]:
        """The options of `masking.MaskSchedule`."""
        return super().mask_options | {"prompt_mask_ratio": self.prompt_mask_ratio}


@dataclass
class MDUConfig(DiffusionConfig):
    r"""
    Configuration of [`MDUTrainer`], which makes a masked diffusion language model forget.

        L = L_forget + retain_weight * L_retain

    Only the parameters that [`DiffusionConfig`] does not have, or whose defaults differ, are listed. The defaults of
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
    _VALID_DICT_FIELDS = [*DiffusionConfig._VALID_DICT_FIELDS, "loss_options"]

    def check_values(self) -> None:
        """As in `DiffusionConfig`, and the options of the losses."""
        super().check_values()
        for name in ("loss_type", "kl_reduction", "anchor_source", "retain_loss_type", "reference_precision"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise UserError(f"{name} '{getattr(self, name)}' is unknown; choose one of {', '.join(choices)}.")
        check_numbers(self, {"tau": NOT_NEGATIVE, "retain_weight": NOT_NEGATIVE, "beta": POSITIVE})
        check_numbers(self, {"gamma": "finite", "alpha": "finite"})
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
