"""Somebody else's objective, metric, attack and benchmark: registered from outside, and seen everywhere."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from mdu_trainer import (
    ATTACKS,
    Attack,
    AttackSettings,
    Benchmark,
    DiffusionGenerationConfig,
    MDUConfig,
    MDUTrainer,
    Metric,
    Objective,
    evaluate_tofu,
    question_answer_rows,
    register_attack,
    register_benchmark,
    register_metric,
    register_objective,
    run_attacks,
    write_page,
)
from mdu_trainer.attacks import AttackScores, choose_attacks, prefix
from mdu_trainer.attacks.base import worst_case
from mdu_trainer.evaluation.registry import BENCHMARKS, METRICS, BenchmarkOptions
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.files import UserError
from mdu_trainer.objectives import OBJECTIVES, diffusion_bound
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.model_card import unlearned_model_card

ROOT = Path(__file__).resolve().parents[1]
DECODING = DiffusionGenerationConfig(max_new_tokens=40, steps=2)


@pytest.fixture(autouse=True)
def registries():
    """What is registered in a test is gone after it."""
    kept = [(registry, dict(registry)) for registry in (OBJECTIVES, METRICS, ATTACKS, BENCHMARKS)]
    yield
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


# What somebody else writes


def add_objective():
    def damped(terms, *, power):
        return (1 + diffusion_bound(terms.nll, terms.batch_index, terms.weight)) ** -power

    words = "The bound of the pairs to forget was raised, less and less."
    register_objective(
        "damped", Objective(damped, title="Damped ascent", words=words, formula="B^{-p}", options={"power": 0.5})
    )


def add_metric():
    def brevity(batch):
        return {"brevity": [1 / (1 + len(text)) for text in batch.texts]}

    words = {"brevity": "how `short` answers are"}
    register_metric("brevity", Metric(brevity, words=words, titles={"brevity": "brev."}))


def add_attack():
    def shouting(target, seed):
        questions = target.encode([text.upper() for text in target.rows["question"]])
        return worst_case(target, {"upper case": target.score(target.decode([one.prompt for one in questions]))})

    register_attack("shouting", Attack(shouting, "ask in capital letters"))


def add_benchmark():
    def load(options):
        return {"riddles": Dataset.from_dict({"question": ["What has keys but no locks?"], "answer": ["A piano."]})}

    def evaluate(model, tokenizer, sets, options):
        run = evaluate_tofu(model, tokenizer, {"forget": sets["riddles"]}, metrics=["rougeL"]).run
        scores = {"riddles": {"solved": run.scores["forget"]["rougeL_recall"]}}
        return Run("model", None, scores, {"riddles": 1}, {"wit": Estimate(0.25)})

    register_benchmark("riddles", Benchmark(load, evaluate, words={"wit": "how witty the model is"}))


# Where it is seen


@pytest.fixture
def model(make_model):
    return make_model(initializer_range=0.2)


@pytest.fixture
def facts():
    return Facts.load(ROOT / "tests" / "demo_card")


def page(folder: Path, facts: Facts, results: Results) -> str:
    facts.save(folder / "model")
    (folder / "model" / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    results.save(folder / "results.json")
    return write_page(folder).read_text()


def test_objective(tmp_path, make_model, tokenizer, authors, facts):
    add_objective()
    config = {"loss_type": "damped", "loss_options": {"power": 1.0}, "retain_weight": 0, "use_cpu": True}
    args = MDUConfig(str(tmp_path / "run"), max_steps=1, report_to="none", save_strategy="no", **config)
    rows = question_answer_rows(authors.select(range(4)), conversational=bool(tokenizer.chat_template))
    trainer = MDUTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    with pytest.raises(UserError, match="'damped' has no option speed; it has power"):
        MDUConfig(str(tmp_path), loss_type="damped", loss_options={"speed": 1})

    (tmp_path / "page" / "model").mkdir(parents=True)
    facts = replace(facts, method="damped", tau=None, options={"power": 1.0, "retain_weight": 0.0})
    results = Results("m", "d", {}, [Run(name, None, {}, {}, {"wit": Estimate(0.5)}) for name in ("base", "damped")])
    card, shown = str(unlearned_model_card(facts, results)), page(tmp_path / "page", facts, results)
    for text in (card, shown):
        assert "Damped ascent" in text and OBJECTIVES["damped"].words in text and "power=1" in text
    assert "$$B^{-p}$$" in card


def test_metric(tmp_path, model, tokenizer, authors, facts):
    add_metric()
    sets = {name: authors.select([row]) for row, name in enumerate(("forget", "retain"))}
    runs = [
        evaluate_tofu(model, tokenizer, sets, DECODING, metrics=["rougeL", "brevity"], method="base").run,
        replace(Run("mdu", 0.0, {}, {}), scores={"forget": {"brevity": Estimate(0.123)}}, rows={"forget": 1}),
    ]
    results = Results("m", "d", {}, runs)
    header, _, base, ours = results.table().splitlines()
    assert "| forget brev. | retain brev. |" in header and "0.123" in ours and "0.123" not in base
    assert "| forget | brevity" in results.details()
    (tmp_path / "model").mkdir()
    card, shown = str(unlearned_model_card(facts, results)), page(tmp_path, facts, results)
    assert "how `short` answers are" in card and "| brevity" in card
    assert "how short answers are" in shown and "0.123" in shown


def test_attack(model, tokenizer, authors, facts, tmp_path):
    add_attack()
    settings = AttackSettings(decoding=DECODING)
    attacks = choose_attacks(["shouting"], settings)

    def load():
        return model, tokenizer

    recovery = run_attacks({"mdu tau=0": load}, load, load, authors.select(range(2)), settings, attacks)
    assert "| shouting" in recovery.table()
    assert list(recovery.attacks["shouting"].models["base"].path) == ["upper case"]
    (tmp_path / "model").mkdir()
    recovery.save(tmp_path / "recovery.json")
    results = Results("m", "d", {}, [Run("base", None, {}, {}), Run("mdu", 0.0, {}, {})])
    card, shown = str(unlearned_model_card(facts, recovery=recovery)), page(tmp_path, facts, results)
    assert "| shouting | ask in capital letters" in card and "shouting" in shown


def test_benchmark(model, tokenizer, facts, tmp_path, monkeypatch, capsys):
    add_benchmark()
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "mdu")
    script, output = ROOT / "examples" / "score.py", tmp_path / "scored"
    options = {"model_name_or_path": tmp_path / "mdu", "benchmark": "riddles", "output_dir": output}
    monkeypatch.setattr(sys, "argv", [str(script), *(f"--{name}={value}" for name, value in options.items())])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and "riddles" in capsys.readouterr().out
    results = Results.load(output / "results.json")
    assert results.dataset == "riddles" and results.runs[0].name == "mdu"
    assert results.runs[0].figure("riddles", "solved") and results.runs[0].figure(None, "wit").value == 0.25

    (output / "model").mkdir()
    results.runs[:] = [replace(results.runs[0], method="base"), replace(results.runs[0], tau=0.0)]
    card, shown = str(unlearned_model_card(facts, results)), page(output, facts, results)
    assert "| riddles | solved" in results.details() and "| riddles | solved" in card
    assert "how witty the model is" in card and "how witty the model is" in shown


# What is refused


@pytest.mark.parametrize(
    "register, name, entry",
    [
        (register_objective, "ga", Objective(diffusion_bound, title="")),
        (register_metric, "rougeL", Metric(lambda batch: {})),
        (register_attack, "prefix", Attack(prefix.attack, "")),
        (register_attack, "none", Attack(prefix.attack, "")),
        (register_benchmark, "tofu", Benchmark(dict, dict)),
    ],
)
def test_a_name_that_is_taken_is_refused(register, name, entry):
    before = [dict(registry) for registry in (OBJECTIVES, METRICS, ATTACKS, BENCHMARKS)]
    with pytest.raises(UserError, match=f"There is an? .*'{name}' already. Choose another name"):
        register(name, entry)
    assert before == [OBJECTIVES, METRICS, ATTACKS, BENCHMARKS]


def test_a_score_has_one_meaning(model, tokenizer, authors):
    with pytest.raises(UserError, match="metric 'mine' explains probability, a score of another one already"):
        register_metric("mine", Metric(lambda batch: {}, words={"probability": "another"}))
    with pytest.raises(UserError, match="benchmark 'mine' explains model_utility"):
        register_benchmark("mine", Benchmark(dict, dict, words={"model_utility": "another"}))
    add_metric()
    with pytest.raises(UserError, match="Columns are called brev. already: give 'mine' other titles"):
        register_metric("mine", Metric(lambda batch: {}, titles={"other": "brev."}))
    register_metric("again", Metric(METRICS["brevity"].compute))
    register_metric("short", Metric(lambda batch: {"half": [1.0]}))
    rows = {"forget": authors.select(range(2))}
    with pytest.raises(UserError, match="Two metrics of the forget set give 'brevity', one of them 'again'"):
        evaluate_tofu(model, tokenizer, rows, DECODING, metrics=["brevity", "again"])
    with pytest.raises(UserError, match="'short' gives 1 values of 'half' for 2 rows"):
        evaluate_tofu(model, tokenizer, rows, DECODING, metrics=["short"])


def test_scores_of_an_attack_are_two_a_row():
    with pytest.raises(UserError, match="each row that it scored: 2 rows, 2 and 1 scores"):
        AttackScores([0, 1], [0.5, 0.5], [0.5])


def test_attacks_are_functions_that_can_be_looked_up():
    assert ATTACKS["prefix"].run is prefix.attack


def test_a_log_of_truth_ratios_is_none_of_rwku(tmp_path):
    with pytest.raises(UserError, match="retain_log is for the truth ratios of TOFU"):
        BENCHMARKS["rwku"].load(BenchmarkOptions(dataset_name=str(tmp_path), retain_log="truth_ratios.json"))
