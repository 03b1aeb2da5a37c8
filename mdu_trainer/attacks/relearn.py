"""Fine-tune for a few steps: what comes back was not forgotten, only hidden.

What is fine-tuned: all floating-point parameters, adapters included, for an attacker holds the weights. Every update
is AdamW's on the masked-diffusion loss, averaged over the masked tokens of a row. Source: Lynch et al. (arXiv
2402.16835), Hu et al. (arXiv 2406.13356), Łucki et al. (arXiv 2409.18025).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..data.rows import RowPairs, TokenizedRows, shuffled
from ..evaluation.scoring import Question
from ..files import UserError
from ..masking import MaskSchedule, permutation
from ..models import evaluation_mode
from .base import AttackScores, Target, mean, restored

CHECKS = 4  # scores along the way


def related(target: Target, seed: int) -> AttackScores:
    """Fine-tune on some of the forget rows, and score the others.

    So that every row is scored once, the rows are dealt to as many rounds as `relearn_share` leaves room for, and each
    round starts anew from the model and trains on a share of the rows it does not score. `after` is the score at the
    last update, `path` the mean score along the way.

    Raises:
        ValueError: for a share that leaves no row to train on, or none to score.
    """
    order = permutation(seed, 0, len(target.rows)).tolist()
    trained = round(len(order) * target.settings.relearn_share)
    held_out = len(order) - trained
    if not (trained and held_out):
        raise UserError(
            f"relearn-related trains on {trained} of {len(order)} forget rows and scores {held_out}: give more."
        )
    paths: list[dict[str, list[float]]] = []
    scored: list[int] = []
    for first in range(0, len(order), held_out):
        rows = order[first : first + held_out]
        others = (order[first + held_out :] + order[:first])[:trained]
        paths.append(_relearn(target, [target.questions[row] for row in others], rows, seed + len(scored)))
        scored += rows
    return _scores(target, scored, paths)


def benign(target: Target, seed: int) -> AttackScores:
    """Fine-tune on unrelated rows, and score all forget rows, at the last update; `path` has those along the way."""
    unrelated = target.settings.unrelated
    questions = target.encode(unrelated["question"], unrelated)
    rows = list(range(len(target.rows)))
    return _scores(target, rows, [_relearn(target, questions, rows, seed)])


def _scores(target: Target, rows: list[int], paths: list[dict[str, list[float]]]) -> AttackScores:
    """Join the rows of all rounds, in their order."""
    path = {step: [score for part in paths for score in part[step]] for step in paths[0]}
    after = dict(sorted(zip(rows, list(path.values())[-1], strict=True)))
    means = {step: mean(scores) for step, scores in path.items()}
    return AttackScores(list(after), [target.plain[row] for row in after], list(after.values()), means)


def _relearn(target: Target, questions: list[Question], rows: list[int], seed: int) -> dict[str, list[float]]:
    """Return the scores of some rows after each few updates on others: number of updates -> scores."""
    steps, prompts = target.settings.relearn_steps, [target.prompts[row] for row in rows]
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)} - {0}
    path = {}
    with _trainable(target.model) as parameters:
        for step in _updates(target, questions, parameters, seed):
            if step in checks:
                path[str(step)] = target.score(target.decode(prompts), rows)
    return path


def _updates(target: Target, questions: list[Question], parameters: list[nn.Parameter], seed: int) -> Iterator[int]:
    """Train, and yield the number of updates so far after each."""
    settings, size = target.settings, target.settings.relearn_batch_size
    parts = TokenizedRows([q.prompt for q in questions], [q.answers["answer"][0] for q in questions])
    rows = RowPairs({"train": parts}, seed, shuffled, {"train": MaskSchedule(seed, "relearn", len(parts))})
    optimizer = torch.optim.AdamW(parameters, lr=settings.relearn_learning_rate, weight_decay=0.0)
    for step in range(settings.relearn_steps):
        batch = target.collate([rows[counter]["train"] for counter in range(step * size, (step + 1) * size)])
        with torch.enable_grad():
            target.masked_nll(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


@contextmanager
def _trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters, ready to be trained without dropout; everything is as it was afterwards."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    state = [(p, p.requires_grad, p.grad) for p in parameters]
    with evaluation_mode(model), restored(parameters):
        try:
            for p in parameters:
                p.requires_grad_(True)
                p.grad = None
            yield parameters
        finally:
            for p, requires_grad, grad in state:
                p.requires_grad_(requires_grad)
                p.grad = grad
