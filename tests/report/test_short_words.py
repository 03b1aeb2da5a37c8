"""The card in short and the certificate: what was asked for, before and after, one verdict, no markup of others."""

import hashlib
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_page import CHROMIUM, browse

from mdu_trainer.attacks.leak_history import LEAK_HISTORY, add_to_history
from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.commands.model_card import main
from mdu_trainer.evaluation.results import Estimate, Results
from mdu_trainer.files import UserError
from mdu_trainer.provenance.facts import Facts, Seal
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.report.certificate import CERTIFICATE, write_certificate
from mdu_trainer.report.model_card import unlearned_model_card, write_model_card
from mdu_trainer.report.page import write_page
from mdu_trainer.report.verdicts import told_apart

DEMO = Path(__file__).resolve().parents[1] / "demo_card"
IMAGE = '<img src=x onerror="document.title=1">'
POISON = f'"><script>document.title = "owned"</script>{IMAGE} [a](javascript:b) | *c* {{{{ 7*7 }}}}'
REQUEST = {"request_id": "A-17", "request_date": "2026-05-01"}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with its records, and a file of weights."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_card_begins_with_it(folder):
    text = write_model_card(folder, **REQUEST).text
    short = text.partition("## In short\n")[2].partition("\n## ")[0]
    assert (
        "(16 rows); request A-17 of 2026-05-01." in short and "**Forgotten?** Over-forgotten. forget rL 0.073" in short
    )
    assert (
        "told apart from a model that never saw the rows in 3 of 16 attacks (relearn-related, infill-random" in short
    )
    assert re.search(r"\| rows to keep \(80\) +\| 1.000 \[1.000, 1.000\] \| 0.999 ", short)
    assert "degenerate answers on the rows to forget 0.125" in short and len(text.partition("## In short")[0]) < 400
    assert len(short.splitlines()) < 16, "one screen"


def test_no_heading_is_empty(folder):
    facts = Facts.load(folder)
    for card in (
        write_model_card(folder),
        unlearned_model_card(facts),
        unlearned_model_card(replace(facts, retain=None)),
    ):
        headings = [line for line in card.text.splitlines() if line.startswith("#")]
        parts = re.split(r"^#+ .*$", card.text, flags=re.M)[1:]
        assert headings[0].startswith("# ") and all(part.strip() for part in parts[1:]), headings
        assert "license: null" not in str(card) and "language: null" not in str(card)
    assert "Whether it worked is not known here" in unlearned_model_card(facts).text


def test_the_title_is_the_name_of_the_repository(folder):
    assert write_model_card(folder, repo_id="ORG/some_model").text.split("\n\n")[0].strip() == "# some_model"


def outcome(after, never):
    estimates = {"base": Estimate(1.0), "never trained": never, "mdu tau=0": after}
    return AttackOutcome("w", 16, {name: Outcome(Estimate(0.0), one) for name, one in estimates.items()})


def test_told_apart_by_the_rule():
    near, far, below = Estimate(0.3, 0.1, 0.5), Estimate(0.6, 0.5, 0.7), Estimate(0.1, 0.05, 0.12)
    level = Estimate(0.35, 0.25, 0.45)
    attacks = {
        "none": outcome(far, level),
        "a": outcome(near, level),
        "b": outcome(far, level),
        "c": outcome(below, level),
    }
    assert told_apart(Recovery("d", {}, attacks), "mdu tau=0").endswith("in 2 of 3 attacks (b, c).")
    some = {name: attacks[name] for name in ("none", "a")}
    assert told_apart(Recovery("d", {}, some), "mdu tau=0").endswith("in none of 1 attack.")
    assert told_apart(None, "mdu tau=0").startswith("No attack was run")
    alone = replace(attacks["a"], models={n: o for n, o in attacks["a"].models.items() if n != "never trained"})
    assert "not known whether it can be told apart" in told_apart(Recovery("d", {}, {"a": alone}), "mdu tau=0")


class Words(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_the_certificate_says_the_same(folder, capsys):
    assert main([str(folder), "--certificate", "--request-id", "A-17", "--request-date", "2026-05-01"]) == 0
    said = capsys.readouterr().out
    assert "It names no license and no language: pass --license and --language." in said and CERTIFICATE in said
    page = Words((folder / CERTIFICATE).read_text())
    card = ModelCard.load(folder / "README.md").text
    sentence = "It can be told apart from a model that never saw the rows in 3 of 16 attacks"
    assert sentence in page.text and sentence in card and "A-17" in page.text and "2026-05-01" in page.text
    assert hashlib.sha256(b"weights").hexdigest() in page.text and "model.safetensors" in page.text
    assert "Not promised" in page.text and "relearn-related" in page.text and "(16 rows)" in page.text
    assert not {"script", "img", "a"} & set(page.tags)
    first = write_certificate(folder, issued="2026-05-02", **REQUEST).read_text()
    assert first == write_certificate(folder, issued="2026-05-02", **REQUEST).read_text() and "2026-05-02" in first


def test_a_certificate_of_no_weights_or_with_a_quote(folder):
    sentence = "Ada Quill grew up beside the old harbour of Velm."
    hashes = ForgetHashes.of([sentence])
    hashes.save(folder)
    replace(Facts.load(folder), hashes=Seal.of(hashes)).save(folder)
    with pytest.raises(UserError, match="would quote rows that were to be forgotten. It was not written") as failure:
        write_certificate(folder, description=f"She said: {sentence}")
    assert "Quill" not in str(failure.value) and not (folder / CERTIFICATE).exists()
    write_certificate(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        write_certificate(folder)


@pytest.fixture
def poisoned(folder):
    """The folder with others' text wherever text is read from; its card and its two pages."""
    facts = Facts.load(folder)
    forget = replace(facts.forget, name=POISON)
    changed = replace(facts, forget=forget, description=None, versions=facts.versions | {POISON: POISON})
    replace(changed, training=facts.training | {POISON: POISON}, base_model=POISON).save(folder)
    results = Results.load(folder / "results.json")
    runs = [
        replace(run, rows=run.rows | {POISON: 1}, summary=run.summary | {POISON: Estimate(0.5)})
        for run in results.runs
    ]
    replace(results, dataset=f"data {POISON}", runs=runs, settings={POISON: POISON}).save(folder / "results.json")
    recovery = Recovery.load(folder / "recovery.json")
    attacks = recovery.attacks | {POISON: replace(recovery.attacks["relearn-related"], words=POISON)}
    replace(recovery, attacks=attacks, dataset=POISON).save(folder / "recovery.json")
    answer = {
        "leak": 0.5,
        "low": 0.4,
        "high": 0.6,
        "rows": 3,
        "not_measured": 0,
        "left_out": [POISON],
        "checks": {POISON: 1},
    }
    add_to_history(folder / LEAK_HISTORY, answer | {"max_leak": 0.1, "passed": False, "seed": 0})
    details = {"repo_id": f"org/{POISON}", "request_id": POISON, "request_date": POISON, "license": POISON}
    (folder / "README.md").unlink(missing_ok=True)
    certificate = write_certificate(folder, model_name=POISON, **details)
    return write_page(folder), certificate


def test_a_poisoned_field_is_text_in_both_pages(poisoned):
    for path in poisoned:
        page = Words(path.read_text())
        assert "script" not in page.tags and "onerror" not in page.attributes
        assert page.text.count(IMAGE) > 2 and "{{ 7*7 }}" in page.text


@pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason=f"needs Chromium at {CHROMIUM}: apt-get install chromium")
def test_a_poisoned_field_is_text_in_a_browser(poisoned, tmp_path):
    for path in poisoned:
        text = path.read_text()
        unguarded = tmp_path / f"unguarded-{path.name}"
        unguarded.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
        for one in (path, unguarded):
            dom, asked = browse(one, tmp_path / "profile")
            page = Words(dom)
            assert "script" not in page.tags and "onerror" not in page.attributes and asked == []
            assert re.search(r"<title>(.*?)</title>", dom)[1].startswith(("Unlearning report", "Record of unlearning"))
            assert IMAGE in page.text
