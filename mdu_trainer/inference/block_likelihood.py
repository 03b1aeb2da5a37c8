"""Likelihood of a response under a block-wise model, block by block.

    log p(y | x)  =  sum_b log p(y_b | x, y_<b)
                 >=  sum_b E_l E_S [ L/l * sum_{i in S} log p(y_i | x, y_<b, y_b without S) ]     L tokens of y_b

The sets S of each block are drawn as those of a whole response are (`mdu_trainer.inference.mask_sets`), on their own.
In the form [x_t ; x_0] a block sees the whole blocks before it, so a pass predicts a set of every block at once.
A response that ends in the block in which it begins needs no clean tokens beside it: what is before it is the prompt.

Where logits are shifted (Fast-dLLM v2), the last token of a block decodes the first one of the next, before that block
is begun. So that token is a part of its own, predicted once, and shown to the rest of its block.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..divergence import TokenNLL
from ..masking import pad_rows
from ..models import Backbone, measure_at
from ..models.head import Clean
from ..terminal import Bar
from .mask_sets import Draws, draw_masks, num_sets, standard_error, token_parts


class _Part(NamedTuple):
    """Tokens of a response that are predicted together, their draws, and what the model has said so far."""

    tokens: slice  # of the response
    draws: Draws
    log_p: np.ndarray  # [K, L], as `token_parts` takes it; filled set by set
    opens: bool  # a block, of a model with a logit shift: its token is never masked


class _Row(NamedTuple):
    """A response in its parts."""

    number: int
    prompt: list[int]
    response: list[int]
    parts: list[_Part]
    one_block: bool

    @property
    def passes(self) -> int:
        return max(len(part.log_p) for part in self.parts)


def count_passes(prompt: list[int], response: list[int], backbone: Backbone, num_draws: int) -> int:
    """Sequences that a row takes."""
    pieces = _pieces(len(prompt), len(response), backbone)
    return max(num_sets(piece.stop - piece.start, num_draws) for piece in pieces)


def block_likelihoods(
    model: nn.Module,
    rows: Sequence[tuple[int, list[int], list[int]]],
    backbone: Backbone,
    num_draws: int,
    rngs: Sequence[np.random.Generator],
    batch_size: int,
    progress: Bar,
) -> list[tuple[int, np.ndarray, float]]:
    """Estimate the log-likelihood of responses, block by block.

    Args:
        model: a block-wise model, in evaluation mode.
        rows: a number, the ids of a prompt, and those of a response, each.
        backbone: facts of the model.
        num_draws: sets of a block, at most.
        rngs: where the draws of each row come from.
        batch_size: sequences a forward pass.
        progress: is told of each pass.

    Returns:
        Of each row its number, the part of each token in the estimate `[L]`, and the standard error.
    """
    drawn = [_drawn(*row, backbone, num_draws, rng) for row, rng in zip(rows, rngs, strict=True)]
    drawn.sort(key=lambda row: (not row.one_block, len(row.prompt) + len(row.response)))
    sequences = ((row, k) for row in drawn for k in range(row.passes))
    while batch := list(islice(sequences, batch_size)):
        _fill_log_p(model, batch, backbone)
        progress.update(len(batch))
    found = []
    for row in drawn:
        estimates = [(part.draws, token_parts(part.draws, part.log_p)) for part in row.parts]
        tokens = np.concatenate([replicates.mean(axis=0) for _, replicates in estimates])
        errors = [standard_error(draws, replicates.sum(axis=1)) for draws, replicates in estimates]
        found.append((row.number, tokens, float(np.sqrt(np.square(errors).sum()))))
    return found


def _pieces(prompt: int, response: int, backbone: Backbone) -> list[slice]:
    """The parts of a response, in its own positions: its blocks and, with a logit shift, their first tokens."""
    assert backbone.block_size is not None
    edges = {0, response} | {at for at in range(response) if (prompt + at) % backbone.block_size == 0}
    if backbone.logit_shift:
        edges |= {at + 1 for at in edges if _opens(prompt + at, backbone) and at < response}
    ordered = sorted(edges)
    return [slice(*pair) for pair in zip(ordered, ordered[1:], strict=False)]


def _opens(position: int, backbone: Backbone) -> bool:
    """Whether the token before a position predicts it before its block is begun."""
    return backbone.logit_shift and position > 0 and position % (backbone.block_size or 1) == 0


def _drawn(
    number: int,
    prompt: list[int],
    response: list[int],
    backbone: Backbone,
    num_draws: int,
    rng: np.random.Generator,
) -> _Row:
    pieces = _pieces(len(prompt), len(response), backbone)
    lengths = [piece.stop - piece.start for piece in pieces]
    parts = [
        _Part(piece, draws, np.zeros(draws.masked.shape), _opens(len(prompt) + piece.start, backbone))
        for piece, draws in zip(pieces, draw_masks(lengths, num_draws, [rng] * len(pieces)), strict=True)
    ]
    size = backbone.block_size or 1
    one_block = len(prompt) // size == (len(prompt) + len(response) - 1) // size
    return _Row(number, prompt, response, parts, one_block)


def _fill_log_p(model: nn.Module, batch: list[tuple[_Row, int]], backbone: Backbone) -> None:
    """Run one forward pass over pairs of a row and k: log p of what set k of each of its parts masks goes into it."""
    ids, attention_mask = pad_rows([row.prompt + row.response for row, _ in batch], backbone.pad_token_id)
    wanted, masked = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    for b, (row, k) in enumerate(batch):
        for part in _asked(row, k):
            at = slice(len(row.prompt) + part.tokens.start, len(row.prompt) + part.tokens.stop)
            wanted[b, at] = torch.from_numpy(part.draws.masked[k])
            masked[b, at] = wanted[b, at] & (not part.opens)
    device = next(model.parameters()).device
    ids, attention_mask, wanted, masked = (part.to(device) for part in (ids, attention_mask, wanted, masked))
    noisy_ids, measure = ids.masked_fill(masked, backbone.mask_token_id), TokenNLL(ids[wanted])
    short = all(row.one_block for row, _ in batch)
    clean = None if short else Clean(ids, backbone.block_size or 1, opens=True)
    form = {"logit_shift": backbone.logit_shift, "clean": clean}
    log_p = -measure_at(model, noisy_ids, attention_mask, wanted, measure, **form).value.cpu().double()
    found = iter(log_p.split([int(part.draws.masked[k].sum()) for row, k in batch for part in _asked(row, k)]))
    for row, k in batch:
        for part in _asked(row, k):
            part.log_p[k, part.draws.masked[k]] = next(found).numpy()


def _asked(row: _Row, k: int) -> list[_Part]:
    """The parts that have a set k."""
    return [part for part in row.parts if k < len(part.log_p)]
