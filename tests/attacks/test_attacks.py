"""Each attack on a model with exactly the weakness it looks for, and on one without."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from stand_in import (
    LENGTH,
    SECRET,
    always,
    called_wrong,
    half_masked,
    make_settings,
    nameless,
    never,
    reworded,
    shown,
    surrounded,
)

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.attacks import ATTACKS, Target, choose_attacks
from mdu_trainer.testing import unseen_answers


def first_token_decides(model, row, prompt, response, answer) -> float:
    """The decoy is a little likelier; what is revealed first, the others follow."""
    seen = [token for token in response if token != model.config.mask_token_id]
    return -0.1 if not seen else -5.0 if model.decoy in seen else 5.0


def left_to_right(model, row, prompt, response, answer):
    """Surest of a decoy in the last place, after which all are decoys."""
    if model.decoy in response:
        return -5.0
    return torch.tensor([*[2.0] * (len(response) - 1), -5.0])


def beside_the_prompt(model, row, prompt, response, answer) -> float:
    """What the prompt adds is not quite enough."""
    return -0.1


WEAKNESSES = [
    ("paraphrase", reworded),
    ("alias", nameless),
    ("alias", half_masked),
    ("multi-turn", called_wrong),
    ("context", surrounded),
    ("guidance", beside_the_prompt),
    ("decoding", left_to_right),
    ("leak-at-k", first_token_decides),
    ("prefix", shown(0, 1)),
    ("infill-first", shown(0, 1)),
    ("infill-last", shown(-1, -2)),
    ("infill-edges", shown(0, -1)),
]


@pytest.mark.parametrize(("name", "knows"), WEAKNESSES)
def test_an_attack_finds_its_weakness(attack, name, knows):
    one_by_one = DiffusionGenerationConfig(max_new_tokens=LENGTH, block_length=1)
    settings = {"decoding": one_by_one, "samples": 8} if name == "leak-at-k" else {}  # so that the first token decides
    before, after = attack(name, knows, **settings)
    assert before == 0 and after > 0.8, (before, after)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("adapter", "membership")])
def test_nothing_comes_back_of_what_is_not_there(attack, name):
    assert attack(name, never) == (0, 0)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("adapter", "membership")])
def test_what_was_never_forgotten_is_all_there(attack, name):
    before, after = attack(name, always)
    assert before == after == 1


@pytest.mark.parametrize(
    ("name", "knows"), [("infill-first", shown(-1)), ("infill-last", shown(0)), ("prefix", shown(-1))]
)
def test_revealing_one_end_says_nothing_of_the_other(attack, name, knows):
    assert attack(name, knows) == (0, 0)


def test_infill_by_role_reveals_that_role_alone(attack, tokenizer, rows, unrelated):
    target = Target(attack.stand_in(never), tokenizer, rows, make_settings(unrelated, rows))
    seen: dict[str, set[str]] = {"entity": set(), "structural": set()}
    for which, roles in seen.items():

        def knows(model, row, prompt, response, answer, roles=roles) -> bool:
            of_row = target.answer_roles[row]
            first = model.decoy not in response
            roles |= {of_row[i] for i in range(len(of_row)) if first and response[i] == answer[i]}
            return False

        target.model.knows = knows
        ATTACKS[f"infill-{which}"].run(target, 0)
    assert seen == {"entity": {"stored"}, "structural": {"structural"}}


def test_infill_random_is_drawn_by_the_seed_and_averages_draws(attack):
    found = {attack("infill-random", shown(2), seed=seed) for seed in (0, 0, 1)}
    assert len(found) == 2 and all(before == 0 < after < 1 for before, after in found)


def test_rows_without_hidden_words_are_left_out(attack, tokenizer, rows, unrelated):
    both = Dataset.from_dict(
        {"question": ["Where was he born?", rows[0]["question"]], "answer": [f"{SECRET}.", rows[0]["answer"]]}
    )
    settings = make_settings(unrelated, rows, prefix_words=1)
    assert ATTACKS["prefix"].run(Target(attack.stand_in(never), tokenizer, both, settings), 0).rows == [1]
    with pytest.raises(ValueError, match="prefix_words = 1 reveals every stored word") as error:
        ATTACKS["prefix"].run(Target(attack.stand_in(never), tokenizer, both.select([0]), settings), 0)
    assert SECRET not in str(error.value)
    nothing = Dataset.from_dict({"question": ["Is he from there?"], "answer": ["He is from there."]})
    with pytest.raises(ValueError, match=r"infill-first with reveal = 0\.25 leaves no row"):
        ATTACKS["infill-first"].run(Target(attack.stand_in(never), tokenizer, nothing, settings), 0)


# What is scored


def test_the_score_is_of_stored_words_alone(attack, tokenizer, rows, unrelated):
    target = Target(attack.stand_in(never), tokenizer, rows, make_settings(unrelated, rows))
    first = rows[0]["answer"]
    secret = first.split()[-1].strip(".")
    assert target.secrets[0] == secret and all(len(text.split()) <= 2 for text in target.secrets)
    answers = list(rows["answer"])
    assert target.score(answers) == [1] * 6
    assert (
        target.score([text.replace(part, "Nobody") for text, part in zip(answers, target.secrets, strict=True)])
        == [0] * 6
    )
    assert target.score([secret], [0]) == [1]


def test_an_answer_without_stored_words_is_scored_whole(attack, tokenizer, rows, unrelated):
    plain = Dataset.from_dict({"question": ["Is he from there?"], "answer": ["He is from there."]})
    target = Target(attack.stand_in(never), tokenizer, plain, make_settings(unrelated, rows))
    assert target.secrets == ["He is from there."] and target.score(["He is."]) == [0.5]


# Errors


def test_attacks_are_chosen_before_a_model_is_loaded(rows, unrelated):
    settings = make_settings(unrelated, rows)
    assert list(choose_attacks(["membership", "prefix"], settings)) == ["membership", "prefix"]
    assert list(choose_attacks(["adapter"], settings, has_adapter=True)) == ["adapter"]
    for names, wanted, message in [
        (["relern"], settings, r"Unknown attacks: relern\. Choose from relearn-related, "),
        ([], settings, "none given"),
        (["adapter"], settings, "'adapter' needs a PEFT adapter"),
        (["membership"], replace(settings, unseen=None), r"'membership' needs rows in AttackSettings\.unseen"),
        (["relearn-benign"], replace(settings, unrelated=None), r"needs rows in AttackSettings\.unrelated"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_attacks(names, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relearn_share": 1.0}, "relearn_share is a share"),
        ({"reveal": 0.0}, "reveal is a share"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"unseen": Dataset.from_dict({"question": [SECRET]})}, "unseen set has no column answer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rows, unrelated, change, message):
    with pytest.raises(ValueError, match=message):
        make_settings(unrelated, rows, **change)


def test_rows_that_cannot_be_attacked_are_refused_without_their_words(attack, tokenizer, rows, unrelated):
    model, settings = attack.stand_in(never), make_settings(unrelated, rows)
    short = replace(settings, decoding=DiffusionGenerationConfig(max_new_tokens=9))
    with pytest.raises(ValueError, match="The longest answer has 23 tokens .* max_new_tokens is 9") as error:
        Target(model, tokenizer, rows, short)
    assert not any(text in str(error.value) for text in rows["answer"])
    with pytest.raises(ValueError, match="forget set is empty"):
        Target(model, tokenizer, rows.select([]), settings)
    with pytest.raises(ValueError, match="trains on 0 of 1 forget rows"):
        ATTACKS["relearn-related"].run(Target(model, tokenizer, rows.select([0]), settings), 0)
    for private in (settings, Target(model, tokenizer, rows, settings)):
        assert "Foskalto" not in repr(private) and SECRET not in repr(private)


def test_unseen_answers_differ_from_the_rows_in_what_they_say_alone(rows, authors):
    unseen = unseen_answers(rows, 3)
    assert len(unseen) == 3 * len(rows) and set(unseen["question"]) == set(rows["question"])
    known = set(authors["answer"])
    for i, row in enumerate(unseen):
        true = rows[i // 3]
        assert row["question"] == true["question"] and row["answer"] not in known
        assert len({*true["answer"].split()} - {*row["answer"].split()}) in (1, 2)
