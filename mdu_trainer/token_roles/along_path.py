"""TOFU's metrics along the denoising path: when in decoding does an answer come out, or does the model know it?

    run = score_along_path(model, tokenizer, load_tofu("locuslab/TOFU"), num_steps=16)
    print(PathScores("TOFU forget10", 16, {}, [run]).details())

A score at the end of decoding does not say whether the knowledge is gone or only comes out late. Each metric is
computed anew at S moments of a path, when a share s/S of the answer's tokens (rounded down) is revealed, and once of
the tokens at the moments at which each is fixed:

    what a metric reads     at moment s                                      at fixing
    the answer              what the model's own decoding has fixed so far,  the answer as it is decoded in the end
                            the rest filled in at once with its prediction
    likelihoods of answers  log p of the tokens still masked, the others     log p of each token when decoding fixes
                            revealed in a random order                       it (`mdu_trainer.token_roles.fixing`)

So the probability at moment 0 is that of one fully masked pass. The random orders are a hash of (seed, answer, row,
position): every model is asked about the same noisy answers. True, paraphrased and wrong answers have an order each.

A metric reads these in place of the finished answer and the likelihood, so every metric of the registry works, also
one from outside, unless it runs the model itself. What is left of an answer is easier to say the more of it is shown:
read a curve beside that of the base, or of the rows to keep.

Source: the evaluation of diffusion models in a fork of OpenUnlearning (Jounce-IO/open-unlearning,
docs/trajectory_metrics.md), which keeps the logits of one decoding and reads metrics off them, step by step and back
from the step at which each token was fixed. By default it follows what the model decodes, whatever the answer. Here
likelihoods are conditioned on the answer's own tokens, so that they are those of that answer. Its guided modes write
the answer's tokens, too, in the order of the unguided decoding or by the answer's own probability; at fixing here, the
model's confidence decides, given what is written so far.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.protocol import Protocol
from ..evaluation.registry import Metric, RowScores
from ..evaluation.runner import score_questions
from ..evaluation.scoring import AnswerLikelihood, QuestionBatch, QuestionSet
from ..evaluation.tofu import TOFU_METRICS, check_sets, tofu_questions, tofu_scores
from ..files import UserError
from ..inference.config import Decoding, DiffusionGenerationConfig, check_count
from ..inference.generation import generate_ids
from ..inference.likelihood import masked_log_p
from ..models import Backbone, evaluation_mode, resolve_backbone
from .fixing import fixed_log_p
from .path_results import PathCurve, PathRun
from .paths import random_order, watch_decoding

SELF_MADE = ("exact_memorization", "extraction_strength", "fast_agreement")  # metrics that decode by themselves
NO_STEP = "decodes by itself, so it is no function of the step: leave it out along the path."


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse metrics that run the model themselves, before any model is loaded."""
    for name in metrics:
        if name in SELF_MADE:
            raise UserError(f"The metric {name!r} {NO_STEP}")


def score_along_path(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    decoding: Decoding = "exact",
    metrics: Sequence[str] = TOFU_METRICS,
    num_steps: int = 16,
    name: str = "model",
    backbone: Backbone | None = None,
    progress_path: str | Path | None = None,
    show_progress: bool = False,
    protocol: Protocol = "ours",
) -> PathRun:
    """Score a model on TOFU's sets along the denoising path. Every process of an accelerate launch must call this.

    It takes at most S passes and one a token for each answer to be weighed (true, paraphrased and wrong ones), and at
    most S passes a row beside its decoding.

    Args:
        model, tokenizer, sets, generation_config, decoding, backbone, protocol: as in `evaluate_tofu`. The finished
            answers, and so the text metrics at fixing, are those that it scores.
        metrics: as there, but for those that decode by themselves.
        num_steps: S, moments of each path, evenly spaced over the tokens revealed.
        name: what the run is called.
        progress_path: file that keeps finished rows, to continue a killed run.
        show_progress: show a progress bar that names the run.

    Raises:
        ValueError: as `evaluate_tofu`, for a metric that decodes by itself, or a number of steps below 1.
    """
    check_count("num_steps", num_steps)
    check_metrics(metrics)
    check_sets(sets)
    backbone = backbone or resolve_backbone(model, tokenizer)
    how = {"metrics": metrics, "protocol": protocol, "decoding": decoding}
    questions = tofu_questions(sets, tokenizer, backbone, generation_config, **how)
    scored = score_questions(
        model,
        tokenizer,
        [_along(part, num_steps) for part in questions],
        backbone=backbone,
        progress_path=progress_path,
        show_progress=show_progress and f"{name} along the path",
    )
    sets_by_moment = [tofu_scores(_of_moment(scored.scores, moment)) for moment in range(num_steps + 1)]
    scores = {part.name: _curves([scores[part.name] for scores, _ in sets_by_moment], num_steps) for part in questions}
    rows = {part.name: len(part) for part in questions}
    return PathRun(name, rows, scores, _curves([summary for _, summary in sets_by_moment], num_steps))


def _along(questions: QuestionSet, num_steps: int) -> QuestionSet:
    """The questions, with one metric that gives the scores of all others at all moments, as "moment/score"."""

    def compute(batch: QuestionBatch) -> RowScores:
        path = _Path(replace(batch, set=questions), num_steps)
        moments = [path.at(moment).scores() for moment in range(num_steps + 1)]
        return {f"{moment}/{name}": values for moment, scores in enumerate(moments) for name, values in scores.items()}

    name = f"{', '.join(questions.metrics)} at {num_steps} moments"  # which progress is told apart by
    return replace(questions, metrics={name: Metric(compute)})


def _of_moment(scores: Mapping[str, RowScores], moment: int) -> dict[str, RowScores]:
    start = f"{moment}/"
    return {
        name: {key.removeprefix(start): values for key, values in of_set.items() if key.startswith(start)}
        for name, of_set in scores.items()
    }


def _curves(by_moment: Sequence[Mapping], num_steps: int) -> dict[str, PathCurve]:
    """The curve of each score, from the scores of every moment and, last, those at fixing."""
    names = dict.fromkeys(name for scores in by_moment for name in scores)
    found = {name: [scores.get(name) for scores in by_moment] for name in names}
    return {name: PathCurve(values[:num_steps], values[num_steps]) for name, values in found.items()}


@dataclass(eq=False, repr=False)
class _Moment(QuestionBatch):
    """Rows before a model at one moment of the path: what is said and how likely it is, as metrics read it."""

    path: "_Path"
    moment: int

    @cached_property
    def written(self) -> list[list[int]]:
        """Ids of what the model would say at the moment."""
        return self.path.said[self.moment]

    @cached_property
    def likelihoods(self) -> list[dict[str, AnswerLikelihood]]:
        """The likelihoods of what is left of each answer, by role."""
        return self.path.weighed[self.moment]

    @property
    def to_complete(self) -> NoReturn:
        """Refused: a metric that completes answers by itself has no moment."""
        raise UserError(f"One of the metrics {', '.join(self.set.metrics)} {NO_STEP}")


class _Answer(NamedTuple):
    """An answer to be weighed."""

    place: int  # of its question in the batch
    role: str
    number: int  # among all answers to the question, weighed or not
    ids: list[int]


@dataclass(eq=False, repr=False)
class _Path:
    """The paths of the rows of a batch: S moments and, last, the tokens as they are fixed."""

    batch: QuestionBatch
    num_steps: int

    def at(self, moment: int) -> _Moment:
        """The rows at a moment."""
        batch = self.batch
        return _Moment(batch.model, batch.tokenizer, batch.backbone, batch.set, batch.rows, self, moment)

    @cached_property
    def said(self) -> list[list[list[int]]]:
        """Ids of the answer to each question, at each moment: `[S + 1][R]`."""
        batch, decoding = self.batch, self.batch.set.decoding
        past_end = batch.set.protocol == "release"
        how = {"row_ids": batch.rows, "past_end": past_end}
        finished, tokens, steps = watch_decoding(batch.model, batch.prompts, batch.backbone, decoding, **how)
        states: dict[tuple[int, int], int] = {}  # row and step up to which is revealed -> place among the inputs
        at = np.empty((self.num_steps, len(finished)), dtype=np.int64)
        for row, ids in enumerate(finished):
            order = np.sort(steps[row, : len(ids) + (not past_end)])  # with the end token, if there is one
            for moment in range(self.num_steps):
                state = (row, int(order[moment * len(order) // self.num_steps]))
                at[moment, row] = states.setdefault(state, len(states))
        given = [
            [token if known else None for token, known in zip(tokens[row].tolist(), steps[row] < step, strict=True)]
            for row, step in states
        ]
        prompts, rows = [batch.prompts[row] for row, _ in states], [batch.rows[row] for row, _ in states]
        how = {"row_ids": rows, "past_end": past_end, "given": given}
        filled = generate_ids(batch.model, prompts, _at_once(decoding), batch.backbone, **how)
        return [*([filled[place] for place in places] for places in at), finished]

    @cached_property
    def weighed(self) -> list[list[dict[str, AnswerLikelihood]]]:
        """Likelihoods of the answers to each question by role, at each moment: `[S + 1][R]`."""
        batch, answers = self.batch, self._answers()
        log_p = self._masked(answers)
        prompts, responses = [batch.prompts[one.place] for one in answers], [one.ids for one in answers]
        size = batch.set.decoding.batch_size
        fixed = fixed_log_p(batch.model, prompts, responses, batch.backbone, batch_size=size)
        moments = [
            [log_p[i, count] for i, count in enumerate(self._revealed(m, answers))] for m in range(self.num_steps)
        ]
        return [self._by_role(answers, parts) for parts in (*moments, fixed)]

    def _answers(self) -> list[_Answer]:
        """The answers whose likelihood the metrics need."""
        found = []
        for place, question in enumerate(self.batch.questions):
            all_of = [(role, ids) for role, answers in question.answers.items() for ids in answers]
            found += [_Answer(place, role, number, ids) for number, (role, ids) in enumerate(all_of)]
        return [one for one in found if one.role in self.batch.set.roles]

    def _revealed(self, moment: int, answers: Sequence[_Answer]) -> list[int]:
        """How many tokens of each answer are revealed at a moment."""
        return [moment * len(one.ids) // self.num_steps for one in answers]

    def _masked(self, answers: Sequence[_Answer]) -> dict[tuple[int, int], np.ndarray]:
        """log p of the masked tokens of each answer once so many are revealed, by (its place, that number)."""
        batch, decoding = self.batch, self.batch.set.decoding
        rows = [batch.rows[one.place] for one in answers]
        orders = [
            random_order(decoding.seed, one.number, row, len(one.ids)) for one, row in zip(answers, rows, strict=True)
        ]
        wanted = {(i, n) for moment in range(self.num_steps) for i, n in enumerate(self._revealed(moment, answers))}
        keys = sorted(
            wanted, key=lambda key: (len(batch.prompts[answers[key[0]].place]) + len(answers[key[0]].ids), key)
        )
        found = {}
        with evaluation_mode(batch.model):
            for first in range(0, len(keys), decoding.batch_size):
                part = keys[first : first + decoding.batch_size]
                inputs = [(batch.prompts[answers[i].place], answers[i].ids, orders[i] >= n) for i, n in part]
                found |= zip(part, masked_log_p(batch.model, inputs, batch.backbone), strict=True)
        return found

    def _by_role(self, answers: Sequence[_Answer], parts: Sequence[np.ndarray]) -> list[dict[str, AnswerLikelihood]]:
        """The parts of each answer's tokens as the likelihoods of each question, by role."""
        found: list[dict[str, list[np.ndarray]]] = [defaultdict(list) for _ in self.batch.questions]
        for one, tokens in zip(answers, parts, strict=True):
            found[one.place][one.role].append(tokens)
        return [
            {
                role: AnswerLikelihood(np.array([t.sum() for t in of]), np.array([len(t) for t in of]), of)
                for role, of in roles.items()
            }
            for roles in found
        ]


def _at_once(decoding: DiffusionGenerationConfig) -> DiffusionGenerationConfig:
    """The same decoding with everything that is masked revealed in one step, or one a block."""
    return replace(
        decoding,
        steps=1,
        block_length=None,
        schedule="linear",
        remasking="low_confidence",
        position_temperature=0.0,
        confidence_threshold=None,
        edit_threshold=None,
    )
