"""Settings of unlearning under one name; what users set themselves counts before them.

    MDUConfig("out", preset="lasting")
    mdu unlearn --preset lasting ...

`lasting`: the counterfactual anchor, which draws the model towards one that never saw the rows, and a learning rate
that deletes where a smaller one hides. The rate was found on small models of which all weights are
trained (examples/benchmarks/README.md), and is a third of that with which they had learned the rows. For a large model
or an adapter, begin with a third of the rate of its fine-tuning.
"""

from typing import Any

from ..files import UserError

PRESETS: dict[str, dict[str, Any]] = {
    "lasting": {"loss_type": "mdu", "tau": 1.0, "anchor_input": "counterfactual", "learning_rate": 1e-3},
}


def preset(name: str) -> dict[str, Any]:
    """The settings of a name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}' is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
