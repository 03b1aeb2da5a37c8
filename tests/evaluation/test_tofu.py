"""TOFU: what is read, what is refused, what is measured."""

import json

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import hmean, ks_2samp

from mdu_trainer.data.rows import question_answer_rows, tokenize_rows
from mdu_trainer.evaluation import scoring
from mdu_trainer.evaluation.sources import load_split, spread
from mdu_trainer.evaluation.tofu import TruthRatios, check_sets, evaluate_tofu, load_tofu
from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids
from mdu_trainer.inference.likelihood import response_likelihood

SECRET = "zanzibar"
DECODING = DiffusionGenerationConfig(max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def sets(authors):
    known = [c for c in authors.column_names if c not in ("question", "answer", "perturbed_answer")]
    return {
        "forget": authors.select(range(6)),
        "retain": authors.select(range(20, 25)),
        "real_authors": authors.select(range(40, 44)).remove_columns(known),
        "world_facts": authors.select(range(60, 63)).remove_columns(known),
    }


@pytest.fixture
def result(model, tokenizer, sets):
    return evaluate_tofu(model, tokenizer, sets, DECODING, num_draws=4)


def per_token(model, tokenizer, backbone, rows, answers):
    """By hand: a data set for each answer."""
    pairs = Dataset.from_dict({"question": rows["question"], "answer": answers})
    encoded = tokenize_rows(question_answer_rows(pairs, conversational=True), tokenizer, backbone, name="test")
    return response_likelihood(model, encoded.prompt_ids, encoded.completion_ids, backbone, num_draws=4).per_token


def test_truth_ratio_and_probability_by_hand(model, tokenizer, backbone, sets, result):
    for name, rows in sets.items():
        true_column = "paraphrased_answer" if name in ("forget", "retain") else "answer"
        true = per_token(model, tokenizer, backbone, rows, rows[true_column])
        wrong = np.stack(
            [per_token(model, tokenizer, backbone, rows, [a[k] for a in rows["perturbed_answer"]]) for k in range(3)]
        )
        ratio = np.exp(wrong).mean(axis=0) / np.exp(true)
        assert result.row_scores[name]["truth_ratio"] == pytest.approx(ratio.tolist(), rel=1e-4)
        expected = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
        assert result.run.scores[name]["truth_ratio"].value == pytest.approx(expected.mean(), rel=1e-4)
        answer = np.exp(per_token(model, tokenizer, backbone, rows, rows["answer"]))
        if name in ("real_authors", "world_facts"):
            answer = answer / (answer + np.exp(wrong).sum(axis=0))
        assert result.run.scores[name]["probability"].value == pytest.approx(answer.mean(), rel=1e-4)


@pytest.mark.parametrize("count", [3, 1])
def test_true_rank_by_hand(model, tokenizer, backbone, sets, count):
    sets = {
        name: Dataset.from_list(
            [row | {"perturbed_answer": row["perturbed_answer"][:count]} for row in rows.to_list()]
        )
        for name, rows in sets.items()
    }
    result = evaluate_tofu(model, tokenizer, sets, DECODING, metrics=["true_rank"], num_draws=4)
    for name, rows in sets.items():
        true_column = "paraphrased_answer" if name in ("forget", "retain") else "answer"
        true = per_token(model, tokenizer, backbone, rows, rows[true_column])
        wrong = [
            per_token(model, tokenizer, backbone, rows, [a[k] for a in rows["perturbed_answer"]]) for k in range(count)
        ]
        ranks = [sum(other[row] < true[row] for other in wrong) / count for row in range(len(rows))]
        assert result.row_scores[name] == {"true_rank": pytest.approx(ranks)}
        assert result.run.scores[name]["true_rank"].value == pytest.approx(np.mean(ranks))


def test_truth_ratio_and_true_rank_share_their_passes(model, tokenizer, sets, monkeypatch):
    passes = []

    def measure(model, prompt_ids, response_ids, *args, **kwargs):
        passes[-1].append(len(response_ids))
        return response_likelihood(model, prompt_ids, response_ids, *args, **kwargs)

    monkeypatch.setattr(scoring, "response_likelihood", measure)
    for metrics in (["truth_ratio"], ["true_rank"], ["truth_ratio", "true_rank"]):
        passes.append([])
        result = evaluate_tofu(model, tokenizer, {"forget": sets["forget"]}, metrics=metrics, num_draws=4)
        assert list(result.row_scores["forget"]) == metrics
    assert passes[0] == passes[1] == passes[2] and sum(passes[0]) == 6 * 5


def test_summary_by_hand(result):
    nine = [
        result.run.scores[name][metric].value
        for name in ("retain", "real_authors", "world_facts")
        for metric in ("rougeL_recall", "probability", "truth_ratio")
    ]
    assert result.run.summary["model_utility"].value == pytest.approx(hmean(nine))
    fluency = 1 - result.run.scores["forget"]["degeneracy"].value
    both = hmean([result.run.summary["model_utility"].value, fluency])
    assert result.run.summary["utility_score"].value == pytest.approx(both)
    assert set(result.run.summary) == {"model_utility", "utility_score"}, "no forget quality without a retain model"
    assert result.run.rows == {"forget": 6, "retain": 5, "real_authors": 4, "world_facts": 3}
    assert result.run.eval_seconds > 0
    for scores in result.run.scores.values():
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in scores.values())


def test_memorisation_by_hand(model, tokenizer, backbone, sets):
    parts = ["exact_memorization", "extraction_strength", "paraphrase"]
    asked = {"forget": sets["forget"], "world_facts": sets["world_facts"]}
    run = evaluate_tofu(model, tokenizer, asked, DECODING, metrics=["probability", *parts], num_draws=4).run
    true = np.exp(per_token(model, tokenizer, backbone, sets["forget"], sets["forget"]["paraphrased_answer"]))
    wrong = np.stack(
        [
            per_token(model, tokenizer, backbone, sets["forget"], [a[k] for a in sets["forget"]["perturbed_answer"]])
            for k in range(3)
        ]
    )
    share = true / (true + np.exp(wrong.mean(axis=0)))
    scores = {name: estimate.value for name, estimate in run.scores["forget"].items()}
    assert scores["paraphrase_probability"] == pytest.approx(true.mean(), rel=1e-4)
    assert scores["truth_share"] == pytest.approx(share.mean(), rel=1e-4)
    known = [scores["exact_memorization"], scores["extraction_strength"], true.mean(), share.mean()]
    found = run.summary["memorization_score"].value
    assert found == pytest.approx(hmean([1 - value for value in known]), rel=1e-4)
    assert "paraphrase_probability" not in run.scores["world_facts"], "which has no answers in other words"
    assert set(run.summary) == {"model_utility", "memorization_score"}, "no fluency without degeneracy"


def test_memorisation_needs_all_of_its_parts(model, tokenizer, sets):
    without = sets["forget"].remove_columns("paraphrased_answer")
    for rows, metrics in ((without, ["exact_memorization", "paraphrase"]), (sets["forget"], ["paraphrase"])):
        run = evaluate_tofu(model, tokenizer, {"forget": rows}, DECODING, metrics=metrics, num_draws=1).run
        assert run.summary == {}
    with pytest.raises(UserError, match="forget set has no column paraphrased_answer, without which paraphrase"):
        evaluate_tofu(model, tokenizer, {"forget": without}, metrics=["paraphrase"])
    with pytest.raises(UserError, match="protocol 'release' weighs no answers in other words"):
        evaluate_tofu(model, tokenizer, sets, metrics=["rougeL", "paraphrase"], protocol="release")


def test_forget_quality_against_a_retain_model(model, make_model, tokenizer, sets, result, tmp_path):
    never = make_model(max_position_embeddings=64, initializer_range=0.2, seed=1)
    evaluate_tofu(never, tokenizer, sets, DECODING, num_draws=4).truth_ratios.save(tmp_path / "log.json")
    log = TruthRatios.load(tmp_path / "log.json", sets["forget"])
    run = evaluate_tofu(model, tokenizer, sets, DECODING, num_draws=4, retain_log=log).run
    expected = ks_2samp(result.row_scores["forget"]["truth_ratio"], log.values).pvalue
    assert run.summary["forget_quality"].value == pytest.approx(expected)
    itself = evaluate_tofu(never, tokenizer, sets, DECODING, num_draws=4, retain_log=log).run
    assert itself.summary["forget_quality"].value == 1


def test_a_log_of_other_questions_is_refused(sets, result, tmp_path):
    result.truth_ratios.save(tmp_path / "log.json")
    assert set(json.loads((tmp_path / "log.json").read_text())) == {"schema", "questions", "values", "protocol"}
    for other in (sets["forget"].select(range(5)), sets["forget"].select([1, 0, 2, 3, 4, 5])):
        with pytest.raises(ValueError, match="6 other questions than the .* of the forget set"):
            TruthRatios.load(tmp_path / "log.json", other)
        with pytest.raises(ValueError, match="other questions"):
            evaluate_tofu(None, None, {"forget": other}, retain_log=result.truth_ratios)
    (tmp_path / "log.json").write_text("[]")
    with pytest.raises(ValueError, match="not a log of truth ratios"):
        TruthRatios.load(tmp_path / "log.json", sets["forget"])


def test_without_perturbed_answers(model, tokenizer, backbone, sets):
    rows = sets["forget"].select_columns(["question", "answer"])
    result = evaluate_tofu(model, tokenizer, {"forget": rows}, num_draws=2)
    assert result.truth_ratios is None and result.run.summary == {}
    assert set(result.run.scores["forget"]) == {"rougeL_recall", "rougeL_f1", "probability", "degeneracy"}
    chosen = evaluate_tofu(
        model, tokenizer, {"forget": rows}, metrics=("rougeL", "probability", "true_rank"), num_draws=2
    )
    scores = chosen.run.scores["forget"]
    assert scores == {name: result.run.scores["forget"][name] for name in scores} and len(scores) == 3
    prompts = tokenize_rows(question_answer_rows(rows, True), tokenizer, backbone, name="test").prompt_ids
    longest = max(len(ids) for ids in tokenizer(rows["answer"][:])["input_ids"]) + 1
    answers = generate_ids(model, prompts, DiffusionGenerationConfig(max_new_tokens=longest), backbone)
    from mdu_trainer.evaluation.metrics import RougeL

    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rouge = RougeL().compute(predictions=texts, references=rows["answer"])
    assert scores["rougeL_recall"].value == pytest.approx(rouge["rougeL_recall"])
    with pytest.raises(UserError, match="The forget set has no column perturbed_answer, without which true_rank"):
        evaluate_tofu(model, tokenizer, {"forget": rows}, metrics=["true_rank"])


def changed(rows, row, **values):
    listed = rows.to_list()
    listed[row] |= values
    return Dataset.from_list(listed)


def test_bad_rows_are_refused_before_a_model_is_touched(sets):
    rows = sets["forget"].select_columns(["question", "answer", "paraphrased_answer", "perturbed_answer"])
    cases = [
        (rows.remove_columns("answer"), "The forget set has no column answer"),
        (rows.select([]), "The forget set is empty"),
        (changed(rows, 2, answer=" \n"), "Row 2 of the forget set: answer is blank"),
        (changed(rows, 1, paraphrased_answer=None), "Row 1 of the forget set: paraphrased_answer must be a text"),
        (changed(rows, 3, perturbed_answer=[SECRET]), "Row 3 of the forget set has 1 perturbed answers, row 0 has 3"),
        (changed(rows, 3, perturbed_answer=[]), "perturbed_answer must be a list of texts"),
        (
            changed(rows, 0, perturbed_answer=[SECRET, "", SECRET]),
            "Row 0 of the forget set: perturbed_answer is blank",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            evaluate_tofu(None, None, {"forget": bad})
        assert SECRET not in str(error.value)
    with pytest.raises(ValueError, match="sets must be 'forget' and any of"):
        check_sets({"retain": rows})
    with pytest.raises(ValueError, match="sets must be 'forget' and any of"):
        check_sets({"forget": rows, "neighbours": rows})


def test_a_folder_without_a_card(authors, tmp_path):
    authors.select(range(4)).select_columns(["question", "answer"]).to_json(tmp_path / "forget10.json")
    authors.select(range(8)).to_json(tmp_path / "forget10_perturbed.json")
    authors.select(range(9, 12)).to_json(tmp_path / "retain90.jsonl")
    sets = load_tofu(tmp_path)
    assert list(sets) == ["forget", "retain"]
    assert sets["forget"]["question"][:] == authors["question"][:4], (
        "those to forget, from the file with wrong answers"
    )
    assert "perturbed_answer" in sets["forget"].column_names
    with pytest.raises(ValueError, match="has no config 'forget05'; it has forget10, forget10_perturbed, retain90"):
        load_tofu(tmp_path, forget="forget05")
    (tmp_path / "retain95.json").touch()
    with pytest.raises(ValueError, match="'retain95' .* is empty"):
        load_tofu(tmp_path, retain="retain95")


def test_rows_that_are_not_used_are_checked(authors, tmp_path):
    rows = authors.select(range(8)).select_columns(["question", "answer"]).to_list()
    for name in ("forget10", "retain90"):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_tofu(tmp_path, max_rows=2)["retain"]) == 2
    for column, value, message in (("answer", None, "must be a text"), ("question", "  ", "is blank")):
        bad = [*rows[:7], rows[7] | {column: value}]
        (tmp_path / "retain90.json").write_text("\n".join(map(json.dumps, bad)))
        with pytest.raises(ValueError, match=f"Row 7 of the retain set: {column} {message}"):
            load_tofu(tmp_path, max_rows=2, max_retain_rows=3)
    for limits in ({"max_rows": 0}, {"max_rows": -1}, {"max_retain_rows": 0}):
        (tmp_path / "retain90.json").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match="number of rows to use must be at least 1, got"):
            load_tofu(tmp_path, **limits)


def test_files_are_read_alike_with_and_without_a_card(tmp_path):
    texts = ["one\u2028two", "three\x85four", "2009-01-01"]
    rows = [{"question": f"q{i}", "answer": text} for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    Dataset.from_list(rows).to_csv(tmp_path / "comma.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "arrow.parquet")
    files = ("lines.jsonl", "array.json", "comma.csv", "arrow.parquet")
    bare = [load_split(tmp_path, file.partition(".")[0]).to_list() for file in files]
    configs = [f"- config_name: {file.partition('.')[0]}\n  data_files: {file}\n" for file in files]
    both = (
        "- config_name: two\n  data_files:\n  - split: a\n    path: array.json\n  - split: b\n    path: lines.jsonl\n"
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}{both}---\n")
    carded = [load_split(tmp_path, file.partition(".")[0]).to_list() for file in files]
    assert bare == carded == [rows] * 4
    semicolons = "---\nconfigs:\n- config_name: s\n  data_files: s.csv\n  sep: ';'\n---\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text(semicolons)
    (tmp_path / "other" / "s.csv").write_text("question;answer\nq,0;x\n")
    assert load_split(tmp_path / "other", "s").to_list() == [{"question": "q,0", "answer": "x"}], "as the card says"
    with pytest.raises(ValueError, match="'two' of .* has the splits a, b; there must be one"):
        load_split(tmp_path, "two")


def test_rows_that_are_no_table(tmp_path):
    cases = {
        "mixed": ([{"answer": SECRET}, {"answer": 3}], "Row 1 of .*: answer is a number, and a text in rows before"),
        "list": ([{"answer": SECRET}, [SECRET]], "Row 1 of .* is not an object"),
        "nested": ([{"answer": [SECRET]}, {"answer": [3]}], "do not make a table"),
    }
    for name, (rows, message) in cases.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        with pytest.raises(UserError, match=message) as error:
            load_split(tmp_path, name)
        assert SECRET not in str(error.value)
    (tmp_path / "later.json").write_text(json.dumps([{"a": "x"}, {"a": "y", "b": "z"}]))
    assert load_split(tmp_path, "later")["b"][:] == [None, "z"], "a column that the first row lacks"
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: gone\n  data_files: gone.json\n---\n")
    with pytest.raises((UserError, OSError)) as error:
        load_split(tmp_path, "gone")


def test_the_published_folder(tofu_path):
    sets = load_tofu(tofu_path, "forget01", "retain99")
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 40,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert all("perturbed_answer" in rows.column_names for rows in sets.values())
    few = load_tofu(tofu_path, "forget05", "retain_perturbed", max_rows=7, max_retain_rows=5)
    assert [len(rows) for rows in few.values()] == [7, 5, 7, 7]
    assert "perturbed_answer" not in few["forget"].column_names, "which this copy has none for"
    with pytest.raises(ValueError, match="has no config 'forget02'; it has .*forget01"):
        load_tofu(tofu_path, "forget02")


def test_spread(authors):
    assert spread(authors, None) is not None and len(spread(authors, None)) == len(authors)
    assert spread(authors, 3)["question"][:] == [authors["question"][i] for i in (0, 32, 64)]


def test_one_config_of_a_folder(tofu_path):
    assert load_split(tofu_path, "forget01").column_names == ["question", "answer"]
