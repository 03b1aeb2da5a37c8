"""Make a model forget real people without a retain set, and score it on RWKU before and after.

    accelerate launch examples/rwku.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --use_peft \\
        --dataset_name jinzhuoran/RWKU --intros intros/ --subjects "Stephen King" --num_train_epochs 3

`--intros` holds what is to be forgotten: questions and answers that the model itself wrote about the subjects, one
JSONL file, or a folder with one a subject. Every option of MDUConfig and TRL's ModelConfig is an option here.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from common import claim, is_trained, load, settings, train_seconds, unlearn
from trl import ModelConfig, TrlParser

from mdu_trainer import DiffusionGenerationConfig, MDUConfig
from mdu_trainer.evaluation.report import Results
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.rwku import evaluate_rwku, load_forget_rows, load_rwku


@dataclass
class RwkuArguments:
    """Whom to forget, and what to measure."""

    dataset_name: str = field(default="jinzhuoran/RWKU", metadata={"help": "Hub name, or a folder with a copy."})
    intros: str | None = field(default=None, metadata={"help": "JSONL of question and answer, or a folder of them."})
    subjects: list[str] | None = field(default=None, metadata={"help": "Whom to forget; all in --intros if unset."})
    configs: list[str] | None = field(default=None, metadata={"help": "RWKU's configs to score; all if unset."})
    max_eval_rows: int | None = field(default=400, metadata={"help": "Score N evenly spaced rows of each config."})
    eval_rows_a_batch: int = field(default=32, metadata={"help": "Sequences a forward pass when scoring."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    likelihood_draws: int = field(default=32, metadata={"help": "Passes a choice for its likelihood."})
    resume: bool = field(default=False, metadata={"help": "Finish what was begun in output_dir."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is in output_dir."})


@dataclass
class RwkuConfig(MDUConfig):
    """MDUConfig without a retain set."""

    retain_weight: float = field(default=0.0, metadata={"help": "lambda; RWKU has no retain set."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the rows to forget."})
    output_dir: str | None = field(default="outputs/rwku", metadata={"help": "Folder of the model and the results."})


def main(args: RwkuArguments, config: RwkuConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None or args.intros is None:
        raise SystemExit("Pass --model_name_or_path, and --intros with what it is to forget.")
    if config.retain_weight:
        raise SystemExit("RWKU has no retain set: leave --retain_weight at 0, or use examples/tofu.py.")
    forget = load_forget_rows(args.intros, args.subjects)
    sets = load_rwku(args.dataset_name, args.configs, args.subjects, args.max_eval_rows)
    folder, state, tau = Path(config.output_dir), processes(), config.tau if config.loss_type == "mdu" else None
    config.output_dir = str(folder / (config.loss_type if tau is None else f"mdu-tau{tau:g}"))
    if state.is_main_process and not args.resume:
        claim(folder, [Path(config.output_dir)], model_args.model_name_or_path, args.overwrite_output_dir)
    state.wait_for_everyone()

    def score(model, tokenizer, method: str, name: str):
        decoding = DiffusionGenerationConfig(steps=args.decoding_steps, batch_size=args.eval_rows_a_batch)
        return evaluate_rwku(
            model,
            tokenizer,
            sets,
            decoding,
            method=method,
            num_draws=args.likelihood_draws,
            progress_path=folder / name / "rows.jsonl",
            show_progress=True,
        )

    data = f"RWKU, {len(args.subjects)} subjects" if args.subjects else "RWKU"
    results = Results(model_args.model_name_or_path, data, settings(args, config, model_args))
    base = load(model_args.model_name_or_path, model_args, config.trust_remote_code)
    results.runs.append(score(*base, "base", "base"))
    del base
    unlearned = unlearn(config, model_args.model_name_or_path, model_args, forget, None)
    run = score(*unlearned, config.loss_type, Path(config.output_dir).name)
    seconds = train_seconds(Path(config.output_dir)) if is_trained(Path(config.output_dir)) else 0.0
    results.runs.append(replace(run, tau=tau, train_seconds=seconds))
    if state.is_main_process:
        results.save(folder / "results.json")
        print(f"\n{results.details()}\n\nWritten to {folder}")


if __name__ == "__main__":
    main(*TrlParser((RwkuArguments, RwkuConfig, ModelConfig)).parse_args_and_config())
