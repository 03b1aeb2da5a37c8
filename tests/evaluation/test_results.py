"""Results: the tables, the file, the pictures."""

import json

import pytest

from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.report.plots import plot_losses, plot_tradeoff


@pytest.fixture
def results():
    def run(method, tau, forget, retain, **summary):
        scores = {
            name: {"rougeL_recall": Estimate(score, score - 0.1, score + 0.1), "probability": Estimate(score)}
            for name, score in (("forget", forget), ("retain", retain))
        }
        summary = {name: Estimate(value) for name, value in summary.items()}
        return Run(method, tau, scores, {"forget": 4, "retain": 8}, summary, 12.3, 4.5)

    runs = [
        run("base", None, 1.0, 1.0, model_utility=0.75, forget_quality=1e-7),
        run("npo", None, 0.25, 0.5),
        run("mdu", 0.5, 0.125, 0.75, model_utility=0.5),
    ]
    return Results("model", "data", {"seed": 1}, runs)


def test_table_has_the_columns_that_somebody_has(results):
    assert results.table().splitlines() == [
        "| method      | forget rL | retain rL | forget prob. | retain prob. | utility | forget quality | train s |",
        "|-------------|----------:|----------:|-------------:|-------------:|--------:|---------------:|--------:|",
        "| base        |     1.000 |     1.000 |        1.000 |        1.000 |   0.750 |          1e-07 |      12 |",
        "| npo         |     0.250 |     0.500 |        0.250 |        0.500 |         |                |      12 |",
        "| mdu tau=0.5 |     0.125 |     0.750 |        0.125 |        0.750 |   0.500 |                |      12 |",
    ]


def test_table_has_the_distance_to_a_never_trained_model(results):
    def cells(*extra):
        return Results("m", "d", {}, [*results.runs, *extra]).table_cells()

    def never(forget):
        return Run("retain model", None, {"forget": {"rougeL_recall": Estimate(forget)}}, {"forget": 4})

    header, *rows = cells(never(0.2))
    assert header[:4] == ["method", "forget rL", "retain rL", "to never-trained"]
    assert [row[3] for row in rows] == ["+0.800", "+0.050", "-0.075", ""]
    assert [[*row[:3], *row[4:]] for row in cells(never(0.2))[:-1]] == cells(), "nothing else moved"
    assert [row[3] for row in cells(never(0.1252))[1:]] == ["+0.875", "+0.125", "+0.000", ""], "no negative zero"


def test_further_sets_have_one_column_each():
    scores = {"forget_level1": {"rougeL_recall": Estimate(0.5)}, "utility_general": {"accuracy": Estimate(0.25)}}
    table = Results("m", "d", {}, [Run("base", None, scores, {"forget_level1": 3, "utility_general": 4})]).table()
    assert "| F-L1 rL | MMLU acc. | train s |" in table


def test_details_have_every_figure_with_its_interval(results):
    lines = results.details().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["set", "metric", "rows", "base", "npo", "mdu tau=0.5"]
    assert cells[2] == ["forget", "rougeL_recall", "4"] + [
        "1.000 [0.900, 1.100]",
        "0.250 [0.150, 0.350]",
        "0.125 [0.025, 0.225]",
    ]
    assert cells[-1] == ["model", "forget_quality", "", "1e-07", "", ""]
    assert len(lines) == 2 + 4 + 2 and len({len(line) for line in lines}) == 1


def test_file(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path)
    assert Results.load(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 7}))
    with pytest.raises(ValueError, match="schema 7, this version reads 3"):
        Results.load(path)
    path.write_text("half a fi")
    with pytest.raises(ValueError, match="holds no JSON"):
        Results.load(path)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_repeatable(results, tmp_path, suffix):
    history = [{"step": s, "forget_loss": -s, "retain_loss": 0.1 * s} for s in range(1, 5)] + [{"train_runtime": 1.0}]
    pictures = []
    for turn in range(2):
        path, losses = tmp_path / f"{turn}.{suffix}", tmp_path / f"losses{turn}.{suffix}"
        plot_tradeoff(results.runs, path)
        plot_losses({"npo": history, "mdu tau=0.5": history}, losses)
        pictures.append((path.read_bytes(), losses.read_bytes()))
    assert pictures[0] == pictures[1]
    assert all(len(picture) > 5000 for picture in pictures[0])
