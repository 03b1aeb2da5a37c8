"""Make a model forget rows of your own, and see what it forgot and what it kept.

    python examples/unlearn.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --use_peft \\
        --forget forget.jsonl --retain retain.jsonl --output_dir outputs/mine

Rows: JSONL, CSV, Parquet, or DATASET[:CONFIG[/SPLIT]] on the Hub; with `question`/`answer`, `prompt`/`completion`,
`messages`, or `text` alone (articles, books). `--columns prompt=input,completion=output` if they are called otherwise.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl import ModelConfig, get_peft_config

from mdu_trainer import MDUConfig, MDUTrainer, Results, write_model_card
from mdu_trainer.commands import run
from mdu_trainer.commands.folders import RESUME, RunArguments, check_run, model_folder
from mdu_trainer.commands.loading import check_model, load
from mdu_trainer.commands.options import parse_options, settings
from mdu_trainer.commands.row_sets import COLUMNS, DataArguments, answer_rows, load_own_rows, say_what_is_not_kept
from mdu_trainer.commands.scoring import Scorer, ScoringArguments, check_scoring
from mdu_trainer.commands.summary import unlearn_summary
from mdu_trainer.commands.training import whole_checkpoint
from mdu_trainer.evaluation.own_rows import as_questions
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.trainer.pairs import check_texts


@dataclass
class UnlearnArguments(RunArguments, ScoringArguments, DataArguments):
    """The rows, and how the model is scored on them before and after."""

    forget: str | None = field(default=None, metadata={"help": "Rows to forget: a file, or DATASET[:CONFIG]."})
    retain: str | None = field(default=None, metadata={"help": "Rows to keep, in the same form."})
    columns: str | None = field(default=None, metadata={"help": COLUMNS})


def main(args: UnlearnArguments, config: MDUConfig, model_args: ModelConfig) -> None:
    check_model(model_args)
    check_run(args, config.output_dir)
    check_scoring(args)
    rows = load_own_rows(args.forget, args.retain, args.keep_dataset_cache, args.columns, to_train=True)
    check_texts(rows["forget"], config)
    if "retain" not in rows:
        say_what_is_not_kept()
        config.retain_weight = 0.0
        config.check_values()
    folder, chosen, path = Path(config.output_dir), settings(args, config, model_args), model_args.model_name_or_path
    with model_folder(folder, [path, args.forget, args.retain], args, chosen):
        model, tokenizer = load(path, model_args, config.trust_remote_code, is_trainable=True)
    score = Scorer({name: spread(as_questions(part), args.max_eval_rows) for name, part in rows.items()}, args)
    before = score(model, tokenizer, "base", folder / "base-rows.jsonl").run
    chats, dpo = bool(tokenizer.chat_template), config.loss_type == "dpo"
    sets = {name: answer_rows(part, chats, refusals=dpo and name == "forget") for name, part in rows.items()}
    trainer = MDUTrainer(
        model,
        config,
        train_dataset=sets["forget"],
        retain_dataset=sets["retain"] if config.retain_weight else None,
        eval_dataset=sets if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    seconds = trainer.train(resume_from_checkpoint=whole_checkpoint(folder)).metrics["train_runtime"]
    trainer.save_model()
    trainer.save_state()
    after = score(trainer.model, tokenizer, config.loss_type, folder / "unlearned-rows.jsonl").run
    after = replace(after, tau=config.tau if config.loss_type == "mdu" else None, train_seconds=seconds)
    results = Results(path, f"{len(rows['forget'])} rows to forget", chosen, [before, after])
    if trainer.is_world_process_zero():
        results.save(folder / "results.json")
        score.decoding(tokenizer).save_pretrained(folder)
        write_model_card(folder)
        print(f"\n{results.table()}\n\n{unlearn_summary(args, model_args, folder)}")
    if config.push_to_hub:
        trainer.push_to_hub()


def command() -> None:
    """The script as it is called."""
    main(*parse_options(UnlearnArguments, MDUConfig, ModelConfig, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
