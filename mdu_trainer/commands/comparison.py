"""A comparison of unlearning methods: from one base, a run each, all scored on the same rows.

`examples/tofu.py` makes one; `examples/sweep.py` makes one of all combinations of settings.
"""

import gc
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import ModelConfig

from ..config import MDUConfig
from ..config.presets import preset
from ..evaluation.benchmarks import fictional_sets
from ..evaluation.registry import choose_metrics
from ..evaluation.results import Results, today
from ..evaluation.runner import processes
from ..evaluation.sources import load_split
from ..evaluation.tofu import TOFU_METRICS, TofuResult, load_tofu
from ..files import UserError
from ..report.model_card import write_model_card
from ..report.plots import plot_losses, plot_tradeoff
from ..testing import fictional_authors, forget_retain_split
from .checks import check_least, check_once, check_source
from .finetuning import FinetuningArguments, check_finetuning, finetune
from .folders import RunArguments, check_run, output_folder
from .loading import check_models, load
from .options import settings
from .row_sets import SplitArguments
from .scoring import Scorer, ScoringArguments, check_scoring
from .training import log_history, train_seconds, unlearn


@dataclass
class ComparisonArguments(RunArguments, ScoringArguments, FinetuningArguments, SplitArguments):
    """What to forget, and how to measure it.

    Without `dataset_name` the rows are the embedded fictional authors; without `model_name_or_path` the model is a
    small one from scratch, which `finetune_epochs` teaches the rows first.
    """

    max_retain_rows: int | None = field(default=None, metadata={"help": "Use the first N rows to keep only."})
    metrics: list[str] = field(default_factory=lambda: list(TOFU_METRICS), metadata={"help": "What is measured."})
    retain_model: str | None = field(
        default=None, metadata={"help": "A model of the rows to keep alone, or 'train'; adds the forget quality."}
    )


@dataclass
class ComparisonConfig(MDUConfig):
    """MDUConfig with lists: one run for each `loss_type`, for "mdu" one for each `tau`, and one for each preset.

    The run of a preset has its settings, whatever those of the others are.
    """

    loss_type: list[str] = field(default_factory=lambda: ["mdu"], metadata={"help": "Forget losses."})
    tau: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "MDU's anchors."})
    preset: list[str] = field(
        default_factory=list, metadata={"help": "One further run each, of settings by one name; none for no run."}
    )

    def __post_init__(self):
        pass  # each run's own MDUConfig checks its values

    def runs(self) -> list[MDUConfig]:
        """The configuration of each run, with a folder of its own."""
        check_once(self, *self.lists)
        runs = []
        for method in self.methods:
            name, tau = method_name(method), f"-tau{method['tau']:.12g}"
            folder = self.folder / (f"{name}{tau}" if name == "mdu" else name)
            runs.append(MDUConfig(**self.shared | method | {"output_dir": str(folder)}))
        return runs

    @property
    def lists(self) -> list[str]:
        """The options of which each value is a run of its own; a comparison may be without presets."""
        return ["loss_type", "tau", *(["preset"] if self.preset else [])]

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of all runs."""
        return {f.name: getattr(self, f.name) for f in fields(MDUConfig) if f.init}

    @property
    def methods(self) -> list[dict[str, Any]]:
        """The settings of each loss, of each tau that it has, and of each preset."""
        losses = [(loss, tau) for loss in self.loss_type for tau in (self.tau if loss == "mdu" else [0.0])]
        named = [preset(name).training | {"preset": name} for name in self.preset if name != "none"]
        return [{"loss_type": loss, "tau": tau, "preset": None} for loss, tau in losses] + named

    def unchanging(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """What must be the same for a comparison to be resumed, of what was set."""
        return chosen

    def swept(self, run: MDUConfig) -> dict[str, Any]:
        """What tells a run from others of its method and tau."""
        return {} if run.preset is None else {"preset": run.preset}

    @property
    def folder(self) -> Path:
        """The output folder of all runs."""
        return Path("outputs/tofu" if self.output_dir is None else self.output_dir)


def method_name(method: dict[str, Any]) -> str:
    """The loss, or the loss and the preset, as folders are called."""
    return method["loss_type"] if method["preset"] is None else f"{method['loss_type']}-{method['preset']}"


def load_rows(args: ComparisonArguments, from_scratch: bool) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """Return the rows to forget and those to keep, and the sets to score on."""
    if args.dataset_name is None:
        forget, retain = forget_retain_split(fictional_authors())
        return forget, retain, fictional_sets(args.max_eval_rows)
    cache = {"keep_dataset_cache": args.keep_dataset_cache}
    forget = load_split(args.dataset_name, args.forget_split, **cache)
    retain = load_split(args.dataset_name, args.retain_split, **cache)
    retain = retain.select(range(min(len(retain), args.max_retain_rows or len(retain))))
    sets = load_tofu(
        args.dataset_name,
        args.forget_split,
        args.retain_split,
        max_rows=args.max_eval_rows,
        max_retain_rows=args.max_retain_rows,
        **cache,
    )
    if from_scratch:  # which has learned nothing but the rows
        sets = {name: sets[name] for name in ("forget", "retain")}
    return forget, retain, sets


def compare(
    args: ComparisonArguments, config: ComparisonConfig, model_args: ModelConfig
) -> tuple[Results, list[MDUConfig]]:
    """Do what is left of a comparison: fine-tune, unlearn and score, one run after the other.

    Writes `results.json` after every run.

    Returns:
        The results, and the configurations of the runs, which are the last of `results.runs`.
    """
    _check(args, config, model_args)
    state, folder, name, runs = processes(), config.folder, model_args.model_name_or_path, config.runs()
    chosen = settings(args, config, model_args)
    forget, retain, sets = load_rows(args, from_scratch=name is None)
    rows = concatenate_datasets([part.select_columns(["question", "answer"]) for part in (forget, retain)])
    base, never = name, args.retain_model
    models = [folder / "base", folder / "retain", *(Path(run.output_dir) for run in runs)]
    inputs = [name, None if never == "train" else never, args.dataset_name]
    with output_folder(folder, models, inputs, args, chosen, config.unchanging):
        if args.finetune_epochs or name is None:
            base = finetune(folder / "base", args, runs[0], model_args, rows, retain)
        if never == "train":
            never = finetune(folder / "retain", args, runs[0], model_args, retain, retain)
        loaded = load(never or base, model_args, config.trust_remote_code)
    score = Scorer(sets, args, args.metrics)
    scored = partial(_scored, score, folder)
    results = Results(name or "from scratch", args.data, chosen, date=today())
    if never is not None:
        result = scored(*loaded, "retain", "retain model")
        score.retain_log = result.truth_ratios
        results.runs.append(result.run)
        loaded = load(base, model_args, config.trust_remote_code)
    results.runs.insert(0, scored(*loaded, "base", "base").run)
    del loaded
    for one in runs:
        gc.collect()  # the model before, with its optimiser
        model, tokenizer = unlearn(one, base, model_args, forget, retain)
        run = scored(model, tokenizer, Path(one.output_dir).name, one.loss_type).run
        del model
        tau, seconds = one.tau if one.loss_type == "mdu" else None, train_seconds(Path(one.output_dir))
        results.runs.append(replace(run, tau=tau, train_seconds=seconds, settings=config.swept(one)))
        if state.is_main_process:
            score.decoding(tokenizer).save_pretrained(one.output_dir)
            results.save(folder / "results.json")
    return results, runs


def present(results: Results, runs: list[MDUConfig], folder: Path) -> None:
    """Draw the trade-off and the training curves, and write a card beside each model.

    Args:
        results, runs: as `compare` returns them.
        folder: of the pictures.
    """
    unlearned = list(zip(results.runs[-len(runs) :], runs, strict=True))
    plot_tradeoff(results.runs, folder / "tradeoff.png")
    plot_losses({one.name: log_history(Path(c.output_dir)) for one, c in unlearned}, folder / "losses.png")
    for one, config in unlearned:  # a sweep has several of one method and tau
        others = [o for o in results.runs if o is one or (o.method, o.tau) != (one.method, one.tau)]
        write_model_card(config.output_dir, results=replace(results, runs=others))


def _scored(score: Scorer, folder: Path, model: Any, tokenizer: Any, name: str, method: str) -> TofuResult:
    """Score a model; its finished rows stay in the folder of its run."""
    return score(model, tokenizer, method, folder / name / "rows.jsonl", name=name)


def _check(args: ComparisonArguments, config: ComparisonConfig, model_args: ModelConfig) -> None:
    """Refuse options that are wrong before anything is loaded."""
    check_run(args, "outputs" if config.output_dir is None else config.output_dir)
    check_once(args, "metrics")
    choose_metrics(args.metrics)
    check_least(args, max_retain_rows=1)
    check_scoring(args)
    check_finetuning(args, model_args)
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
    if args.retain_model == "train" and not args.finetune_epochs:
        raise UserError("--retain_model train needs --finetune_epochs: the epochs that the base was fine-tuned for.")
    retain_model = None if args.retain_model == "train" else args.retain_model
    check_models(model_args, model_name_or_path=model_args.model_name_or_path, retain_model=retain_model)
