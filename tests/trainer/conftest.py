"""Trainers of tiny models on fictional rows."""

import logging

import pytest
import torch
from runs import QUIET

from mdu_trainer import MDLMConfig, MDUConfig, MDUTrainer
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.testing import forget_retain_split


@pytest.fixture(scope="module")
def sets(authors):
    """Eight rows to forget, twenty to keep."""
    forget, retain = forget_retain_split(authors)
    forget = question_answer_rows(forget, conversational=True, preferred="refusal")
    return forget.select(range(8)), question_answer_rows(retain, conversational=True).select(range(20))


@pytest.fixture
def make_speaker(make_model, tokenizer, sets):
    """`make_speaker()`: a model without training that is sure of some tokens of the answers to forget."""

    def make(**kwargs):
        model, answers = make_model(**kwargs), [row["completion"][0]["content"] for row in sets[0]]
        tokens = sorted({token for answer in answers for token in tokenizer(answer)["input_ids"]})
        with torch.no_grad():
            model.lm_head.weight[tokens[::2]] *= 10
        return model

    return make


@pytest.fixture
def save_other(make_model, tokenizer, tmp_path):
    """`save_other(dtype, **kwargs)`: the folder of another checkpoint of the same vocabulary."""

    def save(dtype=torch.float32, processing_class=tokenizer, **kwargs):
        folder = tmp_path / "other"
        make_model(**({"seed": 7} | kwargs)).to(dtype).save_pretrained(folder)
        processing_class.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def make_trainer(make_model, tokenizer, sets, tmp_path):
    def make(model=None, forget=sets[0], retain=sets[1], cls=MDUTrainer, **kwargs):
        config = MDUConfig if cls is MDUTrainer else MDLMConfig
        passed = {k: kwargs.pop(k) for k in ("peft_config", "eval_dataset", "callbacks") if k in kwargs}
        defaults = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "save_strategy": "no",
            **QUIET,
        }
        args = config(output_dir=str(tmp_path), **(defaults | kwargs))
        if cls is MDUTrainer and args.retain_weight:
            passed["retain_dataset"] = retain
        return cls(make_model() if model is None else model, args, forget, processing_class=tokenizer, **passed)

    return make


@pytest.fixture(autouse=True)
def seen(caplog, monkeypatch):
    """What the library logs."""
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    return caplog
