"""Token roles watched in training, and the script that compares models."""

import sys
from pathlib import Path as FilePath

import pytest
import torch
import warm

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.callbacks import TokenRoleCallback
from mdu_trainer.data.roles import ROLES
from mdu_trainer.testing import forget_retain_split
from mdu_trainer.token_roles.measure import role_data
from mdu_trainer.token_roles.paths import by_row, measure_paths, true_paths
from mdu_trainer.token_roles.results import RoleReport


@pytest.fixture
def make_trainer(make_model, tokenizer, sets, tmp_path):
    def make(**kwargs):
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
        quick = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
        forget, retain = (question_answer_rows(rows, conversational=True) for rows in sets)
        return MDUTrainer(
            make_model(attention_dropout=0.1),
            MDUConfig(output_dir=str(tmp_path), tau=0.5, **(quiet | quick | kwargs)),
            forget,
            retain_dataset=retain,
            eval_dataset=forget,
            processing_class=tokenizer,
        )

    return make


NAMES = [f"eval_forget_{figure}_{role}" for figure in ("kl", "entropy", "probability") for role in ROLES]


def test_logged_names_and_figures(make_trainer, sets, backbone):
    trainer = make_trainer()
    callback = TokenRoleCallback(trainer, sets[0], sets[1], every_steps=2)
    trainer.add_callback(callback)
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if NAMES[0] in log}
    assert list(logs) == [2, 4]
    retained = [name.replace("forget", "retain") for name in NAMES]
    assert {name for name in logs[4] if name.startswith("eval_")} == {*NAMES, *retained}
    data = role_data(sets[0], trainer.processing_class, trainer.backbone, sets[1])
    paths = true_paths(data.prompt_ids, data.completion_ids, data.roles)
    kl = measure_paths(trainer.model, paths, trainer.backbone, num_steps=4)["kl"]
    for role in ROLES:
        assert logs[4][f"eval_forget_kl_{role}"] == pytest.approx(by_row(kl, paths, role).mean(), rel=1e-4)
    assert logs[2] != logs[4]


def test_training_is_not_disturbed(make_trainer, sets):
    plain, watched = make_trainer(), make_trainer()
    watched.add_callback(TokenRoleCallback(watched, sets[0], every_steps=1))
    for trainer in (plain, watched):
        torch.manual_seed(0)  # of the dropout, which a callback that draws would change
        trainer.train()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert watched.model.training == plain.model.training


def test_figures_join_the_trainers_evaluations(make_trainer, sets):
    trainer = make_trainer(eval_strategy="steps", eval_steps=2)
    trainer.add_callback(TokenRoleCallback(trainer, sets[0]))
    assert set(NAMES) <= set(trainer.evaluate())


def test_callback_that_cannot_work(make_trainer, sets):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="never evaluates"):
        TokenRoleCallback(trainer, sets[0])
    with pytest.raises(ValueError, match="no column answer"):
        TokenRoleCallback(trainer, sets[0].remove_columns("answer"), every_steps=1)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded"):
        TokenRoleCallback(trainer, sets[0], every_steps=1)


def script(*arguments, expect=0):
    root = FilePath(__file__).resolve().parents[2]
    run = warm.run([sys.executable, root / "examples" / "roles.py", *arguments], cwd=root, timeout=120)
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout + run.stderr


def test_script(make_model, tokenizer, tmp_path, authors):
    for seed, name in enumerate(("base", "after")):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    models = ("--base", tmp_path / "base", "--model", tmp_path / "after")
    quick = ("--max_eval_rows", 2, "--num_steps", 2, "--num_paths", 1, "--output_dir", out)
    log = script(*models, *quick)
    report = RoleReport.load(out / "roles.json")
    assert report.details() in log and [run.name for run in report.runs] == ["base", "after"]
    pictures = {"roles.png", "roles.svg", "path.png", "decoding.png", "heatmap.png"}
    assert {path.name for path in out.iterdir()} == pictures | {"roles.json"}
    forget = forget_retain_split(authors)[0]
    assert not any(name in log for name in forget["answer"][0].split()[:2])
    before = (out / "heatmap.png").read_bytes()
    shown = script(*models, *quick, "--show_forget_text")
    assert all(name in shown for name in forget["answer"][0].split()[:2])
    assert RoleReport.load(out / "roles.json") == report and (out / "heatmap.png").read_bytes() != before


def test_script_refuses_before_a_model_is_loaded(tmp_path):
    missing = ("--base", tmp_path / "no", "--output_dir", tmp_path / "out")
    twice = script(*missing, "--model", tmp_path / "x", tmp_path / "x", expect=2)
    assert "--model_name_or_path names value 2 twice" in twice and not (tmp_path / "out").exists()
