"""The card: whole against a golden file, its metadata, what is left out, and its picture."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.commands import run
from mdu_trainer.commands.model_card import main
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.files import UserError
from mdu_trainer.objectives import OBJECTIVES
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.markup import markdown_code, markdown_text
from mdu_trainer.report.model_card import (
    CardDetails,
    chosen_run,
    draw_picture,
    template_path,
    unlearned_model_card,
    write_model_card,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo_card"  # facts and figures of the demo's run at tau = 0
GOLDEN = ROOT / "model_cards" / "mdu-demo.md"


@pytest.fixture
def facts():
    return Facts.load(DEMO)


@pytest.fixture
def results():
    return Results.load(DEMO / "results.json")


def metadata(card):
    """The YAML at the top, read as the Hub reads it."""
    return yaml.safe_load(str(card).split("---\n")[1])


def test_card_of_the_demo_is_the_golden_one(facts, results):
    """After a change that is meant: MDU_WRITE_CARD=1 pytest tests/report/test_model_card.py"""
    card = unlearned_model_card(
        facts,
        results,
        Recovery.load(DEMO / "recovery.json"),
        CardDetails(repo_id="ORG/mdu-demo", language="en", license="mit"),
        decodes=True,
        picture="mdu-demo_tradeoff.png",
    )
    picture = GOLDEN.with_name("mdu-demo_tradeoff.png")
    if os.environ.get("MDU_WRITE_CARD"):
        card.save(GOLDEN)
        picture.write_bytes(draw_picture(results, Recovery.load(DEMO / "recovery.json")))
    assert str(card) == GOLDEN.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG") and f"]({picture.name})" in str(card)


def test_metadata(facts, results):
    facts = replace(facts, base_model="org/base", base_revision="f" * 40)
    card = unlearned_model_card(
        facts,
        replace(results, dataset="org/data forget10"),
        details=CardDetails(repo_id="org/name", license="mit", language="en", tags="x"),
    )
    data = metadata(card)
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "finetune"
    assert (data["license"], data["language"], data["datasets"]) == ("mit", "en", ["org/data"])
    assert {"unlearning", "machine-unlearning", "masked-diffusion", "mdu", "x"} <= set(data["tags"])
    run = chosen_run(results, facts)
    index = data["model-index"][0]
    values = {(r["dataset"].get("split"), m["type"]): m["value"] for r in index["results"] for m in r["metrics"]}
    assert set(values) == set(run.places())
    assert values["forget", "rougeL_recall"] == pytest.approx(run.figure("forget", "rougeL_recall").value, abs=1e-6)
    read = ModelCard(str(card)).data.eval_results
    assert len(read) == len(values) and {result.dataset_type for result in read} == {"org/data"}


def test_the_protocol_and_what_rl_stands_for_are_named(facts, results):
    runs = [replace(run, protocol="release", rouge="f1") for run in results.runs]
    text = unlearned_model_card(facts, replace(results, runs=runs), picture="x.png").text
    assert "by the protocol release (as the code released with the MDU paper asks and scores); rL stands for" in text
    assert "rL stands for ROUGE-L F1:" in text and "![ROUGE-L F1 on the rows" in text


def test_only_measured_figures(facts):
    scores = {"forget": {"rougeL_recall": Estimate(0.25), "probability": Estimate(float("nan"))}}
    results = Results("m", "d", {}, [Run("mdu", 0.0, scores, {"forget": 4})])
    card = unlearned_model_card(facts, results)
    types = [m["type"] for r in metadata(card)["model-index"][0]["results"] for m in r["metrics"]]
    assert types == ["rougeL_recall"]
    assert (
        "0.250" in card.text
        and "| nan" not in card.text
        and "| 0.000 " not in card.text
        and "truth_ratio" not in card.text
    )
    assert "What was kept was not measured." in card.text and "base |" not in card.text
    without = unlearned_model_card(facts)
    assert "model-index" not in metadata(without) and "nothing is known here" in without.text


@pytest.fixture
def recovery():
    def of(base, never, one):
        ends = {
            name: Outcome(Estimate(0.5), Estimate(end)) for name, end in (("base", base), ("never trained", never))
        }
        recovery = None if one is None else Estimate(one, one - 0.1, one + 0.1)
        return AttackOutcome("what it does", 16, ends | {"mdu tau=0": Outcome(Estimate(0.0), Estimate(0.3), recovery)})

    attacks = {"none": of(1.0, 0.0, 0.9), "prefix": of(0.9, 0.1, 0.25), "sampling": of(0.8, 0.1, 0.125)}
    return Recovery("d", {}, attacks | {"flat": of(0.5, 0.5, None)})


def test_attacks_are_in_the_limits(facts, results, recovery):
    limits = unlearned_model_card(facts, results, recovery=recovery).text.partition("## Limits")[2]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in limits.splitlines() if line[:1] == "|"]
    assert lines[0] == ["attack", "what it does", "base", "never trained", "this model", "recovery"]
    assert lines[3] == ["prefix", "what it does", "0.900", "0.100", "0.300", "0.250 [0.150, 0.350]"]
    assert lines[5][-1] == "", "what is undefined is left out"
    assert "the strongest here, prefix, reached 0.250 [0.150, 0.350]." in limits
    assert "What was tried is in the table of attacks below" in limits and "none of these was tried" not in limits


def test_attacks_without_a_model_that_never_saw_the_rows(facts, recovery):
    def without(outcome):
        models = {name: replace(one, recovery=None) for name, one in outcome.models.items() if name != "never trained"}
        return replace(outcome, models=models)

    recovery = replace(recovery, attacks={name: without(outcome) for name, outcome in recovery.attacks.items()})
    limits = unlearned_model_card(facts, recovery=recovery).text.partition("## Limits")[2]
    assert "| this model |" in limits and "| recovery |" not in limits and "strongest" not in limits
    assert "No model that never saw the rows was attacked beside it" in limits


def test_membership_in_both_directions_is_a_further_sentence(facts, results, recovery):
    assert "Membership, where" not in unlearned_model_card(facts, results, recovery=recovery).text
    areas = dict(zip(recovery.attacks["none"].models, (1.0, 0.5625, 0.875), strict=True))
    models = {
        name: replace(one, path={"two_sided": areas[name]}) for name, one in recovery.attacks["none"].models.items()
    }
    attacks = recovery.attacks | {"membership": replace(recovery.attacks["none"], models=models)}
    changed = replace(recovery, attacks=attacks)
    words = "Membership, where rows that became too unlikely tell as well (0.5 is a guess): base 1.000, "
    words += "never trained 0.562, "
    assert f"{words}this model 0.875. Scores are" in unlearned_model_card(facts, results, recovery=changed).text
    assert f"{words}mdu tau=0 0.875." in changed.text() and changed.two_sided() == areas
    assert changed.table_cells()[0] == recovery.table_cells()[0] and "Membership" not in recovery.text()


def test_attacks_on_other_models(facts, recovery):
    with pytest.raises(ValueError, match="The checkpoint is npo, and the attacks were on mdu tau=0"):
        unlearned_model_card(replace(facts, method="npo", tau=None), recovery=recovery)


def test_attacks_of_the_folder(facts, results, recovery, tmp_path):
    folder = Path(shutil.copytree(DEMO, tmp_path / "run"))
    recovery.save(folder / "recovery.json")
    assert "### Attacks" in write_model_card(folder).text
    beside = (folder / "tradeoff.png").read_bytes()
    assert "### Attacks" not in write_model_card(folder, recovery=False).text
    assert beside != (folder / "tradeoff.png").read_bytes(), "attacks are drawn beside the trade-off"
    with pytest.raises(FileNotFoundError, match="no recovery file"):
        write_model_card(folder, recovery=folder / "nothing.json")
    with pytest.raises(UserError, match="repeat the attacks"):
        main([str(folder), "--recovery", str(folder / "results.json")])


def test_a_model_that_never_saw_the_rows_has_its_column(facts, results):
    others = [run for run in results.runs if run.method != "retain model"]
    assert len(others) == len(results.runs) - 1
    absent = unlearned_model_card(facts, replace(results, runs=others)).text
    present = unlearned_model_card(facts, results).text
    assert "No model that never saw the rows" in absent and "retain model |" not in absent
    assert "No model that never saw the rows" not in present and "retain model |" in present


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_has_its_words(facts, method):
    tau = 0.5 if method == "mdu" else None
    card = unlearned_model_card(replace(facts, method=method, tau=tau, retain=None, options={"retain_weight": 0.0}))
    assert OBJECTIVES[method].title in card.text and f"arXiv {OBJECTIVES[method].arxiv}" in card.text
    assert ("tau = 0.5" in card.text) == (method == "mdu")
    assert "no rows were trained to be kept" in card.text and "None" not in card.text and "{{" not in card.text


def test_a_counterfactual_anchor_is_explained_as_such(facts, results):
    options = facts.options | {"anchor_input": "counterfactual", "strike_quantile": 0.5}
    changed = replace(facts, tau=1.0, options=options, training=facts.training | {"preset": "lasting"})
    run = next(run for run in results.runs if run.tau == 1.0)
    both = replace(results, runs=[*results.runs, replace(run, settings={"preset": "lasting"})])
    assert chosen_run(both, changed).name == changed.name == "mdu tau=1 preset=lasting"
    assert chosen_run(both, replace(facts, tau=1.0)).name == "mdu tau=1"
    text = unlearned_model_card(changed, both).text
    assert "Masked Diffusion Unlearning with a counterfactual anchor" in text and "strike}_{y_i}" in text
    assert "x' and y'_t the input described above" in text and "a prompt of masks only" not in text
    assert "strike}_{y_i}" not in unlearned_model_card(facts, results).text


def test_paths_of_the_machine_are_not_shown(facts, results, tmp_path):
    facts = replace(facts, base_path=str(tmp_path))
    for name in (f"{tmp_path} forget01", "../shared/data forget01", "~/data forget01"):
        text = str(unlearned_model_card(facts, replace(results, dataset=name, model=str(tmp_path))))
        assert str(tmp_path) not in text and "shared" not in text and "~/data" not in text
        assert "a local data set forget01" in text and "datasets:" not in text


def test_results_of_another_model(facts, results):
    with pytest.raises(ValueError, match="mdu tau=0.25, of which the results have 0 runs"):
        unlearned_model_card(replace(facts, tau=0.25), results)


def test_command_line(tmp_path, capsys):
    shutil.copytree(DEMO, tmp_path / "run")
    assert main([str(tmp_path / "run"), "--license", "mit"]) == 0
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "mit" and (tmp_path / "run" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "](tradeoff.png)" in card.text and "| forget | rougeL_recall " in card.text
    assert run(lambda: main([str(tmp_path)])) == 2
    assert "holds no unlearning.json" in capsys.readouterr().err


def test_card_needs_no_matplotlib(facts, results, monkeypatch):
    monkeypatch.setattr("mdu_trainer.report.model_card.find_spec", lambda name: None)
    assert draw_picture(results) is None


def test_template_of_an_installed_package(tmp_path):
    """Inside the package, where a wheel puts it."""
    package = tmp_path / "mdu_trainer"
    shutil.copytree(ROOT / "mdu_trainer", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "model_cards", package / "model_cards")
    code = "from mdu_trainer.report.model_card import template_path; print(template_path())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(package / "model_cards" / template_path().name)


def test_facts_hold_no_path_that_is_published(facts):
    assert "path" not in json.dumps(metadata(unlearned_model_card(facts)))


# Others' text stays text

INJECTIONS = [
    '<script>alert("x")</script>',
    '<img src="http://evil.invalid/a.png" onerror="x()">',
    "<!-- hidden --> &lt;b&gt; &copy; &#60;i&#62;",
    "</td></table><h1>over</h1>",
    "[click](http://evil.invalid)",
    "![pixel](https://evil.invalid/p.png)",
    "see http://evil.invalid and www.evil.invalid or a@evil.invalid",
    "<http://evil.invalid> [ref]: http://evil.invalid",
    "a | b || c \\| d",
    "`code` ``two`` ```",
    "first\n\n# heading\n\n- item\n\n```\nfence\n```\n> quote",
    "first\n---\nlicense: mit\n---\nkey: &anchor *alias",
    "*one* **two** _three_ __four__ ~~five~~ \\*six",
    "{{ 7 * 7 }} {% raw %} ${x} $$y^2$$ {# note #}",
    "left \u202egnp.exe\u202c \u2066right\u2069 \u200fend",
    "1. one",
    "+ plus",
    "# hash #",
    "C:\\temp\\",
]
READ = {"html": True}  # as the Hub renders a card: HTML in it is HTML


def as_typed(text):
    return " ".join("".join(c for c in text if c not in "\u202e\u202c\u2066\u2069\u200f").split())


def rendered(card):
    """The card's body as HTML: its elements in order, and its text."""
    page = Elements()
    page.feed(MarkdownIt("commonmark", READ).enable(["table", "strikethrough"]).render(ModelCard(str(card)).text))
    return page


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))

    def handle_comment(self, data):
        self.found.append(("comment",))

    def handle_data(self, data):
        self.text += data


def filled(text, facts, results, recovery):
    """A card with the same text in every field that takes one; names that look up something have it behind them."""
    facts = replace(
        facts,
        description=None,
        forget=replace(facts.forget, name=text),
        retain=replace(facts.retain, split=text),
        versions={"mdu_trainer": text, text: text},
        training=facts.training | {text.replace("_", " "): text, "optimizer": text},
        options=facts.options | {text: text},
        base_revision=text,
        base_model=text,
        adapter={"type": text, "r": 4},
    )
    runs = [
        replace(
            run,
            scores=run.scores | {text: {text: Estimate(0.5)}},
            rows=run.rows | {text: 3},
            summary=run.summary | {text: Estimate(0.25)},
            settings={"note": text} if run.method == "mdu" else {},
        )
        for run in results.runs
    ]
    recovery = replace(recovery, attacks={text: replace(next(iter(recovery.attacks.values())), words=text)})
    details = {"language": text, "license": text, "tags": [text], "datasets": text, "model_name": text}
    details |= {"request_id": text, "request_date": text}
    details = CardDetails(**details, repo_id=f"org/{text}", revision=text)
    results = replace(results, dataset=f"data {text}", runs=runs)
    return unlearned_model_card(facts, results, recovery, details, picture=f"{text}.png", adapter=True, decodes=True)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("after", ["", "word "])
def test_text_is_text_everywhere(facts, results, recovery, injection, after, monkeypatch):
    monkeypatch.setattr("mdu_trainer.report.model_card.base_metadata", lambda *_: {})
    recovery = replace(recovery, attacks={"prefix": recovery.attacks["prefix"]})
    results = replace(results, runs=[run for run in results.runs if run.tau in (None, 0.0)])
    text = after + injection
    card, harmless = (filled(part, facts, results, recovery) for part in (text, "something"))
    shown, expected = rendered(card), rendered(harmless)
    assert [found[0] for found in shown.found if found[0] != "a"] == [e[0] for e in expected.found if e[0] != "a"]
    assert [found for found in shown.found if found[0] == "a"] == [("a", "href")] * 2, "to the paper and the limits"
    (words, snippet), (wanted, _) = (without_snippet(page.text) for page in (shown, expected))
    as_harmless = words.replace(as_typed(text), "something")
    as_harmless = as_harmless.replace(as_typed(text.replace("_", " ")), "something")  # the name of an option
    assert as_harmless == wanted and wanted.count("something") > 20
    strings = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert strings.count(text) == 6 and f"org/{text}" in strings
    data = metadata_of(card)
    for name in ("language", "license", "model_name", "base_model"):
        assert data.get(name, text) == text
    assert text in data["tags"] and data["datasets"] == [text]


def without_snippet(text):
    """The text of a card in one line, and the code in it."""
    before, _, rest = text.partition("from peft")
    code, _, after = rest.partition("print(")
    return " ".join(f"{before} {after}".split()), f"from peft{code}"


def metadata_of(card):
    return ModelCard(str(card)).data.to_dict()


def test_a_description_is_text(facts):
    for injection in INJECTIONS:
        shown = rendered(unlearned_model_card(facts, details=CardDetails(description=injection)))
        assert shown.found == rendered(unlearned_model_card(facts, details=CardDetails(description="something"))).found
        assert as_typed(injection).rstrip(".") in " ".join(shown.text.split())


def test_ordinary_names_are_left_as_they_are():
    for name in (
        "rougeL_recall",
        "fictional authors (embedded)",
        "mdu tau=0.5 lr=1e-05",
        "2.13.0+cpu",
        "-0.5",
        "a.b, c",
    ):
        assert markdown_text(name) == name
    assert markdown_code("a`b") == "``a`b``" and markdown_code("") == "`  `"
