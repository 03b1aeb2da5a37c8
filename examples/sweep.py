"""Choose tau, and whatever else, by looking: unlearn with every combination, mark the Pareto front, select one.

The embedded default (fictional authors, a tiny model, two CPU cores, a few minutes):

    python examples/sweep.py

LLaDA on TOFU, from a model that was fine-tuned on it:

    accelerate launch examples/sweep.py --model_name_or_path PATH --dtype bfloat16 --use_peft \\
        --dataset_name locuslab/TOFU --loss_type mdu npo --tau 0 0.25 0.5 --learning_rate 1e-5 3e-5 \\
        --num_train_epochs 5 9 --select "retain>=0.95*base" --output_dir outputs/llada-sweep

`loss_type`, `tau`, `learning_rate`, `max_steps` (or `num_train_epochs`) and `seed` take several values; tau is MDU's
alone. The other options are those of examples/tofu.py. All runs unlearn from the same model: if it is fine-tuned here,
with the first seed.

Every run has a folder of its own. `--resume` finishes what was begun and killed, also with more or fewer values: a run
that is finished is not trained or scored again.
"""

import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from trl import ModelConfig

from mdu_trainer import MDUConfig
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_once
from mdu_trainer.commands.comparison import ComparisonArguments, ComparisonConfig, compare, method_name, present
from mdu_trainer.commands.folders import RESUME
from mdu_trainer.commands.options import parse_options
from mdu_trainer.commands.summary import comparison_summary
from mdu_trainer.evaluation.frontier import FIGURES, frontier_cells, parse_conditions, place_of, reading, select
from mdu_trainer.evaluation.results import SHORT, markdown_table
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.tofu import SETS
from mdu_trainer.files import UserError
from mdu_trainer.report.plots import plot_frontier
from mdu_trainer.terminal import folded

CONFIG = Path(__file__).parent / "configs" / "sweep.yaml"
DEFAULTS = {name: MDUConfig.__dataclass_fields__[name].default for name in SHORT}
FIGURES_OF = {  # of a metric; of others their name
    "rougeL": ("rougeL", "rougeL_recall", "rougeL_f1"),
    "choice_probability": ("probability",),
}


@dataclass
class SweepArguments(ComparisonArguments):
    """What to forget, how to measure it, and which run to keep."""

    select: str = field(
        default="",
        metadata={
            "help": "Bounds on the run to keep, e.g. retain>=0.95*base. Of the runs within them, the nearest to the "
            "never-trained model's forget score is selected, without such a model the lowest."
        },
    )


@dataclass
class SweepConfig(ComparisonConfig):
    """MDUConfig with lists: one run for each combination of their values."""

    learning_rate: list[float] = field(default_factory=lambda: [1e-5], metadata={"help": "Initial learning rates."})
    max_steps: list[int] = field(default_factory=lambda: [-1], metadata={"help": "Update steps, in place of epochs."})
    num_train_epochs: list[float] = field(default_factory=lambda: [3.0], metadata={"help": "Epochs."})
    seed: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds; the first is the base's too."})

    forget_masking: list[str] = field(default_factory=lambda: ["random"], metadata={"help": "What is masked."})
    anchor_source: list[str] = field(default_factory=lambda: ["initial"], metadata={"help": "MDU's anchors: whose."})
    anchor_input: list[str] = field(
        default_factory=lambda: ["masked_prompt"], metadata={"help": "MDU's anchors: predicted from what."}
    )

    numbers: ClassVar[tuple[str, ...]] = ("learning_rate", "max_steps", "num_train_epochs", "seed")
    anchors: ClassVar[tuple[str, ...]] = ("anchor_source", "anchor_input")  # of MDU at tau > 0 alone
    axes: ClassVar[tuple[str, ...]] = (*numbers, "forget_masking", *anchors)

    def __post_init__(self):
        for name in ("loss_type", "tau", "preset", *self.axes):  # code may give one value
            value = getattr(self, name)
            setattr(self, name, value if isinstance(value, list) else [value])

    def runs(self) -> list[MDUConfig]:
        """The configuration of each run, with a folder that is named after its values."""
        check_once(self, *self.lists, *self.axes)
        if len(self.max_steps) > 1 and min(self.max_steps) <= 0:
            raise UserError(f"--max_steps must be positive, got {' '.join(map(str, self.max_steps))}.")
        if self.max_steps[0] > 0 and len(self.num_train_epochs) > 1:
            raise UserError("Sweep over --max_steps or over --num_train_epochs: with steps, epochs do not count.")
        runs = []
        for method in self.methods:
            read = [name for name in self.axes if name not in self.anchors or _has_anchor(method)]
            for point in product(*(getattr(self, name) for name in read)):
                chosen, name = dict(zip(read, point, strict=True)), method_name(method)
                folder = self.folder / _name({"tau": method["tau"]} | chosen if name == "mdu" else chosen, name)
                runs.append(
                    MDUConfig(**self.shared | _unread(method | chosen) | method | chosen | {"output_dir": str(folder)})
                )
        return runs

    def unchanging(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """All but the values that are swept over, which may become more or fewer; the first seed is the base's."""
        swept = {"loss_type", "tau", "preset", *self.axes, "select"}
        kept = {key: value for key, value in chosen.items() if key not in swept}
        return kept | {"first seed": chosen.get("seed", [42])[0]}

    def swept(self, run: MDUConfig) -> dict[str, Any]:
        """The values that not all runs share, besides method and tau."""
        return super().swept(run) | {name: getattr(run, name) for name in self.axes if len(getattr(self, name)) > 1}

    @property
    def folder(self) -> Path:
        return Path("outputs/sweep" if self.output_dir is None else self.output_dir)


def _has_anchor(method: dict[str, Any]) -> bool:
    """Whether a method predicts an anchor that is not its preset's."""
    return method["loss_type"] == "mdu" and method["tau"] > 0 and method["preset"] is None


def _unread(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults in place of what other runs of the sweep read, and one with these values would refuse or not read."""
    unread = {"anchor_source": "initial", "anchor_input": "masked_prompt"}
    if values["forget_masking"] != "generated":
        unread["rollout_every"] = None
    if values.get("anchor_source") != "ema":
        unread["anchor_ema_decay"] = MDUConfig.anchor_ema_decay
    return unread


def _name(values: dict[str, Any], loss_type: str) -> str:
    """All values of a run, so that its folder keeps its name in a larger sweep; of words those that are no default."""
    unused = "num_train_epochs" if values["max_steps"] > 0 else "max_steps"
    numbers = {key: f"{value:.12g}" for key, value in values.items() if not isinstance(value, str) and key != unused}
    words = {key: value for key, value in values.items() if isinstance(value, str) and value != DEFAULTS[key]}
    named = [f"{SHORT.get(key, key)}{value.replace('/', '_')}" for key, value in (numbers | words).items()]
    return "-".join([loss_type, *named])


def check_select(args: SweepArguments) -> None:
    """Refuse bounds that cannot be read, or on figures that this sweep does not measure."""
    try:
        places = {bound.figure: place_of(bound.figure) for bound in parse_conditions(args.select)}
    except UserError as error:
        raise UserError(f"--select: {error}") from error
    measured = {figure for metric in args.metrics for figure in FIGURES_OF.get(metric, (metric,))}
    of_model = {"model_utility"} | ({"forget_quality", "ks_statistic"} if args.retain_model else set())
    places |= {"forget": FIGURES["forget"]}  # by which the run is chosen, of those that fit
    for name, (part, metric) in places.items():
        if (metric not in measured or part not in SETS) if part else metric not in of_model:
            raise UserError(
                f"--select: {name} is not measured here. See --metrics, and --retain_model for the forget quality; "
                f"sets are {', '.join(SETS)}."
            )


def main(args: SweepArguments, config: SweepConfig, model_args: ModelConfig) -> None:
    check_once(args, "metrics")
    check_select(args)
    results, runs = compare(args, config, model_args)
    if not processes().is_main_process:
        return
    present(results, runs, config.folder)
    problem, selected = "", None
    try:
        selected = select(results.runs, args.select)
    except ValueError as error:
        problem = str(error)
    for suffix in ("png", "svg"):
        plot_frontier(results.runs, config.folder / f"frontier.{suffix}", selected=selected)
    chosen = runs[0 if selected is None else results.runs[-len(runs) :].index(selected)].output_dir
    where = comparison_summary(args, model_args, config.folder, chosen, "frontier.png")
    print(f"\n{markdown_table(frontier_cells(results, selected))}\n\n{folded(reading(results.runs))}\n\n{where}")
    if selected is None:
        raise UserError(problem)
    print(f"Selected: {selected.name}, in {chosen}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(SweepArguments, SweepConfig, ModelConfig, default=CONFIG, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
