"""Fine-tune for a few steps: what comes back was not forgotten, only hidden.

What is fine-tuned: all floating-point parameters, adapters included, for an attacker holds the weights; or a LoRA on
top of all linear layers; or the weights once they are rounded to 4 bits. Every update is AdamW's on the
masked-diffusion loss, averaged over the masked tokens of a row. Source: Lynch et al. (arXiv 2402.16835), Hu et al.
(arXiv 2406.13356), Łucki et al. (arXiv 2409.18025).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..data.rows import RowPairs, TokenizedRows, shuffled
from ..evaluation.scoring import Question
from ..files import UserError
from ..masking import MaskSchedule, permutation
from .base import AttackScores, Target, worst_case
from .changes import linear_layers, restored, trained_alone
from .quantise import quantised, roundings

RATES = (10**-0.5, 1.0, 10**0.5)  # times `relearn_learning_rate`: a decade
LORA_RATES = (10**0.5, 10.0)  # an adapter takes up to ten times the rate of all weights
LORA_RANK, LORA_SCALE = 8, 2.0

Trainable = Callable[[nn.Module], AbstractContextManager[list[nn.Parameter]]]


class Round(NamedTuple):
    """A fine-tuning from the model.

    Attributes:
        number: that of the first row it scores, in the order in which rows were dealt.
        questions: that it trains on.
        scored: numbers of the rows that it scores.
    """

    number: int
    questions: list[Question]
    scored: list[int]


def related(target: Target, seed: int) -> AttackScores:
    """Fine-tune on some of the forget rows, and score the others, at learning rates over a decade.

    So that every row is scored once, the rows are dealt to as many rounds as `relearn_share` leaves room for, and each
    round starts anew from the model and trains on a share of the rows it does not score. `after` is the score at the
    last update, of each row the most that any rate brought back; `path` has the mean score by rate.

    Raises:
        ValueError: for a share that leaves no row to train on, or none to score.
    """
    rounds, rate = _dealt(target, seed), target.settings.relearn_learning_rate
    return _worst(target, {f"lr {_short(rate * factor)}": _Fine(rate * factor, rounds) for factor in RATES}, seed)


def benign(target: Target, seed: int) -> AttackScores:
    """Fine-tune on unrelated rows, and score all forget rows, as `related` does at one learning rate.

    Rows to keep are mostly asked and answered in the wording of the forget rows. So this is unrelated text of like
    syntax, not any text.
    """
    unrelated, rate = target.settings.unrelated, target.settings.relearn_learning_rate
    rounds = [Round(0, target.encode(unrelated["question"], unrelated), list(range(len(target.rows))))]
    return _worst(target, {f"lr {_short(rate)}": _Fine(rate, rounds)}, seed)


def lora(target: Target, seed: int) -> AttackScores:
    """Fine-tune as `related` does, at three and ten times the learning rate, and train a LoRA alone.

    It is of rank 8 on all linear layers but the head, beside an adapter that the model may have. Source: Hu et al.
    (arXiv 2106.09685).
    """
    rates = [factor * target.settings.relearn_learning_rate for factor in LORA_RATES]
    rounds, trainable = _dealt(target, seed), _lora_of(seed)
    return _worst(target, {f"lr {_short(rate)}": _Fine(rate, rounds, trainable) for rate in rates}, seed)


def rounded(target: Target, seed: int) -> AttackScores:
    """Round the weights to 4 bits, and fine-tune from there as `related` does, at one learning rate.

    They are rounded to NF4 where bitsandbytes is installed, else to nearest, as in `quantise`.
    """
    rate, (name, rounding) = target.settings.relearn_learning_rate, list(roundings(4).items())[-1]
    fine = {f"{name}, lr {_short(rate)}": _Fine(rate, _dealt(target, seed))}
    with quantised(target.model, rounding):
        found = _relearned(target, fine, seed)
    return worst_case(target, *found)


def _dealt(target: Target, seed: int) -> list[Round]:
    """Deal the forget rows to rounds, so that each is scored in one that does not train on it."""
    order = permutation(seed, 0, len(target.rows)).tolist()
    trained = round(len(order) * target.settings.relearn_share)
    held_out = len(order) - trained
    if not (trained and held_out):
        raise UserError(
            f"Relearning trains on {trained} of {len(order)} forget rows and scores {held_out}: give more, or another "
            "relearn_share."
        )
    rounds = []
    for first in range(0, len(order), held_out):
        rows = order[first : first + held_out]
        others = (order[first + held_out :] + order[:first])[:trained]
        rounds.append(Round(first, [target.questions[row] for row in others], rows))
    return rounds


@contextmanager
def _all_weights(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the floating-point parameters, ready to be trained without dropout; all is as it was afterwards."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    with restored(parameters), trained_alone(model, parameters):
        yield parameters


def _lora_of(seed: int) -> Trainable:
    """Return a context that adds a LoRA to a model; the seed draws its weights.

    Hooks add it: nothing of the model is replaced, whether or not it has an adapter already.
    """

    @contextmanager
    def adapted(model: nn.Module) -> Iterator[list[nn.Parameter]]:
        generator, parameters, handles = torch.Generator().manual_seed(seed), [], []
        with trained_alone(model, []):
            try:
                for layer in linear_layers(model):
                    down, up = _lora_weights(layer, generator)
                    parameters += [down, up]
                    handles.append(layer.register_forward_hook(_adding(down, up)))
                yield parameters
            finally:
                for handle in handles:
                    handle.remove()

    return adapted


def _lora_weights(layer: nn.Linear, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the two factors of a layer's update, `[r, in]` and `[out, r]`, whose product is 0 at first."""
    device = layer.weight.device
    down = torch.randn(LORA_RANK, layer.in_features, generator=generator) / layer.in_features**0.5
    return nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(layer.out_features, LORA_RANK, device=device))


def _adding(down: nn.Parameter, up: nn.Parameter) -> Callable[..., torch.Tensor]:
    """Return a forward hook that adds the update of these factors to a layer's output."""

    def hook(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + LORA_SCALE * (args[0].to(down.dtype) @ down.T @ up.T).to(output.dtype)

    return hook


class _Fine(NamedTuple):
    """A way to fine-tune: the learning rate, the rounds, and what is trained."""

    rate: float
    rounds: list[Round]
    trainable: Trainable = _all_weights


def _worst(target: Target, ways: dict[str, _Fine], seed: int) -> AttackScores:
    """Return of each row the most that any way brought back at the last update."""
    return worst_case(target, *_relearned(target, ways, seed))


def _relearned(target: Target, ways: dict[str, _Fine], seed: int) -> tuple[dict[str, list[float]], list[int]]:
    """Return the scores at the last update, way -> score of each row; and the numbers of the rows."""
    units = [(name, one) for name, way in ways.items() for one in way.rounds]
    scored = target.share([partial(_relearn, target, ways[name], one, seed) for name, one in units])
    found: dict[str, dict[int, float]] = {name: {} for name in ways}  # way -> row -> score
    for (name, one), scores in zip(units, scored, strict=True):
        found[name] |= dict(zip(one.scored, scores, strict=True))
    rows = sorted(next(iter(found.values())))
    return {name: [scores[row] for row in rows] for name, scores in found.items()}, rows


def _relearn(target: Target, way: _Fine, one: Round, seed: int) -> list[float]:
    """Return the scores of a round's rows after the last update."""
    with way.trainable(target.model) as parameters:
        _train(target, one.questions, parameters, way.rate, seed + one.number)
        return target.score(target.decode([target.prompts[row] for row in one.scored]), one.scored)


def _train(target: Target, questions: list[Question], parameters: list[nn.Parameter], rate: float, seed: int) -> None:
    """Make the settings' updates."""
    settings, size = target.settings, target.settings.relearn_batch_size
    parts = TokenizedRows([q.prompt for q in questions], [q.answers["answer"][0] for q in questions])
    rows = RowPairs({"train": parts}, seed, shuffled, {"train": MaskSchedule(seed, "relearn", len(parts))})
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(settings.relearn_steps):
        batch = target.collate([rows[counter]["train"] for counter in range(step * size, (step + 1) * size)])
        with torch.enable_grad():
            target.masked_nll(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _short(rate: float) -> str:
    """Return a learning rate with two digits."""
    return f"{rate:.2g}"
