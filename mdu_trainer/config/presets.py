"""Settings of unlearning under one name; what users set themselves counts before them.

    MDUConfig("out", preset="lasting")
    mdu unlearn --preset lasting ...

`lasting`: the counterfactual anchor, which draws the model towards one that never saw the rows; a learning rate that
deletes where a smaller one hides; and rows to keep that count eight times, for such a rate harms them. Rate and weight
were found on small models of which all weights are trained (examples/benchmarks/README.md). The rate is a third of
that with which they had learned the rows: for a large model or an adapter, begin with a third of its fine-tuning's.

MDU on TOFU's forget10 as three others ran it, for LLaDA-8B, so that their figures can be compared with. A command that
scores takes their rows and decoding, too:

`paper`: the equation of arXiv 2605.18253. `release`: the code published with it, with MDU's loss switched on, which
its documented command does not do. `replication`: a public replication with about fifty runs; of its masks and anchors
those that it found to forget most.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..files import UserError
from ..terminal import folded

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Preset:
    """Settings under one name.

    Attributes:
        training: options of `MDUConfig`.
        scoring: options of a command that chooses rows and scores: of those, what the command has.
        unknown: what the source does not say, or does otherwise.
    """

    training: dict[str, Any]
    scoring: dict[str, Any] = field(default_factory=dict)
    unknown: str = ""


ON_TOFU: dict[str, Any] = {
    "loss_type": "mdu",
    "tau": 0.5,
    "learning_rate": 1e-5,
    "num_train_epochs": 9.0,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "retain_weight": 1.0,
}
SCORED: dict[str, Any] = {
    "forget_split": "forget10",
    "retain_split": "retain_perturbed",
    "max_new_tokens": 128,
    "decoding_steps": 128,
}
PRESETS: dict[str, Preset] = {
    "lasting": Preset(
        {
            "loss_type": "mdu",
            "tau": 1.0,
            "anchor_input": "counterfactual",
            "learning_rate": 1e-3,
            "retain_weight": 8.0,
        },
    ),
    "paper": Preset(
        ON_TOFU | {"forget_masking": "random", "anchor_source": "initial", "anchor_input": "masked_prompt"},
        SCORED | {"rouge": "f1"},
        "tau is one of 0, 0.25, 0.5, 0.75 and 1, epochs are 5 for Dream; the paper does not say which rows are kept, "
        "whether special tokens are masked, how the learning rate falls, or in how many steps answers are decoded",
    ),
    "release": Preset(
        ON_TOFU
        | {
            "forget_masking": "generated",
            "rollout_every": 1,
            "anchor_source": "current",
            "anchor_input": "masked_prompt",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        },
        SCORED | {"rouge": "recall"},
        "the release generates anew for every batch, here for every epoch; its epochs are 5 for Dream; and its "
        "documented command sets neither loss nor masks, so it runs gradient ascent",
    ),
    "replication": Preset(
        ON_TOFU
        | {
            "tau": 0.25,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "forget_masking": "content",
            "anchor_source": "current",
            "anchor_input": "masked_prompt",
        },
        SCORED | {"rouge": "recall"},
        "it also ran the masks 'random' and 'generated', and the anchors 'initial' and 'ema', at all five tau",
    ),
}
# Options of presets that mean nothing without a value of another: they give way where that is set otherwise
DEPENDENT: dict[str, tuple[str, Any]] = {"rollout_every": ("forget_masking", "generated")}


def preset(name: str) -> Preset:
    """The settings of a name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


@contextmanager
def applied(args: Any, given: set[str]) -> Iterator[None]:
    """Set the options of `args.preset` but those given, and say which they are once they have been checked within.

    An option that means nothing beside what is given becomes None. A refusal that names what the preset set says so.

    Raises:
        UserError: there is no such preset.
    """
    if args.preset is None:
        yield
        return
    one = preset(args.preset)
    for option, value in one.training.items():
        if option not in given:
            setattr(args, option, value)
    idle = [
        option
        for option, (other, needed) in DEPENDENT.items()
        if getattr(args, option) == one.training.get(option, ...) and getattr(args, other) != needed
    ]
    for option in idle:
        setattr(args, option, None)
    try:
        yield
    except UserError as error:
        named = [option for option in one.training if re.search(rf"\b{option}\b", str(error))]
        own = {option: one.training[option] for option in named if getattr(args, option) == one.training[option]}
        added = f" Preset '{args.preset}' sets {_said(own)}; another value that is passed counts before it."
        raise UserError(f"{error}{added if own else ''}") from None
    said = _said({option: getattr(args, option) for option in one.training if option not in idle})
    said += "".join(f"; without {option}, which is of {'='.join(DEPENDENT[option])}" for option in idle)
    unknown = f" Note: {one.unknown}." if one.unknown else ""
    logger.warning_once(folded(f"preset '{args.preset}': {said}.{unknown}", sys.stderr))


def _said(values: dict[str, Any]) -> str:
    return ", ".join(f"{option}={getattr(value, 'value', value)}" for option, value in values.items())
