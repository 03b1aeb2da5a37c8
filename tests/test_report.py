"""Results: the table, the file, the pictures."""

import json

import pytest

from mdu_trainer.analysis.plots import plot_losses, plot_tradeoff
from mdu_trainer.evaluation.report import Results, Run, Score


@pytest.fixture
def results():
    def run(method, tau, forget, retain):
        return Run(method, tau, Score(forget, forget, forget, 4), Score(retain, retain, retain, 8), 12.3, 4.5)

    runs = [run("base", None, 1.0, 1.0), run("npo", None, 0.25, 0.5), run("mdu", 0.5, 0.125, 0.75)]
    return Results("model", "data", {"seed": 1}, runs)


def test_table(results):
    assert results.table().splitlines() == [
        "| method      | forget rL | retain rL | forget F1 | retain F1 | forget prob. | retain prob. | train s |",
        "|-------------|----------:|----------:|----------:|----------:|-------------:|-------------:|--------:|",
        "| base        |     1.000 |     1.000 |     1.000 |     1.000 |        1.000 |        1.000 |      12 |",
        "| npo         |     0.250 |     0.500 |     0.250 |     0.500 |        0.250 |        0.500 |      12 |",
        "| mdu tau=0.5 |     0.125 |     0.750 |     0.125 |     0.750 |        0.125 |        0.750 |      12 |",
    ]


def test_file(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path)
    assert Results.load(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 7}))
    with pytest.raises(ValueError, match="schema 7, this version reads 1"):
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
