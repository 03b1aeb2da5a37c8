"""The options of a script: dataclasses, filled from the command line and a YAML file, every value of which is checked.

args, config = parse_options(ScriptArguments, MDUConfig, default=Path("configs/demo.yaml"))
"""

import argparse
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..files import UserError

NO_DEFAULT = {"config", "model_name_or_path", "dataset_name", "h", "help"}  # options beside which no file is taken


def parse_options(*types: Any, default: Path | None = None) -> tuple[Any, ...]:
    """Return the options on the command line, over those of the file that `--config` names.

    Args:
        types: the dataclasses to fill.
        default: the file to take when neither `--config`, a model nor a data set is given.

    Raises:
        UserError: an option that does not exist, or a value that is none for it; a file that cannot be read, is not
            YAML, or has other keys.
    """
    arguments = [part for argument in sys.argv[1:] for part in _split_config(argument)]
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("-")}
    if default is not None and not given & NO_DEFAULT:
        arguments[:0] = ["--config", str(default)]
    if arguments[-1:] == ["--config"]:
        raise UserError("--config needs a file.")
    file = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    parser = OptionParser(types)
    try:
        *filled, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except UserError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(error, "problem_mark", None)
        raise UserError(f"{file} is not YAML{f', line {line.line + 1}' if line else ''}.") from error
    except OSError as error:
        raise UserError(f"{error.filename or file}: {error.strerror or error}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        names = [word for word in unknown if word.startswith("--")]
        raise UserError(
            f"There is no option {', '.join(names)} (--help lists them)."
            if names
            else f"{len(unknown)} words on the command line belong to no option (--help lists them)."
        )
    return tuple(filled)


class OptionParser(TrlParser):
    """TRL's parser, which takes no beginning of an option for it, and checks the types of what a file holds."""

    def __init__(self, types: tuple[Any, ...]):
        super().__init__(types, allow_abbrev=False)
        self._hints = {name: hint for one in types for name, hint in get_type_hints(one).items()}

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (--help lists the options).")

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take the values of a file as if they were given on the command line."""
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of two, not its --no_ form
        checked = {
            name: self._value(actions[name], value) if name in actions else value for name, value in kwargs.items()
        }
        return super().set_defaults_with_config(**checked)

    def _value(self, action: argparse.Action, value: Any) -> Any:
        hint = self._hints[action.dest]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            return None
        structures = [get_origin(kind) or kind for kind in kinds if (get_origin(kind) or kind) in (dict, list)]
        if type(value) in structures and action.nargs != "+":
            return value
        values = value if isinstance(value, list) and action.nargs == "+" else [value]
        if not values or any(each is None or isinstance(each, dict | list) for each in values):
            raise UserError(f"{action.dest} has no value, or one of another type, in the file of --config.")
        try:
            taken = [self._get_value(action, str(each)) for each in values]
            for each in taken:
                self._check_value(action, each)
        except argparse.ArgumentError as error:
            raise UserError(f"{error}, in the file of --config.") from error
        return taken if action.nargs == "+" else taken[0]


def _split_config(argument: str) -> list[str]:
    """Split `--config=FILE`, which TRL would not see, into two words."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
