"""What `--help` shows: each option under one name, its default where it has one, and the command that was given."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

TWICE = re.compile(r"(--\w+)(?:/--[\w-]+)+")  # an option with its other names, as argparse's messages have it


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """List an option under its first name and other short ones, not in both spellings, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings[:1]
        is_switch = action.nargs == "?" and action.const is True
        value = "" if is_switch else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown, default = action.help or "", action.default
        silent = default is None or isinstance(default, bool) or default in ("", [], argparse.SUPPRESS)
        return shown if silent or "default" in shown else f"{shown} (default: %(default)s)"


def plain_names(message: str) -> str:
    """Return a message of argparse in which each option has one name: "--max_steps", not both spellings."""
    return TWICE.sub(r"\1", message)


def program() -> str:
    """What the user has called: a script's name, `mdu` and the subcommand, or `python -m` and the module."""
    spec: Any = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or sys.argv[0].startswith("mdu "):
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def description_of(text: str | None) -> str | None:
    """A script's docstring for its help, in which commands are those that the user gives: `mdu score`, say."""
    called = program()
    if text is None or not called.startswith("mdu "):
        return text
    return re.sub(
        r"(python|accelerate launch) (examples/\w+\.py|-m mdu_trainer\.\w+)",
        lambda found: called if found[1] == "python" else f"accelerate launch -m {called}",
        text,
    )
