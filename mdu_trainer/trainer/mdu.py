"""Unlearning of masked diffusion language models: the loss, step by step."""

import math
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import MDUConfig
from ..data.roles import Labeller
from ..data.rows import RowPairs, TokenizedRows
from ..data.secrets import SecretMarker, refuse_texts, warn_of_secrets, warn_of_spans
from ..data.texts import of_text
from ..divergence import AnchorKL, Joint, Prediction, Projection, TokenNLL
from ..files import UserError
from ..masking import Noised, forward_process, side_by_side
from ..models import measure_at
from ..objectives import OBJECTIVES, ForgetTerms, Objective, diffusion_bound, mean_by_example
from .anchors import make_anchor, make_reference, predict_anchor
from .average import MovingAverage
from .evaluating import Score, Scores, has_both
from .forget_rows import check_prompts, check_retain, warn_of_overlap
from .mdlm import Batch, MDLMTrainer
from .precompute import compute_before_training
from .reference import Reference
from .rewind import check_rewind, rewind
from .rollouts import Rollout, check_room, load_rollout, save_rollout, set_masks
from .tracked import check_tracked

logger = logging.get_logger(__name__)


class MDUTrainer(MDLMTrainer):
    """Make a masked diffusion language model forget (MDU, arXiv 2605.18253, and its baselines).

        L_forget = E_t [ 1/|M_t| sum_{i in M_t} KL( p_theta(. | x, y_t)_i || softmax(tau logits_theta0(m, y_t)_i) ) ]
        L        = L_forget + retain_weight * L_retain

    Args:
        model: a model's name or path, a `PreTrainedModel`, or a `PeftModel`.
        args: the configuration; `args.loss_type` names the forget loss.
        train_dataset: the rows to forget, in a format of `mdu_trainer.data.rows`.
        retain_dataset: the rows to keep. Needed unless `args.retain_weight` is 0.
        labeller: your own rule for what is stored in an answer, for a counterfactual anchor (see `label_roles`).
        eval_dataset: rows, or a dict of names and rows; see below. Masks are fixed by the seed.
        processing_class, peft_config, data_collator, callbacks, optimizers, model_init: as in `MDLMTrainer`.

    Logs means over the rows since the last log: `loss`, `forget_loss`, `retain_loss`, and of the forget rows `kl` (to
    the anchor; to the uniform distribution for objectives without one), `entropy` and `masked_fraction`.

    An evaluation computes them on each eval set, as `eval_<score>`, or `eval_<set>_<score>` for a set of a dict:

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

    args: MDUConfig
    config_class = MDUConfig
    _doing = "unlearning"
    _publishes_by_list = True
    _rollout: Rollout | None = None  # what the rows to forget are masked by, where the model generates it
    _rewound = False  # whether the model was set back towards the one before fine-tuning

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: MDUConfig | None = None,
        train_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        *others: Any,
        labeller: Labeller | None = None,
        **options: Any,
    ):
        args = self._config(args)
        check_retain(args, train_dataset is not None, retain_dataset is not None)
        self._retain_dataset = retain_dataset
        self._labeller = labeller
        self._marker: SecretMarker | None = None  # of what a counterfactual anchor hides
        super().__init__(model, args, train_dataset, *others, **options)
        self._anchor_head: Projection | None = None  # of the anchors computed before training
        self.reference = make_reference(self)
        self.anchor = make_anchor(self)
        self.provenance = self._open_provenance(train_dataset, retain_dataset)

    @property
    def forget_objective(self) -> Objective:
        """The forget loss, of `args.loss_type`. (The Trainer calls what a search has measured its `objective`.)"""
        return OBJECTIVES[self.args.loss_type]

    @property
    def loss_options(self) -> dict[str, float]:
        """The constants of the forget loss: those of the configuration, or the objective's own."""
        return self.forget_objective.chosen(vars(self.args) | cast(dict, self.args.loss_options or {}))

    def _start_over(self) -> None:
        super()._start_over()
        check_retain(self.args, self.train_dataset is not None, self._retain_dataset is not None)
        if self.forget_objective.preferred and self.train_dataset and not self.train_dataset.parts["forget"].preferred:
            raise UserError("loss_type 'dpo' takes other rows than the rest: make a trainer of its own for it.")
        self._anchor_head, self._rewound = None, False
        self.reference = make_reference(self)
        self.anchor = make_anchor(self)

    def _prepare_training(self) -> None:
        for stage, dataset in {"train": self.train_dataset, **self._eval_sets}.items():
            set_masks(self, dataset, stage)
        compute_before_training(self)
        rewind(self)

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Scores]:
        """L = L_forget + retain_weight * L_retain of a batch, and with `return_outputs` the scores of each example.

            L_forget = E_t [ 1/|M_t| sum_{i in M_t} KL( p_theta(.|x, y_t)_i || softmax(tau logits_theta0(m, y_t)_i) ) ]

        Args:
            num_items_in_batch: name of a loss -> weight of the examples in its mean, as `get_batch_samples` counts it.
        """
        # 1. The forward process: y_t is y with the positions M_t masked, N in all; m is a prompt of masks
        noised = {name: forward_process(batch, self.backbone.mask_token_id) for name, batch in inputs.items()}
        weight = {name: batch["weight"] for name, batch in inputs.items()}  # [B], 0 for pairs that fill up a batch
        forget, retain = noised.get("forget"), noised.get("retain")

        # 2. The anchor: theta_0 on (m, y_t) at M_t, or what `anchor_source` and `anchor_input` say, [N, V] before its
        # head; at tau = 0 it is uniform, without a pass
        anchored = forget is not None and self.forget_objective.anchor and self.args.tau > 0
        anchor = predict_anchor(self, model, inputs["forget"], noised["forget"]) if anchored else None

        # 3. One conditional pass for all sets, p_theta(. | x, y_t): of each masked token KL or -log p, [N]
        counts = [len(one.targets) for one in noised.values()]  # N of each set
        measure = Joint(counts, [self._asked_of(name, one, anchor, model) for name, one in noised.items()])
        joined = side_by_side(list(noised.values()), self.backbone.pad_token_id)  # ids, mask, M_t, y: [sum B, L]
        measured = measure_at(model, *joined[:3], measure, **self.backbone.form(joined[3]))  # [sum N]
        values, entropies = (dict(zip(noised, column.split(counts), strict=True)) for column in measured)

        # 4. One loss an example, [B], and the mean over the examples of the update
        scores: Scores = {}
        if forget is not None:
            loss = self.forget_objective.loss(self._forget_terms(model, noised, values), **self.loss_options)
            counted = weight["forget"] * (forget.num_masked if self._pools_tokens else 1)  # as the mean counts each
            uniform = math.log(self.backbone.vocab_size) - entropies["forget"]  # KL to the uniform distribution, [N]
            kl = values["forget"].detach() if self.forget_objective.anchor else uniform
            scores["forget_loss"] = Score(loss, counted)
            scores["kl"] = Score(mean_by_example(kl, forget.batch_index, forget.num_masked), counted)
        if retain is not None:
            scores["retain_loss"] = Score(self._retain_loss(retain, values["retain"]), weight["retain"])
        name, first = next(iter(noised.items()))
        entropy = mean_by_example(entropies[name], first.batch_index, first.num_masked)
        scores["entropy"] = Score(entropy, weight[name])
        scores["masked_fraction"] = Score(first.num_masked / first.num_response, weight[name])
        sizes = num_items_in_batch or {name: score.weight.sum() for name, score in scores.items()}
        shares = {"forget_loss": 1.0, "retain_loss": self.args.retain_weight}
        terms = [shares[n] * ((scores[n].value * scores[n].weight).sum() / sizes[n]) for n in shares if n in scores]
        loss = torch.stack(terms).sum()
        self._record(loss, scores)
        return (loss, scores) if return_outputs else loss

    def _asked_of(self, name: str, noised: Noised, anchor: Prediction | None, model: nn.Module) -> AnchorKL | TokenNLL:
        """Return the measure of a set's prediction, with the tokens' shares in the loss where they are known."""
        mean, by_bound = 1 / noised.num_masked, noised.weight / noised.num_response  # [B]
        if name == "forget" and self.forget_objective.anchor:
            share = torch.ones_like(mean) if self._pools_tokens else mean
            edit = noised.strike and partial(noised.strike.edit, quantile=self.args.strike_quantile)
            return AnchorKL(self.args.tau, anchor, share[noised.batch_index], edit, self.args.kl_direction)
        if name == "retain" and self._retain_loss_type == "kl":
            where = (noised.input_ids, noised.attention_mask, noised.masked)
            initial = self._theta_0.projection(model, *where, **self.backbone.form(noised.clean_ids))
            return AnchorKL(1.0, initial, token_weight=mean[noised.batch_index])
        known = name == "retain" or (name == "forget" and self.forget_objective.linear)
        return TokenNLL(noised.targets, token_weight=by_bound[noised.batch_index] if known else None)

    def _forget_terms(self, model: nn.Module, noised: dict[str, Noised], values: dict[str, Tensor]) -> ForgetTerms:
        """Return what the objective reads: the prediction, and theta_0's on the same masks where it compares them."""
        forget, preferred = noised["forget"], noised.get("preferred")
        terms = {"kl" if self.forget_objective.anchor else "nll": values["forget"]}
        if self.forget_objective.reference:
            terms["reference_bound"] = self._reference_bound(model, forget)
        if preferred is not None:
            terms["preferred_bound"] = diffusion_bound(values["preferred"], preferred.batch_index, preferred.weight)
            terms["preferred_reference_bound"] = self._reference_bound(model, preferred)
        return ForgetTerms(forget.batch_index, forget.num_masked, forget.num_response, forget.weight, **terms)

    def _reference_bound(self, model: nn.Module, noised: Noised) -> Tensor:
        where = (noised.input_ids, noised.attention_mask, noised.masked, noised.targets)
        nll = self._theta_0.nll(model, *where, **self.backbone.form(noised.clean_ids))
        return diffusion_bound(nll, noised.batch_index, noised.weight)

    def _retain_loss(self, noised: Noised, value: Tensor) -> Tensor:
        if self._retain_loss_type == "nelbo":
            return diffusion_bound(value, noised.batch_index, noised.weight) / noised.num_response
        return mean_by_example(value, noised.batch_index, noised.num_masked)

    @property
    def _retain_loss_type(self) -> str:
        """Without a retain loss in training, theta_0 is not kept for the scores of an eval set."""
        return self.args.retain_loss_type if self.args.retain_weight else "nelbo"

    @property
    def _pools_tokens(self) -> bool:
        """Whether the KL is averaged over the masked tokens of the update, and not first over each example's."""
        return self.forget_objective.anchor and self.args.kl_reduction == "token"

    @property
    def _theta_0(self) -> Reference:
        assert self.reference is not None
        return self.reference

    def _update_sizes(self, batches: list[dict[str, Batch]]) -> dict[str, Tensor]:
        names = [name for name in ("forget", "retain") if name in batches[0]]
        counts = {name: [batch[name]["weight"].sum() for batch in batches] for name in names}
        sizes = {f"{name}_loss": self._mean_over_update(counts[name]) for name in names}
        if self._pools_tokens:
            noised = [forward_process(batch["forget"], self.backbone.mask_token_id) for batch in batches]
            pairs = zip(noised, batches, strict=True)
            masked = [(one.num_masked * batch["forget"]["weight"]).sum() for one, batch in pairs]
            sizes["forget_loss"] = self._mean_over_update(masked)
        return sizes

    # Data

    def _train_sets(self, dataset: Dataset | None) -> dict[str, Dataset | None]:
        return {"forget": dataset, "retain": self._retain_dataset}

    def _tokenize_train(self, dataset: Dataset | None) -> dict[str, TokenizedRows]:
        parts = super()._tokenize_train(dataset)
        warn_of_overlap(parts)
        return parts

    def _check_run(self) -> None:
        super()._check_run()
        check_rewind(self)
        check_tracked(self)
        if self.train_dataset and self.args.may_equal_anchor:
            check_prompts(self.train_dataset.parts["forget"].prompt_ids, self.backbone.mask_token_id)
        if self.train_dataset and self.args.forget_masking == "generated":
            check_room(self.train_dataset.parts["forget"], self.backbone.context_length)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; also sees to it that the rows know their masks, where training has not begun."""
        if self.train_dataset is not None:
            set_masks(self, self.train_dataset)
        return super().get_train_dataloader()

    def _ask_for_loss(self, dataset: RowPairs) -> None:
        super()._ask_for_loss(dataset)
        set_masks(self, dataset)

    def _tokenize(self, dataset: Dataset, name: str, parts: list[str], **options: Any) -> TokenizedRows:
        if "forget" not in parts or not self.args.counterfactual:
            warn_of_spans(name, dataset, unread="forget" in parts)
            return super()._tokenize(dataset, name, parts, **options)
        if self._marker is None:  # the first set is the one to forget
            refuse_texts(dataset, name)
            sets = [rows for rows in (dataset, self._retain_dataset) if rows is not None and not of_text(rows)]
            self._marker = SecretMarker.of(self._tokenizer, sets, self._labeller)
        rows = super()._tokenize(dataset, name, parts, mark=self._marker)
        warn_of_secrets(name, rows, self.backbone.end_token_ids)
        return rows

    # Evaluation: rows to forget are asked for another loss than rows to keep

    def _over_sets(self, sets: Any, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        if not has_both(sets):
            return {}
        forget, retain = (metrics[f"{prefix}_{name}_loss"] for name in ("forget", "retain"))
        return {f"{prefix}_loss": forget + self.args.retain_weight * retain}

    def _eval_parts(self, name: str | None) -> list[str]:
        if name == "retain":
            return ["retain"]
        return ["forget", "retain"] if self.args.retain_weight else ["forget"]

    def _columns(self, parts: list[str]) -> dict[str, bool]:
        return {"preferred": "forget" in parts and self.forget_objective.preferred}

    def _loss_of(self, name: str | None, parts: list[str]) -> dict[str, float]:
        if name == "forget" or "retain" not in parts:
            return {"forget_loss": 1.0}
        if "forget" not in parts:
            return {"retain_loss": 1.0}
        return {"forget_loss": 1.0, "retain_loss": self.args.retain_weight}

    def _score_names(self, name: str | None, parts: list[str]) -> list[str]:
        losses = {"forget": ["forget_loss", "kl"], "retain": ["retain_loss"]}
        prefix = "eval_" if name is None else f"eval_{name}_"
        return [prefix + score for part in parts for score in losses[part]] + super()._score_names(name, parts)

    def _all_score_names(self) -> list[str]:
        return super()._all_score_names() + (["eval_loss"] if has_both(self.eval_dataset) else [])

    def _unclear_names(self) -> dict[str, str]:
        why = "it adds the forget and the retain loss of the same rows, and no model is good at both"
        mixed = [name for name, rows in self._named_sets.items() if len(self._loss_of(name, [*rows.parts])) > 1]
        return {"eval_loss" if name is None else f"eval_{name}_loss": why for name in mixed}

    # Saving and publishing. What stands above the trainer is imported where its own hooks call it

    def _open_provenance(self, forget: Dataset | None, retain: Dataset | None) -> Any:
        from ..provenance.requests import Provenance

        name = getattr(self.accelerator.unwrap_model(self.model).config, "_name_or_path", None)
        tokens = getattr(self.processing_class, "all_special_tokens", [])
        provenance = Provenance(forget, retain, Path(name) if name else None, tokens)
        provenance.warn_of_relearning()
        return provenance

    def _run(self) -> Any:
        from ..provenance.requests import Run

        model = self.accelerator.unwrap_model(self.model)
        return Run(self.args, self.state, model, self.backbone, self.loss_options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.provenance.save(output_dir or self.args.output_dir, self._run())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_rollout(self, output_dir)
        if isinstance(self.anchor, MovingAverage) and self.args.should_save:
            self.anchor.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_rollout(self, checkpoint)
        if checkpoint is not None and isinstance(self.anchor, MovingAverage):
            self.anchor.load(checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, private unless `private` or `args.hub_private_repo` says otherwise."""
        from ..hub.trainer_side import is_private

        super().init_hf_repo(token, is_private(self, private))

    def create_model_card(self, **details: Any) -> None:
        """Write `README.md`, and the picture that it shows, into `args.output_dir`.

        Args:
            **details: what the run does not know; the fields of
                `mdu_trainer.report.model_card.CardDetails`. Results and attacks are by default those of the folder.
        """
        from ..hub.trainer_side import write_card

        write_card(self, **details)

    def push_to_hub(
        self, commit_message: str | None = "End of training", **options: Any
    ) -> CommitInfo | Future | None:
        """Save the model in `args.output_dir` and publish it as `mdu_trainer.push_unlearned_model` does.

        Args:
            commit_message: as in `Trainer`.
            **options: see `mdu_trainer.hub.trainer_side.push`.
        """
        from ..hub.trainer_side import push

        return push(self, commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        from ..hub.trainer_side import push_checkpoint

        if self._staging is None:  # a checkpoint without its name is not whole yet
            push_checkpoint(self, checkpoint_folder)
