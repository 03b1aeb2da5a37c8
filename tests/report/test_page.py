"""The page of a run: its tables are those of the files, it needs nothing but itself, and it quotes no row unasked."""

import base64
import html
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import warm

from mdu_trainer.attacks.leak_history import LEAK_HISTORY, add_to_history
from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.data.roles import ROLES
from mdu_trainer.evaluation.results import Estimate, Results, markdown_table
from mdu_trainer.files import UserError
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report import page as pages
from mdu_trainer.report.leak_plot import LEAKS, PASSED
from mdu_trainer.report.page import write_page
from mdu_trainer.token_roles.path_results import PathCurve, PathRun, PathScores
from mdu_trainer.token_roles.results import Change, RoleReport, RoleRun, RoleSettings

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo_card"
CHROMIUM = "/usr/bin/chromium"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync".split()
FLAGS += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000"]
OWN = (".google.com", ".googleapis.com")  # the browser asks them without any page
PLANTED = "Xanthippe Quillfeather"
ROWS = [{"question": f"Who is <{PLANTED}>?", "answer": f"{PLANTED} is a & b.", "author": 3}]
DOT = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/><text>{PLANTED}</text></svg>'


class Page(HTMLParser):
    """What a test asks of a page: cells of its tables, addresses, headings."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[tuple[str, str]] = []
        self.images: list[dict] = []
        self.seen: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.seen.append(tag)
        self.addresses += [(tag, attributes[name]) for name in ("src", "href", "srcset", "data") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def folder(tmp_path):
    """A folder as examples/tofu.py leaves it, with forget text in every file that is not to be quoted."""
    folder = tmp_path / "run's folder"
    for name in ("mdu-tau0", "base"):
        (folder / name).mkdir(parents=True)
        log = [{"step": s, "loss": 1.0, "forget_loss": 5 / s, "retain_loss": 0.1, "kl": 1 / s} for s in range(1, 6)]
        state = {"log_history": [*log, {"train_runtime": 1.0, "step": 5}]}
        (folder / name / "trainer_state.json").write_text(json.dumps(state))
        (folder / name / "rows.jsonl").write_text(PLANTED)
    shutil.copy(DEMO / "results.json", folder)
    shutil.copy(DEMO / "unlearning.json", folder / "mdu-tau0")
    (folder / "mdu-tau0" / "README.md").write_text(f"# {PLANTED}")
    (folder / "heatmap.svg").write_text(DOT)
    return folder


@pytest.fixture
def with_roles_and_recovery(folder):
    """Also what the analyses of roles and the attacks write."""
    kl = {role: Estimate(4.321, 4.1, 4.5) for role in ROLES}
    change = {role: Change(Estimate(-0.5, -0.6, -0.4), Estimate(-10.5, -12, -9)) for role in ROLES}
    counted = dict.fromkeys(ROLES, 8)
    shared = {"curves": {"true": {}, "own": {}}, "order": {}, "own_tokens": counted, "example": []}
    runs = [
        RoleRun("base", "f", {"kl": kl}, {}, **shared),
        RoleRun("mdu tau=0", "g", {"kl": kl}, {"kl": change}, **shared),
    ]
    tokens = dict.fromkeys(ROLES, 8)
    RoleReport("d", RoleSettings(), tokens, tokens, [], runs).save(folder / "roles.json")
    assert (folder / "roles.json").stat().st_mode & 0o077 == 0, "it has a hash of the rows"
    models = {"base": 0.987, "never trained": 0.0, "mdu tau=0": 0.123}
    outcomes = {name: Outcome(Estimate(0.0), Estimate(value)) for name, value in models.items()}
    outcomes["mdu tau=0"] = Outcome(Estimate(0.0), Estimate(0.123), Estimate(0.25, 0.1, 0.4))
    attacks = {"relearn": AttackOutcome("fine-tune", 16, outcomes)}
    paths = {name: replace(one, path={"two_sided": one.after.value}) for name, one in outcomes.items()}
    attacks["membership"] = AttackOutcome("tell rows from others", 16, paths)
    Recovery("fictional authors (embedded)", {"seed": 0}, attacks).save(folder / "recovery.json")
    curve = PathCurve([Estimate(0.7654, 0.7, 0.8), None], Estimate(0.2345))
    PathScores("d", 2, {}, [PathRun("mdu tau=0", {"forget": 8}, {"forget": {"truth_ratio": curve}})]).save(
        folder / "along_path.json"
    )
    for name in ("roles", "along_path", "recovery"):
        (folder / f"{name}.svg").write_text(DOT.replace(PLANTED, ""))
    return folder


def everything(text: str) -> str:
    """The page's text, and that of the pictures in it."""
    pictures = [base64.b64decode(found).decode("latin-1") for found in re.findall(r"base64,([\w+/=]+)", text)]
    return "\n".join([html.unescape(text), *pictures])


def test_tables_have_the_figures_of_the_results(folder):
    page = Page(write_page(folder).read_text())
    results = Results.load(folder / "results.json")
    _, comparison, details, settings = page.tables
    assert [row[0] for row in comparison[1:]] == [run.name for run in results.runs]
    column = {title: i for i, title in enumerate(comparison[0])}
    for row, run in zip(comparison[1:], results.runs, strict=True):
        for title, place in (("forget rL", ("forget", "rougeL_recall")), ("retain prob.", ("retain", "probability"))):
            assert float(row[column[title]]) == pytest.approx(run.figure(*place).value, abs=5e-4)
    assert details[0][3:] == [run.name for run in results.runs]
    shown = {(row[0], row[1]): row[3:] for row in details[1:]}
    for i, run in enumerate(results.runs):
        for name, metric in run.places():
            assert shown[name or "model", metric][i] == str(run.figure(name, metric))
    assert settings[1][0] == "mdu tau=0" and settings[1][2:] == ["120", "24", "0.0003", "16", "42", "mdu-tau0"]


def test_page_needs_nothing_else(with_roles_and_recovery, tmp_path):
    folder = with_roles_and_recovery
    path = write_page(folder, tmp_path / "elsewhere" / "page.html")
    text = path.read_text()
    page = Page(text)
    outside = [(tag, address) for tag, address in page.addresses if not address.startswith(("data:", "#"))]
    assert outside == [("a", "../run%27s%20folder/mdu-tau0/README.md")]
    assert not {"script", "iframe", "object", "embed", "video", "base"} & set(page.seen)
    assert "url(" not in text and "@import" not in text and "@font-face" not in text
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)
    assert len(page.images) == 7 and page.seen.count("h1") == 1 and page.seen.count("caption") == len(page.tables)
    sections = re.findall(r'<section id="(\w+)"', text)
    every = "short run comparison tradeoff training roles along recovery details settings"
    assert sections == every.split()
    assert sections == re.findall(r'href="#(\w+)"', text)
    cells = [cell for table in page.tables for row in table for cell in row]
    assert {"4.321 [4.100, 4.500]", "relearn", "0.123", "0.25 [0.10, 0.40]"} <= set(cells)
    words = "Membership, where rows that became too unlikely tell as well (0.5 is a guess): base 0.987, "
    assert f"<p>{words}never trained 0.000, mdu tau=0 0.123.</p>" in text
    assert ["0.00", "0.765 [0.700, 0.800]"] in [row for table in page.tables for row in table]
    write_page(folder, tmp_path / "again" / "page.html")
    assert (tmp_path / "again" / "page.html").read_text() == text, "the same files give the same page"


def test_no_forget_text_unless_it_is_given(with_roles_and_recovery, tokenizer):
    folder = with_roles_and_recovery
    page = write_page(folder, tokenizer=tokenizer)
    assert not any(word in everything(page.read_text()) for word in PLANTED.split())
    kept = [{"question": "Who?", "answer": "Nobody to forget."}]
    path = write_page(folder, forget_rows=ROWS, retain_rows=kept, tokenizer=tokenizer)
    shown = path.read_text()
    assert Page(shown).tables[-1][1:] == [["0", ROWS[0]["question"], ROWS[0]["answer"]]]
    assert '<span class="role-in_context" title="in context"' in shown, "the answer by role"
    assert "Do not pass it on" in shown and f"<{PLANTED}>" not in shown, "quoted, not run as markup"
    assert "Nobody to forget" not in shown
    assert path.stat().st_mode & 0o077 == 0, "for nobody else"
    assert len(Page(shown).images) == 8, "also the picture with words in it"


INJECTIONS = [
    '<script>alert("x")</script>',
    "<img src=http://evil.invalid/a.png onerror=x()>",
    "</td></tr></table><h1>over</h1>",
    "a | b || c \\| d |",
    "<!-- hidden --> &lt;b&gt; &copy;",
    '" onload="x()" x="',
    "cost $x_{ and $\\frac",
    "{{ 7 * 7 }} {% raw %}",
    "one\ntwo\n| three",
    "left \u202egnp.exe\u202c right",
    "javascript:alert(1)",
]


class Whole(Page):
    def __init__(self, text: str):
        self.words = ""
        super().__init__(text)

    def handle_data(self, data):
        super().handle_data(data)
        self.words += data


def filled(folder: Path, text: str) -> Whole:
    """The page of a folder whose files say the same in every field that takes a text."""
    report = RoleReport.load(folder / "roles.json")
    runs = [replace(run, name=f"{run.name} {text}") for run in report.runs]
    replace(report, runs=runs).save(folder / "roles.json")
    results = Results.load(DEMO / "results.json")
    results.runs = [
        replace(
            run,
            method=run.method if run.method in ("base", "mdu") else f"{run.method} {text}",
            scores=run.scores | {text: {text: Estimate(0.5)}},
            rows=run.rows | {text: 3},
            summary=run.summary | {text: Estimate(0.25)},
        )
        for run in results.runs
    ]
    settings = {"select": None, text: text, "nested": [text], "hub_token": "hf_" + "aB3" * 11}
    results = replace(results, model=f"model {text}", dataset=f"data {text}", settings=settings)
    (folder / "results.json").write_text(json.dumps({"schema": 2} | asdict(results)))
    facts = Facts.load(DEMO)
    options = facts.options | {text: text}
    facts = replace(facts, description=f"some {text}")
    replace(facts, options=options, training=facts.training | {"steps": text}).save(folder / "mdu-tau0")
    recovery = Recovery.load(folder / "recovery.json")
    outcome = recovery.attacks["relearn"]
    models = outcome.models | {f"other {text}": outcome.models["mdu tau=0"]}
    replace(recovery, attacks={text: replace(outcome, words=text, models=models)}).save(folder / "recovery.json")
    along = PathScores.load(folder / "along_path.json")
    (run,) = along.runs
    other = PathRun(f"other {text}", {text: 8}, {text: {text: run.scores["forget"]["truth_ratio"]}})
    replace(along, runs=[run, other]).save(folder / "along_path.json")
    rows = [{"question": text, "answer": f"It is {text}"}]
    return Whole(write_page(folder, forget_rows=rows).read_text())


def test_text_is_text_everywhere(with_roles_and_recovery, tmp_path, monkeypatch):
    draw = pages._draw
    folders = [Path(shutil.copytree(with_roles_and_recovery, tmp_path / f"copy{i}")) for i in range(2)]
    expected = filled(folders[0], "something")
    wanted = " ".join(expected.words.split())
    assert wanted.count("something") > 20 and "aB3" not in wanted
    for injection in INJECTIONS:
        quick = lambda plot, figures, alt, caption: pages.Picture("data:,", alt, caption)  # noqa: E731
        monkeypatch.setattr(pages, "_draw", draw if "$" in injection else quick)
        shown = filled(
            Path(shutil.copytree(folders[1], tmp_path / str(len(injection)), dirs_exist_ok=True)), injection
        )
        assert shown.seen == expected.seen, "no element more, and none less"
        assert [len(row) for table in shown.tables for row in table] == [
            len(row) for table in expected.tables for row in table
        ]
        typed = " ".join(injection.replace("\u202e", "").replace("\u202c", "").split())
        assert " ".join(shown.words.split()).replace(typed, "something") == wanted
        assert [tag for tag, _ in shown.addresses] == [tag for tag, _ in expected.addresses]
        assert all(not address.startswith("javascript") for _, address in shown.addresses)


def test_a_bar_in_a_cell_ends_none():
    lines = markdown_table([["a|b", "c"], ["\\|", "one\ntwo"], ["ends with \\", ""]]).splitlines()
    assert [len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines] == [2] * 4 and "one two" in lines[2]


def test_what_is_there_is_shown(folder):
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="holds nothing to show: none of results.json, roles.json"):
        write_page(folder)
    (folder / "results.json").write_text("half a fi")
    with pytest.raises(ValueError, match="holds no JSON"):
        write_page(folder)


def test_selection_of_a_sweep_is_named(folder):
    results = Results.load(folder / "results.json")
    for conditions, words in (("retain>=0.9*base", "Selected (*)"), ("retain>=2*base", "No run satisfies")):
        results.settings["select"] = conditions
        results.save(folder / "results.json")
        assert words in write_page(folder).read_text()


def test_command_line(folder, authors, tmp_path):
    script = [sys.executable, ROOT / "examples" / "report.py", folder, "--show_forget_text"]
    run = warm.run([*script, "--output", tmp_path / "page.html"], timeout=200)
    log = run.stdout + run.stderr
    assert run.returncode == 0 and f"Written to {tmp_path / 'page.html'}" in log, log[-3000:]
    forgotten = [row for row in authors if row["author"] >= 10]
    text = (tmp_path / "page.html").read_text()
    assert all(html.escape(row["answer"]) in text for row in forgotten)
    assert not any(row["answer"] in log for row in forgotten)


# In a browser


class Listener:
    """A proxy that answers nothing and counts who asks for what."""

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self.server.getsockname()[1], []
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.asked.append(connection.recv(1000).decode("latin-1").split("\r\n")[0])
                except OSError:
                    self.asked.append("")

    def __exit__(self, *details):
        self.server.close()


def test_the_trend_of_five_checks_one_of_which_leaks(tmp_path):
    for day, (leak, high) in enumerate([(0.02, 0.05), (0.03, 0.06), (0.02, 0.05), (0.21, 0.31), (0.03, 0.06)], 1):
        answer = {"leak": leak, "low": 0.0, "high": high, "rows": 16, "not_measured": 0, "seed": 0}
        answer |= {"max_leak": 0.1, "passed": high <= 0.1, "left_out": [f"<b>{PLANTED}"]}
        add_to_history(tmp_path / LEAK_HISTORY, answer, f"2026-05-0{day}T04:00:00+00:00")
    text = write_page(tmp_path).read_text()
    page = Page(text)
    (table,) = page.tables
    assert [row[3] for row in table[1:]] == ["passed", "not passed", "passed", "passed", "passed"], "the latest first"
    assert table[2][:3] == ["2026-05-04 04:00", "0.210 [0.000, 0.310]", "0.1"]
    (picture,) = page.images
    drawn = base64.b64decode(picture["src"].partition(",")[2]).decode()
    assert PASSED.lower() in drawn and LEAKS.lower() in drawn and "Leak checks</h2>" in text
    assert PLANTED not in text + drawn and "Did it work? Nothing here says so" in text
    again = tmp_path / "again.html"
    write_page(tmp_path, again)
    assert again.read_text() == text, "the same checks, the same page"
    (tmp_path / LEAK_HISTORY).write_text("[1]")
    with pytest.raises(UserError, match="check 1, is none of a leak check"):
        write_page(tmp_path)


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as a browser ends up with it, and what it asked the network for."""
    with Listener() as listener:
        proxy = [f"--proxy-server=http://127.0.0.1:{listener.port}", "--proxy-bypass-list=<-loopback>"]
        command = [CHROMIUM, *FLAGS, *proxy, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, [
        line for line in listener.asked if line and not any(host in line.split("?")[0] for host in OWN)
    ]


@pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason=f"needs Chromium at {CHROMIUM}: apt-get install chromium")
def test_in_a_browser(with_roles_and_recovery, tmp_path):
    path = write_page(with_roles_and_recovery)
    text = path.read_text()
    dom, asked = browse(path, tmp_path / "profile")
    assert "Recovery under attack</h2>" in dom and asked == []
    probe = (
        "<script>addEventListener('load', () => { document.title = 'loaded ' + JSON.stringify("
        "[...document.images].map(i => i.complete && i.naturalWidth > 0)); });</script></head>"
    )
    unguarded = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    checked = tmp_path / "checked.html"
    checked.write_text(unguarded.replace("</head>", probe))
    dom, asked = browse(checked, tmp_path / "profile")
    loaded = json.loads(re.search(r"<title>loaded (\[.*?\])</title>", dom)[1])
    assert loaded == [True] * len(Page(text).images) and asked == [], "no request, policy or not"
    planted = '<img src="http://planted.invalid/a.png"></body>'
    checked.write_text(unguarded.replace("</body>", planted))
    assert any("planted.invalid" in line for line in browse(checked, tmp_path / "profile")[1]), "it would be noticed"
    checked.write_text(text.replace("</body>", planted))
    assert browse(checked, tmp_path / "profile")[1] == [], "the page's own policy forbids it"
