"""Questions to a model, and the scores of its answers.

A `QuestionSet` holds tokenised questions and the metrics to compute. A `QuestionBatch` of them decodes answers and
estimates likelihoods once, when the first metric asks. Metrics are functions from a batch to scores a row.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.reading import private
from ..data.rows import question_answer_rows, tokenize_rows
from ..data.texts import without_ends
from ..files import UserError
from ..inference.generation import DiffusionGenerationConfig, generate_ids
from ..inference.likelihood import response_likelihood
from ..models import Backbone
from .metrics import (
    ChoiceProbability,
    Degeneracy,
    ExactMemorization,
    ExtractionStrength,
    Probability,
    RougeL,
    RowMetric,
    TrueRank,
    TruthRatio,
    bootstrap_interval,
    greedy_completions,
    shortest_prefixes,
)
from .protocol import Protocol
from .registry import Metric, RowScores, register_metric
from .results import Estimate, Scores

logger = logging.get_logger(__name__)

OF_A_SAMPLE = ("fast_token_agreement", "fast_rougeL_error")  # scores of some rows alone: `fast`


@dataclass(frozen=True, repr=False)
class Question:
    """One row, tokenised. Its texts appear in no message.

    Attributes:
        prompt: ids, generation prompt included.
        references: true answers as texts, of which the best match counts.
        answers: role -> ids of the answers in it, end token included. Roles are `"answer"`, `"paraphrased"` and
            `"perturbed"`, or `"true"` and `"false"` for the choices of a question that has choices.
    """

    prompt: list[int]
    references: tuple[str, ...]
    answers: dict[str, list[list[int]]]


@dataclass(frozen=True, repr=False)
class QuestionSet:
    """The questions of one set, and the metrics to compute.

    Attributes:
        name: of the set: "forget", "retain", ...
        questions: at least one.
        metrics: by name, see `registry.METRICS` and `choose_metrics`.
        decoding: how answers are decoded; its batch size and seed serve the likelihood too.
        num_draws: forward passes for the likelihood of each answer.
        protocol: by "release", what stands after the end token of a decoded answer counts as text of it, too.
    """

    name: str
    questions: list[Question]
    metrics: Mapping[str, Metric]
    decoding: DiffusionGenerationConfig
    num_draws: int = 16
    protocol: Protocol = "ours"

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def roles(self) -> list[str]:
        """The answers whose likelihood the metrics need."""
        return list(dict.fromkeys(role for metric in self.metrics.values() for role in metric.roles))

    def fingerprint(self) -> dict[str, Any]:
        """All that the scores depend on, without a word of the texts; not the batch size, which changes nothing."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        content = [(question.prompt, question.references, question.answers) for question in self.questions]
        return {
            "rows": len(self),
            "data": digest(content),
            "metrics": list(self.metrics),
            "decoding": decoding,
            "num_draws": self.num_draws,
            **({} if self.protocol == "ours" else {"protocol": self.protocol}),
        }

    def chunks(self) -> list[list[int]]:
        """Row numbers in groups of the batch size, rows of like length together."""
        order = sorted(range(len(self)), key=lambda row: len(self.questions[row].prompt))
        size = self.decoding.batch_size
        return [order[first : first + size] for first in range(0, len(order), size)]


class AnswerLikelihood(NamedTuple):
    """The log-likelihoods in nats `[K]` and the numbers of tokens `[K]` of the K answers in one role.

    `tokens` are the parts of each answer's tokens in its log-likelihood.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray
    tokens: Sequence[np.ndarray] = ()

    @property
    def per_token(self) -> np.ndarray:
        """Mean log-likelihood a token, `[K]`."""
        return self.log_likelihood / self.num_tokens


@dataclass(eq=False, repr=False)
class QuestionBatch:
    """Rows of a set before a model.

    Attributes:
        model, tokenizer, backbone: they answer.
        set: the questions, of which `rows` are the numbers that are asked.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    backbone: Backbone
    set: QuestionSet
    rows: Sequence[int]

    @cached_property
    def questions(self) -> list[Question]:
        """The questions that are asked."""
        return [self.set.questions[row] for row in self.rows]

    def scores(self) -> RowScores:
        """The scores of every metric of the set.

        Raises:
            UserError: a metric gives a score that another one gives, too, or not one a row.
        """
        scores: RowScores = {}
        for name, metric in self.set.metrics.items():
            for score, values in metric.compute(self).items():
                if score in scores:
                    raise UserError(f"Two metrics of the {self.set.name} set give {score!r}, one of them {name!r}.")
                if len(values) != len(self.rows):
                    raise UserError(
                        f"The metric {name!r} gives {len(values)} values of {score!r} for {len(self.rows)} rows: it "
                        "must give one a row, None where it cannot be measured."
                    )
                scores[score] = values
        return scores

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of each prompt."""
        return [question.prompt for question in self.questions]

    @property
    def to_complete(self) -> tuple[nn.Module, list[list[int]], list[list[int]], Backbone]:
        """Model, prompts, true answers and backbone, as the metrics of memorisation take them."""
        return self.model, self.prompts, [one.answers["answer"][0] for one in self.questions], self.backbone

    @cached_property
    def written(self) -> list[list[int]]:
        """Ids of what counts as the answer to each question: by the protocol "release" all that was decoded."""
        how: dict[str, Any] = {"row_ids": self.rows, "past_end": self.set.protocol == "release"}
        return generate_ids(self.model, self.prompts, self.set.decoding, self.backbone, **how)

    @cached_property
    def decoded(self) -> list[list[int]]:
        """Ids of the answer to each question, without its end token."""
        ends = self.backbone.end_token_ids
        return [list(takewhile(lambda token: token not in ends, ids)) for ids in self.written]

    @cached_property
    def texts(self) -> list[str]:
        """The answer to each question, without special tokens."""
        return self.tokenizer.batch_decode(self.written, skip_special_tokens=True)

    @property
    def ended(self) -> list[str]:
        """The same up to the end token, whatever counts as the answer."""
        return self.tokenizer.batch_decode(self.decoded, skip_special_tokens=True)

    @cached_property
    def likelihoods(self) -> list[dict[str, AnswerLikelihood]]:
        """The likelihoods of the answers to each question, by role."""
        flat = [
            (i, role, ids)
            for i, question in enumerate(self.questions)
            for role in self.set.roles
            for ids in question.answers.get(role, ())
        ]
        estimate = response_likelihood(
            self.model,
            [self.questions[i].prompt for i, _, _ in flat],
            [ids for _, _, ids in flat],
            self.backbone,
            num_draws=self.set.num_draws,
            batch_size=self.set.decoding.batch_size,
            seed=self.set.decoding.seed,
        )
        places: list[dict[str, list[int]]] = [{} for _ in self.questions]
        for place, (i, role, _) in enumerate(flat):
            places[i].setdefault(role, []).append(place)
        total, count, tokens = estimate.log_likelihood, estimate.num_tokens, estimate.tokens
        return [
            {role: AnswerLikelihood(total[at], count[at], [tokens[i] for i in at]) for role, at in roles.items()}
            for roles in places
        ]

    def per_token(self, role: str) -> list[list[float]]:
        """Mean log-likelihoods a token of the answers in a role, for each question."""
        return [roles[role].per_token.tolist() for roles in self.likelihoods]

    def first(self, role: str) -> list[float]:
        """Mean log-likelihood a token of the first answer in a role, for each question."""
        return [answers[0] for answers in self.per_token(role)]


def encode_questions(
    name: str,
    prompts: Sequence[str],
    references: Sequence[Sequence[str]],
    answers: Mapping[str, Sequence[Sequence[str]]],
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    *,
    conversational: bool | None = None,
    plain: bool = False,
    protocol: Protocol = "ours",
) -> list[Question]:
    """Tokenise questions and the answers to be weighed.

    Args:
        name: what messages call the set.
        prompts: a text a row; a user's turn if the tokenizer has a chat template.
        references: the true answers of each row, as texts.
        answers: role -> the answers in it of each row.
        tokenizer, backbone: of the model.
        conversational: False for plain texts whatever the tokenizer has.
        plain: prompts and answers are running text (`mdu_trainer.data.texts`): no turns, and no end tokens.
        protocol: by "release", answers are weighed without their end token.

    Raises:
        ValueError: for no rows, an answer without tokens, or prompts longer than the model's context.
    """
    chats = not plain and (bool(tokenizer.chat_template) if conversational is None else conversational)
    flat = [(row, None, "") for row in range(len(prompts))]  # a response of its end token alone: the prompt's ids
    flat += [(row, role, text) for role in answers for row, texts in enumerate(answers[role]) for text in texts]
    columns = {"question": [prompts[row] for row, _, _ in flat], "answer": [text for _, _, text in flat]}
    with private(f"The rows of the {name} set do not make a table"):
        pairs = question_answer_rows(Dataset.from_dict(columns), conversational=chats)
    numbers = [row for row, _, _ in flat]
    encoded = tokenize_rows(pairs, tokenizer, backbone, name=name, allow_blank=True, numbers=numbers)
    questions = [
        Question(prompt, tuple(texts), {})
        for prompt, texts in zip(encoded.prompt_ids, references, strict=False)  # the first len(prompts) are these
    ]
    ends = backbone.end_token_ids
    responses = without_ends(encoded.completion_ids, ends) if plain else encoded.completion_ids
    for (row, role, _), ids in zip(flat, responses, strict=True):
        if role is None:
            continue
        if all(token in ends for token in ids):
            raise UserError(f"Row {row} of the {name} set: an answer ({role}) has no tokens, so nothing to score.")
        while protocol == "release" and ids[-1] in ends:
            ids = ids[:-1]
        questions[row].answers.setdefault(role, []).append(ids)
    return questions


def estimates(row_scores: RowScores) -> Scores:
    """The mean of each score over the rows where it is measured, with its interval.

    Scores that are measured nowhere, or are not finite in every row where they are, are left out.
    """
    scores: Scores = {}
    without: dict[str, list[str]] = {}  # on how many rows -> scores that cannot be measured there
    for name, values in row_scores.items():
        measured = [value for value in values if value is not None]
        if len(measured) < len(values) and name not in OF_A_SAMPLE:
            without.setdefault(f"{len(values) - len(measured)} of {len(values)} rows", []).append(name)
        if measured and all(map(math.isfinite, measured)):
            scores[name] = Estimate(math.fsum(measured) / len(measured), *bootstrap_interval(measured))
    for rows, names in without.items():
        logger.warning(f"Not measured on {rows}, which hold no word to compare: {', '.join(names)}.")
    return scores


def digest(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _by_row(metric: RowMetric, **columns: Any) -> RowScores:
    return cast(RowScores, metric.compute(**columns, use_aggregator=False))


def _rouge(batch: QuestionBatch) -> RowScores:
    pairs = [(i, text) for i, question in enumerate(batch.questions) for text in question.references]
    scores = _by_row(RougeL(), predictions=[batch.texts[i] for i, _ in pairs], references=[text for _, text in pairs])
    best: RowScores = {name: [None] * len(batch.questions) for name in scores}
    for name, values in scores.items():
        for (i, _), value in zip(pairs, values, strict=True):
            if value is not None:
                best[name][i] = max(best[name][i] or 0.0, value)
    return best


def _probability(batch: QuestionBatch) -> RowScores:
    return _by_row(Probability(), per_token=batch.first("answer"))


def _choice_probability(batch: QuestionBatch) -> RowScores:
    wrong = batch.per_token("perturbed")
    return _by_row(ChoiceProbability(), per_token=batch.first("answer"), wrong_per_token=wrong)


def _true_and_wrong(batch: QuestionBatch) -> dict[str, Any]:
    """The true answers, paraphrased where the data has it, and the wrong ones in their wording, as columns."""
    true = "paraphrased" if "paraphrased" in batch.questions[0].answers else "answer"
    return {"per_token": batch.first(true), "wrong_per_token": batch.per_token("perturbed")}


def _truth_ratio(batch: QuestionBatch) -> RowScores:
    """Ratios before any aggregation."""
    return _by_row(TruthRatio(), **_true_and_wrong(batch))


def _true_rank(batch: QuestionBatch) -> RowScores:
    return _by_row(TrueRank(), **_true_and_wrong(batch))


def _accuracy(batch: QuestionBatch) -> RowScores:
    """Whether the best true choice is likelier than every false one, by the likelihood of the whole choice."""
    rows = [roles["true"].log_likelihood.max() > roles["false"].log_likelihood.max() for roles in batch.likelihoods]
    return {"accuracy": [float(right) for right in rows]}


def _degeneracy(batch: QuestionBatch) -> RowScores:
    texts, special = batch.tokenizer.batch_decode(batch.decoded), batch.tokenizer.all_special_tokens
    return {"degeneracy": _by_row(Degeneracy(), predictions=texts, special_tokens=special)["degeneracy"]}


def _exact_memorization(batch: QuestionBatch) -> RowScores:
    decoded, true = greedy_completions(*batch.to_complete, batch_size=batch.set.decoding.batch_size)
    return _by_row(ExactMemorization(), predictions=decoded, references=true)


def _extraction_strength(batch: QuestionBatch) -> RowScores:
    prefixes, lengths = shortest_prefixes(*batch.to_complete, batch_size=batch.set.decoding.batch_size)
    return _by_row(ExtractionStrength(), prefix_tokens=prefixes, num_tokens=lengths)


WORDS = {
    "rougeL_recall": "ROUGE-L recall of decoded answers against the true ones (lower on `forget`, higher elsewhere)",
    "rougeL_f1": "ROUGE-L F1 of the same, which words beside the true answer lower",
    "probability": "probability of the true answer, a token, estimated over draws of masks",
    "truth_ratio": "TOFU's truth ratio (arXiv 2401.06121) of wrong answers to a rewording of the true one",
    "true_rank": "share of wrong answers that are less likely than the true one; chance is 0.5",
    "degeneracy": "share of answers that are empty, repetitive or made of special tokens",
    "exact_memorization": "share of the answer's tokens that decoding at its true length gets right",
    "extraction_strength": "share of the answer that need not be revealed for the model to complete it",
}


def _explained(*scores: str) -> dict[str, str]:
    return {score: WORDS[score] for score in scores}


register_metric("rougeL", Metric(_rouge, words=_explained("rougeL_recall", "rougeL_f1")))
register_metric("probability", Metric(_probability, ("answer",), _explained("probability")))
register_metric("choice_probability", Metric(_choice_probability, ("answer", "perturbed")))
register_metric("truth_ratio", Metric(_truth_ratio, ("answer", "paraphrased", "perturbed"), _explained("truth_ratio")))
register_metric("true_rank", Metric(_true_rank, ("answer", "paraphrased", "perturbed"), _explained("true_rank")))
register_metric("accuracy", Metric(_accuracy, ("true", "false")))
register_metric("degeneracy", Metric(_degeneracy, words=_explained("degeneracy")))
register_metric("exact_memorization", Metric(_exact_memorization, words=_explained("exact_memorization")))
register_metric("extraction_strength", Metric(_extraction_strength, words=_explained("extraction_strength")))
