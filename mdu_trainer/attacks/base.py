"""The base of all attacks: what they take, and what they return.

An attack tries to bring back what a model was made to forget, and scores each forget row before and after. Unless the
attack says otherwise the score is the recall of what only the answer says: ROUGE-L recall of the words that are
neither in the question nor wording that answers share. A model that never saw the row knows the rest all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.roles import Role, label_roles
from ..data.rows import DataCollatorForUnlearning
from ..data.spans import token_spans
from ..data.texts import is_plain
from ..data.word_keys import words
from ..data.words import has_words
from ..divergence import TokenNLL
from ..evaluation.metrics import RougeL, greedy_completions
from ..evaluation.scoring import Question, encode_questions
from ..evaluation.sources import check_columns
from ..files import UserError
from ..inference.generation import DiffusionGenerationConfig, generate_ids
from ..inference.likelihood import response_likelihood
from ..masking import forward_process
from ..models import Backbone, measure_at, resolve_backbone
from ..objectives import sum_by_example
from .sharing import one_by_one, parts

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, repr=False)
class AttackSettings:
    """Settings that say how hard the attacks try, the same for every model of a comparison.

    Attributes:
        decoding: how answers are decoded; `max_new_tokens` must hold the longest answer and its end token.
        unseen: rows that no model was trained on and that differ from the forget rows in nothing else (`question`,
            `answer`), for `membership`: the forget questions with other answers, say.
        unrelated: rows that have nothing to do with the forget rows (`question`, `answer`), for `relearn-benign`.
        relearn_share: share of the forget rows that relearning trains on, but for `relearn-benign`.
        relearn_steps: updates of the fine-tuning attacks.
        relearn_learning_rate: of AdamW in the fine-tuning attacks: `relearn-related` tries a decade around it, and
            `relearn-lora` takes three and ten times as much.
        relearn_batch_size: rows an update of the fine-tuning attacks.
        reveal: share of an answer's tokens that `infill` reveals.
        prefix_words: words that `prefix` reveals; characters in scripts without spaces.
        samples: k of leak@k.
        temperature: of the samples.
        num_draws: forward passes for a likelihood.
    """

    decoding: DiffusionGenerationConfig
    unseen: Dataset | None = None
    unrelated: Dataset | None = None
    relearn_share: float = 0.5
    relearn_steps: int = 40
    relearn_learning_rate: float = 1e-4
    relearn_batch_size: int = 8
    reveal: float = 0.25
    prefix_words: int = 3
    samples: int = 8
    temperature: float = 1.0
    num_draws: int = 16

    def __post_init__(self) -> None:
        for name in ("relearn_steps", "relearn_batch_size", "prefix_words", "samples", "num_draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("relearn_share", "reveal"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        for name in ("relearn_learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("unseen", "unrelated"):
            if getattr(self, name) is not None:
                check_columns(getattr(self, name), name, {"question": str, "answer": str})


class NothingToAttack(UserError):
    """An attack suits none of the rows: there is nothing that it could bring back. No other failure is this."""


class StoredWord(NamedTuple):
    """A word that only the answer says, and the numbers of the answer's tokens that it is in."""

    text: str
    tokens: list[int]


@dataclass(frozen=True, repr=False)
class Target:
    """A model under attack, and the rows it should not know.

    Attributes:
        model, tokenizer: a masked diffusion language model and its tokenizer.
        rows: the forget rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        settings: how answers are decoded, and how hard attacks try.
        share: does tasks that do not depend on each other, and returns what each gives, in order: over the processes
            of a launch, which must all come here. What the target keeps, as `plain`, is to be asked outside of tasks.

    Raises:
        ValueError: for no rows, blank ones, answers that cannot be scored, or answers longer than `max_new_tokens`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    settings: AttackSettings
    share: Callable[[Sequence[Callable[[], Any]]], list[Any]] = one_by_one

    def __post_init__(self) -> None:
        check_answers(self.rows)
        longest, room = max(map(len, self.answer_ids)), self.settings.decoding.max_new_tokens
        if longest > room:
            raise UserError(
                f"The longest answer has {longest} tokens with its end token, and max_new_tokens is {room}: raise it, "
                "or what came back is cut off."
            )

    @cached_property
    def backbone(self) -> Backbone:
        """Facts of the model."""
        return resolve_backbone(self.model, self.tokenizer)

    @cached_property
    def questions(self) -> list[Question]:
        """The rows, tokenised: chat turns if the tokenizer has a chat template."""
        return self.encode(self.rows["question"])

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Ids of the plain questions."""
        return [question.prompt for question in self.questions]

    @cached_property
    def answer_ids(self) -> list[list[int]]:
        """Ids of the true answers, end token included."""
        return [question.answers["answer"][0] for question in self.questions]

    @cached_property
    def answer_roles(self) -> list[list[Role]]:
        """The role of each token of the answers, but for their ends: "stored", "in_context" or "structural".

        The wording that answers share is found over the settings' other rows, too.
        """
        others = [rows for rows in (self.settings.unseen, self.settings.unrelated) if rows is not None]
        questions, answers = (
            [text for rows in (self.rows, *others) for text in rows[column]] for column in ("question", "answer")
        )
        ends = self.backbone.end_token_ids
        own = [list(takewhile(lambda token: token not in ends, ids)) for ids in self.answer_ids]
        ids = own + [[]] * (len(answers) - len(own))
        return label_roles(questions, answers, ids, self.tokenizer)[: len(own)]

    @cached_property
    def stored(self) -> list[list[StoredWord]]:
        """The stored words of each answer."""
        found: list[list[StoredWord]] = []
        for answer, ids, roles in zip(self.rows["answer"], self.answer_ids, self.answer_roles, strict=True):
            found.append([])
            spans = token_spans(answer, ids[: len(roles)], self.tokenizer)
            for word in words(answer):
                tokens = [i for i, (start, stop) in enumerate(spans) if start < word.stop and stop > word.start]
                if any(roles[i] == "stored" for i in tokens):
                    found[-1].append(StoredWord(answer[word.start : word.stop], tokens))
        return found

    @cached_property
    def secrets(self) -> list[str]:
        """The part of each answer that is scored: its stored words, or all of it where it has none."""
        return [said(words) or answer for words, answer in zip(self.stored, self.rows["answer"], strict=True)]

    @cached_property
    def plain(self) -> list[float]:
        """The score of each row with no attack at all: greedy decoding of the plain question."""
        return self.score(self.plain_answers)

    @cached_property
    def plain_answers(self) -> list[str]:
        """The greedy answers to the plain questions. Private, as the rows are."""
        return self.decode(self.prompts)

    @cached_property
    def completed(self) -> list[str]:
        """Each answer as greedy decoding completes it at its true length, from nothing. Private, as the rows are."""
        return self.complete(range(len(self.rows)), None)

    def ask(self, **changes: Any) -> list[float]:
        """Return the score of each row when its plain question is decoded with changes of the settings' decoding."""
        return self.score(self.decode(self.prompts, **changes))

    def complete(self, rows: Sequence[int], revealed: Sequence[Sequence[bool]] | None) -> list[str]:
        """Return the answers of some rows as greedy decoding completes them, with some of their tokens revealed."""
        prompts, answers = [self.prompts[row] for row in rows], [self.answer_ids[row] for row in rows]
        shown = [[]] * len(answers) if revealed is None else revealed
        return self.tokenizer.batch_decode(self.complete_ids(prompts, answers, shown), skip_special_tokens=True)

    def complete_ids(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], revealed: Sequence[Sequence[bool]]
    ) -> list[list[int]]:
        """Return the ids of answers as `greedy_completions` decodes them, without their ends."""

        def completed(rows: list[int]) -> list[list[int]]:
            asked, true, shown = ([of[row] for row in rows] for of in (prompts, answers, revealed))
            size = self.settings.decoding.batch_size
            return greedy_completions(self.model, asked, true, self.backbone, revealed=shown, batch_size=size)[0]

        return self.in_parts(list(map(len, answers)), completed)

    def log_p(self, questions: Sequence[Question], seed: int) -> list[np.ndarray]:
        """Return the log p of each token of each answer, as `response_likelihood` estimates it: R arrays `[L]`."""
        prompts, answers = [one.prompt for one in questions], [one.answers["answer"][0] for one in questions]
        size, draws = self.settings.decoding.batch_size, self.settings.num_draws

        def estimated(rows: list[int]) -> list[np.ndarray]:
            pairs = [prompts[row] for row in rows], [answers[row] for row in rows]
            how = {"num_draws": draws, "batch_size": size, "seed": seed}
            return response_likelihood(self.model, *pairs, self.backbone, **how).tokens

        return self.in_parts([len(a) + len(b) for a, b in zip(prompts, answers, strict=True)], estimated)

    def in_parts(self, lengths: Sequence[int], compute: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return what is computed of each row, in parts that are shared; at most a batch of rows each.

        Args:
            lengths: of each row, in tokens.
            compute: numbers of some rows -> what is computed of each.
        """
        dealt = parts(lengths, self.settings.decoding.batch_size)
        found: dict[int, T] = {}
        for rows, values in zip(dealt, self.share([partial(compute, rows) for rows in dealt]), strict=True):
            found |= zip(rows, values, strict=True)
        return [found[row] for row in range(len(lengths))]

    def encode(self, prompts: Sequence[str], rows: Dataset | None = None) -> list[Question]:
        """Tokenise other wordings of the rows' questions, with the rows' answers; or other rows."""
        rows = self.rows if rows is None else rows
        answers, plain = [[text] for text in rows["answer"]], is_plain(rows)
        asked = (prompts, answers, {"answer": answers})
        return encode_questions("attacked", *asked, self.tokenizer, self.backbone, plain=plain)

    def decode(self, prompt_ids: list[list[int]], **changes: Any) -> list[str]:
        """Return decoded answers, one a prompt; changes are of the settings' decoding."""
        config = replace(self.settings.decoding, **changes)

        def decoded(rows: list[int]) -> list[list[int]]:
            return generate_ids(self.model, [prompt_ids[row] for row in rows], config, self.backbone, row_ids=rows)

        return self.tokenizer.batch_decode(
            self.in_parts(list(map(len, prompt_ids)), decoded), skip_special_tokens=True
        )

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows as `RowPairs` gives them to a batch on the model's device."""
        batch = DataCollatorForUnlearning(self.backbone.pad_token_id)([{"rows": row} for row in rows])["rows"]
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    def masked_nll(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy of the masked tokens of each response: `[B]`, in nats."""
        noised = forward_process(batch, self.backbone.mask_token_id)
        where, measure = (noised.input_ids, noised.attention_mask, noised.masked), TokenNLL(noised.targets)
        nll = measure_at(self.model, *where, measure, **self.backbone.form(noised.clean_ids))
        return sum_by_example(nll.value, noised.batch_index, len(noised.masked)) / noised.num_masked

    def score(self, answers: list[str], rows: Sequence[int] | None = None) -> list[float]:
        """Return the recall of each answer against what only the row's answer says; of some rows, if given."""
        return recall(answers, self.secrets if rows is None else [self.secrets[row] for row in rows])


def unscorable(rows: Dataset) -> list[int]:
    """Return the numbers of the rows whose answer holds no word of any script, so that nothing can come back."""
    return [row for row, answer in enumerate(rows["answer"]) if not has_words(answer)]


def check_answers(rows: Dataset) -> None:
    """Refuse forget rows that cannot be asked or scored, before any model is loaded.

    Raises:
        ValueError: as `check_columns`, and for answers that cannot be scored.
    """
    check_columns(rows, "forget", {"question": str, "answer": str})
    without = unscorable(rows)
    if without:
        raise UserError(
            f"Row {without[0]} of the forget set cannot be scored, as {len(without)} of {len(rows)} rows: the answer "
            "holds no word, number or emoji to compare. Remove such rows."
        )


@dataclass(frozen=True)
class AttackScores:
    """Scores of the rows, higher where more came back. Numbers only.

    Attributes:
        rows: row numbers of the forget set that were scored.
        before: score of each of these rows with no attack.
        after: score of each under the attack.
        path: what was measured along the way, as name -> mean score: updates of a fine-tuning, ways of decoding, ...
        reached_by: the one of the path that brought back most by itself, where several were tried; "" if none did
            better than the others.
        log_p: of `membership`, two lists: the mean log-likelihood a token of each forget row, and of each unseen row,
            to be compared with another model's.
    """

    rows: list[int]
    before: list[float]
    after: list[float]
    path: dict[str, float] = field(default_factory=dict)
    reached_by: str = ""
    log_p: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.before) == len(self.after) > 0:
            raise UserError(
                f"An attack gives two scores, before and after, for each row that it scored: {len(self.rows)} rows, "
                f"{len(self.before)} and {len(self.after)} scores."
            )


def said(words: Sequence[StoredWord]) -> str:
    """Return the words as a text."""
    return " ".join(word.text for word in words)


def recall(answers: list[str], secrets: list[str]) -> list[float]:
    """Return how much of each secret an answer says: ROUGE-L recall."""
    return RougeL().compute(predictions=answers, references=secrets, use_aggregator=False)["rougeL_recall"]


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def worst_case(target: Target, tries: dict[str, list[float]], rows: Sequence[int] | None = None) -> AttackScores:
    """Return scores where several ways were tried: of each row, the most that came back in any of them.

    Args:
        target: the model and its rows.
        tries: way -> score of each row.
        rows: the rows that were scored; all of them unless given.
    """
    rows = list(range(len(target.rows))) if rows is None else list(rows)
    after = [max(scores) for scores in zip(*tries.values(), strict=True)]
    path = {name: mean(scores) for name, scores in tries.items()}
    return AttackScores(rows, [target.plain[row] for row in rows], after, path, strongest(path))


def strongest(path: dict[str, float]) -> str:
    """Return the name of the highest value, "" if all are the same.

    >>> strongest({"0.5": 0.1, "2": 0.3})
    '2'
    """
    return "" if min(path.values()) == max(path.values()) else max(path, key=path.__getitem__)
