"""Can it be told that the forget rows were trained on?

Each forget row is compared with the unseen rows: its score is the share of them that it outscores, ties counting half,
so the mean is the area under the ROC curve. Six scores of a row, all high for what was trained on:

- `loss`: the mean log-likelihood a token (Yeom et al., arXiv 1709.01604).
- `zlib`: that over the bytes that the answer packs into (Carlini et al., arXiv 2012.07805).
- `min-k`: that of its least likely tokens (Shi et al., arXiv 2310.16789).
- `min-k++`: that of its least likely tokens, of log-likelihoods standardised over the vocabulary (Zhang et al., arXiv
  2404.02936).
- `multi-mask`: at how many of the mask sizes `SIZES` the masked tokens are likelier than the median of the unseen
  rows, as a vote. Masks of many sizes are what Chen et al. (arXiv 2601.20125) attack diffusion language models with.
- `gradient`: how small the gradient of the loss is (Wang et al., arXiv 2402.17012).

The unseen rows must differ from the forget rows in nothing else, or any model tells them apart. The forget questions
with other answers do; other questions mostly do not, for a model recognises their names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ..evaluation.metrics import min_k_score, outscored, privacy_score, reference_score, two_sided, zlib_score
from ..evaluation.metrics.privacy import DECIMALS
from ..evaluation.scoring import Question
from ..masking import counter_uniform, forward_process
from ..models import evaluation_mode, logits_at
from .base import AttackScores, Target, mean, strongest
from .changes import trained_alone
from .results import NEVER, PRIVACY, REFERENCE, TWO_SIDED

LEAST_VARIANCE = 1e-6  # of the log-likelihoods of a prediction that is all but certain
SIZES = (0.25, 0.5, 0.75, 1.0)  # shares of an answer's tokens that are masked
OF_PRIVACY = ("loss", "zlib", "min-k", "min-k++")  # scores whose areas OpenUnlearning's privacy score aggregates


def attack(target: Target, seed: int) -> AttackScores:
    """Return the row scores under the one of the six that tells most; `path` holds the area under the curve of each.

    `before` is 1/2, a guess: nothing can be told without looking. An area below 1/2, of rows that stick out by being
    too unlikely, brings nothing back, but says that something was deleted: `path["two_sided"]` is the area of whoever
    guesses in the direction that tells most, under the score that tells most so.
    """
    unseen = target.settings.unseen
    sets = [target.questions, target.encode(unseen["question"], unseen)]
    tokens = [target.log_p(questions, seed) for questions in sets]
    draws = max(1, target.settings.num_draws // len(SIZES))
    sizes = [masked_log_p(target, questions, seed, draws) for questions in sets]
    median = np.median(sizes[1], axis=0)
    log_p = [np.round([row.mean() for row in one], DECIMALS).tolist() for one in tokens]
    texts = target.rows["answer"], unseen["answer"]
    scores = {
        "loss": log_p,
        "zlib": [zlib_score(*pair) for pair in zip(log_p, texts, strict=True)],
        "min-k": [np.round(min_k_score(one), DECIMALS) for one in tokens],
        "min-k++": [np.round(min_k_score(standardised_log_p(target, one, seed)), DECIMALS) for one in sets],
        "multi-mask": [(one > median).sum(axis=1) for one in sizes],
        "gradient": [-np.round(gradient_norms(target, questions, seed), DECIMALS) for questions in sets],
    }
    shares = {name: outscored(*pair) for name, pair in scores.items()}
    areas = {name: mean(values) for name, values in shares.items()}
    name = max(areas, key=areas.__getitem__)
    path = areas | {TWO_SIDED: max(map(two_sided, areas.values()))}
    rows, reached_by = list(range(len(shares[name]))), strongest(areas)
    return AttackScores(rows, [0.5] * len(rows), shares[name], path, reached_by, log_p)


def beside_never_trained(scores: Mapping[str, AttackScores]) -> dict[str, AttackScores]:
    """Return the scores of all models under an attack, and what a model that never saw the rows adds to their `path`.

    - `reference`: the two-sided area of whoever has that model, too, and takes its log-likelihoods off.
    - `privacy`: `privacy_score`, how near the areas of `OF_PRIVACY` are to those on that model.

    Scores of other attacks, and those without such a model, are left as they are.

    Args:
        scores: name of a model -> its scores under the attack.
    """
    never = scores.get(NEVER)
    if never is None or not never.log_p:
        return dict(scores)
    found = dict(scores)
    for name in scores.keys() - {NEVER}:
        one = scores[name]
        pairs = zip(one.log_p, never.log_p, strict=True)
        above = [np.round(reference_score(*pair), DECIMALS) for pair in pairs]
        areas, others = ({score: path[score] for score in OF_PRIVACY} for path in (one.path, never.path))
        further = {REFERENCE: two_sided(mean(outscored(*above))), PRIVACY: privacy_score(areas, others)}
        found[name] = replace(one, path=one.path | further)
    return found


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

    The loss is a mean over `SIZES`, so a row costs one backward pass of as many sequences. No more than the gradient
    of one tensor is held at a time. Source: Wang et al. (arXiv 2402.17012), of language models; Pang et al. (arXiv
    2308.06405) have the loss averaged over noise levels, of image diffusion, and train a classifier on the norms.
    """
    parameters = [p for p in target.model.parameters() if p.is_floating_point()]
    places = _passes(target, questions, draws=1, at_once=len(SIZES))
    with trained_alone(target.model, parameters):
        return target.share([partial(_gradient_norm, target, questions, seed, one, parameters) for one in places])


@torch.enable_grad()
def _gradient_norm(
    target: Target,
    questions: Sequence[Question],
    seed: int,
    places: np.ndarray,
    parameters: Sequence[torch.nn.Parameter],
) -> float:
    squares = []

    def take(p: torch.Tensor) -> None:
        squares.append(0.0 if p.grad is None else p.grad.float().square().sum().item())
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(take) for p in parameters]
    try:
        target.masked_nll(_masked_batch(target, questions, seed, places)).mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(squares) ** 0.5


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


def _passes(target: Target, questions: Sequence[Question], draws: int, at_once: int | None = None) -> list[np.ndarray]:
    """Return the places `[3, B]` of the passes of each batch, which has `at_once` of them, or the usual size.

    With 2 rows, 4 sizes and 4 draws their columns are (row, size, draw) = (0, 0, 0), (0, 0, 1), ... (1, 3, 3).
    """
    shape = len(questions), len(SIZES), draws
    passes = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape))  # [3, passes]
    step = at_once or target.settings.decoding.batch_size
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
