"""What the scripts share: loading, unlearning, and folders that are not overwritten by accident.

Scripts import it before any library that imports `evaluate`: their folder, the first place where Python looks, has a
script of that name. It is taken off the path here.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

sys.path.remove(str(Path(__file__).parent))

import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.commands import AGAIN, task
from mdu_trainer.commands.checks import check_output_folder, check_revision, check_source
from mdu_trainer.commands.folders import starting
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.evaluation.benchmarks import fictional_sets
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.tofu import load_tofu
from mdu_trainer.files import UserError, read_json, typed, without_secrets
from mdu_trainer.models import base_of, load_checkpoint
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.testing import REFUSALS
from mdu_trainer.trainer.checkpoints import CheckpointError, choose

TRAINED = "trainer_state.json"  # written last, so a folder that has it holds a whole model
CONFIG = "config.yaml"
WRITTEN = ("results.json", "tradeoff.png", "losses.png", "frontier.png", "frontier.svg", CONFIG)  # beside the models
RESUME = f"{AGAIN} with --resume"
PRIVATE = ("subjects", "intros")  # whom to forget
# options of one start of a script, not of what it makes
THIS_TIME = ("resume", "force_resume", "overwrite_output_dir", "keep_dataset_cache")


@dataclasses.dataclass
class DataArguments:
    """What every script that reads rows is asked."""

    keep_dataset_cache: bool = dataclasses.field(
        default=False, kw_only=True, metadata={"help": "Let `datasets` keep the rows in its cache, in plain text."}
    )


class Progress(TrainerCallback):
    """One line when a run starts, so that a log of many runs can be read."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        processes().print(f"\n{self.name}: {state.max_steps} steps")


def load(path: str, model_args: ModelConfig, trust_remote_code: bool = False, is_trainable: bool = False):
    """Model and tokenizer, as the command line asks for them. A folder with an adapter loads with its base.

    `is_trainable`: whether an adapter is going to be trained on; it is frozen otherwise.
    """
    quantization = get_quantization_config(model_args)
    with task(f"loading {path}"):
        model, tokenizer = load_checkpoint(
            path,
            trust_remote_code=trust_remote_code,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization,
            is_trainable=is_trainable,
        )
        if quantization is None:
            model.to(processes().device)
    return model, tokenizer


def facts_of(path: str) -> Facts | None:
    """What a checkpoint keeps about its unlearning, None if it keeps nothing."""
    try:
        return Facts.load(path)
    except (OSError, ValueError):
        return None


def model_names(paths: list[str], reserved: tuple[str, ...] = ("base",)) -> list[str]:
    """What tables and cards call each model: its method where the folder knows it, else the folder's name."""
    names = [facts.name if (facts := facts_of(path)) else Path(path).name for path in paths]
    return [
        path if names.count(name) > 1 or name in reserved else name for name, path in zip(names, paths, strict=True)
    ]


def forget_and_retain(
    dataset_name: str | None,
    forget_split: str,
    retain_split: str,
    max_rows: int | None,
    keep_dataset_cache: bool = False,
) -> dict[str, Dataset]:
    """The sets of TOFU or of a data set like it, checked; without a name the embedded fictional authors."""
    if dataset_name is not None:
        return load_tofu(
            dataset_name, forget_split, retain_split, max_rows=max_rows, keep_dataset_cache=keep_dataset_cache
        )
    return fictional_sets(max_rows)


def answer_rows(rows: Dataset, conversational: bool, refusals: bool = False) -> Dataset:
    """Prompt-completion rows, for DPO with a refusal as the preferred response."""
    if refusals and "refusal" not in rows.column_names:
        rows = rows.add_column("refusal", [REFUSALS[i % len(REFUSALS)] for i in range(len(rows))])
    return question_answer_rows(rows, conversational, preferred="refusal" if refusals else None)


def unlearn(config: MDUConfig, path: str, model_args: ModelConfig, forget: Dataset, retain: Dataset | None):
    """Train a fresh copy of the base to forget and save it in the run's folder, or load it if that is done already.

    Returns:
        The model and its tokenizer.
    """
    if is_trained(Path(config.output_dir)):
        return load(config.output_dir, model_args, config.trust_remote_code)
    model, tokenizer = load(path, model_args, config.trust_remote_code, is_trainable=True)
    chats = bool(tokenizer.chat_template)
    trainer = MDUTrainer(
        model,
        config,
        train_dataset=answer_rows(forget, chats, refusals=config.loss_type == "dpo"),
        retain_dataset=answer_rows(retain, chats) if config.retain_weight else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[Progress(Path(config.output_dir).name)],
    )
    trainer.train(resume_from_checkpoint=whole_checkpoint(Path(config.output_dir)))
    trainer.save_model()
    trainer.save_state()
    return trainer.model, tokenizer


def whole_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint that a killed training left behind, if there is one."""
    try:
        return choose(folder, True)
    except CheckpointError:
        return None


def is_trained(folder: Path) -> bool:
    """Whether a folder holds a model whose training was finished."""
    try:
        return bool(log_history(folder))
    except (OSError, UserError):  # not there, or cut short
        return False


def log_history(folder: Path) -> list[dict]:
    """The logs of a finished training."""
    path = folder / TRAINED
    state = read_json(path, "the log of a training", f"delete {path} and train again")
    try:
        return typed(list[dict[str, Any]], typed(dict[str, Any], state)["log_history"])
    except (ValueError, KeyError):
        raise UserError(f"{path} is not the log of a training. Delete it and train again.") from None


def train_seconds(folder: Path) -> float:
    """How long a finished training took; 0 if its log does not say."""
    return next((log["train_runtime"] for log in log_history(folder) if "train_runtime" in log), 0.0)


def settings(*arguments) -> dict:
    """What differs from the defaults, without secrets at any depth or names of people; as YAML it repeats the run."""
    changed = {}
    for values in arguments:
        hints = get_type_hints(type(values))
        for f in dataclasses.fields(values):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            value = getattr(values, f.name)
            given = value is not None or NoneType in get_args(hints[f.name])  # or the parser's word for left out
            if f.init and f.name not in PRIVATE + THIS_TIME and given and value != default:
                plain = value.to_dict() if hasattr(value, "to_dict") else value
                changed[f.name] = plain.value if isinstance(plain, Enum) else plain
    return without_secrets(changed)


def check_models(model_args: ModelConfig, **paths: str | None) -> None:
    """Refuse names of models, by the option that gives each, that neither a folder nor the Hub can have."""
    check_revision(model_args.model_revision, "model_revision")
    for option, path in paths.items():
        if path is not None:
            check_source(path, option, "model")


@contextmanager
def output_folder(
    folder: Path,
    models: Sequence[Path],
    inputs: Sequence[str | None],
    args: Any,
    chosen: dict[str, Any],
    unchanging: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Iterator[None]:
    """Make the output folder ready: empty, or with what the same command began. The body is the run's start.

    Every process of a launch must call this.

    Args:
        folder: the output folder; it gets a `config.yaml` with what was chosen.
        models: what the run writes into it, beside `WRITTEN`.
        inputs: models and data that it reads.
        args: has `resume` and `overwrite_output_dir`.
        chosen: what must be the same for a run to be resumed, as far as `unchanging` leaves it.
        unchanging: what must be the same, of what was chosen.
    """
    state, written, now = processes(), folder / CONFIG, yaml.safe_load(yaml.safe_dump(chosen))
    if not state.is_main_process:
        state.wait_for_everyone()
        yield
        return
    resumes = args.resume and written.is_file()
    if resumes and unchanging(read_config(written)) != unchanging(now):
        raise UserError(f"{written} is not of this command, so there is nothing to resume: give the same options.")
    with task("reading the adapter's config"):
        bases = [base_of(path) for path in inputs if path is not None]
    paths = [*models, *(folder / name for name in WRITTEN)]
    with starting(folder, paths, [*inputs, *bases], resume=resumes, overwrite=args.overwrite_output_dir):
        written.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        state.wait_for_everyone()
        yield


def read_config(path: Path) -> dict[str, Any]:
    """What an earlier run wrote of its options."""
    try:
        return typed(dict[str, Any], yaml.safe_load(path.read_bytes()) or {})
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{path} cannot be read, so there is nothing to resume. Delete it to start anew.") from None


def check_run(args: Any, folder: str | Path) -> None:
    """Refuse an output folder that is none, and two contrary options."""
    check_output_folder(folder)
    if args.resume and args.overwrite_output_dir:
        raise UserError("--resume goes on with what is in --output_dir, --overwrite_output_dir replaces it: pass one.")
