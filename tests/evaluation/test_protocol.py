"""Figures by the protocol of the paper's release, by hand; no two protocols are mixed; rL is what was asked for."""

import json
from collections import Counter
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from datasets import Dataset

from mdu_trainer.commands.scoring import Scorer, ScoringArguments
from mdu_trainer.data.rows import question_answer_rows, tokenize_rows
from mdu_trainer.evaluation.frontier import frontier_cells, reading, select
from mdu_trainer.evaluation.protocol import DECODED, MMLU_ROWS
from mdu_trainer.evaluation.registry import choose_metrics
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.evaluation.rwku import evaluate_rwku, load_rwku
from mdu_trainer.evaluation.rwku_questions import CONFIGS, config_of
from mdu_trainer.evaluation.scoring import Question, QuestionBatch, QuestionSet
from mdu_trainer.evaluation.tofu import TruthRatios, evaluate_tofu
from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids
from mdu_trainer.inference.likelihood import response_likelihood
from mdu_trainer.report import page
from mdu_trainer.report.plots import plot_tradeoff
from mdu_trainer.report.verdicts import verdicts

DECODING = DiffusionGenerationConfig(max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def sets(authors):
    rows = [row | {"perturbed_answer": [*row["perturbed_answer"], "a fourth."]} for row in authors.to_list()[:4]]
    return {"forget": Dataset.from_list(rows)}


@pytest.fixture
def prompts(sets, tokenizer, backbone):
    rows = question_answer_rows(sets["forget"], conversational=True)
    return tokenize_rows(rows, tokenizer, backbone, name="test").prompt_ids


def test_what_stands_after_the_end_token_counts(model, tokenizer, backbone, prompts):
    """With a token for an end token that stands in the middle of what this model decodes."""
    whole = generate_ids(model, prompts, DECODING, backbone, past_end=True)
    assert [len(ids) for ids in whole] == [6] * 4
    middle = Counter(token for ids in whole for token in ids[1:4]).most_common(1)[0][0]
    ended = replace(backbone, end_token_ids=(*backbone.end_token_ids, middle))
    assert generate_ids(model, prompts, DECODING, ended, past_end=True) == whole
    cut = [ids[: min([ids.index(end) for end in ended.end_token_ids if end in ids], default=6)] for ids in whole]
    assert cut != whole
    questions = [Question(ids, ("a",), {}) for ids in prompts]
    for protocol, written in (("ours", cut), ("release", whole)):
        part = QuestionSet("forget", questions, choose_metrics(["rougeL", "degeneracy"]), DECODING, 2, protocol)
        batch = QuestionBatch(model, tokenizer, ended, part, range(4))
        assert batch.texts == tokenizer.batch_decode(written, skip_special_tokens=True) and batch.decoded == cut


def test_probability_and_truth_ratio_of_the_release_by_hand(model, tokenizer, backbone, sets, prompts):
    def per_token(texts):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return response_likelihood(model, prompts, ids, backbone, num_draws=4).per_token

    rows = sets["forget"]
    metrics = ["probability", "truth_ratio"]
    result = evaluate_tofu(model, tokenizer, sets, DECODING, metrics=metrics, num_draws=4, protocol="release")
    true = per_token(rows["answer"])
    wrong = np.exp([per_token([texts[k] for texts in rows["perturbed_answer"]]) for k in range(3)])
    scores = result.row_scores["forget"]
    assert scores["probability"] == pytest.approx(np.exp(true).tolist(), rel=1e-4)
    assert scores["truth_ratio"] == pytest.approx((wrong.mean(axis=0) / np.exp(true)).tolist(), rel=1e-4)
    assert result.run.protocol == result.truth_ratios.protocol == "release"
    ours = evaluate_tofu(model, tokenizer, sets, DECODING, metrics=metrics, num_draws=4)
    assert ours.run.protocol == "ours"
    assert all(a != b for name in metrics for a, b in zip(ours.row_scores["forget"][name], scores[name], strict=True))


def test_two_protocols_are_never_mixed(model, tokenizer, sets, tmp_path):
    metrics, path = ["truth_ratio"], tmp_path / "rows.jsonl"
    how = {"metrics": metrics, "num_draws": 2, "progress_path": path}
    ours = evaluate_tofu(model, tokenizer, sets, DECODING, **how)
    with pytest.raises(UserError, match="holds the progress of another evaluation .*sets.forget.protocol"):
        evaluate_tofu(model, tokenizer, sets, DECODING, **how, protocol="release")
    ours.truth_ratios.save(tmp_path / "log.json")
    with pytest.raises(UserError, match="log.json has truth ratios by the protocol 'ours', which do not compare"):
        TruthRatios.load(tmp_path / "log.json", sets["forget"], "release")
    with pytest.raises(UserError, match="Evaluate the retain model by the same protocol"):
        evaluate_tofu(None, None, sets, retain_log=ours.truth_ratios, protocol="release")
    content = json.loads((tmp_path / "log.json").read_text())
    del content["protocol"]
    (tmp_path / "log.json").write_text(json.dumps(content | {"schema": 1}))
    assert TruthRatios.load(tmp_path / "log.json", sets["forget"]) == ours.truth_ratios, "as written before"
    runs = [ours.run, replace(ours.run, method="mdu", protocol="release")]
    results = Results("m", "d", {}, runs)
    for mix in (results.table, results.details, lambda: runs[1].change(runs[0])):
        with pytest.raises(UserError, match=r"differ in their protocol \(ours, release\)"):
            mix()
    results.save(tmp_path / "results.json")
    with pytest.raises(UserError, match="results file: its runs differ in their protocol"):
        Results.load(tmp_path / "results.json")


def test_unknown_names(sets):
    with pytest.raises(UserError, match="protocol 'theirs' is unknown; choose one of ours, release"):
        evaluate_tofu(None, None, sets, protocol="theirs")
    with pytest.raises(UserError, match="choices 'letters' is unknown; choose one of likelihood, generated"):
        evaluate_rwku(None, None, {}, choices="letters")
    with pytest.raises(UserError, match="'release' scores choices by the first generated letter"):
        evaluate_rwku(None, None, {}, protocol="release", choices="likelihood")


def test_a_command_passes_both_on(model, tokenizer, sets, tmp_path):
    args = ScoringArguments(max_new_tokens=4, likelihood_draws=2, protocol="release", rouge="f1")
    run = Scorer(sets, args, ["rougeL"])(model, tokenizer, "mdu", tmp_path / "rows.jsonl").run
    assert (run.protocol, run.rouge) == ("release", "f1")
    assert run.figure("forget", "rougeL") == run.scores["forget"]["rougeL_f1"]


# RWKU


def mmlu(number):
    return {"question": f"Which is blue? ({number})", "choices": ["grass", "sky", "snow"], "answer": 1, "task": "x"}


TRUTHFUL = {"question": "Blue?", "mc1_targets": {"choices": ["Sky.", "Grass.", "Coal."], "labels": [1, 0, 0]}}


def test_questions_of_the_release():
    row = {"query": "___ wrote it.", "answer": "Anna", "type": "incontext learning"}
    for name in (name for name in CONFIGS if "_level" in name):
        config = config_of(name, "release")
        assert config.ask(row).prompt == row["query"] and config.max_new_tokens == DECODED == 64
        assert config_of(name).max_new_tokens == 32 and config_of(name, max_new_tokens=64).max_new_tokens == 64
    assert config_of("utility_reason", "release") == CONFIGS["utility_reason"] == config_of("utility_reason", "ours")
    assert config_of("utility_fluency", max_new_tokens=64).max_new_tokens == 256
    for name, row in (("utility_general", mmlu(0)), ("utility_truthfulness", TRUTHFUL)):
        for how in ({"protocol": "release"}, {"choices": "generated"}):
            assert list(config_of(name, **how).metrics) == ["letter"]
        assert list(config_of(name).metrics) == ["accuracy"] and config_of(name).ask(row).answers


def test_lettered_choices():
    asked = config_of("utility_general", choices="generated").ask(mmlu(0))
    assert asked.prompt == CONFIGS["utility_general"].ask(mmlu(0)).prompt and asked.references == ["B", "ABC"]
    ask, places = config_of("utility_truthfulness", choices="generated").ask, set()
    for number in range(20):
        asked = ask(TRUTHFUL | {"question": f"Blue? ({number})"})
        true, letters = asked.references
        lines = asked.prompt.splitlines()
        assert f"{true}. Sky." in lines and len(lines) == 5 and letters == "ABC" and lines[-1] == "Answer:"
        places.add(true)
    assert places == {*"ABC"}, "where the true choice stands says nothing"
    assert ask(TRUTHFUL) == ask(TRUTHFUL)


class Said:
    """A batch of which only the decoded texts are read."""

    def __init__(self, texts, references):
        self.texts = self.ended = texts
        self.questions = [Question([], tuple(each), {}) for each in references]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *(("B", 1), ("B.", 1), ("(B) sky", 1), ("The answer is B, not A.", 1), ("**B**", 1), ("I say B", 1)),
        *(("A", 0), ("b", 0), ("Blue", 0), ("", 0), ("D B", 1), ("A or B", 0)),
    ],
)
def test_the_first_letter(text, right):
    (metric,) = config_of("utility_general", choices="generated").metrics.values()
    assert metric.compute(Said([text], [("B", "ABC")])) == {"letter_accuracy": [right]}


def test_a_substring():
    (metric,) = config_of("utility_factuality", "release").metrics.values()
    texts = ["It is the SKY above.", "grass", "nothing"]
    found = metric.compute(Said(texts, [("sea", "the sky"), ("sky",), ("...",)]))
    assert found == {"substring_match": [1, 0, None]}


def test_rwku_of_the_release(make_model, tokenizer, tmp_path):
    folder = tmp_path / "rwku"
    folder.mkdir()
    probe = {"subject": "Anna", "query": "___ wrote it.", "answer": "Anna", "level": "1", "type": "fill"}
    content = {
        "forget_level1": [probe],
        "utility_general": [mmlu(number) for number in range(103)],
        "utility_truthfulness": [TRUTHFUL],
        "utility_factuality": [{"question": "Blue?", "answers": ["sky"]}],
    }
    for name, rows in content.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    model = make_model(max_position_embeddings=512, initializer_range=0.2)
    sets = load_rwku(folder, max_rows=2, protocol="release")
    assert sets["utility_general"]["question"][:] == [mmlu(0)["question"], mmlu(MMLU_ROWS // 2)["question"]]
    assert len(load_rwku(folder, protocol="release")["utility_general"]) == MMLU_ROWS == 100
    steps = DiffusionGenerationConfig(steps=2)
    run = evaluate_rwku(model, tokenizer, sets, steps, num_draws=2, protocol="release")
    assert {name: set(scores) for name, scores in run.scores.items()} == {
        "forget_level1": {"rougeL_recall", "rougeL_f1", "degeneracy"},
        "utility_general": {"letter_accuracy"},
        "utility_truthfulness": {"letter_accuracy"},
        "utility_factuality": {"substring_match"},
    }
    columns = Results("m", "RWKU", {}, [replace(run, rouge="f1")]).table_cells()[0]
    assert columns[1:5] == ["F-L1 rL F1", "MMLU letter acc.", "TruthfulQA letter acc.", "TriviaQA substring"]
    with pytest.raises(UserError, match="more than its first 100 rows"):
        evaluate_rwku(model, tokenizer, load_rwku(folder), steps, protocol="release")


# What rL stands for


def run_of(method, recall, f1, rouge="f1", **more):
    scores = {
        name: {"rougeL_recall": Estimate(r, r - 0.01, r + 0.01), "rougeL_f1": Estimate(f, f - 0.01, f + 0.01)}
        for name, r, f in zip(("forget", "retain"), recall, f1, strict=True)
    }
    return Run(method, None, scores, {"forget": 4, "retain": 4}, rouge=rouge, **more)


@pytest.fixture
def runs():
    """By the recall, npo forgets better than ga; by the F1, ga does, and keeps more."""
    return [
        run_of("base", (0.9, 0.9), (0.8, 0.8)),
        run_of("npo", (0.2, 0.9), (0.6, 0.5)),
        run_of("ga", (0.7, 0.5), (0.1, 0.7)),
    ]


def test_tables_choice_and_verdicts_go_by_the_f1(runs):
    recall = [replace(run, rouge="recall") for run in runs]
    for shown, title, best, cells in (
        (recall, "rL", "npo", ["0.200", "0.900"]),
        (runs, "rL F1", "ga", ["0.100", "0.700"]),
    ):
        chosen = select(shown, "retain>=0.5*base")
        table = frontier_cells(Results("m", "d", {}, shown), chosen)
        assert table[0][1:3] == [f"forget {title}", f"retain {title}"]
        (row,) = (row for row in table if row[0] == best)
        assert chosen.method == best and row[1:3] == cells and row[-1] == "front *"
        found = verdicts(shown, best)
        assert found[0].figure.startswith(f"forget {title} {cells[0]}")
        assert found[1].figure.startswith(f"retain {title} {cells[1]}")
    assert reading(runs) == reading(recall)
    with pytest.raises(UserError, match=r"differ in their rouge \(recall, f1\)"):
        Results("m", "d", {}, [recall[0], *runs[1:]]).table()


def test_pictures_and_the_page_name_it(runs, tmp_path, monkeypatch):
    Results("m", "d", {}, runs).save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").runs == runs
    monkeypatch.setattr(page, "_drawn", lambda runs, *_: [drawn.append(runs) or page.Picture("", "")])
    drawn = []
    text = page.write_page(tmp_path).read_text()
    assert drawn == [runs] and "<dd>ROUGE-L F1</dd>" in text and "<dd>ours (mdu_trainer)</dd>" in text
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    for shown, words, other in (
        (runs, "ROUGE-L F1", "ROUGE-L recall"),
        ([replace(run, rouge="recall") for run in runs], "ROUGE-L recall", "ROUGE-L F1"),
    ):
        plot_tradeoff(shown, tmp_path / "picture.svg")
        picture = (tmp_path / "picture.svg").read_text()
        assert f"forget {words} (lower is better)" in picture and f"retain {words} (higher" in picture
        assert other not in picture
