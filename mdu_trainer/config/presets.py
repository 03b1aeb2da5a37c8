"""Settings of unlearning under one name; what users set themselves counts before them.

    MDUConfig("out", preset="lasting")
    mdu unlearn --preset lasting ...

`lasting`: the counterfactual anchor, which draws the model towards one that never saw the rows; a learning rate that
deletes where a smaller one hides; and rows to keep that count four times, for such a rate harms them. Rate and weight
were found on small models of which all weights are trained (examples/benchmarks/README.md). The rate is a third of
that with which they had learned the rows: for a large model or an adapter, begin with a third of its fine-tuning's.

MDU on TOFU's forget10 as three others ran it, for LLaDA-8B, so that their figures can be compared with. A command that
scores takes their rows and decoding, too:

`paper`: the equation of arXiv 2605.18253. `release`: the code published with it, with MDU's loss switched on, which
its documented command does not do. `replication`: a public replication with about fifty runs; of its masks and anchors
those that it found to forget most.
"""

from dataclasses import dataclass, field
from typing import Any

from ..files import UserError


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
            "retain_weight": 4.0,
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


def preset(name: str) -> Preset:
    """The settings of a name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def words(name: str, values: dict[str, Any]) -> str:
    """What is said of a preset where it is used: the values of its options, and what its source does not say."""
    unknown = PRESETS[name].unknown
    said = ", ".join(f"{option}={getattr(value, 'value', value)}" for option, value in values.items())
    return f"preset '{name}': {said}" + (f". Note: {unknown}." if unknown else ".")
