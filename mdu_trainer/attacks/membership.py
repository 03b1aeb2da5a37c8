"""Can it be told that the forget rows were trained on?

Each forget row is compared with the unseen rows: its score is the share of them that it outscores, ties counting half,
so the mean is the area under the ROC curve. Three scores of a row, all high for what was trained on:

- `loss`: the mean log-likelihood a token (Yeom et al., arXiv 1709.01604).
- `min-k`: that of its least likely tokens (Shi et al., arXiv 2310.16789).
- `multi-mask`: at how many of the mask sizes `SIZES` the masked tokens are likelier than the median of the unseen
  rows, as a vote.

The unseen rows must differ from the forget rows in nothing else, or any model tells them apart. The forget questions
with other answers do; other questions mostly do not, for a model recognises their names.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..evaluation.metrics import min_k_score, outscored, two_sided
from ..evaluation.metrics.privacy import DECIMALS
from ..evaluation.scoring import Question
from ..inference.likelihood import response_likelihood
from ..masking import counter_uniform
from ..models import evaluation_mode
from .base import AttackScores, Target, mean, strongest
from .results import TWO_SIDED

SIZES = (0.25, 0.5, 0.75, 1.0)  # shares of an answer's tokens that are masked


def attack(target: Target, seed: int) -> AttackScores:
    """Return the row scores under the one of the three that tells most; `path` holds the area under the curve of each.

    `before` is 1/2, a guess: nothing can be told without looking. An area below 1/2, of rows that stick out by being
    too unlikely, brings nothing back, but says that something was deleted: `path["two_sided"]` is the area of whoever
    guesses in the direction that tells most, under the score that tells most so.
    """
    unseen = target.settings.unseen
    sets = [target.questions, target.encode(unseen["question"], unseen)]
    likelihoods = [
        response_likelihood(
            target.model,
            [question.prompt for question in questions],
            [question.answers["answer"][0] for question in questions],
            target.backbone,
            num_draws=target.settings.num_draws,
            batch_size=target.settings.decoding.batch_size,
            seed=seed,
        )
        for questions in sets
    ]
    draws = max(1, target.settings.num_draws // len(SIZES))
    sizes = [masked_log_p(target, questions, seed, draws) for questions in sets]
    median = np.median(sizes[1], axis=0)
    scores = {
        "loss": [np.round(one.per_token, DECIMALS) for one in likelihoods],
        "min-k": [np.round(min_k_score(one.tokens), DECIMALS) for one in likelihoods],
        "multi-mask": [(one > median).sum(axis=1) for one in sizes],
    }
    shares = {name: outscored(*pair) for name, pair in scores.items()}
    areas = {name: mean(values) for name, values in shares.items()}
    name = max(areas, key=areas.__getitem__)
    path = areas | {TWO_SIDED: max(map(two_sided, areas.values()))}
    rows, reached_by = list(range(len(shares[name]))), strongest(areas)
    return AttackScores(rows, [0.5] * len(rows), shares[name], path, reached_by)


@torch.no_grad()
def masked_log_p(target: Target, questions: Sequence[Question], seed: int, draws: int) -> np.ndarray:
    """Return the mean log p of the masked tokens of each row at each of `SIZES`: `[rows, sizes]`, in nats.

    It is a mean over a few draws of the masks, each a forward pass. With 2 rows, 4 sizes and 4 draws the columns of
    `passes` are (row, size, draw) = (0, 0, 0), (0, 0, 1), ... (1, 3, 3).
    """
    values = np.zeros((len(questions), len(SIZES), draws))
    passes = np.stack(np.unravel_index(np.arange(values.size), values.shape))  # [3, passes]
    step = target.settings.decoding.batch_size
    with evaluation_mode(target.model):
        for first in range(0, values.size, step):
            row, size, draw = places = passes[:, first : first + step]
            masks = _SizedMasks(seed, torch.from_numpy(places))
            batch = target.collate(
                [
                    {"prompt_ids": one.prompt, "completion_ids": one.answers["answer"][0], "row": number, "visit": 0}
                    | {"weight": 1.0, "schedule": masks}
                    for number, one in enumerate(questions[i] for i in row)
                ]
            )
            values[row, size, draw] = -target.masked_nll(batch).cpu().numpy()
    return values.mean(axis=2).round(DECIMALS)


class _SizedMasks(NamedTuple):
    """Masks of each of `SIZES`, for the collator; `places` `[3, B]` are row, size and draw of each pass."""

    seed: int
    places: torch.Tensor

    def draw(self, visit: torch.Tensor, row: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        noise = counter_uniform(self.seed, *self.places[:, row, None], torch.arange(length))
        return torch.tensor(SIZES)[self.places[1, row]], noise, torch.zeros(len(row), dtype=torch.bool)
