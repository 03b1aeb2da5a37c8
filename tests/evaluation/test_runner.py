"""Scoring rows: batches, processes, and what a kill leaves behind."""

import json
import signal

import pytest
from runs import EVALUATION_PLACES, draw_moment, evaluate, status

from mdu_trainer.evaluation.registry import choose_metrics
from mdu_trainer.evaluation.runner import score_questions
from mdu_trainer.evaluation.scoring import QuestionBatch, QuestionSet, encode_questions, estimates
from mdu_trainer.inference.generation import DiffusionGenerationConfig
from mdu_trainer.models import weights_fingerprint

SECRET = "zanzibar"
ALL = ("rougeL", "probability", "truth_ratio", "true_rank", "degeneracy", "exact_memorization", "extraction_strength")


@pytest.fixture
def make_set(authors, tokenizer, backbone):
    """`make_set(batch_size=..., rows=..., name=...)`: questions about fictional authors."""

    def make(rows=5, name="forget", metrics=("rougeL", "probability", "truth_ratio", "degeneracy"), **decoding):
        some = authors.select(range(rows))
        answers = {
            "answer": [[text] for text in some["answer"]],
            "paraphrased": [[text] for text in some["paraphrased_answer"]],
            "perturbed": some["perturbed_answer"],
        }
        questions = encode_questions(name, some["question"], answers["answer"], answers, tokenizer, backbone)
        config = DiffusionGenerationConfig(**({"max_new_tokens": 8, "batch_size": 2} | decoding))
        return QuestionSet(name, questions, choose_metrics(metrics), config, num_draws=2)

    return make


def rows_of(evaluation):
    return {(name, score): values for name, scores in evaluation.scores.items() for score, values in scores.items()}


def test_batches_do_not_matter(model, tokenizer, make_set):
    one, many = (
        rows_of(score_questions(model, tokenizer, [make_set(batch_size=size, metrics=ALL)])) for size in (1, 32)
    )
    assert one.keys() == many.keys() and len(one) == 8
    for key in one:
        assert one[key] == pytest.approx(many[key], rel=1e-4), key


def test_scores_are_those_of_each_row_alone(model, tokenizer, make_set):
    questions = make_set()
    scores = score_questions(model, tokenizer, [questions]).scores["forget"]
    from mdu_trainer.models import resolve_backbone

    alone = QuestionBatch(model, tokenizer, resolve_backbone(model, tokenizer), questions, [3]).scores()
    assert {name: values[3] for name, values in scores.items()} == pytest.approx(
        {name: values[0] for name, values in alone.items()}, rel=1e-4
    )


def test_progress_is_continued_after_a_kill(model, tokenizer, make_set, tmp_path, monkeypatch):
    path, sets = tmp_path / "rows.jsonl", [make_set(), make_set(rows=3, name="retain")]
    undisturbed = score_questions(model, tokenizer, sets, progress_path=path)
    header, *lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and set(json.loads(lines[0])) == {"set", "row", "figures", "seconds"}
    calls = []
    scores = QuestionBatch.scores
    monkeypatch.setattr(QuestionBatch, "scores", lambda batch: calls.append(batch.rows) or scores(batch))
    for kept in range(9):  # killed after so many rows, in the middle of a line
        calls.clear()
        torn = lines[kept][: len(lines[kept]) // 2] if kept < 8 else ""
        path.write_text("".join([header, *lines[:kept]]) + torn)
        again = score_questions(model, tokenizer, sets, progress_path=path)
        assert again.scores == undisturbed.scores, "to the last bit, whatever batch the kill cut through"
        written = path.read_text().splitlines(keepends=True)
        assert written[: kept + 1] == [header, *lines[:kept]], "what was finished is kept as it is"
        keys = [(json.loads(line)["set"], json.loads(line)["row"]) for line in written[1:]]
        assert len(keys) == len(set(keys)) == 8, "each row once"
        assert len(calls) == [5, 5, 4, 4, 3, 2, 2, 1, 0][kept] and again.seconds > 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of an evaluation that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert status(evaluate, folder) == 0
    return folder


@pytest.mark.parametrize("seed", range(12))
def test_killed_evaluation_ends_with_the_same_figures(undisturbed, tmp_path, seed):
    kill = draw_moment(EVALUATION_PLACES, seed)
    assert status(evaluate, tmp_path, kill=kill) == -signal.SIGKILL, kill
    assert not (tmp_path / "results.json").exists()
    assert status(evaluate, tmp_path) == 0
    assert (tmp_path / "results.json").read_text() == (undisturbed / "results.json").read_text(), kill
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert sorted(line["row"] for line in lines) == list(range(16)), "each row once"


def test_a_header_cut_short_starts_anew(model, tokenizer, make_set, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"progress": 1, "sc')
    score_questions(model, tokenizer, [make_set(rows=2)], progress_path=path)
    assert len(path.read_text().splitlines()) == 3


def test_progress_of_something_else_is_refused(model, make_model, tokenizer, make_set, tmp_path):
    path = tmp_path / "rows.jsonl"
    score_questions(model, tokenizer, [make_set()], progress_path=path)
    before = path.read_bytes()
    other = make_model(max_position_embeddings=64, seed=1)
    with pytest.raises(ValueError, match=r"another evaluation \(model differ"):
        score_questions(other, tokenizer, [make_set()], progress_path=path)
    for change in ({"seed": 3}, {"max_new_tokens": 4}):
        with pytest.raises(ValueError, match=f"sets.forget.decoding.{next(iter(change))} differ"):
            score_questions(model, tokenizer, [make_set(**change)], progress_path=path)
    with pytest.raises(ValueError, match="sets.forget.data, sets.forget.rows|sets.forget.rows, sets.forget.data"):
        score_questions(model, tokenizer, [make_set(rows=4)], progress_path=path)
    with pytest.raises(ValueError, match="sets.forget.metrics"):
        score_questions(model, tokenizer, [make_set(metrics=("rougeL",))], progress_path=path)
    assert path.read_bytes() == before
    score_questions(model, tokenizer, [make_set(batch_size=32)], progress_path=path)  # changes no figure
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="not the progress of an evaluation"):
        score_questions(model, tokenizer, [make_set()], progress_path=path)
    path.write_bytes(before[: before.index(b"\n") + 1] + b"{}\n")
    with pytest.raises(ValueError, match="line 2, is damaged"):
        score_questions(model, tokenizer, [make_set()], progress_path=path)


def test_progress_holds_no_text(model, tokenizer, make_set, authors, tmp_path):
    path = tmp_path / "rows.jsonl"
    score_questions(model, tokenizer, [make_set()], progress_path=path)
    content = path.read_text()
    names = {word for row in authors.select(range(5)) for word in row["answer"].split() if word[0].isupper()}
    assert names and not any(name.strip(".") in content for name in names)


def test_fingerprint_sees_a_change_of_any_tensor(model):
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor += 1e-4
        assert weights_fingerprint(model) != before, name
        tensor.copy_(kept)
    assert weights_fingerprint(model.bfloat16()) != before


def test_unknown_metric():
    with pytest.raises(ValueError, match="Unknown metrics: bleu. Choose from rougeL"):
        choose_metrics(["rougeL", "bleu"])
    with pytest.raises(ValueError, match="none given"):
        choose_metrics([])


def test_sets_need_names(model, tokenizer, make_set):
    with pytest.raises(ValueError, match="a name of its own"):
        score_questions(model, tokenizer, [make_set(), make_set()])


def test_an_answer_without_tokens(tokenizer, backbone):
    with pytest.raises(ValueError, match="Row 1 of the forget set: an answer .answer. has no tokens") as error:
        answers = {"answer": [[SECRET], [""]]}
        encode_questions("forget", [SECRET, SECRET], [[SECRET]] * 2, answers, tokenizer, backbone)
    assert SECRET not in str(error.value)


def test_best_reference_counts(model, tokenizer, backbone):
    questions = encode_questions("q", ["Who?", "Where?"], [["one two", "three"], ["four"]], {}, tokenizer, backbone)
    part = QuestionSet("q", questions, choose_metrics(["rougeL"]), DiffusionGenerationConfig(max_new_tokens=4))
    batch = QuestionBatch(model, tokenizer, backbone, part, [0, 1])
    batch.__dict__["texts"] = ["three", "nothing"]
    assert batch.scores()["rougeL_recall"] == [1.0, 0.0]


def test_a_row_that_cannot_be_measured_is_read_back(model, tokenizer, backbone, tmp_path):
    questions = encode_questions("q", ["Who?", "Where?"], [["one"], ["..."]], {}, tokenizer, backbone)
    part = QuestionSet("q", questions, choose_metrics(["rougeL"]), DiffusionGenerationConfig(max_new_tokens=4))
    first = score_questions(model, tokenizer, [part], progress_path=tmp_path / "rows.jsonl")
    again = score_questions(model, tokenizer, [part], progress_path=tmp_path / "rows.jsonl")
    assert again.scores == first.scores and first.scores["q"]["rougeL_recall"][1] is None


def test_estimates_leave_out_what_is_not_finite():
    scores = estimates({"a": [0.0, 1.0], "b": [1.0, float("nan")]})
    assert set(scores) == {"a"} and scores["a"].value == 0.5 and scores["a"].low <= 0.5 <= scores["a"].high
