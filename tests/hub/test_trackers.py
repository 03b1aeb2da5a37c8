"""Trackers: no Space that nobody asked for, no checkpoint, and nothing of the rows to forget, by a recorder."""

import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hub_checkpoints import FULL, REPO, forget_text, make_trainer
from hub_server import TOKEN
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback

from mdu_trainer import MDUConfig
from mdu_trainer.config.trackers import SPACE, UPLOADS
from mdu_trainer.files import UserError

PUBLISHED = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN}


@pytest.fixture
def client(monkeypatch):
    """What stands for the clients of trackio and W&B, and keeps every call."""
    recorder = MagicMock(name="client", __version__="1.0.0", Run=None)
    recorder.context_vars = SimpleNamespace(
        current_space_id=SimpleNamespace(get=lambda: None), current_project=SimpleNamespace(get=lambda: "p")
    )
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = ValueError
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, recorder)
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    return recorder


def config(tmp_path, **options):
    return MDUConfig(str(tmp_path / "out"), use_cpu=True, **options)


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker_gets_figures_and_settings_alone(hub, rows, tokenizer, client, tmp_path, tracker, monkeypatch):
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    options = PUBLISHED | ({"trackio_static_space_id": False} if tracker == "trackio" else {})
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, report_to=tracker, logging_steps=1, **options)
    trainer.train()
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == FULL - {"results.json", "tradeoff.png"}, "the list, and nothing else"
    assert set(hub.repos) == {REPO}
    calls = str(client.mock_calls)
    assert "forget_loss" in calls and "learning_rate" in calls, "it was told something"
    assert TOKEN not in calls and not trainer.provenance.hashes().found_in(calls), "and no sentence of any row"
    assert not client.sync.called and not client.freeze.called and not client.Artifact.called
    logged = [value for call in client.log.call_args_list for value in call.args[0].values()]
    assert logged and all(isinstance(value, int | float) for value in logged)


@pytest.mark.parametrize(
    "options, message",
    [
        (PUBLISHED, "would publish a dashboard"),
        (PUBLISHED | {"hub_private_repo": True}, "would publish a dashboard"),
        ({"trackio_static_space_id": "org/space"}, "'org/space' would be a Space that everybody can see"),
        (PUBLISHED | {"trackio_static_space_id": "org/space", "hub_private_repo": False}, "everybody can see"),
        ({"trackio_space_id": "org/live"}, "trackio_space_id = 'org/live' .* everybody can see"),
    ],
)
def test_a_space_is_made_by_name_and_privately_or_not_at_all(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, report_to="trackio", **options)
    assert config(tmp_path, report_to="none", **options), "no tracker, no Space"


def test_a_space_that_is_asked_for(tmp_path, monkeypatch):
    named = config(tmp_path, report_to="trackio", trackio_static_space_id="org/s", hub_private_repo=True, **PUBLISHED)
    assert named.trackio_static_space_id == "org/s"
    assert config(tmp_path, report_to="trackio").trackio_static_space_id is False, "a later push makes none"
    assert config(tmp_path, report_to="trackio", trackio_static_space_id="False").trackio_static_space_id is False
    monkeypatch.setenv(SPACE, "org/live")
    with pytest.raises(UserError, match="trackio_space_id = 'org/live'"):
        config(tmp_path, report_to="trackio")


@pytest.mark.parametrize("tracker", UPLOADS)
def test_checkpoints_are_not_uploaded_past_the_list(tmp_path, monkeypatch, tracker):
    variable, unset = UPLOADS[tracker]
    for value in ("true", "checkpoint", "1"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=f"report_to '{tracker}' would upload checkpoints .* {variable}=false"):
            config(tmp_path, report_to=tracker)
        assert config(tmp_path, report_to="none")
    monkeypatch.setenv(variable, "false")
    assert config(tmp_path, report_to=tracker)
    monkeypatch.delenv(variable)
    if unset == "TRUE":
        with pytest.raises(UserError, match=variable):
            config(tmp_path, report_to=tracker)
    with pytest.raises(UserError, match="'flyte' would upload checkpoints .* Leave flyte out"):
        config(tmp_path, report_to="flyte")


@pytest.mark.parametrize("where", ["run_name", "project", "output_dir", "lr_scheduler_kwargs", "eval set", "config"])
def test_words_of_the_rows_go_into_no_name_and_no_setting(rows, tokenizer, client, tmp_path, where):
    sentence = forget_text(rows)
    kept = str(rows[1].to_list())
    word = next(word for word in sentence.split() if word.istitle() and word not in kept)
    options = {
        "run_name": {"run_name": f"forgets-{word}"},
        "project": {"project": word.lower()},
        "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"note": [sentence]}, "lr_scheduler_type": "linear"},
    }.get(where, {})
    folder = tmp_path / (word if where == "output_dir" else "out")
    trainer = make_trainer(folder, rows, tokenizer, report_to="wandb", **options)
    if where == "eval set":
        trainer.eval_dataset = {word: trainer.train_dataset}
    if where == "config":
        trainer.model.config.note = {"about": sentence}
    with pytest.raises(UserError, match="would tell wandb something of the rows to forget") as failure:
        trainer.train()
    assert where.split(" ")[-1] in str(failure.value) and word not in str(failure.value) + str(client.mock_calls)


def test_trackers_that_are_passed_as_callbacks(rows, tokenizer, client, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out", rows, tokenizer)
    trainer.add_callback(TrackioCallback())
    trainer.args.trackio_space_id = "org/live"
    with pytest.raises(UserError, match="everybody can see"):
        trainer.train()
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    other = make_trainer(tmp_path / "other", rows, tokenizer)
    other.add_callback(WandbCallback())
    with pytest.raises(UserError, match="WANDB_LOG_MODEL"):
        other.train()
    assert not client.mock_calls


def test_secrets_in_options_are_not_told(tmp_path):
    args = config(tmp_path, model_init_kwargs={"token": "hf_plantedInTheOptions1", "revision": "main"})
    assert args.to_dict()["model_init_kwargs"] == {"revision": "main"}
    assert args.load_options["token"] == "hf_plantedInTheOptions1", "the run itself keeps it"
