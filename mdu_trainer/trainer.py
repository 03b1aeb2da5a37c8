"""Unlearning for masked diffusion language models: the loss, step by step. The maths is in its own rooms."""

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from .config import MDUConfig
from .data import TokenizedRows, count_overlap
from .divergence import anchor_kl, cross_entropy
from .mdlm import Batch, Figure, Figures, MDLMTrainer, Noised, each_row
from .objectives import OBJECTIVES, ForgetTerms
from .provenance import Provenance
from .publishing import PublishingMixin
from .reference import Reference, live_row_logits

logger = logging.get_logger(__name__)


class MDUTrainer(PublishingMixin, MDLMTrainer):
    """Make a masked diffusion language model forget (MDU, arXiv 2605.18253, and its baselines).

        L_forget = E_t [ 1/|M_t| sum_{i in M_t} KL( p_theta(. | x, y_t)_i || softmax(tau logits_theta0(m, y_t)_i) ) ]
        L        = L_forget + retain_weight * L_retain

    Args:
        model: a model's name or path, a `PreTrainedModel`, or a `PeftModel`.
        args: the configuration; `args.loss_type` names the forget loss.
        train_dataset: the rows to forget, in a format of `mdu_trainer.data`.
        retain_dataset: the rows to keep. Needed unless `args.retain_weight` is 0.
        eval_dataset: rows, or a dict of names and rows. Both losses are computed on each; masks are fixed by the seed.
        processing_class, peft_config, data_collator, callbacks, optimizers: as in `MDLMTrainer`.

    Logs means over the rows since the last log: `loss`, `forget_loss`, `retain_loss`, and of the forget rows `kl` (to
    the anchor; to the uniform distribution for objectives without one), `entropy` and `masked_fraction`.

    Example:

        trainer = MDUTrainer("GSAI-ML/LLaDA-8B-Instruct", MDUConfig("out", tau=0.0), forget_rows, retain_rows)
        trainer.train()
    """

    config_class = MDUConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: MDUConfig | None = None,
        train_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = self._config(args)
        _check_retain(args, train_dataset, retain_dataset)
        self._retain_dataset = retain_dataset
        self.provenance = Provenance(train_dataset, retain_dataset)
        self.objective = OBJECTIVES[args.loss_type]
        self.beta = self.objective.beta if args.beta is None else args.beta
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            data_collator=data_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        anchored = self.objective.anchor and args.tau > 0 and args.anchor_source == "initial"
        retain_kl = args.retain_weight > 0 and args.retain_loss_type == "kl"
        needed = anchored or retain_kl or self.objective.reference
        self.reference = Reference(self.model, self.accelerator) if needed else None

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Figures]:
        """L = L_forget + retain_weight * L_retain of a micro-batch; with `return_outputs` the figures of its rows."""
        figures = self._figures(model, inputs)
        loss = self._mean(figures, "forget_loss", num_items_in_batch)
        if "retain_loss" in figures:
            loss = loss + self.args.retain_weight * self._mean(figures, "retain_loss", num_items_in_batch)
        return self._finish(loss, figures, return_outputs)

    def _figures(self, model: nn.Module, inputs: dict[str, Batch]) -> Figures:
        figures = self._forget_figures(model, inputs)
        if "retain" in inputs:
            figures["retain_loss"] = each_row(self._retain_loss(model, inputs["retain"]))
        return figures

    def _forget_figures(self, model: nn.Module, inputs: dict[str, Batch]) -> Figures:
        # 1. Draw t and mask the response: y_t.
        noised = self._noise("forget", inputs["forget"])
        # 2. The conditional pass, p_theta(. | x, y_t), at the masked positions.
        logits = self._predict(model, noised)
        # 3. What the objective compares it with: the prompt-masked anchor, or theta_0 on the same masks.
        figures = self._prediction_figures(noised, logits)
        terms = ForgetTerms(noised.row, noised.num_masked, noised.num_response, noised.weight)
        terms = terms._replace(beta=self.beta, gamma=self.args.gamma, alpha=self.args.alpha)
        if self.objective.anchor:
            terms = terms._replace(kl=anchor_kl(logits, self._anchor(model, noised), self.args.tau))
            figures["kl"] = Figure(noised.per_row(terms.kl.detach()), self._forget_weight(noised))
        else:
            terms = terms._replace(nll=cross_entropy(logits, noised.targets))
            figures["kl"] = each_row(math.log(logits.shape[-1]) - figures["entropy"].value)  # to the uniform anchor
        if self.objective.reference:
            terms = terms._replace(reference_bound=self._reference_bound(model, noised))
        if self.objective.preferred:
            preferred = self._noise("forget", inputs["preferred"])
            nll = cross_entropy(self._predict(model, preferred), preferred.targets)
            terms = terms._replace(
                preferred_bound=preferred.bound(nll), preferred_reference_bound=self._reference_bound(model, preferred)
            )
        # 4. One forget loss a row.
        return {"forget_loss": Figure(self.objective.loss(terms), self._forget_weight(noised)), **figures}

    def _forget_weight(self, noised: Noised) -> Tensor:
        """What a row weighs in the forget loss: 1, or its masked tokens where the KL is pooled over all tokens."""
        return noised.num_masked.float() if self._pools_tokens else torch.ones_like(noised.weight)

    @property
    def _pools_tokens(self) -> bool:
        return self.objective.anchor and self.args.kl_reduction == "token"

    def _retain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        noised = self._noise("retain", batch)
        logits = self._predict(model, noised)
        if self.args.retain_loss_type == "nelbo":
            return noised.bound(cross_entropy(logits, noised.targets)) / noised.num_response
        initial_logits = self._initial_logits(model, noised, noised.corruption.noisy_ids)
        return noised.per_row(anchor_kl(logits, initial_logits, tau=1.0))

    def _anchor(self, model: nn.Module, noised: Noised) -> Tensor | None:
        """The prompt-masked prediction at the masked positions, without gradient. The uniform anchor takes no pass."""
        if self.args.tau == 0:
            return None
        ids = noised.corruption.anchor_ids
        if self.args.anchor_source == "initial":
            return self._initial_logits(model, noised, ids)
        shift = self.backbone.logit_shift
        return live_row_logits(model, ids, noised.attention_mask, noised.corruption.masked, logit_shift=shift)

    def _initial_logits(self, model: nn.Module, noised: Noised, input_ids: Tensor) -> Tensor:
        return self.reference.row_logits(
            model,
            self.accelerator.unwrap_model(model),
            input_ids,
            noised.attention_mask,
            noised.corruption.masked,
            logit_shift=self.backbone.logit_shift,
        )

    def _reference_bound(self, model: nn.Module, noised: Noised) -> Tensor:
        nll = cross_entropy(self._initial_logits(model, noised, noised.corruption.noisy_ids), noised.targets)
        return noised.bound(nll)

    def _update_sizes(self, batches: list[dict[str, Batch]]) -> dict[str, Tensor]:
        rows = torch.tensor(sum(len(batch["forget"]["row"]) for batch in batches), device=self.args.device)
        mean_rows = self._mean_over_update(rows, len(batches))
        if not self._pools_tokens:
            return {"forget_loss": mean_rows, "retain_loss": mean_rows}
        masked = sum(self._noise("forget", batch["forget"]).num_masked.sum() for batch in batches)
        return {"forget_loss": self._mean_over_update(masked, len(batches)), "retain_loss": mean_rows}

    # Data

    def _tokenize_train(self, args: MDUConfig, dataset: Dataset | None) -> dict[str, TokenizedRows]:
        retain = self._retain_dataset
        if dataset is None:
            return {}
        parts = {"forget": self._tokenize(args, dataset, "forget", preferred=self.objective.preferred)}
        if retain is not None:
            parts["retain"] = self._tokenize(args, retain, "retain")
            overlap = count_overlap(parts["forget"], parts["retain"])
            if overlap:
                logger.warning(
                    f"{overlap} of {len(parts['forget'])} forget rows are in the retain set too: they are trained to "
                    "be forgotten and kept at once. Remove them from the retain set."
                )
        return parts

    def _eval_parts(self, args: MDUConfig) -> list[str]:
        return ["forget", "retain"] if args.retain_weight else ["forget"]

    def _eval_columns(self, args: MDUConfig) -> dict[str, bool]:
        return {"preferred": self.objective.preferred}


def _check_retain(args: MDUConfig, forget: Dataset | None, retain: Dataset | None) -> None:
    """Refuse a retain set that would not be read, and a retain loss without one, before a model is loaded."""
    if forget is not None and args.retain_weight > 0 and retain is None:
        raise ValueError(
            f"retain_weight is {args.retain_weight:g} but there is no retain set. Pass retain_dataset, or set "
            "retain_weight=0 to unlearn without one."
        )
    if args.retain_weight == 0 and retain is not None:
        raise ValueError(
            "A retain set is given but retain_weight is 0, so it would not be read. Set retain_weight (the papers "
            "use 1), or leave the retain set out."
        )
