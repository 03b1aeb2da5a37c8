"""Unlearn with MDU and its baselines, and compare what each forgot and kept.

The embedded default (fictional authors, a tiny model, two CPU cores, a few minutes):

    python examples/tofu.py

LLaDA on TOFU, already fine-tuned on it, with LoRA:

    accelerate launch examples/tofu.py --model_name_or_path PATH --dtype bfloat16 --use_peft \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90 \\
        --loss_type mdu npo --tau 0 0.25 --num_train_epochs 9 --output_dir outputs/llada-tofu

What was begun and killed, `--resume` finishes. `--retain_model train` also fine-tunes a model on the rows to keep
alone, or names one; its truth ratios give the others their forget quality.

Every option of MDUConfig and TRL's ModelConfig is an option here; `--config FILE.yaml` holds them, too.
"""

import sys
from pathlib import Path

from trl import ModelConfig

from mdu_trainer.commands import run
from mdu_trainer.commands.comparison import ComparisonArguments, ComparisonConfig, compare, present
from mdu_trainer.commands.folders import RESUME
from mdu_trainer.commands.options import parse_options
from mdu_trainer.commands.summary import comparison_summary
from mdu_trainer.evaluation.frontier import reading
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.report.page import write_page
from mdu_trainer.terminal import folded

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def main(args: ComparisonArguments, config: ComparisonConfig, model_args: ModelConfig) -> None:
    results, runs = compare(args, config, model_args)
    if processes().is_main_process:
        present(results, runs, config.folder)
        write_page(config.folder)
        shown = next((one for one in runs if one.loss_type == "mdu"), runs[0])
        where = comparison_summary(args, model_args, config.folder, shown.output_dir, "tradeoff.png")
        print(f"\n{results.table()}\n\n{folded(reading(results.runs))}\n\n{where}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(ComparisonArguments, ComparisonConfig, ModelConfig, default=CONFIG, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
