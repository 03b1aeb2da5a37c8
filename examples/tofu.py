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

import dataclasses
import gc
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import (
    RESUME,
    DataArguments,
    Progress,
    check_models,
    check_run,
    is_trained,
    load,
    log_history,
    output_folder,
    settings,
    train_seconds,
    unlearn,
)
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from trl import ModelConfig, get_peft_config

from mdu_trainer import DiffusionGenerationConfig, MDLMConfig, MDLMTrainer, MDUConfig, question_answer_rows
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_above_zero, check_least, check_once, check_source
from mdu_trainer.commands.options import parse_options
from mdu_trainer.evaluation.registry import choose_metrics
from mdu_trainer.evaluation.results import Results
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import load_split, spread
from mdu_trainer.evaluation.tofu import TOFU_METRICS, TofuResult, TruthRatios, evaluate_tofu, load_tofu, longest_answer
from mdu_trainer.files import UserError
from mdu_trainer.report.model_card import write_model_card
from mdu_trainer.report.plots import plot_losses, plot_tradeoff
from mdu_trainer.testing import (
    SMALLEST_VOCABULARY,
    dataset_texts,
    fictional_authors,
    forget_retain_split,
    tiny_mdlm,
    train_tokenizer,
)

CONFIGS = Path(__file__).parent / "configs"
HEADS = 4  # of a model from scratch
EMBEDDED = "fictional authors (embedded)"  # what results call the rows


@dataclass
class TofuArguments(DataArguments):
    """What to forget and how to measure it.

    Without `dataset_name` the rows are the embedded fictional authors; without `model_name_or_path` the model is a
    small one from scratch, which `finetune_epochs` teaches the rows first.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; embedded authors if unset."})
    forget_split: str = field(default="forget10", metadata={"help": "Config name of the rows to forget."})
    retain_split: str = field(default="retain90", metadata={"help": "Config name of the rows to keep."})
    max_retain_rows: int | None = field(default=None, metadata={"help": "Use the first N rows to keep only."})
    max_eval_rows: int | None = field(default=400, metadata={"help": "Score N evenly spaced rows of each set."})
    finetune_epochs: float = field(default=0, metadata={"help": "Fine-tune on all rows first, for N epochs."})
    finetune_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the fine-tuning."})
    finetune_batch_size: int = field(default=16, metadata={"help": "Rows a fine-tuning step on each device."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a model from scratch."})
    num_layers: int = field(default=3, metadata={"help": "Layers of a model from scratch."})
    vocab_size: int = field(default=512, metadata={"help": "Byte-level BPE tokens of a model from scratch."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Decoded tokens; the longest answer if unset."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    likelihood_draws: int = field(default=16, metadata={"help": "Passes a row for the probability."})
    eval_rows_a_batch: int = field(default=32, metadata={"help": "Rows decoded at a time when scoring."})
    metrics: list[str] = field(default_factory=lambda: list(TOFU_METRICS), metadata={"help": "What is measured."})
    retain_model: str | None = field(
        default=None, metadata={"help": "A model of the rows to keep alone, or 'train'; adds the forget quality."}
    )
    resume: bool = field(default=False, metadata={"help": "Finish what was begun in output_dir."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is in output_dir."})


@dataclass
class TofuConfig(MDUConfig):
    """MDUConfig with lists of methods: one run for each `loss_type`, and for "mdu" one for each `tau`."""

    loss_type: list[str] = field(default_factory=lambda: ["mdu"], metadata={"help": "Forget losses."})
    tau: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "MDU's anchors."})

    def __post_init__(self):
        pass  # each run's own MDUConfig checks its values

    def runs(self) -> list[MDUConfig]:
        """The configuration of each run, with a folder of its own."""
        check_once(self, "loss_type", "tau")
        methods = [(loss, tau) for loss in self.loss_type for tau in (self.tau if loss == "mdu" else [0.0])]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(MDUConfig) if f.init}
        runs = []
        for loss_type, tau in methods:
            name = f"mdu-tau{tau:.12g}" if loss_type == "mdu" else loss_type
            runs.append(
                MDUConfig(**values | {"loss_type": loss_type, "tau": tau, "output_dir": str(self.folder / name)})
            )
        return runs

    def unchanging(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """What must be the same for a comparison to be resumed, of what was set."""
        return chosen

    def swept(self, run: MDUConfig) -> dict[str, Any]:
        """What tells a run from others of its method and tau."""
        return {}

    @property
    def folder(self) -> Path:
        return Path("outputs/tofu" if self.output_dir is None else self.output_dir)


def load_rows(args: TofuArguments, from_scratch: bool) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """The rows to forget and those to keep, and the sets to evaluate on."""
    if args.dataset_name is None:
        forget, retain = forget_retain_split(fictional_authors())
        return (
            forget,
            retain,
            {name: spread(rows, args.max_eval_rows) for name, rows in (("forget", forget), ("retain", retain))},
        )
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


def finetune(
    folder: Path, args: TofuArguments, config: MDUConfig, model_args: ModelConfig, rows: Dataset, vocabulary: Dataset
) -> str:
    """Teach rows to the model that the command line names, or to one from scratch, and save it in a folder.

    The tokenizer of one from scratch learns from the rows of `vocabulary` alone: what is to be forgotten must not be
    among its tokens.
    """
    name = model_args.model_name_or_path
    if is_trained(folder):
        return str(folder)
    if name is None:
        tokenizer = train_tokenizer(dataset_texts(vocabulary.select_columns(["question", "answer"])), args.vocab_size)
        model = tiny_mdlm(tokenizer, args.hidden_size, args.num_layers, HEADS, seed=config.seed)
    else:
        model, tokenizer = load(name, model_args, config.trust_remote_code, is_trainable=True)
    trainer = MDLMTrainer(
        model,
        finetune_config(folder, args, config, from_scratch=name is None),
        train_dataset=question_answer_rows(rows, conversational=bool(tokenizer.chat_template)),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[Progress(f"fine-tuning {folder.name}")],
    )
    trainer.train()
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def finetune_config(folder: Path, args: TofuArguments, config: MDUConfig, from_scratch: bool) -> MDLMConfig:
    """The fine-tuning's configuration: the unlearning's where it is not set here."""
    shared = (
        "seed",
        "bf16",
        "dataloader_pin_memory",
        "activation_checkpointing",
        "gradient_checkpointing",
        "report_to",
        "logging_steps",
        "max_length",
        "disable_tqdm",
    )
    return MDLMConfig(
        output_dir=str(folder),
        num_train_epochs=args.finetune_epochs,
        learning_rate=args.finetune_learning_rate,
        per_device_train_batch_size=args.finetune_batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        adam_beta2=0.98,
        save_strategy="no",
        pad_with_end_tokens=True,
        time_weighting=not from_scratch,  # a small model from scratch learns faster without the variance of 1/t
        prompt_mask_ratio=0.2,
        **{name: getattr(config, name) for name in shared},
    )


class Scorer:
    """Scores one model after the other on the same sets, and keeps finished rows in the model's own folder."""

    def __init__(self, sets: dict[str, Dataset], args: TofuArguments, folder: Path):
        self.sets, self.args, self.folder = sets, args, folder
        self.retain_log: TruthRatios | None = None

    def __call__(self, model, tokenizer, folder: str, method: str) -> TofuResult:
        decoding = DiffusionGenerationConfig(
            max_new_tokens=self.args.max_new_tokens or longest_answer(self.sets, tokenizer),
            steps=self.args.decoding_steps,
            batch_size=self.args.eval_rows_a_batch,
        )
        return evaluate_tofu(
            model,
            tokenizer,
            self.sets,
            decoding,
            metrics=self.args.metrics,
            retain_log=self.retain_log,
            method=method,
            num_draws=self.args.likelihood_draws,
            progress_path=self.folder / folder / "rows.jsonl",
            show_progress=True,
        )


def check(args: TofuArguments, config: TofuConfig, model_args: ModelConfig) -> None:
    """Refuse options that are wrong before anything is loaded."""
    check_run(args, "outputs" if config.output_dir is None else config.output_dir)
    check_once(args, "metrics")
    choose_metrics(args.metrics)
    positive = ("max_retain_rows", "max_eval_rows", "max_new_tokens", "decoding_steps", "likelihood_draws")
    check_least(args, **dict.fromkeys(positive, 1), eval_rows_a_batch=1)
    check_finetuning(args, model_args)
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
    if args.retain_model == "train" and not args.finetune_epochs:
        raise UserError("--retain_model train needs --finetune_epochs: the epochs that the base was fine-tuned for.")
    retain_model = None if args.retain_model == "train" else args.retain_model
    check_models(model_args, model_name_or_path=model_args.model_name_or_path, retain_model=retain_model)


def check_finetuning(args: Any, model_args: ModelConfig) -> None:
    """Refuse what no model can be fine-tuned with, or made of from scratch."""
    check_least(args, finetune_epochs=0, finetune_batch_size=1)
    check_above_zero(args, "finetune_learning_rate")
    if model_args.model_name_or_path is None:
        check_least(args, hidden_size=HEADS, num_layers=1, vocab_size=SMALLEST_VOCABULARY)
        if args.hidden_size % (2 * HEADS):
            raise UserError(f"--hidden_size must be a multiple of {2 * HEADS}, got {args.hidden_size}.")


def compare(args: TofuArguments, config: TofuConfig, model_args: ModelConfig) -> tuple[Results, list[MDUConfig]]:
    """Do what is left of a comparison: fine-tune, unlearn and score, one run after the other.

    Writes `results.json` after every run.

    Returns:
        The results, and the configurations of the runs, which are the last of `results.runs`.
    """
    check(args, config, model_args)
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
    score = Scorer(sets, args, folder)
    data = f"{args.dataset_name} {args.forget_split}" if args.dataset_name else EMBEDDED
    results = Results(name or "from scratch", data, chosen)
    if never is not None:
        result = score(*loaded, "retain", "retain model")
        score.retain_log = result.truth_ratios
        results.runs.append(result.run)
        loaded = load(base, model_args, config.trust_remote_code)
    results.runs.insert(0, score(*loaded, "base", "base").run)
    del loaded
    for one in runs:
        gc.collect()  # the model before, with its optimiser
        model, tokenizer = unlearn(one, base, model_args, forget, retain)
        scored = score(model, tokenizer, Path(one.output_dir).name, one.loss_type).run
        del model
        tau, seconds = one.tau if one.loss_type == "mdu" else None, train_seconds(Path(one.output_dir))
        results.runs.append(replace(scored, tau=tau, train_seconds=seconds, settings=config.swept(one)))
        if state.is_main_process:
            results.save(folder / "results.json")
    return results, runs


def present(results: Results, runs: list[MDUConfig], folder: Path) -> None:
    """Draw the trade-off and the training curves, and write a card beside each model."""
    unlearned = list(zip(results.runs[-len(runs) :], runs, strict=True))
    plot_tradeoff(results.runs, folder / "tradeoff.png")
    plot_losses({one.name: log_history(Path(c.output_dir)) for one, c in unlearned}, folder / "losses.png")
    for one, config in unlearned:  # a sweep has several of one method and tau
        others = [o for o in results.runs if o is one or (o.method, o.tau) != (one.method, one.tau)]
        write_model_card(config.output_dir, results=replace(results, runs=others))


def main(args: TofuArguments, config: TofuConfig, model_args: ModelConfig) -> None:
    results, runs = compare(args, config, model_args)
    if processes().is_main_process:
        present(results, runs, config.folder)
        print(f"\n{results.table()}\n\nWritten to {config.folder}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(TofuArguments, TofuConfig, ModelConfig, default=CONFIGS / "demo.yaml"))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
