"""The verdicts: each case of the rule, and the first screen of the page that shows them."""

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.first_screen import first_screen, requests
from mdu_trainer.report.page import write_page
from mdu_trainer.report.verdicts import BAD, GOOD, OPEN, attacks, differs, forgetting, keeping, verdicts

DEMO = Path(__file__).resolve().parents[1] / "demo_card"


def run(method, forget=None, retain=None, width=0.1):
    given = {"forget": forget, "retain": retain}
    scores = {
        name: {"rougeL_recall": Estimate(value, value - width, value + width)}
        for name, value in given.items()
        if value is not None
    }
    return Run(method, None, scores, {"forget": 4, "retain": 8})


BASE, LEVEL = run("base", 1.0, 0.9, 0.01), Estimate(0.4, 0.3, 0.5)


@pytest.mark.parametrize(
    "forget, words, tone",
    [(0.4, "forgotten", GOOD), (0.5, "forgotten", GOOD), (0.3, "forgotten", GOOD)]
    + [
        (0.6, "still known", BAD),
        (1.0, "still known", BAD),
        (0.2, "over-forgotten", BAD),
        (0.0, "over-forgotten", BAD),
    ]
    + [(None, "not measured", OPEN)],
)
def test_forgetting_against_a_never_trained_model(forget, words, tone):
    found = forgetting(run("npo", forget), BASE, LEVEL)
    assert (found.words, found.tone) == (words, tone)
    assert found.figure == (
        ""
        if forget is None
        else f"forget rL {Estimate(forget, forget - 0.1, forget + 0.1)}; never trained 0.400 [0.300, 0.500]"
    )


def test_nothing_is_concluded_where_the_base_cannot_be_told_apart_either():
    found = forgetting(run("npo", 0.5, width=0.4), run("base", 0.7, width=0.4), LEVEL)
    assert (found.words, found.tone) == ("cannot be told", OPEN)


@pytest.mark.parametrize(
    "forget, base, words, tone",
    [(0.2, BASE, "less than before", OPEN), (0.98, BASE, "not forgotten", BAD), (0.2, None, "not known", OPEN)],
)
def test_forgetting_without_a_never_trained_model(forget, base, words, tone):
    found = forgetting(run("npo", forget), base, None)
    assert (found.words, found.tone) == (words, tone) and found.figure.startswith("forget rL 0.")
    assert words == "not forgotten" or "No never-trained model was scored" in found.meaning


def test_difference_of_two_scores():
    """Further apart than the root of the summed squares of the half-widths that face each other: 0.05 for 3 and 4."""
    low = Estimate(0.5, 0.0, 0.53)
    assert not differs(low, Estimate(0.549, 0.509, 1.0)) and differs(Estimate(0.551, 0.511, 1.0), low)
    assert not differs(Estimate(0.5), Estimate(0.509)) and differs(Estimate(0.5), Estimate(0.52))


@pytest.mark.parametrize(
    "retain, base, words, tone",
    [(0.9, BASE, "kept", GOOD), (0.855, BASE, "kept", GOOD), (0.85, BASE, "damaged", BAD)]
    + [
        (None, BASE, "not measured", OPEN),
        (0.9, None, "not known", OPEN),
        (0.9, run("base", 1.0, 0.0), "not known", OPEN),
    ],
)
def test_keeping(retain, base, words, tone):
    found = keeping(run("npo", 0.4, retain), base)
    assert (found.words, found.tone) == (words, tone)


def attacked(floor=True, **recoveries):
    models = {"base": Outcome(Estimate(1.0), Estimate(0.9))} | (
        {"never trained": Outcome(Estimate(0.0), Estimate(0.1))} if floor else {}
    )
    ours = {"none": Estimate(1.0, 1.0, 1.0)} | recoveries
    outcomes = {
        name: AttackOutcome(
            "words", 4, models | {"npo": Outcome(Estimate(0.1), Estimate(0.2), found if floor else None)}
        )
        for name, found in ours.items()
    }
    return Recovery("d", {}, outcomes)


@pytest.mark.parametrize(
    "recovery, words, tone, figure",
    [
        (attacked(a=Estimate(0.0, 0.0, 0.1)), "held", GOOD, "recovery up to 0.10 (1 is the base): a, 0.000"),
        (attacked(a=Estimate(0.2, 0.1, 0.3), b=Estimate(0.1, 0.0, 0.5)), "may leak some", BAD, "up to 0.50"),
        (attacked(a=Estimate(0.2, 0.1, 0.3)), "leaks some", BAD, "a, 0.200 [0.100, 0.300]"),
        (attacked(a=Estimate(0.2, -0.1, 0.6)), "may leak much", BAD, "up to 0.60"),
        (attacked(a=Estimate(0.6, 0.4, 0.8)), "leaks some, maybe much", BAD, "up to 0.80"),
        (attacked(a=Estimate(0.7, 0.6, 0.8)), "leaks much", BAD, "up to 0.80"),
        (attacked(a=Estimate(0.3)), "may leak some", BAD, "up to 0.30"),
        (attacked(a=None), "cannot be told", OPEN, ""),
        (attacked(False, a=None), "not known", OPEN, "highest score 0.200: a; base 0.900"),
        (None, "not measured", OPEN, ""),
    ],
)
def test_attacks(recovery, words, tone, figure):
    found = attacks(recovery, "npo")
    assert (found.words, found.tone) == (words, tone) and figure in found.figure
    assert attacks(recovery, "another").words == "not measured"


def test_always_three():
    runs = [BASE, run("retain model", 0.4, 0.9), run("npo", 0.4, 0.9)]
    assert [one.words for one in verdicts(runs, "npo")] == ["forgotten", "kept", "not measured"]
    assert [one.words for one in verdicts([], "npo")] == ["not measured"] * 3


def first(path: Path) -> str:
    """The words of the page's first screen."""
    section = re.search(r'(?s)<section id="short">.*?</section>', path.read_text())[0]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", section)).split())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mdu-tau0").mkdir()
    shutil.copy(DEMO / "results.json", tmp_path)
    shutil.copy(DEMO / "unlearning.json", tmp_path / "mdu-tau0")
    return tmp_path


def test_first_screen_without_attacks(folder):
    words = first(write_page(folder))
    assert (
        "To be forgotten: Two of twelve fictional authors, eight question-answer pairs about each (16 rows)." in words
    )
    assert "npo , of 5 models the one that forgets best among those that keep enough" in words
    assert "Forgotten forget rL 0.517 [0.470, 0.563]; never trained 0.568 [0.529, 0.610]" in words
    assert "Kept retain rL 0.999 [0.996, 1.000]; base 1.000" in words and "No attack was run on this model" in words
    assert "ga over-forgotten damaged not measured" in words


def test_first_screen_with_attacks(folder):
    shutil.copy(DEMO / "recovery.json", folder)
    words = first(write_page(folder))
    assert "Leaks some, maybe much recovery up to 0.59 (1 is the base): membership, 0.388 [0.051, 0.589]" in words
    assert "mdu tau=0 over-forgotten kept may leak some" in words and "not measured" not in words
    (folder / "results.json").unlink()
    words = first(write_page(folder))
    assert "the first of 5 models" in words and "(16 rows)" in words and "not measured" in words


def test_first_screen_without_a_never_trained_model(folder):
    results = Results.load(folder / "results.json")
    replace(results, runs=[one for one in results.runs if one.method != "retain model"]).save(folder / "results.json")
    page = write_page(folder)
    words, whole = first(page), page.read_text()
    assert "mdu tau=0 , of 5 models" in words and "Less than before forget rL 0.073" in words
    assert "whether it is too much or not enough is not known" in words
    assert "No never-trained model was scored, so a lower forget score counts as better" in whole
    assert "Best is the top left" in whole and "to never-trained" not in whole


def test_selected_run_is_the_one_that_is_judged(folder):
    results = Results.load(folder / "results.json")
    results.settings["select"] = "forget<=0.4"
    results.save(folder / "results.json")
    assert "mdu tau=1 , the one of 5 that is selected" in first(write_page(folder))
    assert "the one nearest to the never-trained model" in (folder / "report.html").read_text()


def test_what_was_to_be_forgotten():
    facts, results = Facts.load(DEMO), Results.load(DEMO / "results.json")
    plain = replace(facts, description=None)
    assert requests(results, [plain, plain]) == ["fictional authors (embedded) (16 rows)"]
    assert requests(None, [plain, facts]) == [
        "an unnamed data set (16 rows)",
        "Two of twelve fictional authors, eight question-answer pairs about each (16 rows)",
    ]
    assert requests(results, []) == [
        "Two of twelve fictional authors, eight question-answer pairs about each (16 rows scored)"
    ]
    assert first_screen(None, None, [facts], None)["judged"] is None
