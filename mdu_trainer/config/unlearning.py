"""Configuration of unlearning."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.utils import logging

from ..files import UserError
from ..objectives import OBJECTIVES
from .arguments import NOT_NEGATIVE, POSITIVE, check_numbers, is_whole
from .diffusion import DiffusionConfig
from .presets import PRESETS, applied

logger = logging.get_logger(__name__)

OWN_ANCHORS = ("initial", "current", "ema")  # values of anchor_source; all others name a checkpoint


@dataclass
class MDUConfig(DiffusionConfig):
    r"""
    Configuration of [`MDUTrainer`], which makes a masked diffusion language model forget.

        L = L_forget + retain_weight * L_retain

    Only the parameters that [`DiffusionConfig`] does not have, or whose defaults differ, are listed. The defaults of
    learning rate and batch size are those of the MDU paper (arXiv 2605.18253).

    Parameters:
        preset (`str`, *optional*):
            Settings under one name, for those that are not given themselves; what it sets is logged, and what of it
            would mean nothing beside those given is left out. `"lasting"` draws the model towards one that never saw
            the rows; see `mdu_trainer.config.presets`.

        > Parameters that control the forget loss

        loss_type (`str`, *optional*, defaults to `"mdu"`):
            `"mdu"`, `"ga"`, `"bounded_ga"`, `"npo"`, `"simnpo"`, `"wga"` or `"dpo"`; see `mdu_trainer.objectives`.
            `"ga"` with a retain set is the papers' GD.
        tau (`float`, *optional*, defaults to `0.0`):
            MDU: multiplies the anchor's logits. 0 is the uniform distribution, 1 the prompt-masked prediction.
        kl_reduction (`str`, *optional*, defaults to `"sequence"`):
            MDU: `"sequence"` averages over the masked tokens of each row, then over rows (the paper's equation).
            `"token"` averages over the masked tokens of all rows of an update.
        anchor_source (`str`, *optional*, defaults to `"initial"`):
            MDU at tau > 0: whose prediction is the anchor, without gradient. `"initial"` is the model at the start;
            `"current"` is the model in training; `"ema"` is the moving average of its weights, which takes one more
            copy. Anything else is the name or path of a checkpoint, such as that from before fine-tuning, loaded once.
        anchor_ema_decay (`float`, *optional*, defaults to `0.999`):
            Moving average: what is kept of it in an update.
        anchor_input (`str`, *optional*, defaults to `"masked_prompt"`):
            MDU at tau > 0: what the anchor is predicted from. `"masked_prompt"` (the paper's) masks the whole prompt.
            `"hidden_prompt"` takes it out of attention, and leaves all tokens where they stand. `"prompt"` shows it;
            for another checkpoint alone, as the model's own prediction would have it learn nothing.
            `"counterfactual"` keeps the question and masks who it is about: the words that the answer repeats and
            names in the prompt, these and the stored words in the answer; and the true tokens of stored words are
            struck out. So the anchor is what the model would say had it never met the person. Stored words are found
            by a rule (`mdu_trainer.data.roles`), the trainer's `labeller`, or the column `secret_spans`.
        prefix_share (`float`, *optional*, defaults to `0.25`):
            MDU at tau > 0, rows to forget of `text` alone: share of a chunk that is its prompt. At tau = 0, and in
            other losses, a chunk has no prompt, and all of it takes part in the diffusion.
        strike_quantile (`float`, *optional*, defaults to `0.5`):
            Counterfactual anchor: a true token that is struck out gets the logit that this share of the vocabulary
            lies below. `None` strikes nothing out.
        kl_direction (`str`, *optional*, defaults to `"reverse"`):
            MDU: `"reverse"` is KL(model || anchor) (the paper's), `"forward"` KL(anchor || model), `"js"` the
            Jensen-Shannon divergence of the two, which is at most log 2.
        precompute_anchor (`bool`, *optional*, defaults to `False`):
            MDU at tau > 0: compute all anchors before training, into `anchor_cache` in the output folder, and keep no
            copy of the model. A resumed run reads what is there. The file is derived from forget data and is not for
            sharing.
        forget_masking (`str`, *optional*, defaults to `"random"`):
            Which tokens of a response to forget are masked. `"random"` masks each with probability t. `"content"`
            masks all but special tokens (the end of a turn), which stay visible and out of the loss. `"generated"`
            masks those of them that occur among the tokens that the model itself generates for the prompt: greedily,
            as many as the longest response has, in at most 128 steps. A row without such a token is masked as by
            `"content"`. Where t is not drawn it is the masked share, so the weight 1/t of a row in GA, NPO, SimNPO,
            WGA and DPO is the tokens that may be masked over those that are. Rows to keep are masked at random.
        mask_special_tokens (`bool`, *optional*, defaults to `True`):
            Random masks of rows to forget: whether special tokens are masked, too. Others never mask them.
        rollout_every (`int`, *optional*):
            Generated masks: epochs after which the model in training generates anew. Once, at the start, if not set:
            of rows that it knows by heart it then generates all content.
        beta (`float`, *optional*):
            Inverse temperature of NPO (0.2 if not set), SimNPO (2.5) and DPO (0.1).
        gamma (`float`, *optional*, defaults to `0.0`):
            Margin of SimNPO.
        alpha (`float`, *optional*, defaults to `1.0`):
            Exponent of WGA's weights.
        loss_options (`dict`, *optional*):
            `cap` of `"bounded_ga"` (10 nats), or options of your own: `mdu_trainer.objectives.register_objective`.

        > Parameters that control the retain loss

        retain_loss_type (`str`, *optional*, defaults to `"nelbo"`):
            `"nelbo"` is the masked-diffusion bound a token; `"kl"` the divergence from the model at the start.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            lambda. 0 to unlearn without a retain set.
        retain_batch_size (`int`, *optional*):
            Retain rows per device and micro-batch, a multiple of `per_device_train_batch_size`: each forget row comes
            with equally many of them. As many as forget rows if not set.

        > Parameters that control rewinding, before training: theta <- theta_pre + (1 - a) (theta - theta_pre)

        rewind_to (`str`, *optional*):
            theta_pre, the checkpoint from before fine-tuning: a folder or Hub id. Of a LoRA adapter it is the base,
            and the adapter is scaled by 1 - a. The anchor stays that of the model as it was given.
        rewind_share (`float`, *optional*):
            a, the share of the way back: above 0 and at most 1. Needed with `rewind_to`.

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

    preset: str | None = field(
        default=None, metadata={"help": "Settings under one name, for those not given.", "choices": [None, *PRESETS]}
    )
    loss_type: str = field(default="mdu", metadata={"help": "Forget loss.", "choices": OBJECTIVES.keys()})
    tau: float = field(default=0.0, metadata={"help": "MDU: multiplies the anchor's logits."})
    kl_reduction: str = field(
        default="sequence",
        metadata={"help": "MDU: average the KL over each row, or over all tokens.", "choices": ["sequence", "token"]},
    )
    anchor_source: str = field(
        default="initial",
        metadata={
            "help": "MDU: whose prediction is the anchor: initial, current, ema, or a checkpoint's name or path."
        },
    )
    anchor_ema_decay: float = field(
        default=0.999, metadata={"help": "MDU: what an update keeps of the average that is the anchor's source."}
    )
    anchor_input: str = field(
        default="masked_prompt",
        metadata={
            "help": "MDU: what the anchor is predicted from.",
            "choices": ["masked_prompt", "hidden_prompt", "prompt", "counterfactual"],
        },
    )
    prefix_share: float = field(
        default=0.25, metadata={"help": "MDU at tau > 0, rows of text: share of a chunk that is its prompt."}
    )
    strike_quantile: float | None = field(
        default=0.5, metadata={"help": "Counterfactual anchor: where in the vocabulary a struck token lies."}
    )
    kl_direction: str = field(
        default="reverse",
        metadata={
            "help": "MDU: KL(model || anchor), KL(anchor || model), or the Jensen-Shannon divergence.",
            "choices": ["reverse", "forward", "js"],
        },
    )
    precompute_anchor: bool = field(
        default=False, metadata={"help": "MDU: compute all anchors before training and keep no copy of the model."}
    )
    forget_masking: str = field(
        default="random",
        metadata={
            "help": "Which tokens of a response to forget are masked: at random, all but special ones, or those that "
            "the model generates itself.",
            "choices": ["random", "content", "generated"],
        },
    )
    mask_special_tokens: bool = field(
        default=True, metadata={"help": "Random masks of rows to forget: whether special tokens are masked, too."}
    )
    rollout_every: int | None = field(
        default=None, metadata={"help": "Generated masks: epochs until the model generates anew; once if unset."}
    )
    beta: float | None = field(default=None, metadata={"help": "Inverse temperature of NPO, SimNPO and DPO."})
    gamma: float = field(default=0.0, metadata={"help": "Margin of SimNPO."})
    alpha: float = field(default=1.0, metadata={"help": "Exponent of WGA's weights."})
    loss_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of an objective of your own, as JSON."}
    )
    retain_loss_type: str = field(default="nelbo", metadata={"help": "Retain loss.", "choices": ["nelbo", "kl"]})
    retain_weight: float = field(default=1.0, metadata={"help": "lambda; 0 to unlearn without a retain set."})
    retain_batch_size: int | None = field(
        default=None, metadata={"help": "Retain rows per device and micro-batch; as many as forget rows if unset."}
    )

    rewind_to: str | None = field(
        default=None, metadata={"help": "Checkpoint before fine-tuning, towards which the weights are set back first."}
    )
    rewind_share: float | None = field(
        default=None, metadata={"help": "Share of the way back to rewind_to: above 0 and at most 1."}
    )

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
        default=4,
        metadata={"help": "Forget rows (and retain rows, see retain_batch_size) per device and micro-batch."},
    )
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-batches an update."})
    _VALID_DICT_FIELDS = [*DiffusionConfig._VALID_DICT_FIELDS, "loss_options"]

    def __new__(cls, *args: Any, **kwargs: Any) -> "MDUConfig":
        """Note what is given, which counts before a preset."""
        made = super().__new__(cls)
        made._given = {*[f.name for f in fields(cls) if f.init][: len(args)], *kwargs}
        return made

    def __post_init__(self):
        with applied(self, self._given):
            super().__post_init__()

    def check_values(self) -> None:
        """As in `DiffusionConfig`, and the options of the losses."""
        super().check_values()
        of_anchor = ("kl_reduction", "kl_direction", "anchor_input")
        for name in ("loss_type", *of_anchor, "forget_masking", "retain_loss_type", "reference_precision"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise UserError(f"{name} '{getattr(self, name)}' is unknown; choose one of {', '.join(choices)}.")
        check_numbers(self, {"tau": NOT_NEGATIVE, "retain_weight": NOT_NEGATIVE, "beta": POSITIVE})
        check_numbers(self, {"gamma": "finite", "alpha": "finite", "prefix_share": POSITIVE})
        if self.prefix_share >= 1:
            raise UserError(f"prefix_share is a share between 0 and 1, got {self.prefix_share}.")
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
        self._check_anchor()
        self._check_masking()
        if self.precompute_anchor:
            self._check_precompute_anchor()
        if self.retain_batch_size is not None:
            self._check_retain_batch_size()
        self._check_rewind()

    @property
    def rows_a_counter(self) -> dict[str, int]:
        """How many rows of a set `data.rows.RowPairs` takes together, by its name; 1 of sets that are not named."""
        forget_rows = self.per_device_train_batch_size
        return {} if self.retain_batch_size is None else {"retain": self.retain_batch_size // forget_rows}

    def _check_retain_batch_size(self) -> None:
        rows, forget_rows = self.retain_batch_size, self.per_device_train_batch_size
        if not is_whole(rows, 1) or rows % forget_rows:
            raise UserError(
                f"retain_batch_size must be a multiple of per_device_train_batch_size = {forget_rows}, got {rows}: "
                f"each forget row comes with equally many retain rows. Take {forget_rows} or {2 * forget_rows}, or "
                "lower per_device_train_batch_size and raise gradient_accumulation_steps."
            )
        if self.retain_weight == 0:
            raise UserError(
                "retain_batch_size is set but retain_weight is 0, so no retain row would be read. Set retain_weight, "
                "or leave retain_batch_size out."
            )

    def _check_rewind(self) -> None:
        if self.rewind_to is None and self.rewind_share is None:
            return
        if not self.rewind_to or self.rewind_share is None:
            raise UserError(
                "rewind_to and rewind_share go together: the checkpoint from before fine-tuning, and the share of the "
                f"way back to it; got {self.rewind_to!r} and {self.rewind_share}. Set both, or leave both out."
            )
        check_numbers(self, {"rewind_share": POSITIVE})
        if self.rewind_share > 1:
            raise UserError(f"rewind_share is a share of the way back, at most 1, got {self.rewind_share}.")

    def _check_anchor(self) -> None:
        if self.strike_quantile is not None:
            check_numbers(self, {"strike_quantile": "a number"})
        if self.strike_quantile is not None and not 0 <= self.strike_quantile <= 1:
            raise UserError(f"strike_quantile is a share in [0, 1], got {self.strike_quantile}.")
        anchored = OBJECTIVES[self.loss_type].anchor
        if self.kl_direction != "reverse" and not anchored:
            raise UserError(
                f"kl_direction is MDU's; loss_type '{self.loss_type}' has no KL to an anchor. Leave it out."
            )
        if self.counterfactual and not (anchored and self.tau > 0):
            raise UserError(
                "anchor_input='counterfactual' is for loss_type='mdu' at tau > 0; here no anchor is predicted "
                f"(loss_type='{self.loss_type}', tau = {self.tau:g}). Set tau=1, or leave it out."
            )
        unread = [
            name
            for name, plain in (("anchor_source", "initial"), ("anchor_input", "masked_prompt"))
            if getattr(self, name) != plain
        ]
        if unread and not (anchored and self.tau > 0):
            logger.warning_once(f"No anchor is predicted at this loss and tau, so {' and '.join(unread)} is not read.")
        if self.strike_quantile != 0.5 and not self.counterfactual:
            raise UserError("strike_quantile is of anchor_input='counterfactual', which is not set. Leave it out.")
        self._check_anchor_source()

    def _check_anchor_source(self) -> None:
        if not isinstance(self.anchor_source, str) or not self.anchor_source:
            raise UserError(
                f"anchor_source must be {', '.join(OWN_ANCHORS)}, or a checkpoint's name or path, got "
                f"{self.anchor_source!r}."
            )
        if self.anchor_input == "prompt" and self.anchor_checkpoint is None:
            raise UserError(
                f"anchor_input='prompt' with anchor_source='{self.anchor_source}' asks the model for its own "
                "prediction: the KL would be zero, and nothing forgotten. Name another checkpoint as anchor_source, "
                "or take anchor_input='masked_prompt'."
            )
        check_numbers(self, {"anchor_ema_decay": POSITIVE})
        if self.anchor_ema_decay >= 1:
            raise UserError(f"anchor_ema_decay must be smaller than 1, got {self.anchor_ema_decay}.")
        if self.anchor_ema_decay != 0.999 and self.anchor_source != "ema":
            raise UserError("anchor_ema_decay is of anchor_source='ema', which is not set. Leave it out.")
        if self.anchor_source == "ema" and self.reference_precision != "full":
            raise UserError(
                f"reference_precision='{self.reference_precision}' is of a copy that does not change, and "
                "anchor_source='ema' averages weights. Leave it out, or set reference_device='cpu'."
            )

    @property
    def anchor_checkpoint(self) -> str | None:
        """The name or path of another checkpoint whose prediction is the anchor."""
        return None if self.anchor_source in OWN_ANCHORS else self.anchor_source

    @property
    def may_equal_anchor(self) -> bool:
        """Whether a row without a prompt has the model's own prediction for an anchor."""
        own = self.tau == 1 and self.anchor_checkpoint is None and not self.counterfactual
        return own and OBJECTIVES[self.loss_type].anchor

    def _check_masking(self) -> None:
        generated = self.forget_masking == "generated"
        if generated and OBJECTIVES[self.loss_type].preferred:
            raise UserError(
                f"forget_masking='generated' is of responses to forget, and loss_type '{self.loss_type}' masks "
                "preferred ones alike. Take 'content' or 'random'."
            )
        if self.rollout_every is None:
            return
        if not is_whole(self.rollout_every, 1):
            raise UserError(f"rollout_every must be a whole number of epochs from 1, got {self.rollout_every}.")
        if not generated:
            raise UserError("rollout_every is of forget_masking='generated', which is not set. Leave it out.")
        for name, why in (
            ("precompute_anchor", "masks that come from later weights are not known before training"),
            ("dataloader_persistent_workers", "loader processes that persist would not see the new masks"),
        ):
            if getattr(self, name):
                raise UserError(f"rollout_every does not go with {name}: {why}. Leave one of them out.")

    @property
    def counterfactual(self) -> bool:
        """Whether the anchor is predicted for the same question about nobody the model has met."""
        return self.anchor_input == "counterfactual"

    def _check_precompute_anchor(self) -> None:
        if self.loss_type != "mdu" or self.tau == 0 or self.anchor_source in ("current", "ema"):
            raise UserError(
                "precompute_anchor is for loss_type='mdu' at tau > 0 with an anchor_source that does not change; here "
                "no anchor is read that could be computed before training. Leave it out."
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
