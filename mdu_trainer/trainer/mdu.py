"""Unlearning for masked diffusion language models: the loss, step by step. The maths is in its own rooms."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..config import MDUConfig
from ..data.rows import RowPairs, TokenizedRows, count_overlap
from ..divergence import AnchorKL, Measure, Prediction, TokenNLL
from ..files import UserError
from ..hub.trainer_side import PublishingMixin
from ..models import row_projection, weights_fingerprint
from ..objectives import OBJECTIVES, ForgetTerms, Objective
from ..provenance.facts import Provenance
from .anchor_cache import FOLDER, AnchorBatch, AnchorCache, fingerprint_of
from .evaluating import EvalRows, UnlearningEvaluationMixin
from .mdlm import Batch, Figure, Figures, MDLMTrainer, Noised, each_row, weighted
from .reference import Reference, frozen_pass, trained_head

logger = logging.get_logger(__name__)


class MDUTrainer(PublishingMixin, UnlearningEvaluationMixin, MDLMTrainer):
    """Make a masked diffusion language model forget (MDU, arXiv 2605.18253, and its baselines).

        L_forget = E_t [ 1/|M_t| sum_{i in M_t} KL( p_theta(. | x, y_t)_i || softmax(tau logits_theta0(m, y_t)_i) ) ]
        L        = L_forget + retain_weight * L_retain

    Args:
        model: a model's name or path, a `PreTrainedModel`, or a `PeftModel`.
        args: the configuration; `args.loss_type` names the forget loss.
        train_dataset: the rows to forget, in a format of `mdu_trainer.data.rows`.
        retain_dataset: the rows to keep. Needed unless `args.retain_weight` is 0.
        eval_dataset: rows, or a dict of names and rows; see below. Masks are fixed by the seed.
        processing_class, peft_config, data_collator, callbacks, optimizers, model_init: as in `MDLMTrainer`.

    Logs means over the rows since the last log: `loss`, `forget_loss`, `retain_loss`, and of the forget rows `kl` (to
    the anchor; to the uniform distribution for objectives without one), `entropy` and `masked_fraction`.

    An evaluation computes them on each eval set, as `eval_<figure>`, or `eval_<set>_<figure>` for a set of a dict:

    - The set named "retain" is asked for the retain loss only: `eval_retain_loss`.
    - The set named "forget" is asked for the forget loss, `eval_forget_loss`, and (unless `retain_weight` is 0) for
      `eval_forget_retain_loss`: how unlikely its answers have become.
    - With both, `eval_loss` is L, the forget loss of the one plus `retain_weight` times the retain loss of the other.
      It is what `metric_for_best_model` takes if it is not set.
    - Any other set is asked for both losses, and its `loss` is L of these rows. No model is good at both terms, so
      `metric_for_best_model` takes one of `forget_loss` and `retain_loss` then.

    Example:

        trainer = MDUTrainer("GSAI-ML/LLaDA-8B-Instruct", MDUConfig("out", tau=0.0), forget_rows, retain_rows)
        trainer.train()
    """

    config_class = MDUConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: MDUConfig | None = None,
        train_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        model_init: Callable[..., PreTrainedModel] | None = None,
    ):
        args = self._config(args)
        _check_retain(args, train_dataset, retain_dataset)
        self._retain_dataset = retain_dataset
        self.provenance = Provenance(train_dataset, retain_dataset)
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
            model_init=model_init,
        )
        self._anchors: dict[str, AnchorCache] = {}
        self.reference = self._make_reference()
        self.provenance.warn_of_relearning(self)

    @property
    def forget_objective(self) -> Objective:
        """The forget loss, of `args.loss_type`. (The Trainer calls what a search has measured its `objective`.)"""
        return OBJECTIVES[self.args.loss_type]

    @property
    def beta(self) -> float:
        """The inverse temperature: `args.beta`, or the objective's own."""
        return self.forget_objective.beta if self.args.beta is None else self.args.beta

    def _start_over(self) -> None:
        super()._start_over()
        _check_retain(self.args, self.train_dataset, self._retain_dataset)
        if self.forget_objective.preferred and self.train_dataset and not self.train_dataset.parts["forget"].preferred:
            raise UserError("loss_type 'dpo' takes other rows than the rest: make a trainer of its own for it.")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_parts(rows) for name, rows in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._with_parts(self.eval_dataset)
        self._anchors = {}
        self.reference = self._make_reference()

    def _with_parts(self, dataset: RowPairs | None) -> RowPairs | None:
        """An eval set with the parts that the configuration asks for now."""
        if not isinstance(dataset, EvalRows):
            return dataset
        return EvalRows(dataset.rows, self._eval_parts(self.args, dataset.name), dataset.name)

    def _make_reference(self) -> Reference | None:
        args = self.args
        anchored = self.forget_objective.anchor and args.tau > 0 and args.anchor_source == "initial"
        retain_kl = args.retain_weight > 0 and args.retain_loss_type == "kl"
        if not (anchored or retain_kl or self.forget_objective.reference):
            return None
        return Reference(
            self.model,
            self.distributed,
            keep_copy=not args.precompute_anchor,
            precision=args.reference_precision,
            device=args.reference_device,
        )

    def _prepare_training(self) -> None:
        if self.args.precompute_anchor and not self._anchors:
            self._anchors = self._precompute_anchors()
            if not isinstance(self.model, PeftModel):
                self.reference = None  # from now on the live model is not theta_0

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Figures]:
        """L = L_forget + retain_weight * L_retain of a micro-batch; with `return_outputs` the figures of its rows."""
        figures = weighted(self._figures(model, inputs), inputs)
        loss = self._mean(figures, "forget_loss", num_items_in_batch)
        if "retain_loss" in figures:
            loss = loss + self.args.retain_weight * self._mean(figures, "retain_loss", num_items_in_batch)
        return self._finish(loss, figures, return_outputs)

    def _figures(self, model: nn.Module, inputs: dict[str, Batch]) -> Figures:
        if list(inputs) == ["retain"]:  # an eval set to keep
            return self._retain_figures(model, inputs["retain"])
        # 1. Draw t and mask the responses: y_t. A preferred response is masked as the one to forget.
        noised = {name: self._noise("retain" if name == "retain" else "forget", inputs[name]) for name in inputs}
        # 2. The anchor: theta_0 sees the same y_t behind an all-[MASK] prompt.
        measures = {"forget": self._forget_measure(model, inputs["forget"], noised["forget"])}
        if "preferred" in noised:
            measures["preferred"] = TokenNLL(noised["preferred"].targets)
        if "retain" in noised:
            measures["retain"] = self._retain_measure(model, noised["retain"])
        # 3. The conditional pass, p_theta(. | x, y_t), in one forward: at the masked positions, KL or -log p.
        found = self._measure(model, *((noised[name], measure) for name, measure in measures.items()))
        values = {name: value for name, (value, _) in zip(measures, found, strict=True)}
        # 4. One forget loss a row, and one retain loss.
        loss = self._forget_loss(model, noised, values)
        weight = self._forget_weight(noised["forget"])
        figures = {"forget_loss": Figure(loss, weight)}
        entropy = found[0].entropy
        if self.forget_objective.anchor:
            figures["kl"] = Figure(noised["forget"].per_row(values["forget"].detach()), weight)
        else:  # to the uniform anchor
            figures["kl"] = each_row(math.log(self.backbone.vocab_size) - noised["forget"].per_row(entropy))
        figures |= self._prediction_figures(noised["forget"], entropy)
        if "retain" in values:
            figures["retain_loss"] = each_row(self._retain_loss(noised["retain"], values["retain"]))
        return figures

    def _retain_figures(self, model: nn.Module, batch: Batch) -> Figures:
        noised = self._noise("retain", batch)
        ((value, entropy),) = self._measure(model, (noised, self._retain_measure(model, noised)))
        return {
            "retain_loss": each_row(self._retain_loss(noised, value)),
            **self._prediction_figures(noised, entropy),
        }

    def _forget_loss(self, model: nn.Module, noised: dict[str, Noised], values: dict[str, Tensor]) -> Tensor:
        """The objective, with what else it compares the prediction with: theta_0 on the same masks, preferences."""
        forget = noised["forget"]
        terms = ForgetTerms(forget.row, forget.num_masked, forget.num_response, forget.weight)
        terms = terms._replace(beta=self.beta, gamma=self.args.gamma, alpha=self.args.alpha)
        terms = terms._replace(**{"kl" if self.forget_objective.anchor else "nll": values["forget"]})
        if self.forget_objective.reference:
            terms = terms._replace(reference_bound=self._reference_bound(model, forget))
        if self.forget_objective.preferred:
            preferred = noised["preferred"]
            terms = terms._replace(
                preferred_bound=preferred.bound(values["preferred"]),
                preferred_reference_bound=self._reference_bound(model, preferred),
            )
        return self.forget_objective.loss(terms)

    def _forget_measure(self, model: nn.Module, batch: Batch, noised: Noised) -> Measure:
        """What is asked of the conditional pass, with the tokens' shares in the loss where they are known."""
        if self.forget_objective.anchor:
            weight = self._forget_weight(noised) / noised.num_masked
            return AnchorKL(self.args.tau, self._anchor(model, batch, noised), token_weight=weight[noised.row])
        weight = (noised.weight / noised.num_response)[noised.row] if self.forget_objective.linear else None
        return TokenNLL(noised.targets, token_weight=weight)

    def _forget_weight(self, noised: Noised) -> Tensor:
        """What a row weighs in the forget loss: 1, or its masked tokens where the KL is pooled over all tokens."""
        return noised.num_masked.float() if self._pools_tokens else torch.ones_like(noised.weight)

    @property
    def _pools_tokens(self) -> bool:
        return self.forget_objective.anchor and self.args.kl_reduction == "token"

    @property
    def _retain_loss_type(self) -> str:
        """Without a retain loss in training, theta_0 is not kept for the figures of an eval set."""
        return self.args.retain_loss_type if self.args.retain_weight else "nelbo"

    def _retain_measure(self, model: nn.Module, noised: Noised) -> Measure:
        if self._retain_loss_type == "nelbo":
            return TokenNLL(noised.targets, token_weight=(noised.weight / noised.num_response)[noised.row])
        initial = self._initial(model, noised, noised.corruption.noisy_ids)
        return AnchorKL(1.0, initial, token_weight=(1 / noised.num_masked)[noised.row])

    def _retain_loss(self, noised: Noised, value: Tensor) -> Tensor:
        if self._retain_loss_type == "nelbo":
            return noised.bound(value) / noised.num_response
        return noised.per_row(value)

    def _anchor(self, model: nn.Module, batch: Batch, noised: Noised) -> Prediction | None:
        """The prompt-masked prediction at the masked positions, without gradient. The uniform anchor takes no pass."""
        if self.args.tau == 0:
            return None
        if self._stage in self._anchors:
            return self._anchors[self._stage].read(batch["visit"], batch["row"])
        if self.args.anchor_source == "initial":
            return self._initial(model, noised, noised.corruption.anchor_ids)
        with frozen_pass(model):
            return row_projection(model, noised.corruption.anchor_ids, *noised.where, **self._shift)

    def _initial(self, model: nn.Module, noised: Noised, input_ids: Tensor) -> Prediction:
        if self.reference is None:
            raise UserError(
                "The anchors of this eval set were not computed before training. Pass it to the constructor, or set "
                "precompute_anchor=False."
            )
        return self.reference.projection(model, input_ids, *noised.where, **self._shift)

    def _reference_bound(self, model: nn.Module, noised: Noised) -> Tensor:
        ids = noised.corruption.noisy_ids
        return noised.bound(self.reference.nll(model, ids, *noised.where, noised.targets, **self._shift))

    def _update_sizes(self, batches: list[dict[str, Batch]]) -> dict[str, Tensor]:
        forget = [batch["forget"] for batch in batches]
        mean_rows = self._mean_over_update(sum(batch["weight"].sum() for batch in forget), len(batches))
        if not self._pools_tokens:
            return {"forget_loss": mean_rows, "retain_loss": mean_rows}
        masked = sum((self._noise("forget", batch).num_masked * batch["weight"]).sum() for batch in forget)
        return {"forget_loss": self._mean_over_update(masked, len(batches)), "retain_loss": mean_rows}

    # Anchors computed before training

    def _precompute_anchors(self) -> dict[str, AnchorCache]:
        """The anchors of all training steps, and of the eval sets given to the constructor, by stage."""
        self.distributed.place_whole(self.model)
        size = self.args.eval_batch_size
        stages = {} if self.train_dataset is None else {"train": (self.train_dataset, self._schedules)}
        batches = {"train": self._train_batches()}
        for stage, dataset in self._eval_sets.items():
            stages[stage] = (dataset, self._schedules_of(dataset))
            batches[stage] = [range(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)]
        stages = {stage: made for stage, made in stages.items() if "forget" in made[0].parts}  # others have no anchor
        head = trained_head(self.model, self.args.device)
        weights = weights_fingerprint(self.model)
        anchors = {}
        for stage, (dataset, schedules) in stages.items():
            facts = (self.backbone, self.args.bf16, self.args.fp16, batches[stage], vars(schedules["forget"]))
            with self._visiting(stage, schedules):
                anchors[stage] = AnchorCache(
                    Path(self.args.output_dir) / FOLDER / stage,
                    fingerprint=fingerprint_of(weights, dataset.parts["forget"], *facts),
                    batches=partial(self._anchor_batches, dataset, batches[stage]),
                    head=head,
                )
        return anchors

    def _train_batches(self) -> list[range]:
        """The counters of each micro-batch that training reads, those of the processes in turn."""
        args, size, batch_size = self.args, len(self.train_dataset), self.args.train_batch_size
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

    def _anchor_batches(self, dataset: RowPairs, batches: list[range]) -> Iterator[AnchorBatch]:
        for counters in batches:
            inputs = self._prepare_inputs(self.data_collator([dataset[counter] for counter in counters]))
            batch, noised = inputs["forget"], self._noise("forget", inputs["forget"])
            predict = partial(self._initial, self.model, noised, noised.corruption.anchor_ids)
            yield AnchorBatch(batch["visit"], batch["row"], noised.num_masked, predict)

    # Data

    def _train_sets(self, dataset: Dataset | None) -> dict[str, Dataset | None]:
        return {"forget": dataset, "retain": self._retain_dataset}

    def _tokenize_train(self, args: MDUConfig, dataset: Dataset | None) -> dict[str, TokenizedRows]:
        retain = self._retain_dataset
        if dataset is None:
            return {}
        parts = {"forget": self._tokenize(args, dataset, "forget", preferred=OBJECTIVES[args.loss_type].preferred)}
        if retain is not None:
            parts["retain"] = self._tokenize(args, retain, "retain")
            overlap = count_overlap(parts["forget"], parts["retain"])
            if overlap:
                logger.warning(
                    f"{overlap} of {len(parts['forget'])} forget rows are in the retain set too: they are trained to "
                    "be forgotten and kept at once. Remove them from the retain set."
                )
        return parts

    def _check_run(self) -> None:
        super()._check_run()
        if not (self.args.loss_type == "mdu" and self.args.tau == 1):
            return
        prompts = self.train_dataset.parts["forget"].prompts
        bare = sum(all(token == self.backbone.mask_token_id for token in prompt) for prompt in prompts)
        if bare:
            raise UserError(
                f"{bare} of {len(prompts)} forget rows have an empty prompt. At tau = 1 the model's own prediction is "
                "their anchor, so they would never be forgotten. Take a smaller tau, or give them a prompt."
            )


def _check_retain(args: MDUConfig, forget: Dataset | None, retain: Dataset | None) -> None:
    """Refuse a retain set that would not be read, and a retain loss without one, before a model is loaded."""
    if forget is not None and args.retain_weight > 0 and retain is None:
        raise UserError(
            f"retain_weight is {args.retain_weight:g} but there is no retain set. Pass retain_dataset, or set "
            "retain_weight=0 to unlearn without one."
        )
    if args.retain_weight == 0 and retain is not None:
        raise UserError(
            "A retain set is given but retain_weight is 0, so it would not be read. Set retain_weight (the papers "
            "use 1), or leave the retain set out."
        )
