"""The probability of an answer at the moments at which its tokens are fixed: decoding, with the true tokens put in.

From an all-[MASK] answer of the true length, each pass fixes the token that the model is most confident of, as greedy
decoding does. Where decoding would put its own prediction y'_i, the answer's y_i is put, and its probability kept:

    log p_fixed(y | x)  =  sum_k log p(y_i(k) | x, y_i(1) ... y_i(k-1)),    i(k) = argmax_i max_v p(v | x, y_i(1) ...)

over the masked i. The order is a function of what is there already, so these are the factors of one distribution over
answers of that length: that of the order in which the model itself decodes, where a likelihood over random orders
(`mdu_trainer.inference.likelihood`) averages over those that it would never take.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..divergence import TokenNLL
from ..inference.config import DiffusionGenerationConfig
from ..inference.sampling import best_positions, propose
from ..inference.schedule import Step
from ..masking import pad_rows
from ..models import Backbone, evaluation_mode
from .paths import CHUNK_ELEMENTS, predict_at

GREEDY = DiffusionGenerationConfig()  # by which tokens are chosen: the most confident first


@torch.no_grad()
def fixed_log_p(
    model: nn.Module,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    backbone: Backbone,
    *,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """log p of each token of each response when it is fixed, in nats: float64 `[L]` each.

    It takes a pass a token. A block-wise model fixes a token of every block in a pass, each block beside the whole
    ones before it; where its logits are shifted, the first of a block comes first, as in its decoding.

    Args:
        model: a masked diffusion language model; in evaluation mode during the call.
        prompts: ids of each prompt, generation prompt included.
        responses: ids of each response, with the end token if it is to count.
        backbone: facts of the model.
        batch_size: sequences a forward pass.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(responses)
    order = sorted(range(len(responses)), key=lambda i: (len(responses[i]), len(prompts[i])))
    with evaluation_mode(model):
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch = [(prompts[i], responses[i]) for i in places]
            for i, log_p in zip(places, _fix(model, batch, backbone), strict=True):
                found[i] = log_p
    return found


def _fix(model: nn.Module, batch: Sequence[tuple[list[int], list[int]]], backbone: Backbone) -> Iterator[np.ndarray]:
    ids, attention_mask = pad_rows([prompt + response for prompt, response in batch], backbone.pad_token_id)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for positions, (prompt, response) in zip(masked, batch, strict=True):
        positions[len(prompt) :][: len(response)] = True
    device = next(model.parameters()).device
    ids, attention_mask, masked = (part.to(device) for part in (ids, attention_mask, masked))
    log_p = torch.zeros(ids.shape, dtype=torch.float64, device=device)
    while (left := masked.any(dim=1)).any():
        rest = masked[left]
        confidence, of_true = _predict(model, ids[left], attention_mask[left], rest, backbone)
        fixed = _chosen(rest, confidence, backbone)
        values = torch.zeros(rest.shape, dtype=torch.float64, device=device)
        values[rest] = of_true
        log_p[left] += values * fixed
        masked[left] = rest & ~fixed
    for row, (prompt, response) in zip(log_p.cpu().numpy(), batch, strict=True):
        yield row[len(prompt) :][: len(response)]


def _predict(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, masked: Tensor, backbone: Backbone
) -> tuple[Tensor, Tensor]:
    """Of the N masked tokens, how confident the prediction is, and log p of the true token: `[N]`, float64 `[N]`."""
    form = backbone.form(ids)
    if form["clean"] is not None:
        form["clean"] = form["clean"]._replace(opens=True)
    noisy_ids = ids.masked_fill(masked, backbone.mask_token_id)
    prediction, targets = predict_at(model, noisy_ids, attention_mask, masked, form), ids[masked]
    vocabulary = prediction.shape[1] if isinstance(prediction, Tensor) else len(cast(Tensor, prediction.weight))
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    banned = list({backbone.mask_token_id, backbone.pad_token_id} - set(backbone.end_token_ids))
    confidence, of_true = [], []
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        part = prediction[chunk] if isinstance(prediction, Tensor) else prediction.select(chunk)
        of_true.append(-TokenNLL(targets[chunk])(part).value.double())
        logits = part if isinstance(part, Tensor) else linear(part.hidden, cast(Tensor, part.weight), part.bias)
        logits = logits.float()
        logits[:, banned] = -torch.inf
        at = torch.zeros_like(targets[chunk])  # greedily, which row and position it is does not matter
        confidence.append(propose(logits, at, 0, at, GREEDY)[1])
    return torch.cat(confidence), torch.cat(of_true)


def _chosen(masked: Tensor, confidence: Tensor, backbone: Backbone) -> Tensor:
    """The most confident of the masked tokens of each row, of each block of a block-wise model: bool `[B, L]`."""
    positions = torch.arange(masked.shape[1], device=masked.device)
    blocks = torch.zeros_like(positions) if backbone.block_size is None else positions // backbone.block_size
    scores = torch.zeros(masked.shape, device=masked.device)
    scores[masked] = confidence
    if backbone.block_size is not None and backbone.logit_shift:
        scores[:, (positions % backbone.block_size == 0) & (positions > 0)] = 2.0  # above any probability
    step, rows = Step(0, 0, masked.shape[1], 1, 1.0), torch.zeros(len(masked), dtype=torch.long, device=masked.device)
    chosen = torch.zeros_like(masked)
    for block in blocks.unique():
        inside = masked & (blocks == block)
        chosen |= best_positions(inside, scores[inside], rows, step, GREEDY)
    return chosen
