"""Can it be told that the forget rows were trained on?

Each forget row is compared with the unseen rows: its score is the share of them that it outscores, ties counting half,
so the mean is the area under the ROC curve. Four scores of a row, all high for what was trained on:

- `loss`: the mean log-likelihood a token (Yeom et al., arXiv 1709.01604).
- `min-k`: that of its least likely tokens (Shi et al., arXiv 2310.16789).
- `min-k++`: that of its least likely tokens, of log-likelihoods standardised over the vocabulary (Zhang et al., arXiv
  2404.02936).
- `multi-mask`: at how many of the mask sizes `SIZES` the masked tokens are likelier than the median of the unseen
  rows, as a vote.

The unseen rows must differ from the forget rows in nothing else, or any model tells them apart. The forget questions
with other answers do; other questions mostly do not, for a model recognises their names.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ..evaluation.metrics import min_k_score, outscored, two_sided
from ..evaluation.metrics.privacy import DECIMALS
from ..evaluation.scoring import Question
from ..masking import counter_uniform, forward_process
from ..models import evaluation_mode, logits_at
from .base import AttackScores, Target, mean, strongest
from .changes import trained_alone
from .results import TWO_SIDED

LEAST_VARIANCE = 1e-6  # of the log-likelihoods of a prediction that is all but certain
SIZES = (0.25, 0.5, 0.75, 1.0)  # shares of an answer's tokens that are masked


def attack(target: Target, seed: int) -> AttackScores:
    """Return the row scores under the one of the four that tells most; `path` holds the area under the curve of each.

    `before` is 1/2, a guess: nothing can be told without looking. An area below 1/2, of rows that stick out by being
    too unlikely, brings nothing back, but says that something was deleted: `path["two_sided"]` is the area of whoever
    guesses in the direction that tells most, under the score that tells most so.
    """
    unseen = target.settings.unseen
    sets = [target.questions, target.encode(unseen["question"], unseen)]
    log_p = [target.log_p(questions, seed) for questions in sets]
    draws = max(1, target.settings.num_draws // len(SIZES))
    sizes = [masked_log_p(target, questions, seed, draws) for questions in sets]
    median = np.median(sizes[1], axis=0)
    scores = {
        "loss": [np.round([tokens.mean() for tokens in one], DECIMALS) for one in log_p],
        "min-k": [np.round(min_k_score(one), DECIMALS) for one in log_p],
        "min-k++": [np.round(min_k_score(standardised_log_p(target, one, seed)), DECIMALS) for one in sets],
        "multi-mask": [(one > median).sum(axis=1) for one in sizes],
    }
    shares = {name: outscored(*pair) for name, pair in scores.items()}
    areas = {name: mean(values) for name, values in shares.items()}
    name = max(areas, key=areas.__getitem__)
    path = areas | {TWO_SIDED: max(map(two_sided, areas.values()))}
    rows, reached_by = list(range(len(shares[name]))), strongest(areas)
    return AttackScores(rows, [0.5] * len(rows), shares[name], path, reached_by)


def masked_log_p(target: Target, questions: Sequence[Question], seed: int, draws: int) -> np.ndarray:
    """Return the mean log p of the masked tokens of each row at each of `SIZES`: `[rows, sizes]`, in nats.

    It is a mean over a few draws of the masks, each a forward pass.
    """
    values = np.zeros((len(questions), len(SIZES), draws))
    for places, log_p in _over_passes(target, questions, seed, draws, lambda batch: -target.masked_nll(batch)):
        values[tuple(places)] = log_p
    return values.mean(axis=2).round(DECIMALS)


def standardised_log_p(target: Target, questions: Sequence[Question], seed: int) -> list[np.ndarray]:
    """Return the standardised log p of each token of each row, a mean over the passes that mask it: R arrays `[L]`.

    A row has a pass for each of `SIZES`, of which the last masks all of its tokens.
    """
    lengths = [len(question.answers["answer"][0]) for question in questions]
    total, count = (np.zeros((len(questions), max(lengths))) for _ in range(2))

    def masked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Place in the batch, number in the answer and value of each masked token: `[3, N]`."""
        noised = forward_process(batch, target.backbone.mask_token_id)
        where = (noised.input_ids, noised.attention_mask, noised.masked)
        logits = logits_at(target.model, *where, logit_shift=target.backbone.logit_shift)
        place, position = noised.masked.nonzero(as_tuple=True)
        token = position - (batch["completion_mask"].argmax(dim=1))[place]
        return torch.stack([place.float(), token.float(), standardised(logits, noised.targets)])

    for (rows, *_), (place, token, value) in _over_passes(target, questions, seed, 1, masked):
        at = rows[place.astype(int)], token.astype(int)
        np.add.at(total, at, value)
        np.add.at(count, at, 1)
    return [total[row, :length] / count[row, :length] for row, length in enumerate(lengths)]


def gradient_norms(target: Target, questions: Sequence[Question], seed: int) -> list[float]:
    """Return the L2 norm of the gradient of each row's loss with respect to all weights, low for what was trained on.

    The loss is a mean over `SIZES`. Negated, the norms are scores of membership for `MembershipInference`; the attack
    leaves them out, for they cost a backward pass a row. Source: Pang et al. (arXiv 2308.06405), of image diffusion.
    """
    parameters = [p for p in target.model.parameters() if p.is_floating_point()]
    norms = []
    with trained_alone(target.model, parameters), torch.enable_grad():
        for question in questions:
            losses = [
                target.masked_nll(_masked_batch(target, [question], seed, places)).sum()
                for places in _passes(target, [question], draws=1)
            ]
            gradient = torch.autograd.grad(sum(losses) / len(SIZES), parameters, allow_unused=True)
            norms.append(sum(float(part.float().square().sum()) for part in gradient if part is not None) ** 0.5)
    return norms


def standardised(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (log p_y - E log p) / sd(log p) of each target y, expectation and spread over the vocabulary by p: `[N]`.

    Args:
        logits: `[N, V]`.
        targets: `[N]`.
    """
    log_p = logits.float().log_softmax(dim=-1)
    p = log_p.exp()
    mean = (p * log_p).sum(dim=-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(dim=-1)
    return (log_p.gather(1, targets[:, None])[:, 0] - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()


def _over_passes(
    target: Target,
    questions: Sequence[Question],
    seed: int,
    draws: int,
    measure: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of the passes over each row at each of `SIZES` places `[3, B]` and what is measured, batches shared."""

    @torch.no_grad()
    def measured(places: np.ndarray) -> np.ndarray:
        with evaluation_mode(target.model):
            return measure(_masked_batch(target, questions, seed, places)).cpu().numpy()

    batches = _passes(target, questions, draws)
    yield from zip(batches, target.share([partial(measured, places) for places in batches]), strict=True)


def _passes(target: Target, questions: Sequence[Question], draws: int) -> list[np.ndarray]:
    """Return the places of the passes of each batch: `[3, B]`.

    With 2 rows, 4 sizes and 4 draws their columns are (row, size, draw) = (0, 0, 0), (0, 0, 1), ... (1, 3, 3).
    """
    shape = len(questions), len(SIZES), draws
    passes = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape))  # [3, passes]
    step = target.settings.decoding.batch_size
    return [passes[:, first : first + step] for first in range(0, passes.shape[1], step)]


def _masked_batch(
    target: Target, questions: Sequence[Question], seed: int, places: np.ndarray
) -> dict[str, torch.Tensor]:
    """Return the batch of some passes."""
    masks = _SizedMasks(seed, torch.from_numpy(places))
    return target.collate(
        [
            {"prompt_ids": one.prompt, "completion_ids": one.answers["answer"][0], "row": number, "visit": 0}
            | {"weight": 1.0, "schedule": masks}
            for number, one in enumerate(questions[i] for i in places[0])
        ]
    )


class _SizedMasks(NamedTuple):
    """Masks of each of `SIZES`, for the collator; `places` `[3, B]` are row, size and draw of each pass."""

    seed: int
    places: torch.Tensor
    block_size: None = None  # one share a row

    def draw(self, visit: torch.Tensor, row: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        noise = counter_uniform(self.seed, *self.places[:, row, None], torch.arange(length))
        return torch.tensor(SIZES)[self.places[1, row]], noise, torch.zeros(len(row), dtype=torch.bool)
