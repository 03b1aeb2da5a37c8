"""Secrets among the settings are written nowhere, and what is derived from the rows is its owner's alone."""

import stat
from dataclasses import replace
from pathlib import Path

from mdu_trainer import MDUConfig
from mdu_trainer.commands.options import settings
from mdu_trainer.evaluation.progress import ProgressFile
from mdu_trainer.files import without_secrets
from mdu_trainer.provenance.facts import Facts

ROOT = Path(__file__).resolve().parents[2]


def test_secrets_in_facts_are_dropped(trainer, tmp_path):
    facts = replace(
        trainer.provenance.facts(trainer), description=f"as {SECRETS[0]}", options={"api_key": "x", "beta": 1}
    )
    facts.save(tmp_path)
    assert Facts.load(tmp_path).description is None and Facts.load(tmp_path).options == {"beta": 1}


SECRETS = [
    "hf_" + "aB3" * 11,
    "sk-proj-" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "A1b2" * 10,
    "AKIA" + "ABCD1234EFGH5678",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    "Authorization: Bearer abcdef0123456789",
    "https://user:secret@host.invalid/x",
    "-----BEGIN RSA PRIVATE KEY-----",
    "glpat-abcdefghij0123456789",
    "xoxb-123456789012-abcdef",
]


def test_secrets_are_dropped_at_any_depth():
    for secret in SECRETS:
        deep = {"a": [{"b": {"note": f"see {secret}", "kept": 1}}, (secret, "kept")], secret: 1, "c": "kept"}
        assert without_secrets(deep) == {"a": [{"b": {"kept": 1}}, ("kept",)], "c": "kept"}
        assert without_secrets(secret) is None
    names = ("token", "hub_token", "HF_TOKEN", "use_auth_token", "api_key", "apiKey", "X-Api-Key", "wandb_api_key")
    for name in (*names, "password", "aws_secret_access_key", "Authorization", "client_secret", "accessToken"):
        assert without_secrets({"model_init_kwargs": {"deep": {name: "plain"}}}) == {"model_init_kwargs": {"deep": {}}}
    harmless = {
        "pad_token": "<pad>",
        "mask_token": "[MASK]",
        "max_new_tokens": 8,
        "include_num_input_tokens_seen": True,
    }
    harmless |= {
        "path": "data/hf_datasets/sk-learn",
        "tokenizer": "x",
        "author": "y",
        "url": "https://host.invalid/a@b",
    }
    assert without_secrets(harmless) == harmless


def test_settings_of_the_scripts_hold_no_secret(tmp_path):
    nested = {"token": "plain", "revision": "main", "headers": {"x": SECRETS[0]}}
    config = MDUConfig(str(tmp_path), hub_token="plain", model_init_kwargs=nested, use_cpu=True)
    chosen = settings(config)
    assert chosen["model_init_kwargs"] == {"revision": "main", "headers": {}} and "hub_token" not in chosen
    assert chosen["use_cpu"] is True


def test_progress_is_for_its_owner_alone(tmp_path):
    with ProgressFile(tmp_path / "progress.jsonl") as progress:
        progress.resume({"progress": 1}, dict)
        progress.append([{"row": 0}])
    assert stat.S_IMODE((tmp_path / "progress.jsonl").stat().st_mode) == 0o600
