"""Scoring during training: figures, stops, and training that goes on as if nothing were watching."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import warm
from datasets import Dataset

from mdu_trainer import DiffusionGenerationConfig, MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.callbacks import UnlearningEvalCallback
from mdu_trainer.data.rows import tokenize_rows
from mdu_trainer.evaluation.tofu import evaluate_tofu
from mdu_trainer.inference.likelihood import response_likelihood
from mdu_trainer.models import resolve_backbone
from mdu_trainer.testing import forget_retain_split

NAMES = [
    f"eval_{name}_{metric}"
    for name in ("forget", "retain")
    for metric in ("rougeL_recall", "rougeL_f1", "probability")
]
DECODING = DiffusionGenerationConfig(max_new_tokens=6, steps=2)


@pytest.fixture(scope="module")
def sets(authors):
    """Six rows to forget, ten to keep, as questions and answers."""
    forget, retain = forget_retain_split(authors)
    columns = ["question", "answer"]
    return forget.select(range(6)).select_columns(columns), retain.select(range(10)).select_columns(columns)


@pytest.fixture
def make_trainer(make_model, tokenizer, sets, tmp_path):
    def make(eval_dataset=None, rows=None, **kwargs):
        defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
        forget, retain = (question_answer_rows(rows, conversational=True) for rows in (rows or sets[0], sets[1]))
        return MDUTrainer(
            make_model(),
            MDUConfig(output_dir=str(tmp_path), **(defaults | quiet | kwargs)),
            forget,
            retain_dataset=retain,
            eval_dataset=eval_dataset(forget, retain) if eval_dataset else None,
            processing_class=tokenizer,
        )

    return make


@pytest.fixture
def watch(sets):
    def add(trainer, **kwargs):
        kwargs = {"retain": sets[1], "generation_config": DECODING, "num_draws": 2} | kwargs
        callback = UnlearningEvalCallback(trainer, sets[0], **kwargs)
        trainer.add_callback(callback)
        return callback

    return add


def logged(trainer):
    """Step -> figures of the callback."""
    return {log["step"]: log for log in trainer.state.log_history if NAMES[0] in log}


def test_figures_are_logged_and_are_those_of_the_weights(make_trainer, watch, sets):
    trainer = make_trainer()
    watch(trainer, every_steps=2)
    trainer.train()
    found = logged(trainer)
    assert list(found) == [2, 4] and all(name in found[4] for name in NAMES)
    parts = dict(zip(("forget", "retain"), sets, strict=True))
    run = evaluate_tofu(
        trainer.model, trainer.processing_class, parts, DECODING, metrics=["rougeL", "probability"], num_draws=2
    ).run
    for name in NAMES:
        _, part, metric = name.split("_", 2)
        assert found[4][name] == pytest.approx(run.scores[part][metric].value, rel=1e-5)


def test_training_is_not_disturbed(make_trainer, watch):
    plain, watched = make_trainer(), make_trainer()
    watch(watched, every_steps=1)
    for trainer in (plain, watched):
        trainer.train()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert watched.model.training == plain.model.training


def test_figures_join_the_trainers_evaluations(make_trainer, watch):
    trainer = make_trainer(
        eval_dataset=lambda forget, retain: {"some": forget.select(range(2)), "more": forget.select(range(2, 4))},
        eval_strategy="steps",
        eval_steps=2,
    )
    watch(trainer, metrics=["probability"])
    trainer.train()
    scored = [log["step"] for log in trainer.state.log_history if "eval_forget_probability" in log]
    assert scored.count(2) == scored.count(4) == 1  # once, however many data sets are evaluated


def test_best_model_by_a_figure_of_the_callback(make_trainer, watch):
    trainer = make_trainer(
        eval_dataset=lambda forget, retain: forget,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_forget_probability",
        greater_is_better=False,
    )
    watch(trainer)
    trainer.train()
    found = {step: log["eval_forget_probability"] for step, log in logged(trainer).items()}
    assert trainer.state.best_metric == pytest.approx(min(found.values()))
    assert trainer.evaluate()["eval_forget_probability"] == pytest.approx(min(found.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("limits", "reason", "silent"),
    [
        ({"stop_forget_below": 1.1, "stop_retain_below": -1}, "forgetting is reached", "retention is lost"),
        ({"stop_forget_below": -1, "stop_retain_below": 1.1}, "retention is lost", "forgetting is reached"),
    ],
)
def test_stops_and_says_why(make_trainer, watch, caplog, monkeypatch, limits, reason, silent):
    from transformers.utils import logging

    monkeypatch.setattr(logging._get_library_root_logger(), "propagate", True)
    monkeypatch.setattr(logging.get_logger("mdu_trainer"), "propagate", True)
    trainer = make_trainer()
    callback = watch(trainer, every_steps=1, **limits)
    trainer.train()
    assert trainer.state.global_step == 1
    assert reason in callback.stopped_because and silent not in callback.stopped_because
    assert "rougeL_recall = " in callback.stopped_because
    assert f"Training stops at step 1: {callback.stopped_because}" in caplog.text


def test_goes_on_within_the_limits(make_trainer, watch):
    trainer = make_trainer()
    callback = watch(trainer, every_steps=1, stop_forget_below=0, stop_retain_below=0, stop_metric="probability")
    trainer.train()
    assert trainer.state.global_step == 4 and callback.stopped_because is None


def test_forget_rows_alone(make_trainer, watch):
    trainer = make_trainer()
    watch(trainer, retain=None, every_steps=4)
    trainer.train()
    assert not any("retain_rougeL" in name for name in logged(trainer)[4])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"retain": None, "every_steps": 1, "stop_retain_below": 0.5}, "stop_retain_below = 0.5 needs retain rows"),
        (
            {"every_steps": 1, "stop_forget_at": "zero"},
            "stop_forget_at must be one of None, 'never-trained', got 'zero'",
        ),
        ({"every_steps": 1, "stop_forget_at": "never-trained"}, "the forget set has no column perturbed_answer"),
        (
            {"every_steps": 1, "stop_forget_at": "never-trained", "stop_forget_below": 0.1},
            "stop_forget_at = 'never-trained' and stop_forget_below = 0.1 name two ends",
        ),
        ({"every_steps": 0}, "every_steps must be at least 1, got 0"),
        ({}, "never evaluates"),
    ],
)
def test_settings_that_cannot_work(make_trainer, watch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        watch(make_trainer(), **kwargs)


def test_rows_and_metrics_that_do_not_fit(make_trainer, watch, sets):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="no column answer"):
        UnlearningEvalCallback(trainer, sets[0].remove_columns("answer"), every_steps=1)
    watch(trainer, every_steps=1, stop_forget_below=0.1, stop_metric="rouge")
    with pytest.raises(ValueError, match="there is no eval_forget_rouge; measured are eval_forget_rougeL_recall"):
        trainer.train()


def test_a_sharded_model_is_refused(make_trainer, watch):
    trainer = make_trainer()
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded"):
        watch(trainer, every_steps=1)


# The level of a model that never saw the rows


@pytest.fixture
def ranked(make_model, tokenizer, authors):
    """`ranked(place)`: rows whose true answer is, of four to the untrained model, the least (0) to most likely (3)."""

    def make(place):
        model, made = make_model(), []
        for row in forget_retain_split(authors)[0].select(range(6)).to_list():
            answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
            pairs = Dataset.from_dict({"question": [row["question"]] * 4, "answer": answers})
            backbone = resolve_backbone(model, tokenizer)
            encoded = tokenize_rows(question_answer_rows(pairs, conversational=True), tokenizer, backbone, name="test")
            found = response_likelihood(model, encoded.prompt_ids, encoded.completion_ids, backbone, num_draws=2)
            true = answers[np.argsort(found.per_token)[place]]
            wrong = [answer for answer in answers if answer != true]
            made.append({"question": row["question"], "answer": true, "perturbed_answer": wrong})
        return Dataset.from_list(made)

    return make


ASCENT = {"loss_type": "ga", "max_steps": 8, "learning_rate": 2e-3}


def test_stops_at_the_level_of_a_never_trained_model_and_not_before(make_trainer, ranked):
    rows = ranked(3)
    free, stopped = (make_trainer(rows=rows, **ASCENT) for _ in range(2))
    watching = {"metrics": ("probability",), "every_steps": 1, "num_draws": 2}
    free.add_callback(UnlearningEvalCallback(free, rows, **watching | {"metrics": ("true_rank",)}))
    free.train()
    ranks = [log["eval_forget_true_rank"] for log in free.state.log_history if "eval_forget_true_rank" in log]
    step = next(number for number, rank in enumerate(ranks, 1) if rank <= 0.5)
    assert 1 < step < 8 and min(ranks) < 0.5, "it would go on below"
    callback = UnlearningEvalCallback(stopped, rows, stop_forget_at="never-trained", **watching)
    stopped.add_callback(callback)
    stopped.train()
    logs = [log for log in stopped.state.log_history if "eval_forget_probability" in log]
    assert [log["eval_forget_true_rank"] for log in logs] == pytest.approx(ranks[:step])
    assert stopped.state.global_step == step
    assert callback.stopped_because == (
        "the level of a never-trained model is reached: true answers are no likelier than wrong ones "
        f"(eval_forget_true_rank = {ranks[step - 1]:.3f} <= 0.5)"
    )


def test_rows_below_the_level_stop_at_once_beside_a_limit_of_retention(make_trainer, ranked, sets):
    trainer = make_trainer(learning_rate=1e-5)
    limits = {"stop_forget_at": "never-trained", "stop_retain_below": 1.1, "stop_metric": "probability"}
    callback = UnlearningEvalCallback(
        trainer,
        ranked(0),
        sets[1],
        DECODING,
        metrics=("probability", "true_rank"),
        every_steps=1,
        num_draws=2,
        **limits,
    )
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 1 and callback.metrics == ("probability", "true_rank")
    assert "never-trained" in callback.stopped_because and "; retention is lost" in callback.stopped_because


def test_measuring_the_level_does_not_disturb(make_trainer, ranked):
    plain, watched = (make_trainer(learning_rate=1e-4) for _ in range(2))
    callback = UnlearningEvalCallback(
        watched, ranked(3), metrics=("probability",), every_steps=1, num_draws=2, stop_forget_at="never-trained"
    )
    watched.add_callback(callback)
    for trainer in (plain, watched):
        trainer.train()
    assert watched.state.global_step == 4 and callback.stopped_because is None
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    callback.score()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


SCRIPT = """\
import json, os, sys
from mdu_trainer import DiffusionGenerationConfig, MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.callbacks import UnlearningEvalCallback
from mdu_trainer.testing import dataset_texts, fictional_authors, forget_retain_split, tiny_mdlm, train_tokenizer

output, batch_size = sys.argv[1], int(sys.argv[2])
authors = fictional_authors()
tokenizer = train_tokenizer(dataset_texts(authors))
# eight rows: two processes share them evenly, where accelerate would repeat one of seven
forget, retain = (
    part.select(range(8)).select_columns(["question", "answer"]) for part in forget_retain_split(authors)
)
args = MDUConfig(
    output_dir=output, max_steps=6, per_device_train_batch_size=batch_size, learning_rate=3e-3, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no", retain_weight=0, loss_type="ga",
)
model = tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
trainer = MDUTrainer(
    model, args, question_answer_rows(forget, conversational=True), processing_class=tokenizer
)
callback = UnlearningEvalCallback(
    trainer, forget, retain, DiffusionGenerationConfig(max_new_tokens=4, batch_size=2), every_steps=1, num_draws=2,
    stop_forget_below=float(sys.argv[3]), stop_metric="probability",
)
trainer.add_callback(callback)
trainer.train()
rank = os.environ.get("RANK", "0")
with open(f"{output}/{rank}.json", "w") as file:
    figures = [log for log in trainer.state.log_history if "eval_forget_probability" in log]
    json.dump({"step": trainer.state.global_step, "why": callback.stopped_because, "figures": figures}, file)
"""


def run_script(script, folder, num_processes, batch_size, limit):
    folder.mkdir()
    done = warm.run_together([sys.executable, script, folder, batch_size, limit], cwd=folder, number=num_processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


def test_all_processes_stop_together_as_one_would(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (free,) = run_script(script, tmp_path / "free", 1, 2, -1)
    figures = [log["eval_forget_probability"] for log in free["figures"]]
    assert len(figures) == 6 and free["why"] is None
    limit = (figures[2] + min(figures[:2])) / 2  # passed at the third step
    assert figures[2] < limit < min(figures[:2])
    first, second = run_script(script, tmp_path / "two", 2, 1, limit)
    assert first["step"] == second["step"] == 3 and first["why"] == second["why"]
    together = [log["eval_forget_probability"] for log in first["figures"]]
    assert together == pytest.approx(figures[:3], rel=1e-3)
