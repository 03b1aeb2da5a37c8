"""Configuration of what fine-tuning and unlearning share, and of fine-tuning."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

from ..files import UserError, without_secrets
from .arguments import (
    check_arguments,
    check_direction,
    check_numbers,
    check_training,
    is_whole,
)

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")


@dataclass
class DiffusionConfig(TrainingArguments):
    r"""
    The options that fine-tuning ([`MDLMConfig`]) and unlearning ([`MDUConfig`]) share.

    Only the parameters that [`~transformers.TrainingArguments`] does not have, or whose defaults or meaning differ,
    are listed. Those of its parameters that would do harm here are refused (`REFUSED` says why), and those that do
    nothing are named in a warning (`IGNORED`). Values that make no sense are refused before anything is loaded.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, for a model given by name.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a model given by name may run code of its repository. LLaDA and Dream need none.

        > Parameters that control resuming

        force_resume (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint although settings or data that change the weights are not those of its run.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `1024`):
            Longest row in tokens. Responses are truncated, prompts never. `None` is the model's context length.
        text_stride (`int`, *optional*):
            Rows of `text` alone: tokens from the start of a chunk of `max_length` tokens to that of the next. As many
            as a chunk has if not set, so that chunks do not overlap; the last one ends with the text in any case.
        train_sampling_strategy (`str`, *optional*, defaults to `"random"`):
            `"random"`, `"sequential"`, or `"group_by_length"` (batches of rows of like length).
        data_seed (`int`, *optional*):
            Seed of the order of the rows; `seed` if not set. Times and masks follow `seed` alone.
        dataloader_drop_last (`bool`, *optional*, defaults to `False`):
            Leave out the rows of an epoch that do not fill a batch. An evaluation leaves out none.

        > Parameters that control the choice of the best model

        metric_for_best_model (`str`, *optional*), greater_is_better (`bool`, *optional*):
            A score of an evaluation; [`MDLMTrainer`] and [`MDUTrainer`] say how they are named. A name that stands
            for no score, or for one that does not tell a good model, is refused with those that there are. Unless
            the score is a loss, say whether more is better.

        > Parameters that control the form of a pass (models that attend between blocks: SDAR, LLaDA2.x, Fast-dLLM v2)

        attention (`str`, *optional*):
            `"block"` trains on the noisy tokens beside the clean ones, of which a block sees those before it; `"full"`
            lets every token see every other, as public recipes of LLaDA2.x do. As the model's config says if not set
            (`"block"`, unless it was trained in full), and kept there.
        noise_per (`str`, *optional*):
            `"row"` draws one t a row. `"block"` draws one a block, and each row comes twice in a batch, the second
            time with what the first does not mask, so that each token is learned once; a loss with 1/t is then the
            mean cross-entropy. As the model was published if not set: `"block"` for Fast-dLLM v2. Rows to forget
            whose masks are not random, and rows of an evaluation, come once.

        > Parameters that control the forward process

        t_min (`float`, *optional*, defaults to `0.0`), t_max (`float`, *optional*, defaults to `1.0`):
            t is uniform on [max(t_min, time_epsilon), t_max]. `t_min = t_max = 1` masks the whole response.
        time_epsilon (`float`, *optional*, defaults to `1e-3`):
            Smallest t.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, for a model given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether a model given by name may run code of its repository."}
    )
    force_resume: bool = field(
        default=False, metadata={"help": "Resume although settings or data differ from those of the checkpoint."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest row in tokens; responses are truncated, prompts never."}
    )
    attention: str | None = field(
        default=None,
        metadata={"help": "Models of blocks: attend between blocks, or in full.", "choices": [None, "block", "full"]},
    )
    noise_per: str | None = field(
        default=None,
        metadata={"help": "Models of blocks: draw t for each row or block.", "choices": [None, "row", "block"]},
    )
    text_stride: int | None = field(
        default=None, metadata={"help": "Rows of text: tokens from a chunk's start to the next one's; a chunk's own."}
    )
    t_min: float = field(default=0.0, metadata={"help": "t is uniform on [max(t_min, time_epsilon), t_max]."})
    t_max: float = field(default=1.0, metadata={"help": "Largest t; t_min = t_max = 1 masks the whole response."})
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest t."})

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows are tokenised here."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X update steps."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Off: a step runs several forward passes before its backward pass."}
    )
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self):
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise UserError("output_dir is empty; name a folder for checkpoints and the model.")
        check_training(self)
        check_direction(self)
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise UserError(f"An option that is given as a JSON object cannot be read: {error}.") from None
        except (ValueError, TypeError) as error:  # what transformers refuses is the user's mistake as well
            raise UserError(str(error)) from None
        check_arguments(self)
        self.check_values()

    def check_values(self) -> None:
        """Refuse values that contradict each other, also after some were set anew (a search for hyperparameters).

        Raises:
            UserError: naming the parameter, its value and what it may be.
        """
        check_training(self)
        check_numbers(self, dict.fromkeys(("t_min", "t_max", "time_epsilon"), "a number"))
        for name in ("attention", "noise_per"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices[1:])}, got {getattr(self, name)!r}.")
        if not 0 < self.time_epsilon < 1:
            raise UserError(f"time_epsilon must lie between 0 and 1, got {self.time_epsilon}.")
        if not 0 <= self.t_min <= 1 or not 0 < self.t_max <= 1:
            raise UserError(f"t_min and t_max must lie in [0, 1], got t_min = {self.t_min}, t_max = {self.t_max}.")
        if self.t_min > self.t_max:
            raise UserError(f"t_min = {self.t_min} is larger than t_max = {self.t_max}; swap them.")
        if self.max_length is not None and not is_whole(self.max_length, 2):
            raise UserError(f"max_length = {self.max_length} leaves no room for a prompt and a response.")
        if self.text_stride is not None and not is_whole(self.text_stride, 1):
            raise UserError(f"text_stride must be a whole number of tokens from 1, got {self.text_stride}.")
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise UserError(
                f"train_sampling_strategy '{self.train_sampling_strategy}' is not supported; use one of "
                f"{', '.join(SAMPLING_STRATEGIES)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, without the secrets in options that are dicts: trackers are sent it."""
        return {name: without_secrets(v) if isinstance(v, dict) else v for name, v in super().to_dict().items()}

    @property
    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `load_model`."""
        return {"trust_remote_code": self.trust_remote_code} | cast(dict, self.model_init_kwargs or {})

    @property
    def rows_a_counter(self) -> dict[str, int]:
        """How many rows of a set `data.rows.RowPairs` takes together, by its name; 1 of sets that are not named."""
        return {}

    @property
    def mask_options(self) -> dict[str, float]:
        """The options of `masking.MaskSchedule`."""
        return {name: getattr(self, name) for name in ("t_min", "t_max", "time_epsilon")}


@dataclass
class MDLMConfig(DiffusionConfig):
    r"""
    Configuration of [`MDLMTrainer`], which fine-tunes a masked diffusion language model.

    Only the parameters that [`DiffusionConfig`] does not have are listed.

    Parameters:
        pad_with_end_tokens (`bool`, *optional*, defaults to `False`):
            Fill each batch with end tokens that count as response, instead of padding, as LLaDA's instruction tuning
            did. A model trained this way ends short answers inside a longer block of masks.
        time_weighting (`bool`, *optional*, defaults to `True`):
            Weight the cross-entropy by 1/t, the bound on -log p. `False` averages it over the masked tokens instead,
            which has less variance.
        prompt_mask_ratio (`float`, *optional*, defaults to `0.0`):
            Share of rows whose prompt takes part in the diffusion too, so that the model knows what to predict when
            the prompt is masked.
    """

    pad_with_end_tokens: bool = field(
        default=False, metadata={"help": "Fill batches with end tokens that count as response."}
    )
    time_weighting: bool = field(default=True, metadata={"help": "Weight the cross-entropy by 1/t."})
    prompt_mask_ratio: float = field(
        default=0.0, metadata={"help": "Share of rows whose prompt takes part in the diffusion too."}
    )

    def check_values(self) -> None:
        """As in `DiffusionConfig`, and the options of fine-tuning."""
        super().check_values()
        check_numbers(self, {"prompt_mask_ratio": "a number"})
        if not 0 <= self.prompt_mask_ratio <= 1:
            raise UserError(f"prompt_mask_ratio is a share in [0, 1], got {self.prompt_mask_ratio}.")

    @property
    def mask_options(self) -> dict[str, float]:
        """The options of `masking.MaskSchedule`."""
        return super().mask_options | {"prompt_mask_ratio": self.prompt_mask_ratio}
