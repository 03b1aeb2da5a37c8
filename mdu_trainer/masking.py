"""The forward process of a masked diffusion language model: draw a time, mask responses, mask prompts.

In training the randomness is counter-based: every t and every mask bit is a hash of (seed, visit, row, position). The
same row on the same visit is masked alike whatever the batch size, the number of processes, the order of loading, the
device, or the step from which a run resumed.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

KEPT, IN_CONTEXT, STORED = range(3)  # what a counterfactual anchor does with a token; see `counterfactual_ids`


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
    if t is None:
        t = time_epsilon + (1 - time_epsilon) * _uniform(len(input_ids), input_ids.device, generator)
    if noise is None:
        noise = _uniform(input_ids.shape, input_ids.device, generator)
    return _corrupt(input_ids, response_mask, attention_mask, mask_token_id, t, noise)[0]


def _corrupt(
    input_ids: Tensor, response_mask: Tensor, attention_mask: Tensor, mask_token_id: int, t: Tensor, noise: Tensor
) -> tuple[Corruption, Tensor]:
    """Return the corruption, and whether the draw had masked nothing, bool `[B]`."""
    attended = attention_mask.bool()
    response = response_mask.bool() & attended
    masked = response & (noise < t[:, None])
    drew_nothing = ~masked.any(dim=1)
    lowest = torch.where(response, noise, torch.inf).argmin(dim=1, keepdim=True)
    masked = masked | (torch.zeros_like(masked).scatter_(1, lowest, drew_nothing[:, None]) & response)
    noisy_ids = input_ids.masked_fill(masked, mask_token_id)
    anchor_ids = noisy_ids.masked_fill(attended & ~response, mask_token_id)
    return Corruption(noisy_ids, masked, t, anchor_ids), drew_nothing


def _uniform(size: int | torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(size, generator=generator, device=generator.device if generator else device).to(device)


class Noised(NamedTuple):
    """A batch of B examples after the forward process, with N masked positions in all.

    Attributes:
        input_ids: `[B, L]`, (x, y_t).
        anchor_ids: `[B, L]`, (m, y_t).
        attention_mask: `[B, L]`.
        masked: bool `[B, L]`, M_t.
        targets: `[N]`, the true tokens at the masked positions.
        batch_index: `[N]`, the example of each masked position.
        num_masked: `[B]`, |M_t|.
        num_response: `[B]`, |y|: the positions of the response that may be masked.
        weight: `[B]`, 1/t; 0 where the draw had masked nothing, so that the bound stays unbiased.
        clean_ids: `[B, L]`, (x, y), of which block-wise models see the blocks before the one they predict.
        clean_anchor_ids: `[B, L]`, the same for the anchor, which hides in it what it hides in `anchor_ids`: (m, y).
        strike: what is struck out of the anchor, where it is counterfactual.
    """

    input_ids: Tensor
    anchor_ids: Tensor
    attention_mask: Tensor
    masked: Tensor
    targets: Tensor
    batch_index: Tensor
    num_masked: Tensor
    num_response: Tensor
    weight: Tensor
    clean_ids: Tensor
    clean_anchor_ids: Tensor
    strike: "Strike | None" = None


class Strike(NamedTuple):
    """What a counterfactual anchor must not say of N masked positions.

    Attributes:
        tokens: int64 `[N]`, the true token of each position that holds stored knowledge; -1 for all others.
        flat: bool `[N]`, positions of examples without stored knowledge. There is nothing to strike out, so their
            anchor is uniform.
    """

    tokens: Tensor
    flat: Tensor

    def edit(self, logits: Tensor, rows: slice, quantile: float | None) -> Tensor:
        """Return the anchor's logits `[C, V]` of some of the positions, struck out (None: not) and made uniform."""
        if quantile is not None:
            logits = strike_out(logits, self.tokens[rows], quantile)
        return logits.masked_fill(self.flat[rows, None], 0.0)


def counterfactual_ids(noisy_ids: Tensor, hidden: Tensor, mask_token_id: int) -> Tensor:
    """The input (x', y') of the counterfactual anchor, int64 `[B, L]`.

    Who is asked about is masked in the prompt, and what only he would be answered with in the response, whether y_t
    shows it or not. So theta_0 is asked the same question about nobody it has met. With [M] for a mask:

        (x, y_t)    Where was Ada Lovelace born ?   Ada [M] was born in [M]
        (x', y')    Where was [M] [M] [M] ?         [M] [M] was [M] in [M]

    Args:
        noisy_ids: `[B, L]`, (x, y_t).
        hidden: `[B, L]`, not 0 on tokens in context and on stored ones (`mdu_trainer.data.secrets`).
        mask_token_id: id of [MASK].
    """
    return noisy_ids.masked_fill(hidden.bool(), mask_token_id)


def strike_out(logits: Tensor, tokens: Tensor, quantile: float) -> Tensor:
    """Give a token of each row the logit that a share of the vocabulary lies below: a new tensor `[N, V]`.

    >>> strike_out(torch.tensor([[1.0, 9.0, 2.0], [1.0, 9.0, 2.0]]), torch.tensor([1, -1]), quantile=0.5)
    tensor([[1., 2., 2.],
            [1., 9., 2.]])

    Args:
        logits: `[N, V]`.
        tokens: int64 `[N]`, the token to strike out of each row; -1 for none.
        quantile: in [0, 1]. 0.5 takes the (lower) median; 0 the smallest logit.
    """
    rows = (tokens >= 0).nonzero()[:, 0]
    level = logits[rows].kthvalue(1 + int(quantile * (logits.shape[1] - 1)), dim=-1).values
    return logits.index_put((rows, tokens[rows]), level)


def forward_process(batch: dict[str, Tensor], mask_token_id: int) -> Noised:
    """Mask the responses of a batch, as its times and noise say.

    Args:
        batch: `input_ids`, `attention_mask`, `completion_mask` and `noise` `[B, L]`, and `t` `[B]`. With `secrets`
            `[B, L]` (`mdu_trainer.data.secrets`) the anchor is counterfactual; with `maskable` `[B, L]`
            (`mdu_trainer.data.forget_masks`) not all of a response counts.
        mask_token_id: id of [MASK].
    """
    ids, response, attention_mask = (batch[name] for name in ("input_ids", "completion_mask", "attention_mask"))
    corruption, drew_nothing = _corrupt(ids, response, attention_mask, mask_token_id, batch["t"], batch["noise"])
    masked = corruption.masked
    noised = Noised(
        input_ids=corruption.noisy_ids,
        anchor_ids=corruption.anchor_ids,
        attention_mask=attention_mask,
        masked=masked,
        targets=ids[masked],
        batch_index=masked.nonzero(as_tuple=True)[0],
        num_masked=masked.sum(dim=1),
        num_response=batch.get("maskable", response).sum(dim=1),
        weight=~drew_nothing / batch["t"],
        clean_ids=ids,
        clean_anchor_ids=torch.where(masked, ids, corruption.anchor_ids),
    )
    if "secrets" not in batch:
        return noised
    stored = (batch["secrets"] == STORED) & response.bool()
    tokens = torch.where(stored[masked], noised.targets, -1)
    return noised._replace(
        anchor_ids=counterfactual_ids(corruption.noisy_ids, batch["secrets"], mask_token_id),
        clean_anchor_ids=counterfactual_ids(ids, batch["secrets"], mask_token_id),
        strike=Strike(tokens, ~stored.any(dim=1)[noised.batch_index]),
    )


def pad_rows(rows: Sequence[list[int]], fill: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Put rows of ids into one tensor, filled up on the right, with the attention mask: int64 `[B, L]` each.

    L is the smallest multiple of a number that no row exceeds.

    >>> pad_rows([[5, 6, 7], [8]], fill=0)
    (tensor([[5, 6, 7],
            [8, 0, 0]]), tensor([[1, 1, 1],
            [1, 0, 0]]))
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    parts = (pad_sequence(x, batch_first=True, padding_value=value) for x, value in ((tensors, fill), (ones, 0)))
    ids, mask = (
        pad(part, (0, -part.shape[1] % multiple), value=value) for part, value in zip(parts, (fill, 0), strict=True)
    )
    return ids, mask


def side_by_side(batches: Sequence[Noised], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several batches as one, padded on the right, `[sum B, L]` each.

    Returns:
        Input ids, attention mask, masked positions, and the clean ids.
    """
    width = max(noised.masked.shape[1] for noised in batches)

    def joined(parts: list[Tensor], value: int) -> Tensor:
        return torch.cat([pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    ids, clean_ids = (
        joined([getattr(noised, name) for noised in batches], pad_token_id) for name in ("input_ids", "clean_ids")
    )
    attention_mask = joined([noised.attention_mask for noised in batches], 0)
    return ids, attention_mask, joined([noised.masked for noised in batches], False), clean_ids


@dataclass(frozen=True)
class MaskSchedule:
    """Counter-based times and noise for the rows of one data set.

    Args:
        seed: seed of the run.
        stream: name of the data set ("forget", "retain", ...): data sets draw independently.
        num_rows: rows in the data set. On each visit the rows' times fall one into each of `num_rows` equal slices of
            the time range, so they are spread evenly over an epoch.
        t_min, t_max, time_epsilon: t is uniform on [max(t_min, time_epsilon), t_max].
        prompt_mask_ratio: share of rows whose prompt takes part in the diffusion, too.
        block_size: of blocks that have a time each, uniform on the same range; None for one time a row. Each row then
            comes twice, the second time with what the first does not mask.
    """

    seed: int
    stream: str
    num_rows: int
    t_min: float = 0.0
    t_max: float = 1.0
    time_epsilon: float = 1e-3
    prompt_mask_ratio: float = 0.0
    block_size: int | None = None

    @property
    def _key(self) -> int:
        return (self.seed << 32) ^ zlib.crc32(self.stream.encode())

    def draw(self, visit: Tensor, row: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return times `[B]`, noise `[B, length]`, and whether the prompt takes part, bool `[B]`.

        Args:
            visit, row: `[B]` each.
            length: positions of the longest row.
        """
        takes_prompt = counter_uniform(self._key + 1, visit, row) < self.prompt_mask_ratio
        t, noise = self.times(visit, row), self.noise(visit, row, length)
        if self.block_size is not None:
            noise = _below_half(noise, self.block_times(visit, row, length))
            t = torch.full_like(t, 0.5)
        return t, noise, takes_prompt

    def block_times(self, visit: Tensor, row: Tensor, length: int) -> Tensor:
        """Return the time of the block of each position, for rows whose blocks have one each: `[B, length]`."""
        assert self.block_size is not None
        block = torch.arange(length, device=row.device) // self.block_size
        low = max(self.t_min, self.time_epsilon)
        uniform = counter_uniform(self._key + 4, visit[:, None], row[:, None], block)
        return low + (max(self.t_max, low) - low) * uniform

    def times(self, visit: Tensor, row: Tensor) -> Tensor:
        """Return the times of `row` `[B]` on `visit` `[B]`: float32 `[B]`."""
        places = zip(visit.tolist(), row.tolist(), strict=True)
        slices = [_even_uniforms(self._key, v, self.num_rows)[r] for v, r in places]
        low = max(self.t_min, self.time_epsilon)
        return (low + (max(self.t_max, low) - low) * torch.stack(slices)).float().to(row.device)

    def noise(self, visit: Tensor, row: Tensor, length: int) -> Tensor:
        """Return noise for the first `length` positions of `row` `[B]` on `visit` `[B]`: `[B, length]` in [0, 1)."""
        position = torch.arange(length, device=row.device)
        return counter_uniform(self._key, visit[:, None], row[:, None], position[None, :])


def _below_half(noise: Tensor, t: Tensor) -> Tensor:
    """Stretch noise, so that it is below 1/2 where it was below t. So 1 - noise is where it was not.

    With t = 1/2 for the row a loss weighted by 1/t counts each token of the two copies twice in their mean, once in
    all: the mean cross-entropy as Fast-dLLM v2 publishes it (arXiv 2509.26328).
    """
    below, above = noise / (2 * t), 1 - (1 - noise) / (2 * (1 - t))
    return torch.where(noise < t, below.clamp(max=0.5 - 2**-20), above.clamp(min=0.5 + 2**-20))


def counter_uniform(seed: int, *counters: Tensor) -> Tensor:
    """Return uniforms in [0, 1) as a hash of the counters: float32 with 24 random bits, alike on every device.

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
    state = torch.tensor(_signed(seed * 0x9E3779B97F4A7C15))
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
