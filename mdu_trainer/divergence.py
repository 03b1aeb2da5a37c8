"""Per-token divergence between a prediction and the anchor."""

import math

import torch
from torch import Tensor


def anchor_kl(logits: Tensor, anchor_logits: Tensor | None, tau: float) -> Tensor:
    """KL(p || softmax(tau * anchor_logits)) with p = softmax(logits), a figure per row.

    For tau = 0 the anchor is the uniform distribution, the divergence log V - H(p), and `anchor_logits` is not read.

    Args:
        logits: `[N, V]`, the prediction in training.
        anchor_logits: `[N, V]`, theta_0's logits at the same positions; may be None if tau is 0.
        tau: multiplies the anchor's logits.

    Returns:
        `[N]` in nats, float32 (float64 for float64 inputs).

    Source: MDU (arXiv 2605.18253), the forget loss.
    """
    log_p = _log_softmax(logits)
    if tau == 0:
        return math.log(logits.shape[-1]) - _entropy(log_p)
    if anchor_logits is None:
        raise ValueError(f"tau = {tau:g} needs the anchor's logits; only tau = 0 (the uniform anchor) does without.")
    return (log_p.exp() * (log_p - _log_softmax(tau * anchor_logits.to(log_p.dtype)))).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits): `[N, V]` -> `[N]` in nats, float32."""
    return _entropy(_log_softmax(logits))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of the true tokens: `[N, V]`, `[N]` -> `[N]` in nats, float32."""
    return torch.nn.functional.cross_entropy(_at_least_float32(logits), targets, reduction="none")


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return _at_least_float32(logits).log_softmax(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
