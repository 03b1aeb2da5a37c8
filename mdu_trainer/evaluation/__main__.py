"""`python -m mdu_trainer.evaluation`: the command line of lm-evaluation-harness, which then knows `--model mdlm`.

    python -m mdu_trainer.evaluation --model mdlm --model_args pretrained=PATH --tasks mmlu --batch_size 32

Arguments are those of `lm_eval`. Releases that load plugins know `mdlm` without this.
"""

import sys
from importlib.util import find_spec

from ..commands import run, task
from ..files import UserError


def main() -> None:
    """Register the model, and hand over."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'mdu-trainer[eval]'.")
    from lm_eval.__main__ import cli_evaluate

    from . import harness  # noqa: F401  registers "mdlm"

    with task("lm-evaluation-harness"):
        cli_evaluate()


if __name__ == "__main__":
    sys.exit(run(main))
