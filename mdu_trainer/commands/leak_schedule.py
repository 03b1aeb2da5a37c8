"""The options of a leak check that the Hub repeats, and the Job that they come to."""

import argparse
from pathlib import Path

from mdu_trainer.commands.checks import check_repository, check_revision
from mdu_trainer.evaluation.sources import SUFFIXES
from mdu_trainer.files import UserError, looks_like_secret

EVERY = ("hour", "day", "week", "month")
FLAVOR = "cpu-basic"
HERE = {  # options of a check that is made here -> why a Job has none
    "audit": "a Job is watched by its exit status, which needs --max_leak",
    "show_forget_text": "the Hub keeps a Job's log",
    "output": "a Job's disk ends with it, and its log has the figures",
    "history": "a Job's disk ends with it, and its log has the figures",
}


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a schedule to those of a check."""
    group = parser.add_argument_group("a check that the Hub repeats")
    group.add_argument("--every", choices=EVERY, help="how often the Job runs")
    group.add_argument(
        "--jobs", action="store_true", help="print the Job on the Hub that runs the check; nothing runs"
    )
    group.add_argument("--submit", action="store_true", help="make that Job")
    group.add_argument(
        "--package", metavar="SPEC", help="how the Job installs this package, as `uv run --with` has it"
    )
    group.add_argument("--flavor", default=FLAVOR, help="the Job's machine, of those that `hf jobs hardware` lists")


def is_schedule(options: argparse.Namespace) -> bool:
    """Whether options ask for a Job, and not for a check here."""
    return bool(options.every or options.jobs or options.submit or options.package or options.flavor != FLAVOR)


def schedule(options: argparse.Namespace) -> int:
    """Print the Job, make it if that is asked for, and return the exit status.

    Raises:
        UserError: options that contradict each other, or rows or a model that no Job can read.
    """
    _check(options)
    from mdu_trainer.hub.schedule import LeakCheckJob

    values = {"max_leak": options.max_leak, "seed": options.seed, "dtype": options.dtype}
    job = LeakCheckJob(
        every=options.every,
        model=options.model_name_or_path,
        forget=options.forget,
        package=options.package,
        options=tuple(word for name, value in values.items() for word in (f"--{name}", str(value))),
        retain=options.retain,
        revision=options.model_revision,
        flavor=options.flavor,
    )
    print(job)
    if options.submit:
        print(f"Made: {job.submit()}. `hf jobs scheduled ps` lists it, and `hf jobs scheduled delete` ends it.")
    return 0


def _check(options: argparse.Namespace) -> None:
    if not (options.jobs and options.every):
        raise UserError(
            "A Job on the Hub needs both --jobs and --every (hour, day, week or month). On a machine of your own, let "
            "cron repeat the check (examples/README.md)."
        )
    for name, why in HERE.items():
        if getattr(options, name):
            raise UserError(f"--{name} is not for --jobs: {why}. Leave it out.")
    if not options.package:
        raise UserError(
            "--jobs needs --package, by which the Job installs this package: "
            '--package "mdu-trainer @ git+https://github.com/OWNER/mdu_trainer".'
        )
    if looks_like_secret(options.package):
        raise UserError(
            "--package holds what looks like a password or a token, which the Job would show. Leave it out."
        )
    if Path(options.model_name_or_path).exists():
        raise UserError("--model is a folder of this machine, which a Job cannot read. Publish it (mdu publish).")
    check_repository(options.model_name_or_path, "--model")
    check_revision(options.model_revision, "model_revision")
    for name in ("forget", "retain"):
        source = getattr(options, name)
        repository = (source or "").partition(":")[0]
        if source is None:
            continue
        if Path(repository).exists() or repository.endswith(SUFFIXES):
            raise UserError(
                f"--{name} is a file or folder of this machine, which a Job cannot read. Put the rows in a private "
                "data set on the Hub, and name it."
            )
        check_repository(repository, f"--{name}")
