"""What trackers may send away: numbers and settings, and no model, checkpoint or page outside the list of files.

transformers hands every setting of a run to a tracker, and some of its trackers upload more when a variable of the
environment says so: checkpoints with all that lies in them, or a page of the logs that anybody can read.
"""

import os
from collections.abc import Iterable

from transformers import TrainingArguments
from transformers.utils import logging

from ..files import UserError

logger = logging.get_logger(__name__)

NO = {"", "0", "FALSE", "NO", "OFF"}
# Trackers that upload checkpoints if a variable says so: its name, and what it comes to if it is not set
UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", "FALSE"),
    "comet_ml": ("COMET_LOG_ASSETS", "FALSE"),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", "FALSE"),
    "dagshub": ("HF_DAGSHUB_LOG_ARTIFACTS", "FALSE"),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", "FALSE"),
    "clearml": ("CLEARML_LOG_MODEL", "TRUE"),
}
ALWAYS = ("flyte",)  # those that upload checkpoints in any case
SPACE = "TRACKIO_SPACE_ID"  # of the environment, in place of the argument


def check_trackers(config: TrainingArguments, names: Iterable[str]) -> None:
    """Refuse trackers that would publish more than numbers and settings.

    A static Space of trackio is switched off where nobody has asked for it: it would be made at the first push.

    Args:
        config: of the run.
        names: of the trackers, as `report_to` has them.

    Raises:
        UserError: a tracker that uploads checkpoints, or a Space that everybody could see or that has no name.
    """
    for name in names:
        variable, unset = UPLOADS.get(name, ("", "FALSE"))
        if name in ALWAYS or os.environ.get(variable, unset).strip().upper() not in NO:
            how = f"Set {variable}=false in the environment" if variable else f"Leave {name} out of report_to"
            raise UserError(
                f"report_to '{name}' would upload checkpoints with what lies beside the weights, past the list of "
                f"files and the scan for rows to forget. {how}; push_to_hub publishes the model."
            )
        if name == "trackio":
            _check_spaces(config)


def _check_spaces(config: TrainingArguments) -> None:
    static = config.trackio_static_space_id
    if isinstance(static, str) and static.upper() in NO:  # as it comes from a command line
        static = config.trackio_static_space_id = False
    if static is None and config.push_to_hub:
        raise UserError(
            "report_to 'trackio' with push_to_hub would publish a dashboard of this run, a Space with a name of its "
            "own. Set trackio_static_space_id=False, or name a Space there and set hub_private_repo=True."
        )
    if static is None:
        static = config.trackio_static_space_id = False
        logger.info("trackio_static_space_id = False: no Space is made of the logs unless it is asked for by name.")
    spaces = {"trackio_space_id": config.trackio_space_id or os.environ.get(SPACE), "trackio_static_space_id": static}
    for name, space in spaces.items():
        if space and config.hub_private_repo is not True:
            raise UserError(
                f"{name} = {space!r} would be a Space that everybody can see. Set hub_private_repo=True, or leave it "
                "out: trackio then logs on this machine."
            )
