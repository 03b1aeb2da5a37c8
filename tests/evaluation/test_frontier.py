"""The Pareto front, the choice of a run, and their pictures."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdu_trainer.evaluation.frontier import (
    DOMINATED,
    FRONT,
    WITHIN,
    frontier,
    frontier_cells,
    parse_conditions,
    reading,
    select,
)
from mdu_trainer.evaluation.results import Estimate, Results, Run, markdown_table
from mdu_trainer.report.plots import plot_frontier, plot_losses, plot_tradeoff
from mdu_trainer.report.style import COLOURS, run_styles

# few values, so that ties are common
figures = st.lists(
    st.tuples(*[st.integers(0, 6).map(lambda i: i / 6)] * 2, *[st.sampled_from([None, 0.0, 0.1, 0.3])] * 2),
    min_size=1,
    max_size=12,
)


def run(name, forget, retain, forget_width=0.0, retain_width=0.0, tau=None, **summary):
    def estimate(value, width):
        return Estimate(value) if width is None else Estimate(value, value - width, value + width)

    scores = {
        "forget": {"rougeL_recall": estimate(forget, forget_width)},
        "retain": {"rougeL_recall": estimate(retain, retain_width), "probability": Estimate(retain / 2)},
    }
    return Run(name, tau, scores, {"forget": 4, "retain": 8}, {k: Estimate(v) for k, v in summary.items()})


def many(rows):
    return [run(f"run{i}", *row) for i, row in enumerate(rows)]


@given(figures)
def test_front_is_what_nobody_beats(rows):
    """By the definition, a pair of runs at a time."""
    marks = frontier([run("base", 1.0, 1.0), *many(rows)])
    assert [mark.run.name for mark in marks] == [f"run{i}" for i in range(len(rows))]
    for mark, (forget, retain, forget_width, retain_width) in zip(marks, rows, strict=True):
        beaten, clear = False, False
        for f, r, fw, rw in rows:
            if f <= forget and r >= retain and (f < forget or r > retain):
                beaten = True
                clear |= None not in (fw, forget_width) and f + fw < forget - forget_width
                clear |= None not in (rw, retain_width) and r - rw > retain + retain_width
        assert mark.status == (DOMINATED if clear else WITHIN if beaten else FRONT)
        assert (mark.by is None) == (not beaten)


@given(figures, st.integers(0, 6).map(lambda i: i / 6), st.sampled_from([None, 0.0, 0.2]))
def test_front_by_the_distance_to_the_never_trained_model(rows, level, width):
    """By the definition: as near to the level and as well kept, and better in one; clear if so at all of its ends."""
    marks = frontier([run("base", 1.0, 1.0), run("retain model", level, 1.0, width), *many(rows)])
    assert [mark.run.name for mark in marks] == [f"run{i}" for i in range(len(rows))]
    ends = [level] if width is None else [level - width, level, level + width]

    def farthest(forget, width, end):
        return max(abs(forget - width - end), abs(forget + width - end))

    def nearest(forget, width, end):
        return 0.0 if abs(forget - end) <= width else abs(forget - end) - width

    for mark, (forget, retain, forget_width, retain_width) in zip(marks, rows, strict=True):
        beaten, clear = False, False
        for f, r, fw, rw in rows:
            near, other = abs(f - level), abs(forget - level)
            if near <= other and r >= retain and (near < other or r > retain):
                beaten = True
                clear |= None not in (fw, forget_width) and all(
                    farthest(f, fw, end) < nearest(forget, forget_width, end) - 1e-9 for end in ends
                )
                clear |= None not in (rw, retain_width) and r - rw > retain + retain_width
        assert (mark.status == FRONT) == (not beaten) == (mark.by is None)
        assert mark.status == DOMINATED or not clear


@given(figures, st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_selected_is_the_lowest_that_satisfies(rows, bound):
    runs = [run("base", 1.0, 0.5), *many(rows)]
    fit = sorted((forget, -retain) for forget, retain, *_ in rows if retain >= bound * 0.5)
    if not fit:
        with pytest.raises(ValueError, match="No run satisfies"):
            select(runs, f"retain>={bound}*base")
        return
    chosen = select(runs, f"retain>={bound}*base")
    assert (chosen.scores["forget"]["rougeL_recall"].value, -chosen.scores["retain"]["rougeL_recall"].value) == fit[0]
    assert next(mark for mark in frontier(runs) if mark.run is chosen).status == FRONT


RUNS = [
    run("base", 1.0, 0.8, model_utility=0.5),
    run("ga", 0.0, 0.3, model_utility=0.1),
    run("npo", 0.4, 0.75, model_utility=0.6),
    run("mdu", 0.2, 0.75, tau=0.0, model_utility=0.4),
]


KNOWING = [*RUNS, run("retain model", 0.35, 0.8, 0.05)]


def test_wrecked_below_the_level_is_not_on_the_front():
    old, new = ({mark.run.method: mark.status for mark in frontier(runs)} for runs in (RUNS, KNOWING))
    assert old == {"ga": FRONT, "npo": DOMINATED, "mdu": FRONT}
    assert new == {"ga": DOMINATED, "npo": FRONT, "mdu": WITHIN}, "at the level's lower end npo and mdu are as near"
    assert next(mark.by.name for mark in frontier(KNOWING) if mark.run.method == "ga") == "npo"


def test_select_by_distance():
    assert (select(RUNS).name, select(KNOWING).name) == ("ga", "npo")
    assert select(KNOWING, "forget<=0.3").name == "mdu tau=0", "bounds are on the scores as they are"
    both = [run("above", 0.5, 0.7), run("below", 0.25, 0.6), run("retain model", 0.35, 0.8)]
    assert select(both).name == "below", "0.10 below is nearer than 0.15 above"


def test_reading_is_said():
    assert "0.350 [0.300, 0.400]: nearer to it is better" in reading(KNOWING)
    assert reading(RUNS).startswith("No never-trained model was scored, so a lower forget score counts as better")
    assert reading(RUNS[:1]) == ""


@pytest.mark.parametrize(
    "conditions, name",
    [
        ("", "ga"),
        ("retain>=0.7", "mdu tau=0"),
        (" retain >= 0.9 * base , utility>=1*base", "npo"),
        ("forget<=0.3,retain.probability>=.3", "mdu tau=0"),
        ("model.model_utility>=5e-1", "npo"),
    ],
)
def test_conditions(conditions, name):
    assert select(RUNS, conditions).name == name


@pytest.mark.parametrize(
    "conditions, message",
    [
        ("retain>0.9", "'retain>0.9' is no condition"),
        ("retain>=nan", "is no condition"),
        ("retian>=0.9", "no figure 'retian': name forget, retain"),
        ("retain.rouge>=0.9", "No run has the figure retain.rouge: measured are forget.rougeL_recall"),
        ("forget_quality>=0.05", "No run has the figure forget_quality"),
        ("retain>=0.99*base", "nearest is npo: retain is 0.750, 0.042 from retain>=0.99\\*base"),
        ("retain>=0.7,utility>=0.55,forget<=0.3", r"npo: forget is 0.400, 0.1 from forget<=0.3\."),
    ],
)
def test_what_cannot_be_selected(conditions, message):
    with pytest.raises(ValueError, match=message):
        select(RUNS, conditions)


def test_what_a_relative_bound_needs():
    with pytest.raises(ValueError, match="needs a base run"):
        select(RUNS[1:], "retain>=0.9*base")
    with pytest.raises(ValueError, match="no unlearned model"):
        select(RUNS[:1], "retain>=0.9")
    assert [str(bound) for bound in parse_conditions("retain>=0.90*base,forget<=.2")] == [
        "retain>=0.9*base",
        "forget<=0.2",
    ]


def test_table_marks_the_front_and_the_selected():
    table = markdown_table(frontier_cells(Results("m", "d", {}, RUNS), selected=RUNS[3]))
    assert [line.rstrip(" |").rsplit("| ", 1)[-1].strip() for line in table.splitlines()[3:]] == [
        "front",
        "dominated",
        "front *",
    ]


def test_runs_of_a_sweep_have_names_of_their_own(tmp_path):
    runs = [
        dataclasses.replace(RUNS[3], settings={"learning_rate": rate, "max_steps": steps, "seed": 7})
        for rate in (1e-5, 1e-4)
        for steps in (60, 120)
    ]
    assert [run.name for run in runs] == [
        f"mdu tau=0 lr={rate} steps={steps} seed=7" for rate in ("1e-05", "0.0001") for steps in (60, 120)
    ]
    Results("m", "d", {}, runs).save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").runs == runs
    older = json.loads((tmp_path / "results.json").read_text())
    for one in older["runs"]:  # a file from before runs had settings
        del one["settings"]
    (tmp_path / "results.json").write_text(json.dumps(older))
    assert {run.name for run in Results.load(tmp_path / "results.json").runs} == {"mdu tau=0"}


def test_styles():
    styles = run_styles(["base", "mdu tau=0", "mdu tau=1", "mdu tau=1 lr=3", "after request1", "org/model-7B", "npo"])
    assert styles["mdu tau=0"].colour == COLOURS["mdu"] and styles["npo"].colour == COLOURS["npo"]
    assert len({style for style in styles.values()}) == len(styles), "each run can be told from the others"
    assert len({styles[name].marker for name in ("base", "mdu tau=0", "after request1", "org/model-7B", "npo")}) == 5


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures(tmp_path, suffix):
    """Methods without a colour of their own, and figures of evaluations, can be drawn; the same bytes every time."""
    runs = [*RUNS, run("after request1", 0.3, 0.7), run("org/model-7B", 0.35, 0.6, None, None)]
    recovery = {run.name: {"relearn": Estimate(0.5, 0.4, 0.6), "infill": Estimate(0.1, 0.2, 0.3)} for run in runs[1:]}
    keys = ("forget_loss", "retain_loss", "kl", "entropy", "eval_forget_rougeL_recall", "eval_runtime")
    histories = {run.name: [{"step": s} | dict.fromkeys(keys, s / 2) for s in range(3)] for run in runs}
    drawn = []
    for turn in range(2):
        paths = [tmp_path / f"{name}{turn}.{suffix}" for name in ("tradeoff", "recovery", "frontier", "losses")]
        plot_tradeoff(runs, paths[0])
        plot_tradeoff(runs, paths[1], recoveries=recovery)
        plot_frontier(runs, paths[2], selected=RUNS[3])
        plot_losses(histories, paths[3])
        paths += [tmp_path / f"{name}{turn}.{suffix}" for name in ("tradeoff level", "frontier level")]
        plot_tradeoff(KNOWING, paths[4])
        plot_frontier(KNOWING, paths[5], selected=RUNS[2])
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 6
    with pytest.raises(ValueError, match="No run has both figures"):
        plot_frontier(RUNS, tmp_path / "none.png", keep="forget_quality")
