"""Attack unlearned models: how much of what they were made to forget comes back?

The models of the embedded default (`make demo`; two CPU cores, some minutes):

    python examples/recover.py --model outputs/demo/mdu-tau0 outputs/demo/npo --base outputs/demo/base \\
        --never_trained outputs/demo/retain

Your own, on TOFU or a data set like it:

    python examples/recover.py --model PATH --base PATH --never_trained PATH --dtype bfloat16 \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90

A model is a Hub id, a folder, or a folder with an adapter. Every attack is made on all of them, and recovery says how
far it got on the scale from a model that never saw the rows (0) to the model before unlearning (1). Finished attacks
are kept in the output folder as figures, so a killed run continues where it stopped when the same command is given
again.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import DataArguments, check_models, facts_of, forget_and_retain, load, model_names
from datasets import Dataset
from tqdm import tqdm
from trl import ModelConfig

from mdu_trainer import DiffusionGenerationConfig, load_tokenizer
from mdu_trainer.attacks import ATTACKS, AttackSettings, choose_attacks
from mdu_trainer.attacks.results import BASE, NEVER
from mdu_trainer.attacks.run import run_attacks
from mdu_trainer.commands import run, task
from mdu_trainer.commands.checks import check_above_zero, check_least, check_once, check_output_folder, check_source
from mdu_trainer.commands.options import parse_options
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import load_split
from mdu_trainer.evaluation.tofu import longest_answer
from mdu_trainer.files import UserError
from mdu_trainer.models import base_of, is_adapter
from mdu_trainer.models.loading import load_config
from mdu_trainer.report.recovery_plots import plot_recovery
from mdu_trainer.testing import unseen_answers

PICTURES = ("recovery.png", "recovery.svg")


@dataclass
class RecoveryArguments(DataArguments):
    """Which models to attack, how, and on what rows."""

    model: list[str] = field(default_factory=list, metadata={"help": "The unlearned models."})
    base: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    never_trained: str | None = field(
        default=None, metadata={"help": "A model trained like the base, but never on the forget rows."}
    )
    attacks: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(ATTACKS)}; all if unset."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; embedded authors if unset."})
    forget_split: str = field(default="forget10", metadata={"help": "Config name of the rows to forget."})
    retain_split: str = field(default="retain90", metadata={"help": "Config name of the rows to keep."})
    unseen_split: str | None = field(
        default=None, metadata={"help": "Config name of the forget questions with other answers, never trained on."}
    )
    max_rows: int | None = field(default=400, metadata={"help": "Use N evenly spaced rows of each set."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    relearn_steps: int = field(default=40, metadata={"help": "Updates of the attacks that fine-tune."})
    relearn_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the attacks that fine-tune; the unlearning's own if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Of the attacks."})
    output_dir: str = field(default="outputs/recovery", metadata={"help": "Folder of the figures and the progress."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether a model may run code of its own."})

    @property
    def paths(self) -> list[str]:
        """All models."""
        return [self.base, *([self.never_trained] if self.never_trained else []), *self.model]


def check(args: RecoveryArguments, model_args: ModelConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not args.model or args.base is None:
        raise UserError(
            "Which models? Pass --model UNLEARNED [UNLEARNED ...] and --base, the model before unlearning."
        )
    if processes().num_processes > 1:
        raise UserError("The attacks run in one process: start the script with python, not with accelerate launch.")
    check_output_folder(args.output_dir)
    check_once(args, "model", "attacks")
    unknown = [name for name in args.attacks or [] if name not in ATTACKS]
    if unknown:
        raise UserError(f"Unknown attacks: {', '.join(unknown)}. Choose from {', '.join(ATTACKS)}.")
    check_least(args, max_rows=1, batch_size=1, decoding_steps=1, relearn_steps=1, seed=0)
    check_above_zero(args, "relearn_learning_rate")
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
    for option, paths in {"model": args.model, "base": [args.base], "never_trained": [args.never_trained]}.items():
        for path in paths:
            check_models(model_args, **{option: path})
    for path in args.paths:
        with task(f"{path} cannot be loaded"):
            load_config(base_of(path), trust_remote_code=args.trust_remote_code, revision=model_args.model_revision)


def load_sets(args: RecoveryArguments) -> tuple[dict[str, Dataset], Dataset | None]:
    """The rows to forget and to keep, and rows that no model was trained on."""
    splits, cache = (args.forget_split, args.retain_split), {"keep_dataset_cache": args.keep_dataset_cache}
    sets = forget_and_retain(args.dataset_name, *splits, args.max_rows, **cache)
    if args.dataset_name is not None:
        return sets, args.unseen_split and load_split(args.dataset_name, args.unseen_split, **cache)
    return sets, unseen_answers(sets["forget"])


def attack_settings(args: RecoveryArguments, sets: dict[str, Dataset], unseen: Dataset | None) -> AttackSettings:
    """How hard the attacks try; there is room for the longest answer in every model's tokens."""
    tokenizers = [load_tokenizer(base_of(path), trust_remote_code=args.trust_remote_code) for path in args.paths]
    decoding = DiffusionGenerationConfig(
        max_new_tokens=max(longest_answer({"forget": sets["forget"]}, tokenizer) for tokenizer in tokenizers),
        steps=args.decoding_steps,
        batch_size=args.batch_size,
    )
    return AttackSettings(
        decoding=decoding,
        unseen=unseen,
        unrelated=sets["retain"],
        relearn_steps=args.relearn_steps,
        relearn_learning_rate=args.relearn_learning_rate or unlearning_rate(args.model),
    )


def unlearning_rate(paths: list[str]) -> float:
    """The learning rate that the models were unlearned with, the highest of several; of unknown ones the default."""
    rates = [facts.training["learning_rate"] for facts in map(facts_of, paths) if facts is not None]
    return max(rates, default=AttackSettings.relearn_learning_rate)


def possible_attacks(args: RecoveryArguments, attack_settings: AttackSettings) -> tuple[dict, list[str]]:
    """The attacks that have what they need, and a line on each that is left out; named ones must have it."""
    has_adapter = any(map(is_adapter, args.paths))
    if args.attacks:
        return choose_attacks(args.attacks, attack_settings, has_adapter=has_adapter), []
    attacks, left_out = {}, []
    for name in ATTACKS:
        try:
            attacks |= choose_attacks([name], attack_settings, has_adapter=has_adapter)
        except ValueError as error:
            left_out.append(f"Left out: {error}")
    return attacks, left_out


def main(args: RecoveryArguments, model_args: ModelConfig) -> None:
    check(args, model_args)
    sets, unseen = load_sets(args)
    settings = attack_settings(args, sets, unseen)
    attacks, left_out = possible_attacks(args, settings)
    print("\n".join(left_out))

    def loader(path: str):
        return partial(load, path, model_args, args.trust_remote_code)

    folder = Path(args.output_dir)
    recovery = run_attacks(
        dict(zip(model_names(args.model, reserved=(BASE, NEVER)), map(loader, args.model), strict=True)),
        loader(args.base),
        loader(args.never_trained) if args.never_trained else None,
        sets["forget"],
        settings,
        attacks,
        dataset=f"{args.dataset_name} {args.forget_split}" if args.dataset_name else "fictional authors (embedded)",
        seed=args.seed,
        progress_path=folder / "attacks.jsonl",
        show_progress=True,
        left_out=None if args.attacks else lambda name, error: tqdm.write(f"Left out: {name}. {error}"),
    )
    recovery.save(folder / "recovery.json")
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
        if recovery.recoveries():
            plot_recovery(recovery.recoveries(), folder / name)
    print(f"\n{recovery.text()}\n\nWritten to {folder}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(RecoveryArguments, ModelConfig))


if __name__ == "__main__":
    sys.exit(run(command))
