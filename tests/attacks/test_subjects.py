"""Whom a question names, which rows are about the same, and what attacks make of it."""

import pytest
from datasets import Dataset
from stand_in import make_settings, never

from mdu_trainer.attacks import ATTACKS, Target, alias
from mdu_trainer.attacks.subjects import Subjects


@pytest.fixture
def target(attack, tokenizer, rows, unrelated):
    """`target(rows)`: rows before a stand-in that knows nothing."""
    return lambda some=rows: Target(attack.stand_in(never), tokenizer, some, make_settings(unrelated, rows))


def test_the_name_is_found_and_replaced(target, rows):
    subjects = Subjects(target())
    first, last = rows[0]["question"].removeprefix("Where was the author ").removesuffix(" born?").split()
    assert {subjects.name(row) for row in range(len(rows))} == {f"{first} {last}"}
    ways = alias._aliases(subjects, 0)
    assert ways["initials"] == f"Where was the author {first[0]}. {last[0]}. born?"
    assert ways["first name"] == f"Where was the author {first} born?"
    assert ways["last name"] == f"Where was the author {last} born?"
    told, _, asked = ways["description"].partition(". ")
    assert "Somebody" in told and asked == "Where was the author this person born?"
    assert first not in ways["description"] and target().secrets[0] not in ways["description"]


def test_half_of_the_name_is_masked_and_nothing_else(target, tokenizer):
    subjects = Subjects(target())
    name, prompt = subjects.name(0), subjects.target.prompts[0]
    for first, there in ((True, name.startswith), (False, name.endswith)):
        masked = alias._half_masked(subjects, 0, first=first)
        hidden = [token for token, now in zip(prompt, masked, strict=True) if token != now]
        assert hidden and there(tokenizer.decode(hidden).strip()) and tokenizer.decode(hidden).strip() != name
        assert masked.count(tokenizer.mask_token_id) == len(hidden)


def test_other_rows_are_of_the_same_subject_and_say_nothing_of_the_answer(target, rows, authors):
    asked = target()
    subjects = Subjects(asked)
    for row in range(len(rows)):
        others = subjects.others(row, subjects.forget, 3)
        assert len(others) == 3 and subjects.forget[row] not in others
        assert not any(asked.secrets[row] in one.answer for one in others)
        assert subjects.others(row, subjects.retain, 3) == [], "nobody else's rows are about the author"
    telling = {"question": rows[1]["question"], "answer": f"Of {subjects.name(0)} {asked.secrets[0]} is known."}
    both = target(Dataset.from_list([*rows.select_columns(["question", "answer"]).to_list(), telling]))
    others = Subjects(both).others(0, Subjects(both).forget, 9)
    assert len(others) == len(rows) - 1 and telling["answer"] not in [one.answer for one in others]


def test_rows_that_name_nobody_are_compared_by_their_words(target):
    nameless = [("where was he born", "in a small town"), ("where was she born", "at sea"), ("who won", "nobody did")]
    plain = Dataset.from_dict({"question": [q for q, _ in nameless], "answer": [a for _, a in nameless]})
    subjects = Subjects(target(plain))
    assert subjects.spans == [None] * 3 and [one.answer for one in subjects.others(0, subjects.forget, 3)] == [
        "at sea"
    ]
    with pytest.raises(ValueError, match="alias finds no name in any question"):
        ATTACKS["alias"].run(target(plain), 0)


def test_what_is_put_around_an_answer_does_not_say_it(target, tokenizer, rows):
    asked, seen = target(rows.select([0, 1, 2])), []

    def knows(model, row, prompt, response, answer) -> bool:
        own = len(model.rows[row][1]) - 1
        shown = [token == true for token, true in zip(response[:own], answer[:own], strict=False)]
        seen.append((row, prompt, tokenizer.decode(response[own:]), shown if model.decoy not in response else None))
        return False

    asked.model.knows = knows
    scores = ATTACKS["context"].run(asked, 0)
    assert list(scores.path) == ["forget rows", "frame", "forget rows and frame"]
    assert any("." in prompt and "." in after for _, prompt, after, _ in seen)
    for row, prompt, after, shown in seen:
        assert asked.secrets[row] not in prompt + after
        if shown is not None:
            stored = [role == "stored" for role in asked.answer_roles[row]]
            assert not any(a and b for a, b in zip(shown, stored, strict=False))
