"""The options of decoding, as data."""

import json
import math
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..files import UserError, read_json, typed, write_whole

GENERATION_CONFIG = "generation_config.json"
KEY = "diffusion_decoding"  # in that file, where transformers keeps what it does not know
Schedule = Literal["linear", "dllm", "dream"]
Remasking = Literal["low_confidence", "margin", "entropy", "random", "low_confidence_dynamic"]
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
            "entropy": negative entropy of the prediction; "random": no score, uniform. "low_confidence_dynamic":
            low_confidence, with the confidence_threshold that was published for a block-wise model if none is set.
        edit_threshold: revealed tokens of the block, too, are predicted, and replaced where another has a score above
            it (LLaDA2.1), here up to 16 times once nothing is masked.
        position_temperature: above 0, positions are sampled from softmax(score / position_temperature).
        confidence_threshold: all masked tokens of the block whose probability is above it are revealed, and as many
            as the schedule says at least. For remasking "low_confidence"; where a model attends in full, an
            approximation that takes fewer passes (Fast-dLLM, arXiv 2505.22618).

    Parameters that say what a revealed token is:

        temperature: 0 takes the most probable token, otherwise one is sampled from softmax(logits / temperature), by
            the Gumbel-max method in float64. Scores are computed before the temperature with schedules "linear" and
            "dllm", after it with "dream", as each publishes it.
        top_p, top_k: keep the most probable tokens only, up to a total probability, and up to a number.
        cfg_scale: classifier-free guidance, l_u + (cfg_scale + 1) * (l_c - l_u), where the prompt is masked in l_u;
            costs a second forward pass.

    Parameters of models that attend between blocks, whose blocks are decoded one after the other:

        block_length: of sub-blocks, at most the model's own block, and that by default (8 for Fast-dLLM v2).
        steps: each block has its share, rounded up, whatever of it the prompt takes.

    Parameters of what is kept between steps:

        prefix_cache: keep keys and values of the tokens before the block, so that a step costs the tokens of its own.
            It changes no token of a block-wise model, where None is True. For one that attends in full (LLaDA, Dream)
            True is an approximation (`mdu_trainer.inference.prefix`), and None is False.

    Parameters of the run:

        seed: of whatever is random. What is drawn for a prompt is a function of the seed and of the prompt's number
            (its place in the call, unless `row_ids` says otherwise), never of the batch it is decoded in.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: for a value out of range, or one that another makes meaningless.

    Example:

        config = DiffusionGenerationConfig(max_new_tokens=64, steps=32)
        config.save_pretrained("outputs/model")
        generate(model, tokenizer, prompts, DiffusionGenerationConfig.from_pretrained("outputs/model"))
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
    edit_threshold: float | None = None
    prefix_cache: bool | None = None
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
            self._check_threshold()
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
        for name in ("confidence_threshold", "edit_threshold"):
            value = getattr(self, name)
            if value is not None and not (_is(value, Real) and 0 <= value <= 1):
                raise UserError(f"{name} must lie in [0, 1], got {value!r}.")
        if self.prefix_cache not in (None, True, False):
            raise UserError(f"prefix_cache must be True or False, got {self.prefix_cache!r}.")
        if self.top_p is not None and not (_is(self.top_p, Real) and 0 < self.top_p <= 1):
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the options into `generation_config.json` beside a model, whose other options stay.

        Raises:
            ValueError: there is such a file, and it holds something else.
        """
        path = Path(folder) / GENERATION_CONFIG
        content = _content(path) if path.is_file() else {}
        content.pop("_from_model_config", None)  # beside which transformers drops what it does not know
        write_whole(path, json.dumps(content | {KEY: asdict(self)}, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "DiffusionGenerationConfig":
        """Read the options that `save_pretrained` wrote beside a model, and that it was measured with.

        Args:
            name_or_path: a folder, or a Hub id.
            revision, token: of a repository on the Hub.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they cannot be read, or make no sense.
        """
        path = Path(name_or_path) / GENERATION_CONFIG
        if not Path(name_or_path).is_dir():
            try:
                path = Path(hf_hub_download(str(name_or_path), GENERATION_CONFIG, revision=revision, token=token))
            except EntryNotFoundError:
                pass
        content = _content(path) if path.is_file() else {}
        if KEY not in content:
            raise FileNotFoundError(
                f"{name_or_path} says nothing of how its answers are decoded: {GENERATION_CONFIG} has no {KEY}. Pass "
                "options of your own, DiffusionGenerationConfig(max_new_tokens=...)."
            )
        try:
            return typed(cls, content[KEY])
        except ValueError as error:
            raise UserError(f"{KEY} in {GENERATION_CONFIG} of {name_or_path}: {error}") from None

    def _check_threshold(self) -> None:
        other = [f"remasking={self.remasking!r}"] if not self.remasking.startswith("low_confidence") else []
        if self.position_temperature:
            other.append(f"position_temperature={self.position_temperature!r}")
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


def has_decoding(folder: Path) -> bool:
    """Whether `DiffusionGenerationConfig.from_pretrained` finds options in a folder."""
    return (folder / GENERATION_CONFIG).is_file() and KEY in _content(folder / GENERATION_CONFIG)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, "a generation config", "save the model again")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a generation config: it holds no JSON object. Save the model again.")
    return content


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
