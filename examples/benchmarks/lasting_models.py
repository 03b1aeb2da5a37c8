"""Rows and models of `lasting.py`: made once at each scale, and kept in its output folder."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from mdu_trainer import DiffusionGenerationConfig, MDUConfig, load_model, load_tokenizer
from mdu_trainer.commands.finetuning import HEADS, FinetuningArguments, finetune_config
from mdu_trainer.commands.training import is_trained
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.evaluation.sources import load_split
from mdu_trainer.evaluation.tofu import longest_answer
from mdu_trainer.models import load_checkpoint
from mdu_trainer.models.dream import DreamConfig, DreamModel
from mdu_trainer.models.llada import LLaDAConfig, LLaDAModelLM
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer, unseen_answers
from mdu_trainer.trainer.mdlm import MDLMTrainer

FACTS = 8  # rows an author
KEPT_OF_TOFU = 80
QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class Scale:
    """How much there is to learn and to forget, and with what effort.

    Attributes:
        authors: whom the base is fine-tuned on, eight rows each.
        forgotten: how many of them are to be forgotten.
        earlier_authors: others, whom a model learns before it is fine-tuned. With none of them, fine-tuning starts
            from random weights, which then are the model before fine-tuning.
        earlier_epochs: of the training on them.
        finetuning: size of the model, and how it is trained.
        updates: options of `MDUConfig` that say how long a method trains.
        attacking: options of `AttackSettings`: how hard the attacks try.
        attacks: names of those that are made; all if None.
        decoding_steps: of every answer; a token a step if None.
        scored: rows to keep that are scored, at most.
        real_text: the rows are TOFU's: forget01, and the first `KEPT_OF_TOFU` of those to keep.
        layout: of `LAYOUTS`, in which a model is built; the embedded default's if None.
        lora: the package's methods train an adapter, which is merged before anything is measured.
    """

    authors: int
    forgotten: int
    finetuning: FinetuningArguments
    updates: dict[str, int]
    earlier_authors: int = 0
    earlier_epochs: float = 0
    attacking: dict[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] | None = None
    decoding_steps: int | None = None
    scored: int = 96
    real_text: bool = False
    layout: str | None = None
    lora: bool = False


LAYOUTS = {"llada": (LLaDAModelLM, LLaDAConfig), "dream": (DreamModel, DreamConfig)}
SOME_ATTACKS = ("relearn-related", "infill-first", "prefix", "membership")
DEMO = FinetuningArguments(finetune_epochs=240, finetune_learning_rate=3e-3, finetune_batch_size=48)
SMALL = Scale(  # that of examples/configs/demo.yaml
    authors=12,
    forgotten=2,
    finetuning=DEMO,
    updates={"max_steps": 80, "per_device_train_batch_size": 16, "retain_batch_size": 32},
    attacking={"relearn_steps": 80},
)
SCALES = {
    "demo": SMALL,
    **{f"{layout}-lora": replace(SMALL, layout=layout, lora=True, attacks=SOME_ATTACKS) for layout in LAYOUTS},
    "large": Scale(
        authors=60,
        forgotten=6,
        earlier_authors=31,  # the last five of 96 stay unknown to all models: membership is told from them
        earlier_epochs=30,
        finetuning=DEMO,
        updates={"max_steps": 480, "per_device_train_batch_size": 16, "retain_batch_size": 32},
        attacking={"relearn_steps": 80, "samples": 4},
    ),
    "tofu": Scale(  # that of examples/configs/tofu_tiny.yaml
        authors=0,
        forgotten=0,
        finetuning=FinetuningArguments(250, 2e-3, 32, hidden_size=192, num_layers=4, vocab_size=1024),
        updates={"max_steps": 100, "per_device_train_batch_size": 16, "retain_batch_size": 32},
        attacking={"relearn_steps": 80, "samples": 4},
        attacks=SOME_ATTACKS,  # all of them take hours
        decoding_steps=32,
        real_text=True,
    ),
    "tiny": Scale(  # learns nothing: to see that all runs
        authors=4,
        forgotten=1,
        earlier_authors=1,
        earlier_epochs=2,
        finetuning=FinetuningArguments(2, 3e-3, 16, hidden_size=32, num_layers=1, vocab_size=300),
        updates={"max_steps": 2, "per_device_train_batch_size": 4},
        attacking={"relearn_steps": 2, "relearn_batch_size": 2, "samples": 2, "num_draws": 4},
        attacks=("relearn-related", "infill-first", "prefix", "leak-at-k", "membership"),
        decoding_steps=4,
        scored=4,
    ),
}


@dataclass(frozen=True)
class Split:
    """The rows of a scale, those to forget apart, and the folders of its models.

    Attributes:
        scale: of `SCALES`.
        name: of the scale.
        output_dir: folder of all scales.
        validation: forget the authors before those of the test, to choose a learning rate on.
    """

    scale: Scale
    name: str
    output_dir: Path
    validation: bool = False

    @property
    def folder(self) -> Path:
        """Where models and figures are kept."""
        return self.output_dir / (f"{self.name}-validation" if self.validation else self.name)

    @cached_property
    def all_rows(self) -> Dataset:
        """The rows of all authors, those who are learned earlier last."""
        return fictional_authors(self.scale.authors + self.scale.earlier_authors)

    @cached_property
    def forget(self) -> Dataset:
        """The rows to forget."""
        return self.all_rows.select(self._forgotten)

    @cached_property
    def retain(self) -> Dataset:
        """The rows to keep."""
        return self.all_rows.select([i for i in range(FACTS * self.scale.authors) if i not in self._forgotten])

    @cached_property
    def earlier(self) -> Dataset:
        """The rows that are learned before the fine-tuning; none at some scales."""
        return self.all_rows.select(list(range(FACTS * self.scale.authors, len(self.all_rows))))

    @property
    def unseen(self) -> Dataset:
        """The questions to forget with answers that no model has seen."""
        return unseen_answers(self.forget)

    @property
    def _forgotten(self) -> range:
        stop = self.scale.authors - (self.scale.forgotten if self.validation else 0)
        return range(FACTS * (stop - self.scale.forgotten), FACTS * stop)

    @property
    def base_passes(self) -> float:
        """Rows that pass forwards and backwards while the base is fine-tuned."""
        return self.scale.finetuning.finetune_epochs * (len(self.forget) + len(self.retain))

    @property
    def retraining_passes(self) -> float:
        """The same of fine-tuning on the rows to keep alone."""
        return self.scale.finetuning.finetune_epochs * len(self.retain)

    @cached_property
    def decoding(self) -> DiffusionGenerationConfig:
        """How answers are decoded: greedily."""
        length = longest_answer({"forget": self.forget, "retain": self.retain}, load_tokenizer(str(self.first)))
        return DiffusionGenerationConfig(max_new_tokens=length, steps=self.scale.decoding_steps, batch_size=64)

    @property
    def first(self) -> Path:
        """The model before fine-tuning."""
        return self.folder / ("before" if self.scale.earlier_authors else "random")

    @property
    def base(self) -> Path:
        """The model that knows all rows."""
        return self.folder / "base"

    @property
    def never(self) -> Path:
        """The model that was fine-tuned on the rows to keep alone."""
        return self.folder / "never-trained"

    def make_models(self) -> None:
        """Train what is not there yet."""
        scale, random = self.scale, self.folder / "random"
        if not (random / "config.json").is_file():
            rows = concatenate_datasets([self.retain, self.earlier]).select_columns(["question", "answer"])
            size = scale.finetuning
            tokenizer = train_tokenizer(dataset_texts(rows), size.vocab_size)
            if scale.layout == "dream":
                tokenizer.add_tokens("<|endoftext|>", special_tokens=True)  # its class adds it, if it is not there
            tokenizer.save_pretrained(random)
            model = tiny_mdlm(tokenizer, size.hidden_size, size.num_layers, HEADS, seed=42)
            in_layout(model, scale.layout).save_pretrained(random)
        if scale.earlier_authors:
            earlier = replace(scale.finetuning, finetune_epochs=scale.earlier_epochs)
            teach(random, self.first, self.earlier, earlier)
        both = concatenate_datasets(
            [part.select_columns(["question", "answer"]) for part in (self.forget, self.retain)]
        )
        teach(self.first, self.base, both, scale.finetuning)
        teach(self.first, self.never, self.retain, scale.finetuning)


@dataclass(frozen=True)
class TofuSplit(Split):
    """Real text: rows of TOFU, whose wrong answers are the unseen ones.

    Attributes:
        dataset_name: folder with TOFU's files, or its name on the Hub.
    """

    dataset_name: str = ""

    @cached_property
    def forget(self) -> Dataset:
        return load_split(self.dataset_name, "forget01_perturbed")

    @cached_property
    def retain(self) -> Dataset:
        return load_split(self.dataset_name, "retain_perturbed").select(range(KEPT_OF_TOFU))

    @cached_property
    def earlier(self) -> Dataset:
        return self.retain.select([])

    @property
    def unseen(self) -> Dataset:
        pairs = [(row["question"], wrong) for row in self.forget.to_list() for wrong in row["perturbed_answer"]]
        return Dataset.from_dict(dict(zip(("question", "answer"), map(list, zip(*pairs, strict=True)), strict=True)))


def in_layout(model: PreTrainedModel, layout: str | None) -> PreTrainedModel:
    """A model of `LAYOUTS` as large as this one, with its weights where both have them; the same model for None."""
    if layout is None:
        return model
    kind, config = LAYOUTS[layout]
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
        "eos_token_id",
        "pad_token_id",
        "mask_token_id",
    )
    other = kind(config(**{name: getattr(model.config, name) for name in names}))
    other.load_state_dict(model.state_dict(), strict=False)  # Qwen2's biases, which a Llama has not, are 0 at first
    return other


def teach(start: Path, folder: Path, rows: Dataset, args: FinetuningArguments) -> None:
    """Fine-tune a model on rows as a demo's base is, and save it in a folder, unless one lies there already."""
    if is_trained(folder):
        return
    config = finetune_config(folder, args, MDUConfig(str(folder), **QUIET), from_scratch=True)
    trainer = MDLMTrainer(
        load_model(str(start)),
        config,
        train_dataset=question_answer_rows(rows, conversational=True),
        processing_class=load_tokenizer(str(start)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, on the accelerator if there is one."""
    model, tokenizer = load_checkpoint(str(folder))
    model.to(torch.accelerator.current_accelerator() or "cpu")
    return model, tokenizer
