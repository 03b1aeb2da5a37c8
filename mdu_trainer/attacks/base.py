"""What an attack takes and returns.

An attack tries to bring back what a model was made to forget, and scores each forget row before and after. The score
is ROUGE-L recall of the decoded answer unless the attack says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import RougeL
from ..evaluation.scoring import Question, encode_questions
from ..generation import DiffusionGenerationConfig, generate_ids
from ..models import Backbone, resolve_backbone


@dataclass(frozen=True, kw_only=True, repr=False)
class AttackSettings:
    """How hard the attacks try. The same settings and seed are for every model of a comparison.

    Attributes:
        decoding: how answers are decoded; `max_new_tokens` must hold the longest answer and its end token.
        unseen: rows like the forget rows that no model was trained on (`question`, `answer`), for `membership`.
        unrelated: rows that have nothing to do with the forget rows (`question`, `answer`), for `relearn-benign`.
        relearn_share: share of the forget rows that `relearn` trains on.
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


@dataclass(frozen=True, repr=False)
class Target:
    """A model under attack, and the rows it should not know.

    Attributes:
        model, tokenizer: a masked diffusion language model and its tokenizer.
        rows: the forget rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        settings: how answers are decoded, and how hard attacks try.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    settings: AttackSettings

    @cached_property
    def backbone(self) -> Backbone:
        """Facts of the model."""
        return resolve_backbone(self.model, self.tokenizer)

    @cached_property
    def questions(self) -> list[Question]:
        """The rows, tokenised: chat turns if the tokenizer has a chat template."""
        return self.encode(self.rows["question"])

    @cached_property
    def plain(self) -> list[float]:
        """The score of each row with no attack at all: greedy decoding of the plain question."""
        return self.score(self.decode([question.prompt for question in self.questions]))

    def encode(self, prompts: list[str]) -> list[Question]:
        """Other wordings of the rows' questions, with the rows' answers."""
        answers = list(self.rows["answer"])
        texts = [[text] for text in answers]
        return encode_questions("forget", prompts, texts, {"answer": texts}, self.tokenizer, self.backbone)

    def decode(self, prompt_ids: list[list[int]], decoding: DiffusionGenerationConfig | None = None) -> list[str]:
        """Decoded answers, one a prompt."""
        decoded = generate_ids(self.model, prompt_ids, decoding or self.settings.decoding, self.backbone)
        return self.tokenizer.batch_decode(decoded, skip_special_tokens=True)

    def score(self, answers: list[str]) -> list[float]:
        """ROUGE-L recall of each answer against the row's."""
        scores = RougeL().compute(predictions=answers, references=list(self.rows["answer"]), use_aggregator=False)
        return scores["rougeL_recall"]


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


class Attack(NamedTuple):
    """An attack, as it is registered.

    Attributes:
        run: `(target, seed) -> AttackScores`. It leaves the model as it was.
        words: what it does, in a line for tables and cards.
        needs: settings that must not be None, and "adapter" for a model that must have one.
    """

    run: Callable[[Target, int], AttackScores]
    words: str
    needs: tuple[str, ...] = ()
