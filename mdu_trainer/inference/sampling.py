"""Choose what a step of decoding reveals: a token for each position, a score of it, and the positions to reveal."""

import torch
from torch import Tensor

from ..masking import counter_uniform
from .config import DiffusionGenerationConfig
from .schedule import Step

SCORE_DECIMALS = 6  # closer scores are a tie: the rounding of a batched forward must not order saturated predictions


def propose(
    logits: Tensor, row: Tensor, step: int, position: Tensor, config: DiffusionGenerationConfig
) -> tuple[Tensor, Tensor]:
    """Propose a token for each of `[N, V]` logits, and score its position: `[N]`, `[N]`."""
    sharpened = logits / config.temperature if config.temperature else logits
    if config.top_p is not None or config.top_k is not None:
        cut = _cut(sharpened, config.top_p, config.top_k)
        logits, sharpened = logits.masked_fill(cut, -torch.inf), sharpened.masked_fill(cut, -torch.inf)
    tokens = sharpened.argmax(dim=1)
    if config.temperature:
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        noise = uniform(config.seed, TOKENS, row[:, None], step, position[:, None], vocabulary)
        tokens = (sharpened.double() + gumbel(noise)).argmax(dim=1)
    score = SCORES[config.remasking]
    return tokens, score(sharpened if config.schedule == "dream" else logits, tokens)


def random_positions(masked: Tensor, row: Tensor, step: Step, config: DiffusionGenerationConfig) -> Tensor:
    """The positions of bool `[B, N]` that random remasking reveals."""
    position = torch.arange(masked.shape[1], device=masked.device)
    noise = uniform(config.seed, POSITIONS, row[:, None], step.index, position)
    if config.schedule == "dream":
        return masked & (noise < step.share)
    return _top(torch.where(masked, noise, -torch.inf), step.count)


def best_positions(
    masked: Tensor, scores: Tensor, row: Tensor, step: Step, config: DiffusionGenerationConfig
) -> Tensor:
    """The positions of bool `[B, N]` with the highest of the scores `[M]`, or sampled by them."""
    position = torch.arange(masked.shape[1], device=masked.device)
    table = torch.full(masked.shape, -torch.inf, device=masked.device)
    table[masked] = scores.round(decimals=SCORE_DECIMALS)
    if config.position_temperature:
        noise = uniform(config.seed, POSITIONS, row[:, None], step.index, position)
        table = table / config.position_temperature + gumbel(noise)
    return _top(table, step.count)


def _top(table: Tensor, count: int) -> Tensor:
    """The `count` highest of each row of `[B, N]` above -inf, the first of equal ones first: bool `[B, N]`."""
    order = table.argsort(dim=1, descending=True, stable=True)
    top = torch.zeros_like(table, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return top & (table > -torch.inf)  # where responses are partly given, one may have less left than others


def _cut(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Mark the tokens that top_p and top_k drop: bool `[N, V]`. The most probable token always stays."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_p is not None:
        probability = ordered.softmax(dim=1)
        drop = probability.cumsum(dim=1) - probability > top_p
    if top_k is not None:
        drop[:, top_k:] = True
    drop[:, 0] = False
    return torch.zeros_like(drop).scatter_(1, order, drop)


def _confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)).exp()


def _margin(logits: Tensor, tokens: Tensor) -> Tensor:
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.T
    return first - second


def _negative_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return -torch.special.entr(logits.softmax(dim=1)).sum(dim=1)


SCORES = {
    "low_confidence": _confidence,
    "margin": _margin,
    "entropy": _negative_entropy,
    "random": lambda logits, tokens: torch.zeros_like(tokens),
}

POSITIONS, TOKENS = 0, 1  # streams of randomness


def uniform(seed: int, stream: int, row: Tensor, step: int, *counters: Tensor) -> Tensor:
    """Uniforms in (0, 1) as a hash of the counters, which broadcast: float64 with 48 random bits."""
    stream_and_step = torch.tensor([stream, step], device=row.device)
    high, low = (
        counter_uniform(seed, *stream_and_step, torch.tensor(half, device=row.device), row, *counters).double()
        for half in (0, 1)
    )
    return high + (low + 2.0**-25) * 2.0**-24


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms in (0, 1)."""
    return -torch.log(-torch.log(uniform))
