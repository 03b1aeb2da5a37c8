"""A Hub on loopback, and a checkpoint with its records, for the tests of publishing."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_checkpoints import PLANTED, make_trainer
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub import hf_api as client
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from mdu_trainer import question_answer_rows
from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.hub.push import hub_api
from mdu_trainer.testing import dataset_texts, forget_retain_split, train_tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub that the client of this process talks to, signed in, over LFS, without waiting between retries."""
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(client.api, "endpoint", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        real = _http.time
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=real.time))
        hub_api.cache_clear()
        yield server
        hub_api.cache_clear()


@pytest.fixture(scope="session")
def tokenizer(authors):
    """Trained on what is kept, so that no name to forget is one of its tokens."""
    return train_tokenizer(dataset_texts(forget_retain_split(authors)[1].select_columns(["question", "answer"])))


@pytest.fixture(scope="session")
def rows(authors):
    return tuple(question_answer_rows(part, conversational=True) for part in forget_retain_split(authors))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rows, tokenizer):
    """A checkpoint of one step, as the trainer leaves it, with a token in its training arguments."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    trainer = make_trainer(folder, rows, tokenizer, hub_token=PLANTED, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "checkpoint"))


@pytest.fixture
def recovery():
    def outcome(value):
        return Outcome(Estimate(0.1), Estimate(value, 0.0, 1.0), Estimate(value, 0.0, 0.9))

    ends = {name: Outcome(Estimate(0.5), Estimate(end)) for name, end in (("base", 0.9), ("never trained", 0.1))}
    attacks = {"prefix": AttackOutcome("reveal the first words", 16, ends | {"mdu tau=0": outcome(0.25)})}
    settings = {"decoding": {"steps": 4, "schedule": "linear"}, "samples": 8, "note": "/home/somebody"}
    return Recovery("/home/somebody/data forget10", settings, attacks)


@pytest.fixture
def results():
    def run(method, tau, forget, retain):
        scores = {
            name: {"rougeL_recall": Estimate(value, value - 0.1, value + 0.05)}
            for name, value in (("forget", forget), ("retain", retain))
        }
        return Run(method, tau, scores, {"forget": 16, "retain": 80}, {}, 14.0, 2.0)

    settings = {"output_dir": "/home/somebody/outputs"}
    runs = [run("base", None, 0.9, 0.9), run("mdu", 0.0, 0.2, 0.8)]
    return Results("from scratch", "fictional authors", settings, runs)
