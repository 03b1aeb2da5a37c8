"""Watch forgetting and retention while a model is trained, and stop in time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .data.roles import ROLES, Labeller
from .data.words import has_words
from .evaluation.metrics.base import one_of
from .evaluation.tofu import check_sets, evaluate_tofu
from .files import UserError
from .inference.config import check_count
from .inference.generation import DiffusionGenerationConfig
from .token_roles.measure import check_rows, role_data
from .token_roles.paths import by_row, measure_paths
from .token_roles.results import RoleSettings
from .trainer.mdlm import MDLMTrainer

logger = logging.get_logger(__name__)

CHANCE = 0.5  # `true_rank` of a model that never saw the rows


class ScoringCallback(TrainerCallback, ABC):
    """Calls `score` on the weights in training, every so many updates or after each evaluation, and logs the scores.

    When the scores belong to an evaluation of the trainer, they join its metrics. One state of the weights is scored
    once. Subclasses must leave the model and all random states as they were.

    Args:
        trainer: the one that trains. Its model must be whole on every process (no FSDP, no ZeRO-3).
        every_steps: score every so many updates. If None, after each evaluation of the trainer.

    Raises:
        ValueError: for a callback that would never be called, or a sharded model.
    """

    def __init__(self, trainer: MDLMTrainer, every_steps: int | None = None):
        check_count("every_steps", 1 if every_steps is None else every_steps)
        if every_steps is None and trainer.args.eval_strategy == "no":
            raise UserError("The trainer never evaluates (eval_strategy='no'): pass every_steps, or let it evaluate.")
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise UserError(
                "The model is sharded over the processes (FSDP or ZeRO-3), and each would decode at its own pace and "
                "wait for the others forever. Score the checkpoints after training instead."
            )
        self.trainer, self.every_steps = trainer, every_steps
        self._scored: tuple[int, dict[str, float]] | None = None  # step, scores

    @abstractmethod
    def score(self) -> dict[str, float]:
        """Scores of the present weights, by the names under which they are logged."""

    def scored(self, scores: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Called with new scores, once they are logged."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score every `every_steps` updates."""
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._score(state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Score after an evaluation; one of several data sets counts once."""
        if self.every_steps is None:
            scores = self._score(state, control)
            if metrics is not None:
                metrics.update(scores)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the last scores: the best weights may have been loaded at the same step."""
        self._scored = None

    def _score(self, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        if self._scored is None or self._scored[0] != state.global_step:
            scores = self.score()
            self.trainer.log(dict(scores))
            self._scored = (state.global_step, scores)
            self.scored(scores, state, control)
        return self._scored[1]


class UnlearningEvalCallback(ScoringCallback):
    """Scores forget and retain rows during training: decoded answers and likelihoods, not losses.

    Scores are logged as `eval_forget_rougeL_recall`, `eval_retain_probability` and so on. When they belong to an
    evaluation of the trainer, they join its metrics, so `metric_for_best_model` can name one. Training is not
    disturbed: the weights end up as they would without. Rows that a score cannot be measured on do not count for it.

    Every process scores its share and sees all scores, so all stop together.

    Forgetting has a level, and it is not zero. A model that never saw the rows finds a true answer likelier than a
    wrong one half of the time. Trained beyond that, it avoids the true answers, which no model does by itself: whoever
    compares likelihoods sees that they were deleted, and which they were. `stop_forget_at="never-trained"` stops at
    that level; the mean over few rows scatters around it.

    Args:
        trainer, every_steps: as in `ScoringCallback`.
        forget: rows with columns `question` and `answer`; a few dozen are enough to steer by.
        retain: such rows to keep.
        generation_config: how answers are decoded, as in `evaluate_tofu`.
        metrics: what is measured, names in `mdu_trainer.evaluation.registry.METRICS`.
        stop_forget_below: stop once `stop_metric` of the forget rows is below this: forgetting is reached.
        stop_forget_at: "never-trained" stops once the true answers of the forget rows are no likelier than wrong ones:
            once `true_rank`, which is added to the metrics, is at most 0.5. The rows need `perturbed_answer`, wrong
            answers in the wording of the true one, or of `paraphrased_answer` where there is one. Not together with
            `stop_forget_below`.
        stop_retain_below: stop once `stop_metric` of the retain rows is below this: too much is lost.
        stop_metric: the score that is compared.
        num_draws: forward passes for the likelihood of an answer.

    Attributes:
        stopped_because: why training was stopped, None if it was not.

    Raises:
        ValueError: for rows that cannot be scored, limits without what they are compared with, two that contradict
            each other, a callback that would never be called, or a sharded model.

    Example:

        trainer.add_callback(
            UnlearningEvalCallback(trainer, forget, retain, every_steps=20, stop_forget_below=0.2)
        )
    """

    def __init__(
        self,
        trainer: MDLMTrainer,
        forget: Dataset,
        retain: Dataset | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        metrics: Sequence[str] = ("rougeL", "probability"),
        every_steps: int | None = None,
        stop_forget_below: float | None = None,
        stop_forget_at: Literal["never-trained"] | None = None,
        stop_retain_below: float | None = None,
        stop_metric: str = "rougeL_recall",
        num_draws: int = 16,
    ):
        self.sets = {"forget": forget} | ({} if retain is None else {"retain": retain})
        check_sets(self.sets)
        if "rougeL" in metrics:
            for name, rows in self.sets.items():
                if not any(map(has_words, rows["answer"])):
                    raise UserError(
                        f"ROUGE-L can be measured on no row of the {name} set: its answers hold no word, number or "
                        "emoji to compare. Pass other rows, or metrics without rougeL."
                    )
        if stop_retain_below is not None and retain is None:
            raise UserError(f"stop_retain_below = {stop_retain_below} needs retain rows to score: pass retain.")
        _check_level(forget, stop_forget_at, stop_forget_below)
        super().__init__(trainer, every_steps)
        self.generation_config = generation_config
        added = ("true_rank",) if stop_forget_at is not None and "true_rank" not in metrics else ()
        self.metrics, self.num_draws = (*metrics, *added), num_draws
        self.stop_forget_at = stop_forget_at
        self.limits = {"forget": stop_forget_below, "retain": stop_retain_below}
        self.stop_metric = stop_metric
        self.stopped_because: str | None = None

    def score(self) -> dict[str, float]:
        """The scores of every set and metric."""
        result = evaluate_tofu(
            cast(nn.Module, self.trainer.model),
            cast(PreTrainedTokenizerBase, self.trainer.processing_class),
            self.sets,
            self.generation_config,
            metrics=self.metrics,
            backbone=self.trainer.backbone,
            num_draws=self.num_draws,
        )
        return {
            f"eval_{name}_{metric}": estimate.value
            for name, scores in result.run.scores.items()
            for metric, estimate in scores.items()
        }

    def scored(self, scores: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Ask to stop if a limit is passed."""
        meaning = {"forget": "forgetting is reached", "retain": "retention is lost"}
        reasons = []
        if self.stop_forget_at is not None and scores["eval_forget_true_rank"] <= CHANCE:
            rank = f"eval_forget_true_rank = {scores['eval_forget_true_rank']:.3f} <= {CHANCE:g}"
            reasons.append(
                f"the level of a never-trained model is reached: true answers are no likelier than wrong ones ({rank})"
            )
        for name, limit in self.limits.items():
            if limit is None:
                continue
            key = f"eval_{name}_{self.stop_metric}"
            if key not in scores:
                raise UserError(f"stop_metric: there is no {key}; measured are {', '.join(scores)}.")
            if scores[key] < limit:
                reasons.append(f"{meaning[name]} ({key} = {scores[key]:.3f} < stop_{name}_below = {limit:g})")
        if reasons:
            self.stopped_because = "; ".join(reasons)
            control.should_training_stop = True
            logger.warning(f"Training stops at step {state.global_step}: {self.stopped_because}.")


def _check_level(forget: Dataset, stop_forget_at: str | None, stop_forget_below: float | None) -> None:
    """Refuse a level to stop at that is unknown, stands beside a limit, or cannot be measured on the rows."""
    one_of("stop_forget_at", stop_forget_at, (None, "never-trained"))
    if stop_forget_at is None:
        return
    if stop_forget_below is not None:
        raise UserError(
            f"stop_forget_at = {stop_forget_at!r} and stop_forget_below = {stop_forget_below:g} name two ends of "
            "forgetting: pass one of them."
        )
    if "perturbed_answer" not in forget.column_names:
        raise UserError(
            f"stop_forget_at = {stop_forget_at!r} compares true answers with wrong ones, and the forget set has no "
            "column perturbed_answer: add lists of wrong answers, or pass stop_forget_below."
        )


class TokenRoleCallback(ScoringCallback):
    """Logs what the prompt tells the model about the tokens to forget, role by role.

    Logged are means over rows along the ground-truth path (see `token_roles.paths`): `eval_forget_kl_stored`,
    `eval_forget_kl_in_context`, `eval_forget_kl_structural`, and the same for `entropy` and `probability` of the true
    token. They go through `Trainer.log`, so to every tracker that the trainer reports to, and join the metrics of the
    trainer's evaluations. All models are asked about the same noisy inputs. Training is not disturbed: the weights end
    up as they would without. Every process computes the same means.

    Args:
        trainer, every_steps: as in `ScoringCallback`.
        forget: rows with columns `question` and `answer`; a few dozen are enough to watch.
        retain: rows to keep, measured as `eval_retain_...`; template words are found among their answers, too.
        settings: how the path is measured; four moments of one path a row unless given. The example row is not read.
        labeller: as in `label_roles`.

    Raises:
        ValueError: for rows that cannot be asked, a callback that would never be called, or a sharded model.

    Example:

        trainer.add_callback(TokenRoleCallback(trainer, forget, every_steps=20))
    """

    def __init__(
        self,
        trainer: MDLMTrainer,
        forget: Dataset,
        retain: Dataset | None = None,
        *,
        every_steps: int | None = None,
        settings: RoleSettings | None = None,
        labeller: Labeller | None = None,
    ):
        check_rows(forget, retain)
        super().__init__(trainer, every_steps)
        self.settings = settings or RoleSettings(num_steps=4, num_paths=1)
        tokenizer, backbone = cast(PreTrainedTokenizerBase, trainer.processing_class), trainer.backbone
        sets = {"forget": (forget, retain)} | ({} if retain is None else {"retain": (retain, forget)})
        self.paths = {}
        for name, (rows, others) in sets.items():
            data = role_data(rows, tokenizer, backbone, others, labeller=labeller)
            self.paths[name] = data.paths(self.settings)

    def score(self) -> dict[str, float]:
        """Means over rows of each set, value and role; a role that no row has is left out."""
        scores = {}
        for name, paths in self.paths.items():
            measured = measure_paths(
                cast(nn.Module, self.trainer.model),
                paths,
                self.trainer.backbone,
                num_steps=self.settings.num_steps,
                batch_size=self.settings.batch_size,
            )
            for value, of_paths in measured.items():
                for role in ROLES:
                    rows = by_row(of_paths, paths, role)
                    rows = rows[np.isfinite(rows)]
                    if len(rows):
                        scores[f"eval_{name}_{value}_{role}"] = math.fsum(rows) / len(rows)
        return scores
