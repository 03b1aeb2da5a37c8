"""Trainings and evaluations in processes of their own, to be killed: forked from one that has done the imports."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from warm import PROCESSES

from mdu_trainer import (
    DiffusionGenerationConfig,
    MDLMConfig,
    MDLMTrainer,
    MDUConfig,
    MDUTrainer,
    evaluate_tofu,
    question_answer_rows,
)
from mdu_trainer.evaluation import runner
from mdu_trainer.inference import generation, likelihood
from mdu_trainer.testing import dataset_texts, fictional_authors, forget_retain_split, tiny_mdlm, train_tokenizer
from mdu_trainer.trainer import checkpoints, robust

STEPS, SAVE_STEPS, ACCUMULATION = 10, 3, 2  # an epoch of 16 rows has 4 updates, so every second checkpoint is amid one
SAVES = 4  # the last at the end
NEW = "activation_checkpointing"  # of transformers 5.23
CHECKPOINTING = NEW if NEW in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
QUIET = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "full, precomputed anchors": {"tau": 0.5, "precompute_anchor": True},
    "counterfactual anchor": {"tau": 1.0, "anchor_input": "counterfactual"},
    "LoRA with dropout": {"tau": 0.5, "peft_config": LORA},
    "full, frozen copy": {"loss_type": "npo"},
    "fine-tuning": {"cls": MDLMTrainer},
}
PLACES = {  # what is called, how often in a run
    "in a micro-batch": (Trainer, "training_step", STEPS * ACCUMULATION),
    "before an update": (Trainer, "_get_grad_norm", STEPS),
    "weights written": (Trainer, "save_model", SAVES),
    "half of the optimizer written": (torch, "save", 4 * SAVES),
    "optimizer written": (Trainer, "_save_optimizer_and_scheduler", SAVES),
    "random state written": (Trainer, "_save_rng_state", SAVES),
    "no manifest yet": (robust, "write_manifest", SAVES),
    "not renamed yet": (checkpoints.os, "replace", 4 * SAVES),
    "older ones not deleted yet": (robust, "rotate", SAVES),
}
EVALUATION_PLACES = {  # 16 rows, 2 a batch
    "in a pass for a likelihood": (likelihood, "_fill_log_p", 30),
    "in a decoding step": (generation._Decoder, "predict", 60),
    "a batch scored": (runner.QuestionBatch, "scores", 8),
    "a batch kept, or the header": (runner.ProgressFile, "append", 9),
}


def make_rows() -> tuple[Dataset, Dataset]:
    """8 rows to forget and 16 to keep."""
    forget, retain = forget_retain_split(fictional_authors(3), 1)
    return question_answer_rows(forget, conversational=True), question_answer_rows(retain, conversational=True)


def make_trainer(folder: Path, kind: str, **options) -> MDLMTrainer:
    disable_progress_bars()
    settings = KINDS[kind] | options
    forget, retain = make_rows()
    tokenizer = train_tokenizer(dataset_texts(fictional_authors(3)), vocab_size=300)
    cls = settings.pop("cls", MDUTrainer)
    peft_config = settings.pop("peft_config", None)
    names = ("callbacks", "eval_dataset", "model", "train_dataset", "retain_dataset")
    passed = {name: settings.pop(name) for name in names if name in settings}
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "logging_steps": 1,
        **QUIET,
    }
    config = (MDUConfig if cls is MDUTrainer else MDLMConfig)(str(folder), **(defaults | settings))
    defaults = {
        "model": tiny_mdlm(tokenizer, hidden_size=16, num_layers=1, num_heads=2),
        "train_dataset": forget if cls is MDUTrainer else retain,
        **({"retain_dataset": retain} if cls is MDUTrainer else {}),
    }
    peft_config = peft_config and LoraConfig(**peft_config)
    return cls(args=config, processing_class=tokenizer, peft_config=peft_config, **(defaults | passed))


def train(folder: Path, kind: str, kill: tuple[str, int] | None = None, resume: bool = False, **options) -> None:
    """Train, and save the end in `final`."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, kind, **options)
    if kill is not None:
        die_at(*PLACES[kill[0]][:2], kill[1])
    trainer.train(resume_from_checkpoint=resume and bool(checkpoints.complete_checkpoints(folder)))
    trainer.save_model(str(folder / "final"))


def evaluate(folder: Path, kill: tuple[str, int] | None = None) -> None:
    """Score some authors' rows, a line a row in `rows.jsonl`, and save the figures in `results.json`."""
    torch.set_num_threads(1)
    authors = fictional_authors(2)
    tokenizer = train_tokenizer(dataset_texts(authors), vocab_size=300)
    model = tiny_mdlm(tokenizer, hidden_size=16, num_layers=1, num_heads=2, initializer_range=0.5)
    if kill is not None:
        die_at(*EVALUATION_PLACES[kill[0]][:2], kill[1])
    decoding = DiffusionGenerationConfig(max_new_tokens=16, steps=8, batch_size=2)
    progress = folder / "rows.jsonl"
    result = evaluate_tofu(model, tokenizer, {"forget": authors}, decoding, num_draws=4, progress_path=progress)
    (folder / "results.json").write_text(json.dumps(result.row_scores))


def die_at(owner: Any, name: str, count: int) -> None:
    """SIGKILL this process in the middle of the n-th call."""
    original, calls = getattr(owner, name), []
    first_half = name in ("rotate", "write_manifest", "replace")

    def dying(*args, **kwargs):
        calls.append(name)
        last = len(calls) == count
        if last and first_half:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            if name == "save":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            elif name == "append":  # amid a line
                os.truncate(args[0].path, os.path.getsize(args[0].path) - 5)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def run(folder: Path, kind: str, **options) -> int:
    """Exit status of `train` in a process of its own; negative: the signal that ended it."""
    return status(train, folder, kind, **options)


def status(target: Callable, *args, **options) -> int:
    """Exit status of a function in a process of its own; negative: the signal that ended it."""
    process = PROCESSES.Process(target=target, args=args, kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


def weights(folder: Path) -> bytes:
    """The bytes of the weights that a run ended with."""
    return next((folder / "final").glob("*model.safetensors")).read_bytes()


def draw(seed: int) -> tuple[str, tuple[str, int]]:
    """A kind of run and a moment to kill it, such that a few seeds in a row cover all kinds and places."""
    return list(KINDS)[seed % len(KINDS)], draw_moment(PLACES, seed)


def draw_moment(places: dict[str, tuple[Any, str, int]], seed: int) -> tuple[str, int]:
    """A place, all of which some seeds in a row cover, and which of its calls is the last."""
    place = list(places)[seed % len(places)]
    return place, random.Random(seed).randint(1, places[place][2])
