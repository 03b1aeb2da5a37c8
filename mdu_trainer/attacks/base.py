"""What an attack takes and returns.

An attack tries to bring back what a model was made to forget, and scores each forget row before and after. Unless the
attack says otherwise the score is the recall of what only the answer says: ROUGE-L recall of the words that are
neither in the question nor wording that answers share. A model that never saw the row knows the rest all the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import RougeL, greedy_completions
from ..evaluation.scoring import Question, encode_questions
from ..evaluation.sources import check_texts
from ..generation import DiffusionGenerationConfig, generate_ids
from ..models import Backbone, resolve_backbone


@dataclass(frozen=True, kw_only=True, repr=False)
class AttackSettings:
    """How hard the attacks try. The same settings and seed are for every model of a comparison.

    Attributes:
        decoding: how answers are decoded; `max_new_tokens` must hold the longest answer and its end token.
        unseen: rows like the forget rows that no model was trained on (`question`, `answer`), for `membership`.
        unrelated: rows that have nothing to do with the forget rows (`question`, `answer`), for `relearn-benign`.
        relearn_share: share of the forget rows that `relearn-related` trains on.
        relearn_steps: updates of the fine-tuning attacks.
        relearn_learning_rate: of AdamW in the fine-tuning attacks.
        relearn_batch_size: rows an update of the fine-tuning attacks.
        reveal: share of an answer's tokens that `infill` reveals.
        prefix_words: words that `prefix` reveals.
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
    reveal: float = 0.5
    prefix_words: int = 3
    samples: int = 8
    temperature: float = 0.7
    num_draws: int = 16

    def __post_init__(self) -> None:
        for name in ("relearn_steps", "relearn_batch_size", "prefix_words", "samples", "num_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("relearn_share", "reveal"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        for name in ("relearn_learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("unseen", "unrelated"):
            if getattr(self, name) is not None:
                check_texts(getattr(self, name), name, {"question": str, "answer": str})


@dataclass(frozen=True, repr=False)
class Target:
    """A model under attack, and the rows it should not know.

    Attributes:
        model, tokenizer: a masked diffusion language model and its tokenizer.
        rows: the forget rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        settings: how answers are decoded, and how hard attacks try.

    Raises:
        ValueError: for no rows, blank ones, or answers longer than `max_new_tokens`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    settings: AttackSettings

    def __post_init__(self) -> None:
        check_texts(self.rows, "forget", {"question": str, "answer": str})
        longest, room = max(map(len, self.answer_ids)), self.settings.decoding.max_new_tokens
        if longest > room:
            raise ValueError(
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

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of the plain questions."""
        return [question.prompt for question in self.questions]

    @property
    def answer_ids(self) -> list[list[int]]:
        """Ids of the true answers, end token included."""
        return [question.answers["answer"][0] for question in self.questions]

    @cached_property
    def roles(self) -> list[list[str]]:
        """Of each answer's tokens, the end token included: "stored", "in_context" or "structural".

        What wording answers share is found over the settings' other rows, too.
        """
        from ..analysis.token_roles import label_roles

        others = [rows for rows in (self.settings.unseen, self.settings.unrelated) if rows is not None]
        questions, answers = (
            [text for rows in (self.rows, *others) for text in rows[column]] for column in ("question", "answer")
        )
        ids = self.answer_ids + [[]] * (len(answers) - len(self.rows))
        return label_roles(questions, answers, ids, self.tokenizer)[: len(self.rows)]

    @cached_property
    def secrets(self) -> list[str]:
        """What only the answer says, as text: its stored words. The whole answer where it has none."""
        texts = []
        for ids, roles, answer in zip(self.answer_ids, self.roles, self.rows["answer"], strict=True):
            runs = groupby(zip(ids, roles, strict=True), key=lambda token: token[1])
            stored = [self.tokenizer.decode([i for i, _ in run]) for role, run in runs if role == "stored"]
            texts.append(" ".join(stored) or answer)
        return texts

    @cached_property
    def plain(self) -> list[float]:
        """The score of each row with no attack at all: greedy decoding of the plain question."""
        return self.score(self.decode(self.prompts))

    @cached_property
    def completed(self) -> list[list[int]]:
        """Ids of each answer as greedy decoding completes it at its true length, from nothing."""
        return self.complete(range(len(self.rows)), None)

    def complete(self, rows: Sequence[int], revealed: Sequence[Sequence[bool]] | None) -> list[list[int]]:
        """Ids of the answers of some rows as greedy decoding completes them, where some of their tokens are revealed."""
        prompts, answers = [self.prompts[row] for row in rows], [self.answer_ids[row] for row in rows]
        size = self.settings.decoding.batch_size
        return greedy_completions(self.model, prompts, answers, self.backbone, revealed=revealed, batch_size=size)[0]

    def encode(self, prompts: Sequence[str], rows: Dataset | None = None) -> list[Question]:
        """Other wordings of the rows' questions, with the rows' answers; or other rows."""
        answers = [[text] for text in (rows or self.rows)["answer"]]
        return encode_questions("attacked", prompts, answers, {"answer": answers}, self.tokenizer, self.backbone)

    def decode(self, prompt_ids: list[list[int]], **changes: Any) -> list[str]:
        """Decoded answers, one a prompt; changes are of the settings' decoding."""
        config = replace(self.settings.decoding, **changes)
        decoded = generate_ids(self.model, prompt_ids, config, self.backbone)
        return self.tokenizer.batch_decode(decoded, skip_special_tokens=True)

    def score(self, answers: list[str], rows: Sequence[int] | None = None) -> list[float]:
        """Recall of each answer against what only the row's answer says; of some rows, if given."""
        secrets = self.secrets if rows is None else [self.secrets[row] for row in rows]
        return RougeL().compute(predictions=answers, references=secrets, use_aggregator=False)["rougeL_recall"]


@dataclass(frozen=True)
class AttackScores:
    """Scores of the rows, higher where more came back. Figures only.

    Attributes:
        rows: row numbers of the forget set that were scored.
        before: score of each of these rows with no attack.
        after: score of each under the attack.
        path: what was measured along the way, as name -> mean score: updates of a fine-tuning, ways of decoding, ...
    """

    rows: list[int]
    before: list[float]
    after: list[float]
    path: dict[str, float] = field(default_factory=dict)


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def worst_case(target: Target, tries: dict[str, list[float]]) -> AttackScores:
    """Scores of all rows where several ways were tried: of each row, the most that came back in any of them."""
    after = [max(scores) for scores in zip(*tries.values(), strict=True)]
    return AttackScores(
        list(range(len(after))), target.plain, after, {name: mean(scores) for name, scores in tries.items()}
    )


@contextmanager
def restored(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put back the values of these tensors afterwards, to the bit."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
