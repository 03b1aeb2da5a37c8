"""Records on disk that are broken: every reader refuses them, names the file and says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from mdu_trainer.attacks import run as attacks
from mdu_trainer.attacks.results import Recovery
from mdu_trainer.commands.training import log_history
from mdu_trainer.data.roles import ROLES
from mdu_trainer.evaluation import runner
from mdu_trainer.evaluation.frontier import select
from mdu_trainer.evaluation.progress import ProgressFile
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.evaluation.tofu import TruthRatios, question_digest
from mdu_trainer.files import UserError
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.token_roles.path_results import PathCurve, PathRun, PathScores
from mdu_trainer.token_roles.results import OWN, TRUE, Change, Curve, RoleReport, RoleRun, RoleSettings

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "demo_card"
WORDS = {"repeat", "again", "delete", "choose", "name a file", "save the model"}  # of what to do
HEADER = {"progress": 1, "model": "f"}
ATTACKS = {"progress": "attacks 1", "rows": "d"}


def role_report() -> RoleReport:
    counts = dict.fromkeys(ROLES, 8)
    means = {"kl": {role: Estimate(1.0, 0.5, 1.5) for role in ROLES}}
    curves = {path: {"kl": {"stored": Curve([1.0, None], [0.1, None])}} for path in (TRUE, OWN)}
    change = {"kl": {role: Change(Estimate(-0.5), None) for role in ROLES}}
    settings = RoleSettings(num_steps=2)
    made = [
        RoleRun(name, "f", means, changes, curves, {"stored": Estimate(0.5)}, counts, [[1.0, None]])
        for name, changes in (("base", {}), ("npo", change))
    ]
    return RoleReport("d", settings, counts, counts, ["stored", "structural"], made)


def path_scores() -> PathScores:
    curve = PathCurve([Estimate(0.5, 0.4, 0.6), None], Estimate(0.25))
    run = PathRun("npo", {"forget": 4}, {"forget": {"probability": curve}}, {"model_utility": curve})
    return PathScores("rows", 2, {"seed": 0}, [run])


def write(kind: str, folder: Path, authors) -> Path:
    """A whole record."""
    path = folder / FILES[kind][0]
    if kind in ("results", "recovery", "facts"):
        shutil.copy(DEMO / path.name, path)
    elif kind == "roles":
        role_report().save(path)
    elif kind == "along path":
        path_scores().save(path)
    elif kind == "truth ratios":
        TruthRatios(question_digest(authors), [0.5] * len(authors)).save(path)
    elif kind == "rows":
        line = {"set": "forget", "row": 0, "figures": {"probability": 0.5, "nothing": float("nan")}, "seconds": 0.1}
        path.write_text("".join(json.dumps(one) + "\n" for one in (HEADER, line)))
    elif kind == "attacks":
        scores = {"rows": [0], "before": [0.1], "after": [0.2], "path": {"1": 0.5}}
        line = {"model": "base", "weights": "f", "attack": "none", "scores": scores, "seconds": 0.1}
        path.write_text("".join(json.dumps(one) + "\n" for one in (ATTACKS, line)))
    else:
        path.write_text(json.dumps({"log_history": [{"loss": 0.5}, {"train_runtime": 1.5}]}))
    return path


def resume(path: Path, header: dict, read) -> None:
    with ProgressFile(path) as progress:
        progress.resume(header, read)


def read_log(path: Path, authors=None) -> list:
    return log_history(path.parent)


FILES = {  # kind -> name of the file, what reads it
    "results": ("results.json", lambda path, authors: Results.load(path)),
    "recovery": ("recovery.json", lambda path, authors: Recovery.load(path)),
    "roles": ("roles.json", lambda path, authors: RoleReport.load(path)),
    "along path": ("along_path.json", lambda path, authors: PathScores.load(path)),
    "facts": ("unlearning.json", lambda path, authors: Facts.load(path.parent)),
    "truth ratios": ("truth_ratios.json", TruthRatios.load),
    "rows": ("rows.jsonl", lambda path, authors: resume(path, HEADER, runner._finished)),
    "attacks": ("attacks.jsonl", lambda path, authors: resume(path, ATTACKS, attacks._finished)),
    "log": ("trainer_state.json", read_log),
}


def places(content, at=()) -> list[tuple]:
    """Every place in a JSON object."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at] * bool(at) + [place for key, part in parts for place in places(part, (*at, key))]


def put(content, place: tuple, value) -> None:
    """Change what lies at a place; without a value, take it away."""
    for key in place[:-1]:
        content = content[key]
    if value is None:
        del content[place[-1]]
    else:
        content[place[-1]] = value[0]


WRONG = {"null": [None], "text": ["x"], "list": [[]], "object": [{"x": 1}], "NaN": [float("nan")], "huge": [10**400]}


@pytest.mark.parametrize("kind", FILES)
def test_broken_files_are_refused(kind, tmp_path, authors):
    """Whole files that are something else."""
    path, (_, read) = write(kind, tmp_path, authors), FILES[kind]
    read(path, authors)
    whole = path.read_bytes()
    broken = {
        "empty": b"" if kind not in ("rows", "attacks") else b"\n",
        "not JSON": b"half a fi\n",
        "a list": b"[1, 2]\n",
        "a number": b"7\n",
        "null": b"null\n",
        "an empty object": b"{}\n",
        "another schema": b'{"schema": 99}\n',
        "a wrong schema": b'{"schema": ["x"]}\n',
        "latin-1": '{"schema": 1, "é": 1}\n'.encode("latin-1"),
        "UTF-16": whole.decode().encode("utf-16") + b"\n",
        "cut short": whole[: len(whole) // 2] + b"\n",
        "zeros": bytes(len(whole)) + b"\n",
        "deep": b"[" * 100_000 + b"\n",
        "many digits": b'{"schema": ' + b"9" * 5000 + b"}\n",
        "more behind": whole.rstrip() + b"}\n",
    }
    for name, content in broken.items():
        path.write_bytes(content)
        refused(read, path, authors, name)
        assert path.read_bytes() == content, f"{name}: it is left as it is"
    path.unlink()
    path.mkdir()
    if kind != "facts":  # where a folder of that name counts as no file
        refused(read, path, authors, "a folder")


def refused(read, path: Path, authors, name: str) -> None:
    with pytest.raises(UserError) as error:
        read(path, authors)
    message = str(error.value)
    assert path.name in message and any(word in message.lower() for word in WORDS), (name, message)


@pytest.mark.parametrize("kind", FILES)
def test_wrong_values_anywhere_are_refused(kind, tmp_path, authors):
    """At every place of a record something of another type, or nothing: read as it was meant, or refused."""
    path, (_, read) = write(kind, tmp_path, authors), FILES[kind]
    lines = path.read_text().splitlines() if kind in ("rows", "attacks") else [path.read_text()]
    refusals = tried = 0
    for place in thinned(places(json.loads(lines[-1]))):
        for value in (None, *WRONG.values()):
            content = json.loads(lines[-1])
            put(content, place, value)
            path.write_text("\n".join([*lines[:-1], json.dumps(content)]) + "\n")
            tried += 1
            try:
                read(path, authors)
            except UserError as error:
                refusals += 1
                assert path.name in str(error), (place, value, error)
    assert refusals > tried / 3, "some places take anything, such as the settings"


def thinned(found: list[tuple], most: int = 25) -> list[tuple]:
    return found[:: -(-len(found) // most)]


def test_records_survive_a_round_trip(tmp_path, authors):
    for kind in ("results", "recovery", "roles", "along path"):
        read, path = FILES[kind][1], write(kind, tmp_path, authors)
        record = read(path, authors)
        record.save(tmp_path / "again.json")
        assert read(tmp_path / "again.json", authors) == record


def test_what_is_not_finite_was_not_measured(tmp_path):
    run = Run(
        "base", None, {"forget": {"a": Estimate(float("nan")), "b": Estimate(0.5, float("-inf"))}}, {"forget": 2}
    )
    Results("m", "d", {"max_grad_norm": float("inf")}, [run]).save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded.runs[0].scores == {"forget": {"b": Estimate(0.5)}} and loaded.settings == {"max_grad_norm": None}


def test_what_contradicts_itself_is_refused(tmp_path, authors):
    path, cases = tmp_path / "record.json", []
    recovery = json.loads((DEMO / "recovery.json").read_text())
    first = next(iter(recovery["attacks"].values()))
    first["models"].pop("base")
    cases += [
        (Recovery, recovery, "not all on the same models"),
        (Recovery, recovery | {"attacks": {}}, "same models"),
    ]
    results = json.loads((DEMO / "results.json").read_text())
    cases += [(Results, results | {"runs": []}, "it holds no run")]
    role_report().save(path)
    roles = json.loads(path.read_text())
    cases += [(RoleReport, roles | {"runs": []}, "it holds no base"), (RoleReport, roles | {"rows": {}}, "every role")]
    lacking = json.loads(path.read_text())
    lacking["runs"][1]["changes"]["kl"].pop("stored")
    cases += [(RoleReport, lacking, r"runs\[1\] lacks figures of the base")]
    for record, content, message in cases:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            record.load(path)


def test_select_of_a_loaded_comparison():
    results = Results.load(DEMO / "results.json")
    with pytest.raises(UserError, match="no condition"):
        select(results.runs, "retain>>1")
    with pytest.raises(UserError, match="no condition"):
        select(results.runs, str({"x": 1}))
