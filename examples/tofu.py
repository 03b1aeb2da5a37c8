"""Unlearn with MDU and its baselines, and compare what each forgot and kept.

The embedded default (fictional authors, a tiny model, two CPU cores, a few minutes):

    python examples/tofu.py

LLaDA on TOFU, already fine-tuned on it, with LoRA:

    accelerate launch examples/tofu.py --model_name_or_path PATH --dtype bfloat16 --use_peft \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90 \\
        --loss_type mdu npo --tau 0 0.25 --num_train_epochs 9 --output_dir outputs/llada-tofu

Every option of MDUConfig and TRL's ModelConfig is an option here; `--config FILE.yaml` holds them, too.
"""

import dataclasses
import gc
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import PeftModel
from transformers import TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from mdu_trainer import (
    DiffusionGenerationConfig,
    MDLMConfig,
    MDLMTrainer,
    MDUConfig,
    MDUTrainer,
    load_model,
    load_tokenizer,
)
from mdu_trainer.analysis.plots import plot_losses, plot_tradeoff
from mdu_trainer.data import question_answer_rows
from mdu_trainer.evaluation.report import Results, Run
from mdu_trainer.evaluation.tofu import score_answers
from mdu_trainer.testing import (
    REFUSALS,
    dataset_texts,
    fictional_authors,
    forget_retain_split,
    tiny_mdlm,
    train_tokenizer,
)

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class TofuArguments:
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
    likelihood_draws: int = field(default=8, metadata={"help": "Passes a row for the probability."})
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
        methods = [(loss, tau) for loss in self.loss_type for tau in (self.tau if loss == "mdu" else [0.0])]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(MDUConfig) if f.init}
        runs = []
        for loss_type, tau in methods:
            name = f"mdu-tau{tau:g}" if loss_type == "mdu" else loss_type
            runs.append(
                MDUConfig(**values | {"loss_type": loss_type, "tau": tau, "output_dir": str(self.folder / name)})
            )
        return runs

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or "outputs/tofu")


class Progress(TrainerCallback):
    """One line when a run starts, so that a log of many runs can be read."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        PartialState().print(f"\n{self.name}: {state.max_steps} steps")


def load_rows(args: TofuArguments) -> tuple[Dataset, Dataset]:
    """The rows to forget and those to keep, with columns `question` and `answer`."""
    if args.dataset_name is None:
        return forget_retain_split(fictional_authors())
    forget = load_dataset(args.dataset_name, args.forget_split, split="train")
    retain = load_dataset(args.dataset_name, args.retain_split, split="train")
    return forget, retain.select(range(min(len(retain), args.max_retain_rows or len(retain))))


def prepare_base(args: TofuArguments, config: TofuConfig, model_args: ModelConfig, rows: Dataset) -> str:
    """Path of the model that is to forget, fine-tuned first if asked."""
    name = model_args.model_name_or_path
    if name is not None and not args.finetune_epochs:
        return name
    if name is None:
        tokenizer = train_tokenizer(dataset_texts(rows.select_columns(["question", "answer"])), args.vocab_size)
        model = tiny_mdlm(tokenizer, args.hidden_size, args.num_layers, seed=config.seed)
    else:
        model, tokenizer = load(name, model_args, config.trust_remote_code)
    trainer = MDLMTrainer(
        model,
        finetune_config(args, config, from_scratch=name is None),
        train_dataset=question_answer_rows(rows, conversational=bool(tokenizer.chat_template)),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[Progress("fine-tuning")],
    )
    trainer.train()
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    path = config.folder / "base"
    trainer.save_model(str(path))
    trainer.accelerator.wait_for_everyone()
    return str(path)


def finetune_config(args: TofuArguments, config: TofuConfig, from_scratch: bool) -> MDLMConfig:
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
        output_dir=str(config.folder / "base"),
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


def load(path: str, model_args: ModelConfig, trust_remote_code: bool):
    """Model and tokenizer, as the command line asks for them."""
    shared = {"trust_remote_code": trust_remote_code, "revision": model_args.model_revision}
    quantization = get_quantization_config(model_args)
    model = load_model(
        path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
        **shared,
    )
    if quantization is None:
        model.to(PartialState().device)
    return model, load_tokenizer(path, **shared)


def answer_rows(rows: Dataset, conversational: bool, refusals: bool = False) -> Dataset:
    """Prompt-completion rows, for DPO with a refusal as the preferred response."""
    if refusals and "refusal" not in rows.column_names:
        rows = rows.add_column("refusal", [REFUSALS[i % len(REFUSALS)] for i in range(len(rows))])
    return question_answer_rows(rows, conversational, preferred="refusal" if refusals else None)


def score(
    name: str, tau: float | None, model, tokenizer, sets: dict[str, Dataset], args: TofuArguments, seconds=0.0
) -> Run:
    """Score a model on the rows to forget and those to keep."""
    start = time.perf_counter()
    longest = max(len(tokenizer(text)["input_ids"]) for rows in sets.values() for text in rows["answer"]) + 1
    decoding = DiffusionGenerationConfig(max_new_tokens=args.max_new_tokens or longest, steps=args.decoding_steps)
    scores = {
        part: score_answers(
            model,
            tokenizer,
            rows,
            decoding,
            num_draws=args.likelihood_draws,
            show_progress=PartialState().is_main_process,
        )
        for part, rows in sets.items()
    }
    rows = {part: len(rows) for part, rows in sets.items()}
    return Run(name, tau, scores, rows, {}, seconds, time.perf_counter() - start)


def unlearn(config: MDUConfig, path: str, model_args: ModelConfig, forget: Dataset, retain: Dataset) -> MDUTrainer:
    """Train a fresh copy of the base to forget, and save it in the run's folder."""
    model, tokenizer = load(path, model_args, config.trust_remote_code)
    chats = bool(tokenizer.chat_template)
    trainer = MDUTrainer(
        model,
        config,
        train_dataset=answer_rows(forget, chats, refusals=config.loss_type == "dpo"),
        retain_dataset=answer_rows(retain, chats) if config.retain_weight else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[Progress(Path(config.output_dir).name)],
    )
    trainer.train()
    trainer.save_model()
    return trainer


def settings(*arguments) -> dict:
    """What differs from the defaults, without secrets; as YAML it repeats the run."""
    changed = {}
    for values in arguments:
        for f in dataclasses.fields(values):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if f.init and not f.name.endswith("token") and getattr(values, f.name) != default:
                changed[f.name] = getattr(values, f.name)
    return changed


def claim(folder: Path, models: list[Path], base: str | None, overwrite: bool) -> None:
    """Refuse a folder that holds something, or clear what this run is going to write."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SystemExit(f"{folder} is not empty. Choose another --output_dir, or pass --overwrite_output_dir.")
    if base is not None and Path(base).resolve() in [path.resolve() for path in models]:
        raise SystemExit(
            f"The model to load, {base}, is one that this run would overwrite. Choose another --output_dir."
        )
    for path in models:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("results.json", "tradeoff.png", "losses.png", "config.yaml"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def main(args: TofuArguments, config: TofuConfig, model_args: ModelConfig) -> None:
    state = PartialState()
    runs = config.runs()
    chosen = settings(args, config, model_args)
    forget, retain = load_rows(args)
    if state.is_main_process:
        models = [config.folder / "base", *(Path(run.output_dir) for run in runs)]
        claim(config.folder, models, model_args.model_name_or_path, args.overwrite_output_dir)
        (config.folder / "config.yaml").write_text(yaml.safe_dump(chosen))
    state.wait_for_everyone()
    sets = {name: spread(rows, args.max_eval_rows) for name, rows in (("forget", forget), ("retain", retain))}
    path = prepare_base(args, config, model_args, concatenate_datasets([forget, retain]))
    histories = {}
    data = f"{args.dataset_name} {args.forget_split}" if args.dataset_name else "fictional authors (embedded)"
    results = Results(model_args.model_name_or_path or "from scratch", data, chosen)
    model, tokenizer = load(path, model_args, config.trust_remote_code)
    results.runs.append(score("base", None, model, tokenizer, sets, args))
    del model
    for run in runs:
        gc.collect()
        trainer = unlearn(run, path, model_args, forget, retain)
        tau = run.tau if run.loss_type == "mdu" else None
        seconds = next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log)
        results.runs.append(score(run.loss_type, tau, trainer.model, tokenizer, sets, args, seconds))
        histories[results.runs[-1].name] = trainer.state.log_history
        del trainer
        if state.is_main_process:
            results.save(config.folder / "results.json")
    if state.is_main_process:
        plot_tradeoff(results.runs, config.folder / "tradeoff.png")
        plot_losses(histories, config.folder / "losses.png")
        print(f"\n{results.table()}\n\nWritten to {config.folder}")


def spread(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, evenly spaced."""
    count = min(len(rows), limit or len(rows))
    return rows.select([i * len(rows) // count for i in range(count)])


if __name__ == "__main__":
    given = {argument.split("=")[0] for argument in sys.argv[1:]}
    if not given & {"--config", "--model_name_or_path", "--dataset_name", "-h", "--help"}:
        sys.argv[1:1] = ["--config", str(CONFIGS / "demo.yaml")]
    main(*TrlParser((TofuArguments, TofuConfig, ModelConfig)).parse_args_and_config())
