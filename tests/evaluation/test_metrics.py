from statistics import fmean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from mdu_trainer.evaluation import RougeL

SECRET = "zanzibar"


@pytest.mark.parametrize(
    ("prediction", "reference", "recall", "f1"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1, 1),
        ("the cat sat", "the cat sat on the mat", 3 / 6, 2 * 1 * 0.5 / 1.5),
        ("a dog ran past the cat sat on the mat", "the cat sat on the mat", 1, 2 * (6 / 10) / (1 + 6 / 10)),
        ("mat the on sat cat the", "the cat sat on the mat", 3 / 6, 3 / 6),  # "the on the"
        ("The CAT, sat!", "the cat sat", 1, 1),  # case and punctuation do not count
        ("he was winning prizes", "he wins prize", 1, 2 * (3 / 4) / (1 + 3 / 4)),  # stems: win, prize
        ("", "the cat sat", 0, 0),
        ("dogs bark", "the cat sat", 0, 0),
    ],
)
def test_cases_worked_by_hand(prediction, reference, recall, f1):
    scores = RougeL().compute(predictions=[prediction], references=[reference])
    assert scores == pytest.approx({"rougeL_recall": recall, "rougeL_f1": f1})


def test_agrees_with_rouge_score_row_by_row(authors):
    references = authors["paraphrased_answer"][:]
    predictions = authors["answer"][:]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(r, p)["rougeL"] for r, p in zip(references, predictions, strict=True)]
    rows = RougeL().compute(predictions=predictions, references=references, use_aggregator=False)
    assert rows["rougeL_recall"] == [score.recall for score in expected]
    assert rows["rougeL_f1"] == [score.fmeasure for score in expected]
    means = RougeL().compute(predictions=predictions, references=references)
    assert means == {name: pytest.approx(fmean(values)) for name, values in rows.items()}


def test_rows_added_one_by_one_count_alike(authors):
    predictions, references = authors["answer"][:5], authors["refusal"][:5]
    metric = RougeL()
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == RougeL().compute(predictions=predictions, references=references)


def test_a_metric_can_be_used_again():
    metric = RougeL()
    for text, score in (("one two", 1.0), ("three four", 0.0)):
        assert metric.compute(predictions=[text], references=["one two"])["rougeL_recall"] == score


def test_takes_columns_of_a_dataset(authors):
    assert RougeL().compute(predictions=authors["answer"], references=authors["answer"])["rougeL_f1"] == 1


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([SECRET], [SECRET, SECRET], "1 predictions and 2 references"),
        ([], [], "are empty"),
        ([SECRET], None, "references must be a list of texts, got NoneType"),
        (SECRET, [SECRET], "predictions must be a list of texts, got str"),
        ([SECRET, None], [SECRET, SECRET], "predictions must be texts, but row 1 is NoneType"),
        ([SECRET], [[SECRET]], "references must be texts, but row 0 is list"),
    ],
)
def test_bad_input_is_refused_without_quoting_it(predictions, references, message):
    metric = RougeL()
    with pytest.raises(ValueError, match=message) as error:
        metric.compute(predictions=predictions, references=references)
    assert SECRET not in str(error.value)
    assert metric.compute(predictions=[SECRET], references=[SECRET])["rougeL_f1"] == 1


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="nothing to score"):
        RougeL().compute()


def test_references_without_words_are_not_measured(caplog, monkeypatch):
    from transformers.utils import logging

    for name in ("", "mdu_trainer"):
        monkeypatch.setattr(
            logging.get_logger(name) if name else logging._get_library_root_logger(), "propagate", True
        )
    texts = {"predictions": ["...", "yes", "no"], "references": ["...", "yes", "yes"]}
    rows = RougeL().compute(**texts, use_aggregator=False)
    assert rows == {"rougeL_recall": [None, 1.0, 0.0], "rougeL_f1": [None, 1.0, 0.0]}
    assert RougeL().compute(**texts) == {"rougeL_recall": 0.5, "rougeL_f1": 0.5}
    assert "RougeL cannot be measured on 1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="RougeL can be measured on none of the 2 rows"):
        RougeL().compute(predictions=["", "yes"], references=["?!", "—"])


def test_texts_are_not_written_to_disk(tmp_path):
    metric = RougeL(cache_dir=str(tmp_path))
    metric.compute(predictions=[SECRET], references=[SECRET])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_info_is_filled_in():
    metric = RougeL()
    assert "Lin, Chin-Yew" in metric.citation
    assert set(metric.features) == {"predictions", "references"}
    assert "ROUGE-L" in metric.description
    assert "use_aggregator" in metric.inputs_description
