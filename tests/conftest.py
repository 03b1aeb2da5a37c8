"""Tiny models and texts built offline; nothing here reaches the network."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads: one a worker, or workers fight for cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from mdu_trainer.models import Backbone, resolve_backbone  # noqa: E402
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every library has been imported by now."""
    import frozen  # noqa: F401


@pytest.fixture(scope="session")
def authors() -> Dataset:
    """Twelve fictional authors, 96 question-answer pairs. Shared: do not change it."""
    return fictional_authors()


@pytest.fixture(scope="session")
def tokenizer(authors: Dataset) -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded default. Shared: do not change it."""
    return train_tokenizer(dataset_texts(authors))


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """`make_model(**kwargs)`: a fresh untrained model (hidden 32, 2 layers); arguments are those of `tiny_mdlm`."""

    def make(**kwargs) -> LlamaForCausalLM:
        return tiny_mdlm(tokenizer, **({"hidden_size": 32, "num_layers": 2, "num_heads": 2} | kwargs))

    return make


@pytest.fixture
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """An untrained model, sharper than usual, so that no two choices are as close as rounding."""
    return make_model(max_position_embeddings=64, initializer_range=0.2)


@pytest.fixture
def backbone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Backbone:
    """The facts of `model`."""
    return resolve_backbone(model, tokenizer)


@pytest.fixture(scope="session")
def tofu_path() -> Path:
    """The folder of a local copy of TOFU (`locuslab/TOFU`), or the test is skipped."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "tofu"
    path = Path(os.environ.get("MDU_TOFU_PATH", beside))
    if not (path / "README.md").is_file():
        pytest.skip("needs a local copy of the TOFU data set in MDU_TOFU_PATH or ../shared/tofu")
    return path
