"""Per-token divergences of a prediction: from logits, or fused with the LM head that would make them.

With a vocabulary of 126,464 a single row of logits takes half a megabyte. `AnchorKL` and `TokenNLL` therefore take the
head's input instead (a `Projection`), make the logits of a few rows at a time, and keep two values a row and the
gradient with respect to the head's input. That gradient is computed in the forward pass, while the logits are there,
so that no `[N, V]` tensor outlives its chunk and none is made twice. Everything is accumulated in float32.

Both also take logits, for models whose head cannot be fused; loss and gradients are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .files import UserError

CHUNK_ELEMENTS = 3 << 22  # logits a chunk on a CPU: 48 MiB
BLOCK_ELEMENTS = 1 << 20  # logits of a chunk that a CPU works on at a time: they stay in its cache
GPU_CHUNK_ELEMENTS = 1 << 26  # enough rows for a GPU's matrix product, and still small beside the model
TILE_ROWS = 4096  # vocabulary rows of a half-precision head that are converted at a time on a CPU


class Projection(NamedTuple):
    """Logits that were not made yet: `hidden @ weight.T + bias`.

    Attributes:
        hidden: `[N, H]`, the head's input at the selected positions.
        weight: `[V, H]`; None stands for the head of the prediction that this one is compared with.
        bias: `[V]` or None.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def select(self, rows: slice) -> "Projection":
        """Return the same of some of the rows."""
        return self._replace(hidden=self.hidden[rows])


Prediction = Projection | Tensor  # head input, or logits [N, V]


class TokenValues(NamedTuple):
    """Two values of each predicted token, in nats, float32 `[N]`."""

    value: Tensor  # the divergence, which carries the gradient
    entropy: Tensor  # of the prediction, without gradient


def anchor_kl(logits: Tensor, anchor_logits: Tensor | None, tau: float) -> Tensor:
    """KL(p || softmax(tau * anchor_logits)) with p = softmax(logits), a value per row.

    For tau = 0 the anchor is the uniform distribution, the divergence log V - H(p), and `anchor_logits` is not read.

    Args:
        logits: `[N, V]`, the prediction in training.
        anchor_logits: `[N, V]`, theta_0's logits at the same positions; may be None if tau is 0.
        tau: multiplies the anchor's logits.

    Returns:
        `[N]` in nats, float32 (float64 for float64 inputs).

    Source: MDU (arXiv 2605.18253), the forget loss.
    """
    return AnchorKL(tau, anchor_logits)(logits).value


@dataclass(frozen=True)
class AnchorKL:
    """KL(p || softmax(tau * anchor logits)) of each token, from logits or fused with the head; see `anchor_kl`.

    Args:
        tau: multiplies the anchor's logits.
        anchor: theta_0's prediction of the same N tokens, without gradient; not read if tau is 0.
        token_weight: `[N]`, the share of each token in the loss up to a common factor, if it is known beforehand. The
            gradient of a head in training then needs no second pass over the chunks.
        edit: `(anchor logits [C, V], rows) -> [C, V]`, a change of the anchor of some of the N tokens, before tau.
        direction: "reverse" is KL(p || anchor), "forward" KL(anchor || p), "js" the Jensen-Shannon divergence.
    """

    tau: float
    anchor: Prediction | None = None
    token_weight: Tensor | None = None
    edit: Callable[[Tensor, slice], Tensor] | None = None
    direction: str = "reverse"

    def __post_init__(self) -> None:
        if self.tau != 0 and self.anchor is None:
            raise UserError(
                f"tau = {self.tau:g} needs the anchor's logits; only tau = 0 (the uniform anchor) does without."
            )

    def __call__(self, prediction: Prediction) -> TokenValues:
        """Return the values of the N tokens."""
        if isinstance(prediction, Projection):
            return _fused(prediction, self)
        log_p = _log_softmax(prediction)
        token_entropy = _entropy(log_p)
        if self.tau == 0 and self.direction == "reverse":
            return TokenValues(math.log(prediction.shape[-1]) - token_entropy, token_entropy.detach())
        log_q = self._log_anchor(log_p)
        if self.direction == "js":
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            of_p, of_q = (torch.linalg.vecdot(one.exp(), one - log_m) for one in (log_p, log_q))
            return TokenValues((of_p + of_q) / 2, token_entropy.detach())
        large, other = (log_q, log_p) if self.direction == "forward" else (log_p, log_q)
        return TokenValues((large.exp() * (large - other)).sum(dim=-1), token_entropy.detach())

    def _log_anchor(self, log_p: Tensor) -> Tensor:
        if self.tau == 0:
            return torch.full_like(log_p, -math.log(log_p.shape[-1]))
        assert isinstance(self.anchor, Tensor), "a prediction and its anchor are both logits, or neither is"
        logits = self.anchor.to(log_p.dtype)
        logits = logits if self.edit is None else self.edit(logits, slice(0, len(logits)))
        return (self.tau * logits).log_softmax(dim=-1)

    def fused(self, logits: Tensor, anchor: Tensor | None, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, entropies, and the values' gradient with respect to the logits `[C, V]`.

        With logits z, p = softmax(z), a = tau * anchor logits and d = z - a, each sum over the vocabulary:

            KL = sum p (log p - log softmax(a)) = E_p[d] - logsumexp(z) + logsumexp(a)
            dp_u/dz_v = p_u ([u = v] - p_v), so dKL/dz_v = p_v (d_v - E_p[d]);   H = logsumexp(z) - E_p[z]

        With q = softmax(a), KL(q || p) = logsumexp(z) - logsumexp(a) - E_q[d], and its gradient is p_v - q_v. That of
        "js" is p_v (s_v - E_p[s]) / 2 with s = log p - log m and m = (p + q) / 2, as dJS/dp_v = s_v / 2.

        Args:
            logits: of some rows; overwritten.
            anchor: the anchor's logits of these rows, None if tau is 0; overwritten.
            rows: which of the N they are.
        """
        p = logits.softmax(dim=-1)
        log_partition = logits.amax(dim=-1) - p.amax(dim=-1).log()
        token_entropy = log_partition - torch.linalg.vecdot(p, logits)
        if anchor is not None:
            anchor = (anchor if self.edit is None else self.edit(anchor, rows)).mul_(self.tau)
        if self.direction == "js":
            log_p = logits.sub_(log_partition[:, None])
            log_q = self._log_anchor(p) if anchor is None else anchor.log_softmax(dim=-1)
            log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
            mean, of_anchor = (torch.linalg.vecdot(r, x.sub_(log_m)) for r, x in ((p, log_p), (log_q.exp(), log_q)))
            return (mean + of_anchor) / 2, token_entropy, log_p.sub_(mean[:, None]).mul_(p).div_(2)
        if self.direction == "forward":
            q = torch.full_like(p, 1 / p.shape[-1]) if anchor is None else anchor.softmax(dim=-1)
            difference = logits if anchor is None else logits - anchor
            of_anchor = math.log(p.shape[-1]) if anchor is None else anchor.logsumexp(dim=-1)
            return log_partition - of_anchor - torch.linalg.vecdot(q, difference), token_entropy, p.sub_(q)
        if anchor is None:
            kl = math.log(logits.shape[-1]) - token_entropy
            mean = log_partition - token_entropy
        else:
            mean = torch.linalg.vecdot(p, logits.sub_(anchor))
            largest = anchor.amax(dim=-1)
            kl = mean - log_partition + largest + anchor.sub_(largest[:, None]).exp_().sum(dim=-1).log()
        return kl, token_entropy, logits.sub_(mean[:, None]).mul_(p)


@dataclass(frozen=True)
class TokenNLL:
    """-log p of each true token, from logits or fused with the head.

    Args:
        targets: `[N]`, the true tokens.
        token_weight: as in `AnchorKL`.
    """

    targets: Tensor
    token_weight: Tensor | None = None

    def __call__(self, prediction: Prediction) -> TokenValues:
        """Return the values of the N tokens."""
        if isinstance(prediction, Projection):
            return _fused(prediction, self)
        log_p = _log_softmax(prediction)
        return TokenValues(-log_p.gather(1, self.targets[:, None])[:, 0], _entropy(log_p.detach()))

    def fused(self, logits: Tensor, anchor: Tensor | None, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `AnchorKL.fused`. -log p_y = logsumexp(z) - z_y, so its gradient is p_v - [v = y]."""
        targets = self.targets[rows, None]
        p = logits.softmax(dim=-1)
        log_partition = logits.amax(dim=-1) - p.amax(dim=-1).log()
        nll = log_partition - logits.gather(1, targets)[:, 0]
        token_entropy = log_partition - torch.linalg.vecdot(p, logits)
        return nll, token_entropy, p.scatter_add_(1, targets, -torch.ones_like(targets, dtype=p.dtype))


@dataclass(frozen=True)
class Joint:
    """Several measures, each of so many tokens in turn: what is asked of several batches in one forward pass.

    Args:
        counts: number of tokens of each.
        measures: what is asked of them.
    """

    counts: Sequence[int]
    measures: Sequence["TokenMeasure"]

    def __call__(self, prediction: Prediction) -> TokenValues:
        """Return the values of all tokens."""
        values, start = [], 0
        for count, measure in zip(self.counts, self.measures, strict=True):
            rows = slice(start, start + count)
            values.append(measure(prediction[rows] if isinstance(prediction, Tensor) else prediction.select(rows)))
            start += count
        return TokenValues(*(torch.cat(columns) for columns in zip(*values, strict=True)))


TokenMeasure = AnchorKL | TokenNLL
Measure = TokenMeasure | Joint


def _fused(prediction: Projection, measure: TokenMeasure) -> TokenValues:
    prediction = _autocast(prediction)
    with torch.autocast(prediction.hidden.device.type, enabled=False):
        return TokenValues(*_FusedHead.apply(*prediction, measure))


def _autocast(head: Projection) -> Projection:
    """The weights as mixed precision multiplies them; on a CPU float32 is as fast."""
    device = head.hidden.device.type
    if head.weight is None or device == "cpu" or not torch.is_autocast_enabled(device):
        return head
    return head._replace(weight=head.weight.to(torch.get_autocast_dtype(device)))


class _FusedHead(torch.autograd.Function):
    """Head and divergence in one: the chunks are visited once, forwards, with the gradient taken on the way."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, measure: TokenMeasure
    ) -> tuple[Tensor, Tensor]:
        wants_head = any(ctx.needs_input_grad[1:3])
        token_weight = measure.token_weight if wants_head else None
        sums = None if token_weight is None else _HeadGradient(hidden, weight, bias, token_weight)
        values = torch.zeros(len(hidden), dtype=_at_least(hidden.dtype), device=hidden.device)
        entropies = torch.zeros_like(values)
        grad_hidden = torch.zeros_like(hidden, dtype=values.dtype) if ctx.needs_input_grad[0] else None
        for rows, logits, anchor in _chunks(hidden, weight, bias, measure):
            values[rows], entropies[rows], grad_logits = _fused_rows(measure, logits, anchor, rows)
            if grad_hidden is not None:
                grad_hidden[rows] = _back_project(grad_logits, weight)
            if sums is not None:
                sums.add(rows, grad_logits)
        ctx.measure, ctx.sums, ctx.wants_head = measure, sums, wants_head
        ctx.save_for_backward(grad_hidden, *((hidden, weight, bias) if wants_head else (None, None, None)))
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad_hidden, hidden, weight, bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_values[:, None]).to(hidden_dtype)
        if not ctx.wants_head:
            return grad_hidden, None, None, None
        sums: _HeadGradient | None = ctx.sums
        factor = None if sums is None else _common_factor(grad_values, sums.token_weight)
        if sums is None or factor is None:  # the loss is no weighted sum known beforehand: visit the chunks again
            sums, factor = _HeadGradient(hidden, weight, bias, grad_values), 1.0
            with torch.autocast(grad_values.device.type, enabled=False):
                for rows, logits, anchor in _chunks(hidden, weight, bias, ctx.measure):
                    sums.add(rows, _fused_rows(ctx.measure, logits, anchor, rows)[2])
        grad_bias = None if sums.bias is None else (sums.bias * factor).to(weight_dtype)
        return grad_hidden, (sums.weight * factor).to(weight_dtype), grad_bias, None


class _HeadGradient:
    """Sums the gradient of the head's own weights, in float32.

    Args:
        hidden, weight, bias: the head's input, and the head.
        token_weight: `[N]`, the gradient of the loss with respect to each token's value.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_weight: Tensor):
        self.hidden, self.token_weight = hidden, token_weight
        dtype = _at_least(weight.dtype)
        self.weight = torch.zeros_like(weight, dtype=dtype)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        grad_logits.mul_(self.token_weight[rows, None])
        self.weight.addmm_(grad_logits.T, self.hidden[rows].to(grad_logits.dtype))
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0))


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, measure: TokenMeasure
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The logits and those of the anchor, if there is one, a few rows at a time, in at least float32.

    Where the anchor has the same head, both are one matrix product: the weights are read once. What is yielded is
    overwritten by the next chunk.
    """
    limit = CHUNK_ELEMENTS if hidden.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    size = min(max(1, limit // len(weight)), len(hidden))
    anchor = measure.anchor if isinstance(measure, AnchorKL) and measure.tau else None
    shared = isinstance(anchor, Projection) and anchor.weight is None
    dtype = _at_least(weight.dtype)
    buffer = hidden.new_empty(size * (2 if shared else 1), len(weight), dtype=dtype)
    for start in range(0, len(hidden), max(1, size)):
        rows = slice(start, min(start + size, len(hidden)))
        if isinstance(anchor, Projection) and anchor.weight is None:
            both = torch.cat([hidden[rows], anchor.hidden[rows].to(hidden.dtype)])
            logits, of_anchor = _project(both, weight, bias, buffer).chunk(2)
        else:
            logits = _project(hidden[rows], weight, bias, buffer)
            of_anchor = None if anchor is None else _anchor_logits(anchor, rows, dtype)
        yield rows, logits, of_anchor


def _anchor_logits(anchor: Prediction, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return the logits of an anchor with a head of its own, or a copy of logits that are there."""
    if isinstance(anchor, Tensor):
        return anchor[rows].to(dtype, copy=True)
    hidden, weight, bias = _autocast(anchor.select(rows))
    assert weight is not None
    return _project(hidden, weight, bias)


def _fused_rows(
    measure: TokenMeasure, logits: Tensor, anchor: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """`measure.fused`, on a CPU block by block, the gradient in place of the logits."""
    if logits.device.type != "cpu":
        return measure.fused(logits, anchor, rows)
    values, entropies = logits.new_empty(2, len(logits))
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), size):
        block = slice(start, min(start + size, len(logits)))
        of_block = slice(rows.start + block.start, rows.start + block.stop)
        part = None if anchor is None else anchor[block]
        values[block], entropies[block], logits[block] = measure.fused(logits[block], part, of_block)
    return values, entropies, logits


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None = None) -> Tensor:
    """Logits `[C, V]` in at least float32, also where hidden and weight have less; in the buffer's first rows."""
    dtype = _at_least(weight.dtype)
    logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype) if buffer is None else buffer[: len(hidden)]
    if weight.dtype != dtype and weight.device.type == "cuda":
        torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=dtype, out=logits)
    elif weight.dtype != dtype:
        hidden = hidden.to(dtype)
        for start in range(0, len(weight), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            logits[:, tile] = hidden @ weight[tile].to(dtype).T
    else:
        torch.mm(hidden.to(dtype), weight.T, out=logits)
    return logits if bias is None else logits.add_(bias)


def _back_project(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to the head's input, `[C, H]`."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    if weight.device.type == "cuda":
        return torch.mm(grad_logits.to(weight.dtype), weight, out_dtype=grad_logits.dtype)
    total = grad_logits.new_zeros(len(grad_logits), weight.shape[1])
    for start in range(0, len(weight), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        total.addmm_(grad_logits[:, tile], weight[tile].to(grad_logits.dtype))
    return total


def _common_factor(grad: Tensor, token_weight: Tensor) -> float | None:
    """Return c with grad = c * token_weight, or None if there is none.

    Three tokens of weights (1, 2, 0.5): from the gradient (0.1, 0.2, 0.05), c = 0.1; from (0.1, 0.1, 0.1), None.
    """
    if len(grad) == 0:
        return 0.0
    largest = token_weight.abs().argmax()
    factor = (grad[largest] / token_weight[largest]).nan_to_num().item()
    return factor if torch.allclose(grad, factor * token_weight.to(grad.dtype), rtol=1e-4, atol=0) else None


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(_at_least(logits.dtype)).log_softmax(dim=-1)


def _at_least(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
