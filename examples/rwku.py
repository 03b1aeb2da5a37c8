"""Make a model forget real people without a retain set, and score it on RWKU before and after.

    accelerate launch examples/rwku.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --use_peft \\
        --dataset_name jinzhuoran/RWKU --forget intros/ --subjects "Stephen King" --num_train_epochs 3

`--forget` holds what is to be forgotten: questions and answers that the model itself wrote about the subjects, one
JSONL file, or a folder with one a subject, `Stephen_King.jsonl` or `Stephen_King/forget.jsonl`. RWKU's own files of
pairs, such as `1_Stephen_King/pair.json`, are read, too: their made-up texts are what DPO prefers. Every option of
MDUConfig and TRL's ModelConfig is an option here.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl import ModelConfig

from mdu_trainer import DiffusionGenerationConfig, MDUConfig
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_once, check_source
from mdu_trainer.commands.folders import RESUME, RunArguments, check_run, output_folder
from mdu_trainer.commands.loading import check_model, load
from mdu_trainer.commands.options import parse_options, settings
from mdu_trainer.commands.row_sets import DataArguments
from mdu_trainer.commands.scoring import ScoringArguments, check_scoring
from mdu_trainer.commands.training import train_seconds, unlearn
from mdu_trainer.evaluation.protocol import Choices, check_protocol
from mdu_trainer.evaluation.results import Results
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.rwku import evaluate_rwku, load_forget_rows, load_rwku
from mdu_trainer.files import UserError
from mdu_trainer.inference.config import decoded_as


@dataclass
class RwkuArguments(RunArguments, ScoringArguments, DataArguments):
    """Whom to forget, and what to measure."""

    dataset_name: str = field(default="jinzhuoran/RWKU", metadata={"help": "Hub name, or a folder with a copy."})
    forget: str | None = field(
        default=None, metadata={"help": "JSONL of question and answer, or of RWKU's pairs; or a folder."}
    )
    subjects: list[str] | None = field(default=None, metadata={"help": "Whom to forget; all in --forget if unset."})
    configs: list[str] | None = field(default=None, metadata={"help": "RWKU's configs to score; all if unset."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Decoded tokens of short answers; the protocol's if unset."}
    )
    likelihood_draws: int = field(default=32, metadata={"help": "Passes a choice for its likelihood."})
    choices: Choices | None = field(
        default=None, metadata={"help": "How choices are scored; likelihood, by the release generated, if unset."}
    )


@dataclass
class RwkuConfig(MDUConfig):
    """MDUConfig without a retain set."""

    retain_weight: float = field(default=0.0, metadata={"help": "lambda; RWKU has no retain set."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the rows to forget."})
    output_dir: str | None = field(default="outputs/rwku", metadata={"help": "Folder of the model and the results."})


def check(args: RwkuArguments, config: RwkuConfig, model_args: ModelConfig) -> None:
    """Refuse options that are wrong before anything is loaded."""
    check_model(model_args)
    if args.forget is None:
        raise UserError("Pass --forget with what the model is to forget.")
    if config.retain_weight:
        raise UserError("RWKU has no retain set: leave --retain_weight at 0, or use examples/tofu.py.")
    check_run(args, config.output_dir or "")
    check_once(args, "subjects", "configs")
    check_scoring(args)
    check_protocol(args.protocol, args.choices)
    check_source(args.dataset_name, "dataset_name")


def main(args: RwkuArguments, config: RwkuConfig, model_args: ModelConfig) -> None:
    check(args, config, model_args)
    chosen, name = settings(args, config, model_args), model_args.model_name_or_path
    forget = load_forget_rows(args.forget, args.subjects)
    sets = load_rwku(
        args.dataset_name,
        args.configs,
        args.subjects,
        args.max_eval_rows,
        keep_dataset_cache=args.keep_dataset_cache,
        protocol=args.protocol,
    )
    folder, state, tau = Path(config.output_dir), processes(), config.tau if config.loss_type == "mdu" else None
    config.output_dir = str(folder / (config.loss_type if tau is None else f"mdu-tau{tau:.12g}"))
    models = [folder / "base", Path(config.output_dir)]
    with output_folder(folder, models, [name, args.dataset_name, args.forget], args, chosen):
        base = load(name, model_args, config.trust_remote_code)

    decoding = DiffusionGenerationConfig(steps=args.decoding_steps, batch_size=args.batch_size)
    decoding = decoded_as(decoding, args.decoding)

    def score(model, tokenizer, method: str, part: str):
        scored = evaluate_rwku(
            model,
            tokenizer,
            sets,
            decoding,
            decoding=args.decoding,
            method=method,
            num_draws=args.likelihood_draws,
            progress_path=folder / part / "rows.jsonl",
            show_progress=True,
            max_new_tokens=args.max_new_tokens,
            protocol=args.protocol,
            choices=args.choices,
        )
        return replace(scored, rouge=args.rouge)

    data = f"RWKU, {len(args.subjects)} subjects" if args.subjects else "RWKU"
    results = Results(name, data, chosen)
    results.runs.append(score(*base, "base", "base"))
    del base
    unlearned = unlearn(config, name, model_args, forget, None)
    scored = score(*unlearned, config.loss_type, Path(config.output_dir).name)
    results.runs.append(replace(scored, tau=tau, train_seconds=train_seconds(Path(config.output_dir))))
    if state.is_main_process:
        decoding.save_pretrained(config.output_dir)
        results.save(folder / "results.json")
        print(f"\n{results.table()}\n\n{results.details()}\n\nWritten to {folder}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(RwkuArguments, RwkuConfig, ModelConfig, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
