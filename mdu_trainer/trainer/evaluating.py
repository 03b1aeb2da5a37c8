"""The trainers' own evaluation: losses on eval sets, under names that say which loss on which rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun, EvalPrediction, IntervalStrategy, PredictionOutput

from ..config import DiffusionConfig
from ..data.rows import RowPairs, TokenizedRows, in_order
from ..data.sampling import EpochSampler
from ..files import UserError
from ..masking import MaskSchedule
from .progress import TrainingProgress
from .robust import RobustTrainer

EvalSets = Dataset | dict[str, Dataset] | None


class EvalRows(RowPairs):
    """Rows to evaluate on, in their own order.

    Args:
        args: of the trainer.
        rows: of the set.
        parts: the parts of a batch that they are, e.g. ["forget", "retain"]: the same rows for each.
        name: of the set among others; None for the only one.
    """

    def __init__(self, args: DiffusionConfig, rows: TokenizedRows, parts: list[str], name: str | None = None):
        by_part = dict.fromkeys(parts, rows)
        super().__init__(by_part, 0, in_order, schedules(args, by_part, "eval-"))
        self.rows, self.name = rows, name


class Score(NamedTuple):
    """A score of each example of a batch, and what each weighs in the mean: both `[B]`."""

    value: Tensor
    weight: Tensor


Scores = dict[str, Score]


def schedules(
    args: DiffusionConfig, parts: dict[str, TokenizedRows], prefix: str = "", block_size: int | None = None
) -> dict[str, MaskSchedule]:
    """The masks of each part, which are those of its name: eval sets draw others than the rows in training.

    Args:
        args, parts: of the trainer.
        prefix: of the names.
        block_size: of the model, where t may be drawn for each block. An evaluation draws it for each row.
    """
    per_block = {name: block_size if args.noise_per == "block" else None for name in parts}
    if getattr(args, "forget_masking", "random") != "random":  # t does not decide then
        per_block["forget"] = None
    options = args.mask_options
    return {
        name: MaskSchedule(args.seed, f"{prefix}{name}", len(rows), block_size=per_block[name], **options)
        for name, rows in parts.items()
    }


class EvaluatingTrainer(RobustTrainer):
    """A trainer's `evaluate` and `predict`, with masks fixed by the seed: equal weights give equal scores.

    A score of the set `dev` is called `eval_dev_<score>`, one of the only set `eval_<score>`.
    """

    args: DiffusionConfig

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the scores of eval sets.

        Args:
            eval_dataset: rows, a dict of names and rows, or the name of one of the constructor's sets; all of the
                constructor's if not given.
            ignore_keys: not read.
            metric_key_prefix: in place of "eval".

        Returns:
            Each score, the mean over the rows, by its name.
        """
        if not isinstance(eval_dataset, str):
            eval_dataset = self._tokenize_eval(eval_dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        whole = self._over_sets(
            self.eval_dataset if eval_dataset is None else eval_dataset, metrics, metric_key_prefix
        )
        if whole:
            self.log(dict(whole))
        return metrics | whole

    def _over_sets(self, sets: Any, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Return the scores of several sets together."""
        return {}

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return the scores of each row of a set, under the masks of an evaluation.

        Args:
            test_dataset: rows in a format of `mdu_trainer.data.rows`.
            ignore_keys: not read.
            metric_key_prefix: of the means' names.

        Returns:
            `predictions`, a dict of score -> float array `[rows]` in the order of the set; `metrics`, their means.
        """
        if isinstance(test_dataset, dict):
            raise UserError("predict takes one set; call it for each of them.")
        output = super().predict(self._tokenize_eval(test_dataset), ignore_keys, metric_key_prefix)
        rows = _joined(output.predictions)[..., 0]
        scores = {name: rows[:, i] for i, name in enumerate(self._eval_names)}
        return PredictionOutput(predictions=scores, label_ids=None, metrics=output.metrics)

    # Data

    def _tokenize_eval(self, dataset: EvalSets, name: str | None = None) -> Any:
        if dataset is None or isinstance(dataset, RowPairs):
            return dataset
        if isinstance(dataset, dict):
            return {name: self._tokenize_eval(rows, name) for name, rows in dataset.items()}
        parts = self._eval_parts(name)
        return EvalRows(self.args, self._tokenize(dataset, "eval", parts), parts, name)

    def _renew_eval_sets(self) -> None:
        """Make the eval sets' parts and masks anew, as the configuration says now."""

        def renewed(rows: RowPairs | None) -> RowPairs | None:
            if not isinstance(rows, EvalRows):
                return rows
            return EvalRows(self.args, rows.rows, self._eval_parts(rows.name), rows.name)

        sets = self.eval_dataset
        several = isinstance(sets, dict)
        self.eval_dataset = {name: renewed(rows) for name, rows in sets.items()} if several else renewed(sets)

    def _eval_parts(self, name: str | None) -> list[str]:
        """Return the parts that the rows of an eval set are: each is asked for a loss."""
        return ["train"]

    def _columns(self, parts: list[str]) -> dict[str, bool]:
        """Return which columns rows must have that are these parts of a batch."""
        return {}

    def _check_eval_sets(self, dataset: EvalSets) -> None:
        """Refuse eval sets that are missing or whose scores would share a name, before a model is loaded."""
        strategy = IntervalStrategy(self.args.eval_strategy)
        if dataset is None and strategy != IntervalStrategy.NO:
            raise UserError(
                f"eval_strategy is '{strategy.value}' but there is no eval set. Pass eval_dataset, or set "
                "eval_strategy to 'no'."
            )
        if isinstance(dataset, dict):
            names = [score for name in dataset for score in self._score_names(name, self._eval_parts(name))]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise UserError(f"{twice} would name a score of two eval sets; rename one of {', '.join(dataset)}.")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `Trainer`; also sets which loss the set is asked for."""
        named = isinstance(eval_dataset, str)
        known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if named and eval_dataset not in known:
            raise UserError(f"There is no eval set '{eval_dataset}'; there are: {', '.join(known) or 'none by name'}.")
        dataset = self.eval_dataset[eval_dataset] if named else eval_dataset or self.eval_dataset
        if dataset is None:
            raise UserError("There is no eval set. Pass eval_dataset to evaluate, or to the constructor.")
        self._ask_for_loss(dataset)
        kept = getattr(self, "_eval_dataloaders", {})  # by persistent workers, under one key for all unnamed sets
        if not named and "eval" in kept and kept["eval"].dataset is not dataset:
            del kept["eval"]
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As in `Trainer`; also sets which loss the set is asked for."""
        self._ask_for_loss(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> torch.utils.data.DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # an evaluation leaves no row out
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self, eval_dataset: Any) -> EpochSampler:
        return EpochSampler(len(eval_dataset), epoch=lambda: 0)

    def _ask_for_loss(self, dataset: RowPairs) -> None:
        self._eval_loss = self._loss_of(getattr(dataset, "name", None), list(dataset.parts))

    @property
    def _named_sets(self) -> dict[str | None, RowPairs]:
        """The eval sets given to the constructor, by name; that of an only set is None."""
        sets: Any = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        return {name: rows for name, rows in sets.items() if rows is not None}

    @property
    def _eval_sets(self) -> dict[str, RowPairs]:
        """The same, by the name of their stage."""
        return {"eval" if name is None else f"eval-{name}": rows for name, rows in self._named_sets.items()}

    # Scores

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """The K scores of a batch and their weights, `[B, K, 2]`; weighted means over all examples are the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, scores = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_names = list(scores)
        stacked = torch.stack([torch.stack(score, dim=1).float() for score in scores.values()], dim=1)
        return None, stacked, torch.zeros(len(stacked), device=stacked.device)

    def _mean_scores(self, prediction: EvalPrediction) -> dict[str, float]:
        values, weights = torch.from_numpy(_joined(prediction.predictions)).double().unbind(dim=-1)
        means = (values * weights).sum(dim=0) / weights.sum(dim=0)
        metrics = dict(zip(self._eval_names, means.tolist(), strict=True))
        return metrics | {"loss": sum(weight * metrics[name] for name, weight in self._eval_loss.items())}

    def _loss_of(self, name: str | None, parts: list[str]) -> dict[str, float]:
        """Return the scores, with their weights, that `<set>_loss` is the sum of."""
        return {"loss": 1.0}

    def _score_names(self, name: str | None, parts: list[str]) -> list[str]:
        prefix = "eval_" if name is None else f"eval_{name}_"
        return [prefix + score for score in ("loss", "entropy", "masked_fraction")]

    def _all_score_names(self) -> list[str]:
        """Return the names of the scores of all eval sets given to the constructor."""
        return [score for name, rows in self._named_sets.items() for score in self._score_names(name, [*rows.parts])]

    def _unclear_names(self) -> dict[str, str]:
        """Return those of these names that do not tell a good model, and why."""
        return {}

    # The best model

    def _check_metric(self, metric: str) -> None:
        """Refuse to choose a model by a score that is unclear or, as far as can be known, never there.

        Raises:
            UserError: listing the scores that there are.
        """
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        names, unclear = self._all_score_names(), self._unclear_names()
        if metric in unclear or (metric not in names and not self._others_evaluate):
            why = unclear.get(metric, "there is no such score of the eval sets")
            clear = ", ".join(name for name in names if name not in unclear)
            raise UserError(f"'{metric}' cannot choose a model: {why}. There are: {clear}.")

    @property
    def _others_evaluate(self) -> bool:
        """Whether callbacks may add scores to an evaluation's."""
        return any(
            type(callback).on_evaluate is not TrainerCallback.on_evaluate
            and not isinstance(callback, TrainingProgress)
            and not type(callback).__module__.startswith("transformers.")
            for callback in self.callback_handler.callbacks
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        with _naming(metrics, self.args.metric_for_best_model):
            return super()._determine_best_metric(metrics, trial)

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """As in `Trainer`, for a trainer with `model_init`. Every trial has a model, masks and an anchor of its own.

        Args:
            hp_space: as in `Trainer`.
            compute_objective: of the scores of an evaluation, to be minimised unless `direction` says otherwise.
                `eval_loss` if not given, where there is one; `Trainer` would add up all scores.
            *args, **kwargs: as in `Trainer`.
        """
        if self.model_init is None:
            raise UserError("A search makes a new model for each trial: pass model_init in place of model.")
        if compute_objective is None:
            self._check_metric("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective or _eval_loss, *args, **kwargs)


def has_both(sets: Any) -> bool:
    return isinstance(sets, dict) and {"forget", "retain"} <= sets.keys()


def _eval_loss(metrics: dict[str, float]) -> float:
    with _naming(metrics, "eval_loss"):
        return metrics["eval_loss"]


@contextmanager
def _naming(metrics: dict[str, float], wanted: str | None) -> Iterator[None]:
    """Say which scores there are where the wanted one is not among them."""
    try:
        yield
    except KeyError:
        raise UserError(f"There is no score '{wanted}'; an evaluation gave {', '.join(metrics)}.") from None


def _joined(predictions: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """All rows, also where the Trainer was asked to keep batches apart (`eval_do_concat_batches`)."""
    return np.concatenate(predictions) if isinstance(predictions, list) else predictions
