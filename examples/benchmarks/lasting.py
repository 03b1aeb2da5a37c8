"""Ways to forget, compared by how long the forgetting lasts.

    python examples/benchmarks/lasting.py
    python examples/benchmarks/lasting.py --scales demo --methods mdu-0 counterfactual --learning_rates 1e-3 --seeds 0

Models of two scales are made once: "demo", that of examples/configs/demo.yaml, and "large", 60 authors of whom six
are to be forgotten, on top of a model that learned other authors before. "llada-lora" and "dream-lora" are the first
in the published layouts, with an adapter, and "tofu" is real text: the model and the rows of
examples/configs/tofu_tiny.yaml. A method's learning rate is chosen on rows that are not the test's: other authors of
the first scale, with the first seed. Of the rates that leave a retain rL of .98 it is the one with the lowest
worst-case recovery. Name one rate, and that is taken.

By default three methods run at two scales with three rates and three seeds, in about 90 minutes on two quiet cores.
On one thread a run takes two and a half minutes at the first scale, half of that on the rows for the rates, where
fewer attacks are made, and six minutes at the second, whose three trainings take twenty. What is finished is not
repeated: every run has a file of figures in the output folder, so that methods and seeds can be added later.

- recovery: the most that any attack brings back, from 0 (never trained) to 1 (the base). "upper end" is the highest
  end of an interval. Relearning is tried at rates over a decade.
- one-sided, two-sided: area under the curve of telling the forget rows from unseen ones by what is likely, or in
  whichever direction tells most. Nothing comes back by that, so it does not count as a recovery.
- cost: rows that pass forwards and backwards, as a share of those of the base's fine-tuning, and of a fine-tuning on
  the rows to keep alone. Forwards alone is a third.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from lasting_figures import Cell, Measurer, best_rate, table
from lasting_methods import METHODS
from lasting_models import SCALES, SOME_ATTACKS, Scale, Split, TofuSplit

from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_source
from mdu_trainer.files import UserError, read_json, write_whole

MAIN = ("mdu-0", "npo", "counterfactual")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lasting"), help="models and figures")
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=["demo", "large"])
    parser.add_argument("--dataset_name", default="../shared/tofu", help="of scale tofu: a folder, or locuslab/TOFU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(MAIN))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, help="updates of a method; the scale's own if not given")
    parser.add_argument("--finetune_epochs", type=float, help="of the base; the scale's own if not given")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, and a folder with figures of other ones."""
    for name in ("max_steps", "finetune_epochs"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, got {value:g}.")
    if "tofu" in args.scales:
        check_source(args.dataset_name, "dataset_name")
        if args.scales[0] == "tofu" and len(args.learning_rates) > 1:
            raise UserError("A rate is chosen on embedded authors: name another scale before tofu, or one rate.")
    if min(args.learning_rates) <= 0:
        raise UserError(f"--learning_rates must be above 0, got {min(args.learning_rates):g}.")
    chosen = {name: getattr(args, name) for name in ("max_steps", "finetune_epochs")}
    path = args.output_dir / "settings.json"
    if path.is_file():
        found = read_json(path, "the settings of a study", "choose another --output_dir")
        if found != chosen:
            raise UserError(f"{args.output_dir} holds runs with {found}, not {chosen}. Choose another --output_dir.")
    else:
        write_whole(path, json.dumps(chosen) + "\n")


def scale_of(name: str, args: argparse.Namespace) -> Scale:
    """A scale with the changes of the command line."""
    scale = SCALES[name]
    if args.max_steps is not None:
        scale = replace(scale, updates=scale.updates | {"max_steps": args.max_steps})
    if args.finetune_epochs is not None:
        scale = replace(scale, finetuning=replace(scale.finetuning, finetune_epochs=args.finetune_epochs))
    return scale


def split_of(name: str, args: argparse.Namespace, validation: bool = False) -> Split:
    """The rows and models of a scale."""
    scale = scale_of(name, args)
    if validation:
        scale = replace(scale, attacks=scale.attacks or SOME_ATTACKS)
    if scale.real_text:
        return TofuSplit(scale, name, args.output_dir, dataset_name=args.dataset_name)
    return Split(scale, name, args.output_dir, validation)


def chosen_rates(args: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each method: the one that is named, or the best on the rows of the validation."""
    if len(args.learning_rates) == 1:
        return dict.fromkeys(args.methods, args.learning_rates[0])
    measurer = Measurer(split_of(args.scales[0], args, validation=True))
    return {
        method: best_rate([measurer.cell(method, rate, args.seeds[0]) for rate in args.learning_rates])
        for method in args.methods
    }


def main() -> None:
    args = parse()
    check(args)
    rates = chosen_rates(args)
    for name in args.scales:
        measurer = Measurer(split_of(name, args))
        cells: dict[str, list[Cell]] = {}
        for method in args.methods:
            cells[method] = [measurer.cell(method, rates[method], seed) for seed in args.seeds]
        count = len(measurer.split.forget)
        print(f"\n{name}, {count} rows to forget: mean (lowest-highest) over {len(args.seeds)} seeds")
        print(f"\n{table(measurer.ends, cells)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
