"""Choose what a step of decoding reveals: a token for each position, a score of it, and the positions to reveal."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import counter_uniform
from ..models import Backbone, ReadLogits
from .config import DiffusionGenerationConfig
from .schedule import Step

SCORE_BITS = 20  # significant ones; closer scores are a tie, as float32 forward passes of other batches differ by less


def propose(
    logits: Tensor, row: Tensor, step: int, position: Tensor, config: DiffusionGenerationConfig
) -> tuple[Tensor, Tensor]:
    """Propose a token for each of `[N, V]` logits, and score its position: `[N]`, `[N]`."""
    sharpened = logits / config.temperature if config.temperature else logits
    if config.top_p is not None or config.top_k is not None:
        cut = _cut(sharpened, config.top_p, config.top_k)
        logits, sharpened = logits.masked_fill(cut, -torch.inf), sharpened.masked_fill(cut, -torch.inf)
    tokens = _most(sharpened)
    if config.temperature:
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        noise = uniform(config.seed, TOKENS, row[:, None], step, position[:, None], vocabulary)
        tokens = _most(sharpened.double() + gumbel(noise))
    score = SCORES[config.remasking]
    return tokens, score(sharpened if config.schedule == "dream" else logits, tokens)


def read_proposals(
    scan: Callable[[ReadLogits], Tensor],
    row: Tensor,
    step: int,
    position: Tensor,
    config: DiffusionGenerationConfig,
    backbone: Backbone,
) -> tuple[Tensor, Tensor]:
    """Propose a token for each of N predictions, of whose logits a few exist at a time, and score it: `[N]`, `[N]`.

    [MASK] is never proposed, nor is padding unless it ends responses.

    Args:
        scan: `models.scan_logits_at` for the N predictions, which takes what reads their logits; with `cfg_scale`, of
            two inputs, of which the second hides the prompt.
        row, position: `[N]`, by which what is random is drawn.
    """
    banned = list({backbone.mask_token_id, backbone.pad_token_id} - set(backbone.end_token_ids))

    def read(logits: list[Tensor], rows: slice) -> Tensor:
        guided, *unguided = logits
        for other in unguided:
            guided = other + (config.cfg_scale + 1) * (guided - other)
        guided[:, banned] = -torch.inf
        tokens, scores = propose(guided, row[rows], step, position[rows], config)
        return torch.stack([tokens.float(), scores.float()], dim=1)  # ids below 2**24 stay what they are

    found = scan(read)
    return found[:, 0].long(), found[:, 1]


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
    """The positions of bool `[B, N]` with the best of the scores `[M]`, or sampled by them, and above a threshold."""
    position = torch.arange(masked.shape[1], device=masked.device)
    table = torch.full(masked.shape, -torch.inf, device=masked.device)
    table[masked] = scores
    if config.position_temperature:
        noise = uniform(config.seed, POSITIONS, row[:, None], step.index, position)
        table = table / config.position_temperature + gumbel(noise)
    best = _top(table, step.count)
    return best if config.confidence_threshold is None else best | (table > config.confidence_threshold)


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


def _most(values: Tensor) -> Tensor:
    """The first of the largest of each row of `[N, V]`: `[N]`. NumPy's search takes a tenth of torch's on a CPU."""
    return torch.from_numpy(values.numpy().argmax(axis=1)) if values.device.type == "cpu" else values.argmax(dim=1)


def _confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The probability of the tokens."""
    exponent = logits - logits.amax(dim=1, keepdim=True)
    top = exponent.gather(1, tokens[:, None])[:, 0].exp()
    probability = top / exponent.exp_().sum(dim=1)
    return _rounded(probability, probability)


def _margin(logits: Tensor, tokens: Tensor) -> Tensor:
    """By how much the top probability exceeds the second: p1 - p2 = p1 (1 - p2 / p1)."""
    top, token = logits.topk(2, dim=1)
    probability = _confidence(logits, token[:, 0])
    return _rounded(probability * -torch.expm1(top[:, 1] - top[:, 0]), probability)


def _certainty(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far the entropy is below log V, that of V equally probable tokens.

    It orders predictions as the negative entropy does, and a constant does not matter to softmax(score / temperature).
    Of flat predictions it keeps the digits that differ; in float64, as two numbers near log V are subtracted.
    """
    most = math.log(logits.shape[1])
    entropy = torch.special.entr(logits.softmax(dim=1, dtype=torch.float64)).sum(dim=1)
    share = (1 - entropy / most).float()
    return most * _rounded(share, share)


def _rounded(scores: Tensor, sizes: Tensor) -> Tensor:
    """Round scores `[N]` to `SCORE_BITS` binary digits, counted from the first digit of the sizes `[N]`.

    Sizes are the scores themselves, or what they are a small difference of. Probabilities near 1 become 1, a tie. At
    LLaDA's vocabulary (126,464) those of flat predictions are near 1e-5, and no coarser than elsewhere.
    """
    exponent = torch.frexp(sizes).exponent
    return torch.ldexp(torch.ldexp(scores, SCORE_BITS - exponent).round(), exponent - SCORE_BITS)


SCORES = {
    "low_confidence": _confidence,
    "margin": _margin,
    "entropy": _certainty,
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
