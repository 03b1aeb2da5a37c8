"""The options of decoding, as data."""

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

from ..files import UserError

Schedule = Literal["linear", "dllm", "dream"]
Remasking = Literal["low_confidence", "margin", "entropy", "random"]
Decoding = Literal["exact", "fast"]

DECODING_HELP = "exact; or fast, an approximation: many tokens a pass, its error measured and among the scores."
FAST_THRESHOLD = 0.9  # of decoding="fast", as Fast-dLLM (arXiv 2505.22618) has it


@dataclass(frozen=True)
class DiffusionGenerationConfig:
    """The options of decoding.

    Parameters that say how much is decoded, and in how many steps:

        max_new_tokens: length of the response, and of what its end token cuts off.
        steps: forward passes a response, split evenly over the blocks; one a token if None. Where that does not come
            out even: `mdu_trainer.inference.schedule`.
        block_length: tokens of a block (semi-autoregressive decoding); one block if None.
        schedule: how many tokens a step reveals. "linear": equally many, or one more in the first steps (LLaDA).
            "dllm": equally many, rounded as dllm does. "dream": the share 1 - s/t of what is masked, over the
            timesteps linspace(1, 0.001, steps + 1) from t to s, rounded down, and all in the last step; with random
            remasking each masked token is revealed with that probability on its own (Dream).

    Parameters that say which tokens a step reveals:

        remasking: the masked tokens with the highest score are revealed, the first of equal ones first.
            "low_confidence": probability of the token; "margin": by how much the top probability exceeds the second;
            "entropy": negative entropy of the prediction; "random": no score, uniform.
        position_temperature: above 0, positions are sampled from softmax(score / position_temperature).
        confidence_threshold: all masked tokens of the block whose probability is above it are revealed, and as many
            as the schedule says at least. An approximation that takes fewer passes, for remasking "low_confidence"
            (Fast-dLLM, arXiv 2505.22618).

    Parameters that say what a revealed token is:

        temperature: 0 takes the most probable token, otherwise one is sampled from softmax(logits / temperature), by
            the Gumbel-max method in float64. Scores are computed before the temperature with schedules "linear" and
            "dllm", after it with "dream", as each publishes it.
        top_p, top_k: keep the most probable tokens only, up to a total probability, and up to a number.
        cfg_scale: classifier-free guidance, l_u + (cfg_scale + 1) * (l_c - l_u), where the prompt is masked in l_u;
            costs a second forward pass.

    Parameters of the run:

        seed: of whatever is random. What is drawn for a prompt is a function of the seed and of the prompt's number
            (its place in the call, unless `row_ids` says otherwise), never of the batch it is decoded in.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: for a value out of range, or one that another makes meaningless.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    block_length: int | None = None
    schedule: Schedule = "linear"
    remasking: Remasking = "low_confidence"
    position_temperature: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    confidence_threshold: float | None = None
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.remasking not in get_args(Remasking):
            raise UserError(f"remasking must be one of {', '.join(get_args(Remasking))}, got {self.remasking!r}.")
        if self.schedule not in get_args(Schedule):
            raise UserError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}.")
        if self.remasking == "random" and self.position_temperature:
            raise UserError(
                "remasking='random' has no score that position_temperature could divide: set it to 0, or choose "
                "another remasking."
            )
        if self.confidence_threshold is not None:
            self._check_threshold(self.confidence_threshold)
        if self.block_length is not None and self.block_length > self.max_new_tokens:
            raise UserError(
                f"block_length ({self.block_length}) must be at most max_new_tokens ({self.max_new_tokens})."
            )
        if self.steps is not None and self.steps < len(self.blocks):
            raise UserError(
                f"steps ({self.steps}) must be at least the number of blocks ({len(self.blocks)}): raise steps, or "
                "block_length."
            )

    def _check_numbers(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length", "top_k", "batch_size"):
            value = getattr(self, name)
            if value is not None or name in ("max_new_tokens", "batch_size"):
                check_count(name, value)
        if not _is(self.seed, Integral):
            raise UserError(f"seed must be a whole number, got {self.seed!r}.")
        for name in ("temperature", "position_temperature", "cfg_scale"):
            value = getattr(self, name)
            if not (_is(value, Real) and math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a finite number of at least 0, got {value!r}.")
        if self.top_p is not None and not (_is(self.top_p, Real) and 0 < self.top_p <= 1):
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")

    def _check_threshold(self, threshold: float) -> None:
        if not (_is(threshold, Real) and 0 <= threshold <= 1):
            raise UserError(f"confidence_threshold must lie in [0, 1], got {threshold!r}.")
        needed = {"remasking": "low_confidence", "position_temperature": 0.0}
        other = [f"{name}={getattr(self, name)!r}" for name, value in needed.items() if getattr(self, name) != value]
        if self.schedule == "dream":
            other.append("schedule='dream'")
        if other:
            raise UserError(
                f"confidence_threshold, which decoding='fast' sets, reveals tokens by their probability alone. It "
                f"does not go with {' and '.join(other)}: leave one of them out."
            )

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Start and stop (exclusive) of each block within the response."""
        length = self.block_length or self.max_new_tokens
        return [(start, min(start + length, self.max_new_tokens)) for start in range(0, self.max_new_tokens, length)]


def decoded_as(config: DiffusionGenerationConfig, decoding: str) -> DiffusionGenerationConfig:
    """The options of decoding under a name.

    Args:
        config: the options.
        decoding: "exact", the options as they are; or "fast", with a `confidence_threshold` of 0.9 if they have none.

    Raises:
        ValueError: for another name, or options that "fast" does not go with.
    """
    if decoding not in get_args(Decoding):
        raise UserError(f"decoding must be one of {', '.join(get_args(Decoding))}, got {decoding!r}.")
    if decoding == "exact" or config.confidence_threshold is not None:
        return config
    return replace(config, confidence_threshold=FAST_THRESHOLD)


def check_count(name: str, value: Any) -> None:
    """Refuse a value that is not a whole number of at least 1."""
    if not _is(value, Integral):
        raise UserError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}.")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is a number of this kind. True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)
