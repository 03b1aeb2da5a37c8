"""Checkpoints on disk: of each native family, and of the tiny model, with an adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from published import WRITE
from published_blocks import WRITE_BLOCKS

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.models import load_model
from mdu_trainer.testing import forget_retain_split


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder a family, and the tensors in it."""
    root = tmp_path_factory.mktemp("published")
    return {name: (root / name, write(root / name)) for name, write in (WRITE | WRITE_BLOCKS).items()}


@pytest.fixture
def batch():
    """Two rows of 10 tokens, the second with 3 of padding."""
    input_ids = torch.randint(0, 260, (2, 10), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones(2, 10, dtype=torch.long)
    attention_mask[1, 7:] = 0
    return input_ids, attention_mask


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    """A whole checkpoint, to be damaged."""
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter that was trained, with its base."""
    path = tmp_path / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(str(folder)), config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sets(authors):
    forget, retain = (question_answer_rows(rows, conversational=True) for rows in forget_retain_split(authors))
    return forget.select(range(4)), retain.select(range(4))


@pytest.fixture
def make_trainer(tokenizer, sets, tmp_path):
    def make(model, peft_config=None, **kwargs):
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        args = MDUConfig(str(tmp_path / "out"), **quiet | {"tau": 0.5, "max_steps": 1} | kwargs)
        return MDUTrainer(model, args, *sets, processing_class=tokenizer, peft_config=peft_config)

    return make
