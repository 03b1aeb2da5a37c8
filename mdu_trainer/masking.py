"""The forward process of a masked diffusion language model: draw a time, mask responses, mask prompts.

In training the randomness is counter-based: every t and every mask bit is a hash of (seed, visit, row, position). The
same row on the same visit is masked alike whatever the batch size, the number of processes, the order of loading, the
device, or the step from which a run resumed.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Corruption(NamedTuple):
    """One draw of the forward process.

    Attributes:
        noisy_ids: `[B, L]`, the ids with masked response positions replaced by [MASK]: (x, y_t).
        masked: bool `[B, L]`, the positions that were replaced: M_t. At least one in every row that has a response.
        t: `[B]`, the diffusion times.
        anchor_ids: `[B, L]`, the same with the whole prompt replaced too: (m, y_t). Padding is left alone.
    """

    noisy_ids: Tensor
    masked: Tensor
    t: Tensor
    anchor_ids: Tensor


def corrupt(
    input_ids: Tensor,
    response_mask: Tensor,
    attention_mask: Tensor,
    mask_token_id: int,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    time_epsilon: float = 1e-3,
) -> Corruption:
    """Replace each response token by [MASK] with probability t.

    A response position is masked where `noise < t`. If that masks nothing in a row, the response position with the
    smallest noise is masked, so that 1/|M_t| is always defined.

    Args:
        input_ids: `[B, L]`.
        response_mask: `[B, L]`, 1 on the response (completion and end of turn).
        attention_mask: `[B, L]`, 1 on tokens, 0 on padding. Padding is never masked.
        mask_token_id: id of [MASK].
        t: `[B]` times in [0, 1]; drawn from U[time_epsilon, 1] if not given.
        noise: `[B, L]` in [0, 1); drawn from U[0, 1) if not given.
        generator: source of what is drawn here.
        time_epsilon: the smallest time drawn here.

    Source: LLaDA (arXiv 2502.09992) for the forward process; MDU (arXiv 2605.18253) for the anchor.
    """
    device = input_ids.device
    attended = attention_mask.bool()
    response = response_mask.bool() & attended
    if t is None:
        drawn = torch.rand(len(input_ids), generator=generator, device=generator.device if generator else device)
        t = (time_epsilon + (1 - time_epsilon) * drawn).to(device)
    if noise is None:
        noise = torch.rand(input_ids.shape, generator=generator, device=generator.device if generator else device)
        noise = noise.to(device)
    masked = response & (noise < t[:, None])
    lowest = torch.where(response, noise, torch.inf).argmin(dim=1, keepdim=True)
    forced = torch.zeros_like(masked).scatter_(1, lowest, ~masked.any(dim=1, keepdim=True)) & response
    masked = masked | forced
    noisy_ids = input_ids.masked_fill(masked, mask_token_id)
    return Corruption(noisy_ids, masked, t, noisy_ids.masked_fill(attended & ~response, mask_token_id))


class MaskSchedule:
    """Counter-based times and noise for the rows of one data set.

    Args:
        seed: seed of the run.
        stream: name of the data set ("forget", "retain", ...): data sets draw independently.
        num_rows: rows in the data set. On each visit the rows' times fall one into each of `num_rows` equal slices of
            the time range, so they are spread evenly over an epoch.
        t_min, t_max, time_epsilon: t is uniform on [max(t_min, time_epsilon), t_max].
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        num_rows: int,
        t_min: float = 0.0,
        t_max: float = 1.0,
        time_epsilon: float = 1e-3,
    ):
        self.seed = (seed << 32) ^ zlib.crc32(stream.encode())
        self.num_rows = num_rows
        self.low = max(t_min, time_epsilon)
        self.high = max(t_max, self.low)

    def times(self, visit: Tensor, row: Tensor) -> Tensor:
        """Times of `row` `[B]` on `visit` `[B]`: float32 `[B]`."""
        slices = [
            _even_uniforms(self.seed, v, self.num_rows)[r] for v, r in zip(visit.tolist(), row.tolist(), strict=True)
        ]
        u = torch.stack(slices)
        return (self.low + (self.high - self.low) * u).float().to(row.device)

    def noise(self, visit: Tensor, row: Tensor, length: int) -> Tensor:
        """Noise of the first `length` positions of `row` `[B]` on `visit` `[B]`: float32 `[B, length]` in [0, 1)."""
        position = torch.arange(length, device=row.device)
        return counter_uniform(self.seed, visit[:, None], row[:, None], position[None, :])

    def bernoulli(self, visit: Tensor, row: Tensor, probability: float) -> Tensor:
        """A coin for each row, independent of its times and noise: bool `[B]`."""
        return counter_uniform(self.seed + 1, visit, row) < probability


def counter_uniform(seed: int, *counters: Tensor) -> Tensor:
    """Uniforms in [0, 1) as a hash of the counters: float32 with 24 random bits, alike on every device.

    Args:
        seed: any integer.
        counters: broadcastable int64 tensors.
    """
    return _hash(seed, *counters).bitwise_right_shift(40).bitwise_and((1 << 24) - 1).float() / (1 << 24)


def permutation(seed: int, visit: int, num_rows: int) -> Tensor:
    """A shuffle of `range(num_rows)` that is a function of (seed, visit): int64 `[num_rows]`."""
    return _hash(seed, torch.tensor(visit), torch.arange(num_rows)).argsort(stable=True)


@lru_cache(maxsize=16)
def _even_uniforms(seed: int, visit: int, num_rows: int) -> Tensor:
    """One uniform in each of `num_rows` equal slices of [0, 1), in shuffled order: float64 `[num_rows]`."""
    jitter = counter_uniform(seed + 2, torch.tensor(visit), torch.arange(num_rows)).double()
    return (permutation(seed + 3, visit, num_rows) + jitter) / num_rows


def _hash(seed: int, *counters: Tensor) -> Tensor:
    # splitmix64 (Steele, Lea and Flood, 2014), one round a counter; int64 arithmetic wraps alike on every device
    state = _signed(seed * 0x9E3779B97F4A7C15)
    for counter in counters:
        state = _mix(counter + state)
    return state


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
