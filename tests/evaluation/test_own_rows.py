"""Rows of one's own, as questions and answers; what cannot be read so is refused by its number, not quoted."""

import json

import pytest

from mdu_trainer.evaluation.own_rows import load_questions
from mdu_trainer.files import UserError

SECRET = "Zanzibar Quillfeather"
ROLES, TEXTS = ("user", "assistant"), ("Q?", "A.")


def turn(role, content=SECRET):
    return {"role": role, "content": content}


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "answer": "A.", "note": 1},
        {"prompt": "Q?", "completion": "A."},
        {"prompt": [turn("user", "Q?")], "completion": [turn("assistant", "A.")]},
        {"messages": [turn("user", "Q?"), turn("assistant", "A.")]},
        {"messages": [turn(role, [{"type": "text", "text": text}]) for role, text in zip(ROLES, TEXTS, strict=True)]},
        {"prompt": "Q?", "rejected": "A."},
    ],
)
def test_forms(row, tmp_path):
    assert list(load_questions(write(tmp_path, [row] * 2))) == [{"question": "Q?", "answer": "A."}] * 2


@pytest.mark.parametrize("form", [("question", "answer"), ("prompt", "completion"), ("prompt", "rejected")])
def test_what_is_kept(form, tmp_path):
    row = dict(zip(form, ("Q?", "A."), strict=True)) | {"paraphrased_question": "Which?", "chosen": "No."}
    expected = {"question": "Q?", "answer": "A.", "paraphrased_question": "Which?", "refusal": "No."}
    assert list(load_questions(write(tmp_path, [row]))) == [expected]


WRONG = {
    "no answer": ([{"question": SECRET}], "Row 0 of .*rows.jsonl has no answer."),
    "one without": (
        [{"question": "Q?", "answer": "A."}, {"answer": SECRET}],
        "Row 1 of .*rows.jsonl has no question.",
    ),
    "neither": (
        [{"input": SECRET, "output": SECRET}],
        "Row 0 of .*rows.jsonl has no question and no answer. Its columns are input, output. Say which are meant, by "
        "their names: --columns question=NAME,answer=NAME.",
    ),
    "a number": ([{"question": SECRET, "answer": 3}], "Row 0 of .*rows.jsonl: answer must be a text."),
    "blank": ([{"prompt": SECRET, "completion": " "}], "Row 0 of .*: completion is blank"),
    "no prompt": ([{"completion": SECRET}], "needs 'prompt' and 'completion' columns"),
    "twice": ([{"messages": [turn("user")], "prompt": SECRET, "completion": SECRET}], "says twice"),
    "several turns": (
        [{"messages": [turn("user"), turn("assistant")] * 2}],
        "Row 0 of .*: its prompt is not one turn of the user",
    ),
    "a system's turn": (
        [{"prompt": [turn("system"), turn("user")], "completion": [turn("assistant")]}],
        "Row 0 of .*: its prompt is not one turn of the user",
    ),
    "another role": (
        [{"prompt": [turn("user")], "completion": [turn("user")]}],
        "Row 0 of .*: its completion is not one turn of the assistant",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case, tmp_path):
    rows, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        load_questions(write(tmp_path, rows))
    assert SECRET not in str(error.value)
