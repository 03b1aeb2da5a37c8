"""A leak check that the Hub repeats by itself: the scheduled Job that runs it.

The Job reads rows and model from volumes, which the Hub mounts with the rights of whoever made the Job: so no token
and no row is in the request. Its log has the figures, and its exit status is the alarm (see `mdu leak-check --help`).
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import Volume
from huggingface_hub.errors import HfHubHTTPError

from ..files import UserError
from .push import hub_api

SCHEDULES = {"hour": "@hourly", "day": "@daily", "week": "@weekly", "month": "@monthly"}
NAME = "mdu-leak-check"
TIMEOUT = "2h"


@dataclass(frozen=True)
class LeakCheckJob:
    """A leak check on a schedule, on a machine of the Hub.

    Attributes:
        every: a name of `SCHEDULES`.
        model, revision: Hub id of the model or adapter.
        forget, retain: data sets on the Hub, as NAME or NAME:CONFIG; `forget` must be private.
        package: how the Job gets this package, as `uv run --with` takes it.
        flavor: of the machine, as `hf jobs hardware` lists them.
        options: further words of `mdu leak-check`.
    """

    every: str
    model: str
    forget: str
    package: str
    options: tuple[str, ...]
    retain: str | None = None
    revision: str = "main"
    flavor: str = "cpu-basic"

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of `create_scheduled_uv_job`."""
        volumes, words = [Volume(type="model", source=self.model, mount_path="/model", revision=self.revision)], []
        for name, source in (("forget", self.forget), ("retain", self.retain)):
            if source is not None:
                repository, colon, config = source.partition(":")
                volumes.append(Volume(type="dataset", source=repository, mount_path=f"/{name}"))
                words += [f"--{name}", f"/{name}{colon}{config}"]
        return {
            "script": "mdu",
            "script_args": ["leak-check", "--model", "/model", *words, *self.options],
            "schedule": SCHEDULES[self.every],
            "dependencies": [self.package],
            "flavor": self.flavor,
            "timeout": TIMEOUT,
            "name": NAME,
            "volumes": volumes,
        }

    def __str__(self) -> str:
        """Return the request as JSON."""
        request = self.request
        return json.dumps(request | {"volumes": [volume.to_dict() for volume in request["volumes"]]}, indent=2)

    def submit(self) -> str:
        """Create the Job, and return its id.

        Raises:
            UserError: the rows are public, a file here has the name of a word of the command and would be sent along,
                or the Hub could not be reached or refused.
        """
        request, api = self.request, hub_api()
        here = [word for word in (request["script"], *request["script_args"]) if Path(word).is_file()]
        if here:
            raise UserError(
                f"The Job was not made: a file {here[0]} lies here, which huggingface_hub would upload with it. Give "
                "the command in another folder."
            )
        rows = self.forget.partition(":")[0]
        try:
            is_private = api.dataset_info(rows).private
            if is_private:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # huggingface_hub calls it experimental
                    return api.create_scheduled_uv_job(**request).id
        except (HfHubHTTPError, OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            raise UserError(
                f"The Job was not made: the Hub {'could not be reached' if status is None else f'answered {status}'} "
                f"({type(error).__name__}). Log in with `hf auth login`, and see that {rows} is a data set of yours."
            ) from error
        raise UserError(
            f"The Job was not made: everybody can see {rows}, which holds the rows to forget. Make it private "
            "first, or name another data set."
        )
