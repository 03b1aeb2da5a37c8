"""What the scripts share: loading, unlearning, and folders that are not overwritten by accident.

Scripts import it before any library that imports `evaluate`: their folder, the first place where Python looks, has a
script of that name. It is taken off the path here.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))

from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.checkpoints import CheckpointError, choose
from mdu_trainer.data import question_answer_rows
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.evaluation.tofu import load_tofu
from mdu_trainer.models import load_checkpoint
from mdu_trainer.provenance import Facts
from mdu_trainer.testing import REFUSALS, fictional_authors, forget_retain_split

TRAINED = "trainer_state.json"  # written last, so a folder that has it holds a whole model
# beside the models' folders
WRITTEN = ("results.json", "tradeoff.png", "losses.png", "frontier.png", "frontier.svg", "config.yaml")
PRIVATE = ("subjects", "intros")  # whom to forget
THIS_TIME = ("resume", "overwrite_output_dir")  # options of one start of a script, not of what it makes


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
    dataset_name: str | None, forget_split: str, retain_split: str, max_rows: int | None
) -> dict[str, Dataset]:
    """The sets of TOFU or of a data set like it, checked; without a name the embedded fictional authors."""
    if dataset_name is not None:
        return load_tofu(dataset_name, forget_split, retain_split, max_rows=max_rows)
    forget, retain = forget_retain_split(fictional_authors())
    return {"forget": spread(forget, max_rows), "retain": spread(retain, max_rows)}


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
    except (OSError, ValueError):  # not there, or cut short
        return False


def log_history(folder: Path) -> list[dict]:
    """The logs of a finished training."""
    return json.loads((folder / TRAINED).read_text())["log_history"]


def train_seconds(folder: Path) -> float:
    """How long a finished training took."""
    return next(log["train_runtime"] for log in log_history(folder) if "train_runtime" in log)


def settings(*arguments) -> dict:
    """What differs from the defaults, without secrets or names of people; as YAML it repeats the run."""
    changed = {}
    for values in arguments:
        for f in dataclasses.fields(values):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            kept = f.init and f.name not in PRIVATE + THIS_TIME and not f.name.endswith("token")
            if kept and getattr(values, f.name) != default:
                changed[f.name] = getattr(values, f.name)
    return changed


def claim(folder: Path, models: list[Path], base: str | None, overwrite: bool) -> None:
    """Refuse a folder that holds something, or clear what this run is going to write."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SystemExit(
            f"{folder} is not empty. Choose another --output_dir, or pass --resume to finish what was begun there, or "
            "--overwrite_output_dir."
        )
    if base is not None and Path(base).resolve() in [path.resolve() for path in models]:
        raise SystemExit(
            f"The model to load, {base}, is one that this run would overwrite. Choose another --output_dir."
        )
    for path in models:
        shutil.rmtree(path, ignore_errors=True)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
