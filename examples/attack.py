"""Attack unlearned models: how much of what they were made to forget comes back?

The models of the embedded default (`make demo`; two CPU cores, some minutes):

    python examples/attack.py --model outputs/demo/mdu-tau0 outputs/demo/npo --base outputs/demo/base \\
        --retain_model outputs/demo/retain

Your own models, on TOFU or a data set like it:

    python examples/attack.py --model PATH --base PATH --retain_model PATH --dtype bfloat16 \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90

Rows of your own, as examples/unlearn.py takes them, are named by `--forget` and `--retain`. A model is a Hub id, a
folder, or a folder with an adapter. Every attack is made on all of them, and recovery says how far it got on the scale
from a model that never saw the rows (0) to the model before unlearning (1). Under `accelerate launch` the processes
share the rows. Finished attacks are kept in the output folder as figures, so a killed run continues where it
stopped when the same command is given again.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset

from mdu_trainer import DiffusionGenerationConfig, load_tokenizer
from mdu_trainer.attacks import ATTACKS, Attack, AttackSettings, choose_attacks
from mdu_trainer.attacks.results import BASE, NEVER
from mdu_trainer.attacks.run import run_attacks
from mdu_trainer.commands import run, task
from mdu_trainer.commands.checks import check_above_zero, check_least, check_once, check_output_folder
from mdu_trainer.commands.loading import ModelsConfig, check_compared, facts_of, load, model_names
from mdu_trainer.commands.options import parse_options
from mdu_trainer.commands.row_sets import OwnRowsArguments, check_rows_named, forget_and_retain
from mdu_trainer.commands.summary import summary
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import load_split
from mdu_trainer.evaluation.tofu import longest_answer
from mdu_trainer.files import UserError
from mdu_trainer.models import base_of, is_adapter
from mdu_trainer.models.loading import load_config
from mdu_trainer.report.recovery_plots import plot_recovery
from mdu_trainer.terminal import say
from mdu_trainer.testing import unseen_answers

PICTURES = ("recovery.png", "recovery.svg")


@dataclass
class AttackArguments(OwnRowsArguments):
    """What the models are compared with, and how they are attacked, on what rows."""

    base: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    retain_model: str | None = field(
        default=None, metadata={"help": "A model trained like the base, but never on the forget rows."}
    )
    attacks: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(ATTACKS)}; all if unset."})
    unseen_split: str | None = field(
        default=None, metadata={"help": "Config name of the forget questions with other answers, never trained on."}
    )
    max_eval_rows: int | None = field(default=400, metadata={"help": "Use N evenly spaced rows of each set."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    relearn_steps: int = field(default=40, metadata={"help": "Updates of the attacks that fine-tune."})
    relearn_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the attacks that fine-tune; the unlearning's own if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Of the attacks."})
    output_dir: str = field(default="outputs/recovery", metadata={"help": "Folder of the figures and the progress."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether a model may run code of its own."})


def all_models(args: AttackArguments, model_args: ModelsConfig) -> list[str]:
    """The base, the model that never saw the rows if there is one, and the unlearned ones."""
    return [args.base, *([args.retain_model] if args.retain_model else []), *model_args.model_name_or_path]


def check(args: AttackArguments, model_args: ModelsConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_output_folder(args.output_dir)
    check_once(args, "attacks")
    unknown = [name for name in args.attacks or [] if name not in ATTACKS]
    if unknown:
        raise UserError(f"Unknown attacks: {', '.join(unknown)}. Choose from {', '.join(ATTACKS)}.")
    check_least(args, max_eval_rows=1, batch_size=1, decoding_steps=1, relearn_steps=1, seed=0)
    check_above_zero(args, "relearn_learning_rate")
    check_rows_named(args)
    check_compared(model_args, args.base, retain_model=args.retain_model)
    for path in all_models(args, model_args):
        with task(f"{path} cannot be loaded"):
            load_config(base_of(path), trust_remote_code=args.trust_remote_code, revision=model_args.model_revision)


def load_sets(args: AttackArguments) -> tuple[dict[str, Dataset], Dataset | None]:
    """The rows to forget and to keep, and rows that no model was trained on."""
    sets = forget_and_retain(args, args.max_eval_rows)
    if args.dataset_name is not None and args.unseen_split is not None:
        return sets, load_split(args.dataset_name, args.unseen_split, keep_dataset_cache=args.keep_dataset_cache)
    embedded = args.dataset_name is None and args.forget is None
    return sets, unseen_answers(sets["forget"]) if embedded else None


def attack_settings(
    args: AttackArguments, model_args: ModelsConfig, sets: dict[str, Dataset], unseen: Dataset | None
) -> AttackSettings:
    """How hard the attacks try; there is room for the longest answer in every model's tokens."""
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizers = [load_tokenizer(base_of(path), **trust) for path in all_models(args, model_args)]
    decoding = DiffusionGenerationConfig(
        max_new_tokens=max(longest_answer({"forget": sets["forget"]}, tokenizer) for tokenizer in tokenizers),
        steps=args.decoding_steps,
        batch_size=args.batch_size,
    )
    return AttackSettings(
        decoding=decoding,
        unseen=unseen,
        unrelated=sets.get("retain"),
        relearn_steps=args.relearn_steps,
        relearn_learning_rate=args.relearn_learning_rate or unlearning_rate(model_args.model_name_or_path),
    )


def unlearning_rate(paths: list[str]) -> float:
    """The learning rate that the models were unlearned with, the highest of several; of unknown ones the default."""
    rates = [facts.training["learning_rate"] for facts in map(facts_of, paths) if facts is not None]
    return max(rates, default=AttackSettings.relearn_learning_rate)


def possible_attacks(
    names: list[str] | None, settings: AttackSettings, has_adapter: bool
) -> tuple[dict[str, Attack], list[str]]:
    """The attacks that have what they need, and a line on each that is left out; named ones must have it."""
    if names:
        return choose_attacks(names, settings, has_adapter=has_adapter), []
    attacks, left_out = {}, []
    for name in ATTACKS:
        try:
            attacks |= choose_attacks([name], settings, has_adapter=has_adapter)
        except ValueError as error:
            left_out.append(f"Left out: {error}")
    return attacks, left_out


def main(args: AttackArguments, model_args: ModelsConfig) -> None:
    check(args, model_args)
    sets, unseen = load_sets(args)
    settings, unlearned = attack_settings(args, model_args, sets, unseen), model_args.model_name_or_path
    has_adapter = any(map(is_adapter, all_models(args, model_args)))
    attacks, left_out = possible_attacks(args.attacks, settings, has_adapter)
    if processes().is_main_process:
        print("\n".join(left_out))

    def loader(path: str):
        return partial(load, path, model_args, args.trust_remote_code)

    folder = Path(args.output_dir)
    recovery = run_attacks(
        dict(zip(model_names(unlearned, reserved=(BASE, NEVER)), map(loader, unlearned), strict=True)),
        loader(args.base),
        loader(args.retain_model) if args.retain_model else None,
        sets["forget"],
        settings,
        attacks,
        dataset=args.data,
        seed=args.seed,
        progress_path=folder / "attacks.jsonl",
        show_progress=True,
        left_out=None if args.attacks else lambda name, error: say(f"Left out: {name}. {error}"),
    )
    if not processes().is_main_process:
        return
    recovery.save(folder / "recovery.json")
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
        if recovery.recoveries():
            plot_recovery(recovery.recoveries(), folder / name)
    known = [path for path in unlearned if facts_of(path) is not None]
    cards = [["card", known[0], "--recovery", folder / "recovery.json"]] if known else []
    files = {"figures": folder / "recovery.json", "picture": folder / PICTURES[0]}
    print(f"\n{recovery.text()}\n\n{summary(files, *cards)}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(AttackArguments, ModelsConfig, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command))
