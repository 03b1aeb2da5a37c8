"""The options of a script: dataclasses, filled from the command line and a YAML file, every value of which is checked.

args, config = parse_options(ScriptArguments, MDUConfig, default=Path("configs/demo.yaml"))
"""

import argparse
import sys
from copy import copy
from dataclasses import MISSING, Field, fields
from enum import Enum
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, TrlParser

from ..config import MDUConfig
from ..config.presets import preset
from ..files import UserError, without_secrets
from ..terminal import folded
from .help import HelpFormatter, description_of, plain_names, program

logger = logging.get_logger(__name__)

SHORT = {"model_name_or_path": "model"}  # other names that are taken for an option's
# options beside which no file is taken
NO_DEFAULT = {"config", "model_name_or_path", "model", "dataset_name", "h", "help"}
PRIVATE = ("subjects", "forget", "retain")  # whom to forget, and where rows of one's own lie
# options of one start of a script, not of what it makes
THIS_TIME = ("resume", "force_resume", "overwrite_output_dir", "keep_dataset_cache")
OF_TRAINER = "training (transformers' TrainingArguments)"
FILE_WORDS = """--config FILE.yaml holds options, one a line, under the names that are listed here. What stands on the
command line counts before it. --traceback shows where an error arose."""


def parse_options(*types: Any, default: Path | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Return the options on the command line, over those of the file that `--config` names.

    Args:
        types: the dataclasses to fill.
        default: the file to take when neither `--config`, a model nor a data set is given.
        description: what `--help` says of the script; its docstring.

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
    parser = OptionParser(types, description)
    parser.take_presets(_values_after("--preset", arguments))
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
    """TRL's parser, which takes no beginning of an option for it, and checks the types of what a file holds.

    Its help has a group for each dataclass: what is to be done, the unlearning, the model, and last the many options
    of transformers' Trainer.
    """

    def __init__(self, types: tuple[Any, ...], description: str | None = None):
        self._topic: Any = None  # the group of the dataclass whose options are being added
        self._trainers: Any = None  # the group of those that it has from TrainingArguments
        self._has_preset = False  # named on the command line, which counts before a file
        super().__init__(
            types,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            prog=program(),
            usage="%(prog)s [--OPTION VALUE ...]",
            description=description_of(description),
            epilog=" ".join(FILE_WORDS.split()),
        )
        self._hints = {name: hint for one in types for name, hint in get_type_hints(one).items()}
        self._action_groups.sort(key=lambda group: group.title == OF_TRAINER)  # last

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{plain_names(message)} (--help lists the options).")

    def take_presets(self, names: list[str]) -> None:
        """Make the settings of presets the defaults, which files and other options count before.

        A command that makes a further run of each preset takes only how rows are chosen and scored, which all its runs
        share, where the presets agree.
        """
        actions = {action.dest: action for action in self._actions}
        if "preset" not in actions:
            return
        self._has_preset = bool(names)
        chosen = {name: preset(name) for name in names if name != "none"}
        for name, one in chosen.items():
            scoring = {
                option: value
                for option, value in one.scoring.items()
                if option in actions and all(other.scoring.get(option, value) == value for other in chosen.values())
            }
            alone = actions["preset"].nargs != "+"
            self.set_defaults(**scoring | (one.training if alone else {}))
            if scoring:
                said = ", ".join(f"{option}={value}" for option, value in scoring.items())
                logger.warning_once(folded(f"preset '{name}', unless set otherwise: {said}.", sys.stderr))

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take the values of a file as if they were given on the command line."""
        kwargs = {next((long for long, short in SHORT.items() if short == n), n): value for n, value in kwargs.items()}
        if kwargs.get("preset") is not None and not self._has_preset:
            names = kwargs["preset"] if isinstance(kwargs["preset"], list) else [kwargs["preset"]]
            self.take_presets([str(name) for name in names])
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of two, not its --no_ form
        checked = {
            name: self._value(actions[name], value) if name in actions else value for name, value in kwargs.items()
        }
        return super().set_defaults_with_config(**checked)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Open the group of a dataclass; its options come into it."""
        self._topic = self._trainers = self.add_argument_group(_topic_of(dtype))
        if issubclass(dtype, TrainingArguments):
            self._trainers = self.add_argument_group(OF_TRAINER)
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: Field) -> None:
        """Add an option to its group, under its other names, too."""
        if field.name in SHORT:
            field = copy(field)
            field.metadata = {**field.metadata, "aliases": [f"--{SHORT[field.name]}"]}
        inherited = field.name in TrainingArguments.__dataclass_fields__
        super()._parse_dataclass_field(self._trainers if inherited else self._topic, field)

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
            raise UserError(f"{plain_names(str(error))}, in the file of --config.") from error
        return taken if action.nargs == "+" else taken[0]


def settings(*arguments: Any) -> dict[str, Any]:
    """Return what differs from the defaults; as YAML it repeats the run.

    Secrets are left out at any depth, and so are names of people.

    Args:
        arguments: dataclasses as `parse_options` fills them.
    """
    changed = {}
    for values in arguments:
        hints = get_type_hints(type(values))
        for f in fields(values):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            value = getattr(values, f.name)
            given = value is not None or NoneType in get_args(hints[f.name])  # or the parser's word for left out
            if f.init and f.name not in PRIVATE + THIS_TIME and given and value != default:
                plain = value.to_dict() if hasattr(value, "to_dict") else value
                changed[f.name] = plain.value if isinstance(plain, Enum) else plain
    return without_secrets(changed)


def _topic_of(dtype: Any) -> str:
    """The title of a dataclass's options in the help."""
    titles = {MDUConfig: "unlearning (MDUConfig)", ModelConfig: "model, adapter and quantization (TRL's ModelConfig)"}
    return next((title for base, title in titles.items() if issubclass(dtype, base)), "what to do")


def _values_after(name: str, arguments: list[str]) -> list[str]:
    """The values of an option on a command line, given as `--name a b` or `--name=a`."""
    values: list[str] = []
    for place, word in enumerate(arguments):
        if word.startswith(f"{name}="):
            values = [word.partition("=")[2]]
        elif word == name:
            values = [*takewhile(lambda value: not value.startswith("--"), arguments[place + 1 :])]
    return values


def _split_config(argument: str) -> list[str]:
    """Split `--config=FILE`, which TRL would not see, into two words."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
