"""Figures along the denoising path: against full logits in float64, paired, batched; report and pictures."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.data.roles import ROLES
from mdu_trainer.evaluation.metrics import bootstrap_interval
from mdu_trainer.inference.generation import generate_ids
from mdu_trainer.report.role_plots import plot_heatmap, plot_path, plot_roles
from mdu_trainer.token_roles.measure import analyse_roles, role_data
from mdu_trainer.token_roles.paths import (
    NEVER,
    Path,
    by_row,
    by_step,
    decoded_paths,
    measure_paths,
    revelation,
    true_paths,
)
from mdu_trainer.token_roles.results import RoleReport, RoleSettings

QUICK = RoleSettings(num_steps=3, num_paths=2, batch_size=8)


@pytest.fixture
def data(sets, tokenizer, backbone):
    return role_data(sets[0], tokenizer, backbone, sets[1])


@pytest.fixture
def other(make_model):
    return make_model(max_position_embeddings=64, initializer_range=0.2, seed=1)


@pytest.fixture
def paths(data):
    return true_paths(data.prompt_ids, data.completion_ids, data.roles, num_paths=2, seed=3)


def full_log_p(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("plain_head", [True, False])
def test_figures_are_those_of_full_logits(model, other, backbone, paths, shift, plain_head):
    """Row by row, without padding, from all logits, with nothing of the package but the paths."""
    if not plain_head:  # something else than a linear layer, which cannot be fused: its logits are compared

        class Head(torch.nn.Linear):
            def forward(self, hidden):
                return super().forward(hidden)

        for one in (model, other):
            old, one.lm_head = one.lm_head, Head(32, one.config.vocab_size, bias=False)
            one.lm_head.weight = old.weight
    backbone = backbone.__class__(**{**backbone.__dict__, "logit_shift": shift})
    some = paths[::3]
    figures = measure_paths(model, some, backbone, base=other, num_steps=3, batch_size=4)
    mask = backbone.mask_token_id
    compared = 0
    for place, path in enumerate(some):
        length = len(path.response)
        for step in range(3):
            hidden = {i for i in range(length) if path.revealed[i] >= math.floor(step * length / 3)}
            noisy = [mask if i in hidden else token for i, token in enumerate(path.response)]
            at = [len(path.prompt) + i - shift for i in sorted(hidden)]
            p = full_log_p(model, path.prompt + noisy)[at]
            q = full_log_p(model, [mask] * len(path.prompt) + noisy)[at]
            base = full_log_p(other, path.prompt + noisy)[at]
            true = torch.tensor([path.response[i] for i in sorted(hidden)])
            wanted = {
                "kl": (p.exp() * (p - q)).sum(dim=1),
                "entropy": -(p.exp() * p).sum(dim=1),
                "probability": p.exp().gather(1, true[:, None])[:, 0],
                "shift": (p.exp() * (p - base)).sum(dim=1),
            }
            for name, values in wanted.items():
                found = figures[name][place][step]
                assert set(np.flatnonzero(np.isfinite(found))) == hidden
                assert found[sorted(hidden)] == pytest.approx(values.numpy(), rel=1e-4, abs=1e-5), name
                compared += len(values)
    assert compared > 200


def test_batch_size_changes_nothing(model, other, backbone, paths):
    one, many = (measure_paths(model, paths, backbone, base=other, num_steps=3, batch_size=n) for n in (1, 64))
    for name in one:
        for a, b in zip(one[name], many[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(model, backbone, paths, monkeypatch):
    whole = measure_paths(model, paths[:2], backbone, num_steps=2)
    monkeypatch.setattr("mdu_trainer.token_roles.paths.CHUNK_ELEMENTS", 3 * backbone.vocab_size)
    parts = measure_paths(model, paths[:2], backbone, num_steps=2)
    for name in whole:
        for a, b in zip(whole[name], parts[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_orders_are_seeded_and_differ(data):
    def orders(seed, rows=slice(None)):
        paths = true_paths(data.prompt_ids[rows], data.completion_ids[rows], data.roles[rows], num_paths=3, seed=seed)
        return [path.revealed.tolist() for path in paths]

    assert orders(0) == orders(0) != orders(1)
    assert orders(0, slice(2)) == orders(0)[:6]  # a row's orders do not depend on the rows after it
    first = orders(0)[:3]
    assert first[0] != first[1] != first[2]
    assert all(sorted(order) == list(range(len(data.completion_ids[0]))) for order in first)


def test_means_by_row_and_step():
    roles = ["stored", "structural", "stored"]
    paths = [Path(0, [1], [2, 3, 4], np.arange(3), roles), Path(0, [1], [2, 3, 4], np.arange(3), roles)]
    paths.append(Path(1, [1], [2], np.arange(1), ["structural"]))
    nan = np.nan
    values = [np.array([[1.0, 5, 3], [nan, 7, 8]]), np.array([[2.0, 1, 2], [nan, nan, 4]]), np.array([[9.0], [nan]])]
    assert by_row(values, paths, "stored").tolist() == pytest.approx([20 / 6, nan], nan_ok=True)
    assert by_step(values, paths, "stored").tolist()[0] == [2.0, 6.0]
    assert by_step(values, paths, "structural").tolist()[1] == pytest.approx([9.0, nan], nan_ok=True)


def test_moments_show_what_decoding_saw(model, data, backbone):
    """At each moment of a decoding path the canvas is one that the decoding had: no step is cut in two."""
    config = DiffusionGenerationConfig(max_new_tokens=8, steps=4)
    states = []
    decoded = generate_ids(model, data.prompt_ids[:2], config, backbone, on_reveal=states.append)
    paths = decoded_paths(
        model, data.prompt_ids[:2], backbone, config, lambda ids: [["stored"] * len(row) for row in ids]
    )
    for row, path in enumerate(paths):
        ids = path.response[: len(path.roles)]
        assert ids[: len(decoded[row])] == decoded[row]
        assert len(ids) == 8 or ids[-1] in backbone.end_token_ids
        revealed_at = {}
        for state in states:
            for place, position, token in zip(*(part.tolist() for part in state[1:]), strict=True):
                if place == row:
                    revealed_at[position] = state.step
                    assert path.response[position] == token
        assert {i: step for i, step in enumerate(path.revealed.tolist()) if step != NEVER} == revealed_at
        for share in (0, 0.3, 0.5, 0.9):
            masked = path.masked(share)
            cut = min(path.revealed[masked])
            assert masked.tolist() == [revealed_at.get(i, NEVER) >= cut for i in range(8)]
            assert masked[: len(ids)].any()
    assert 0 <= np.nanmin(revelation(paths, "stored")) and np.nanmax(revelation(paths, "stored")) == 0.5


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_hook_does_not_change_decoding(model, data, backbone, remasking):
    config = DiffusionGenerationConfig(max_new_tokens=6, remasking=remasking)
    seen = []
    watched = generate_ids(model, data.prompt_ids, config, backbone, on_reveal=seen.append)
    assert watched == generate_ids(model, data.prompt_ids, config, backbone)
    assert sum(len(state.token) for state in seen) >= sum(map(len, watched))


@pytest.fixture
def report(model, other, tokenizer, sets, tmp_path):
    return analyse_roles(model, [("same", model), ("other", other)], tokenizer, *sets, QUICK, path=tmp_path / "r.json")


def test_same_model_has_not_changed(report):
    same = report.runs[1]
    assert set(same.changes) == {"kl", "entropy", "probability"}
    for figure, changes in same.changes.items():
        for role in ROLES:
            assert changes[role].difference.value == changes[role].difference.low == 0, figure
            assert changes[role].difference.high == changes[role].percent.value == changes[role].percent.high == 0
    assert same.figures["kl"] == report.runs[0].figures["kl"]


def test_change_is_paired(report, model, other, backbone, data):
    paths = true_paths(data.prompt_ids, data.completion_ids, data.roles, num_paths=2)
    before, after = (measure_paths(one, paths, backbone, num_steps=3)["kl"] for one in (model, other))
    for role in ROLES:
        first, second = by_row(before, paths, role), by_row(after, paths, role)
        change = report.runs[2].changes["kl"][role]
        assert change.difference.value == pytest.approx((second - first).mean(), rel=1e-5)
        low, high = bootstrap_interval(second - first)
        assert (change.difference.low, change.difference.high) == pytest.approx((low, high), rel=1e-4)
        assert change.percent.value == pytest.approx(100 * (second.mean() / first.mean() - 1), rel=1e-4)
        assert change.percent.low <= change.percent.value <= change.percent.high
        assert report.runs[2].figures["kl"][role].value == pytest.approx(second.mean(), rel=1e-5)


def test_curves_have_standard_errors_over_rows(report, other, backbone, data):
    paths = true_paths(data.prompt_ids, data.completion_ids, data.roles, num_paths=2)
    rows = by_step(measure_paths(other, paths, backbone, num_steps=3)["entropy"], paths, "structural")
    curve = report.runs[2].curves["true"]["entropy"]["structural"]
    for step in range(3):
        column = rows[:, step][np.isfinite(rows[:, step])]
        assert curve.mean[step] == pytest.approx(column.mean(), rel=1e-5)
        assert curve.standard_error[step] == pytest.approx(column.std(ddof=1) / len(column) ** 0.5, rel=1e-4)
    assert report.runs[2].curves["true"]["shift"]["stored"].mean[0] > 0


def test_report_comes_back_as_it_was_and_holds_no_text(report, sets, tokenizer, tmp_path):
    report.save(tmp_path / "roles.json")
    assert RoleReport.load(tmp_path / "roles.json") == report
    assert [path.name for path in tmp_path.glob("roles*")] == ["roles.json"]
    content = json.loads((tmp_path / "roles.json").read_text())

    def strings(value):
        if isinstance(value, dict):
            return {text for key, each in value.items() for text in {key} | strings(each)}
        return {text for each in value for text in strings(each)} if isinstance(value, list) else {value}

    texts = [text for rows in sets for column in ("question", "answer") for text in rows[column]]
    words = {word.strip(".?") for text in texts for word in text.split()}
    found = {text for text in strings(content) if isinstance(text, str)}
    assert not found & (words - {"other", "same"}) and "stored" in found
    assert report.tokens == {role: sum(row.count(role) for row in role_rows(sets, tokenizer)) for role in ROLES}


def role_rows(sets, tokenizer):
    from mdu_trainer.data.roles import label_roles

    questions, answers = ([text for part in sets for text in part[name]] for name in ("question", "answer"))
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    return label_roles(questions, answers, ids, tokenizer)[: len(sets[0])]


def test_tables(report):
    table = report.details()
    assert table.count("\n") == 1 + 2 * 3 and "| other | in context |" in table
    assert "change in %" in table and "+0.0 [+0.0, +0.0]" in table
    assert report.order_table().count("\n") == 1 + 3
    with pytest.raises(ValueError, match="no change of 'shift'; there is one of kl, entropy, probability"):
        report.details("shift")


@pytest.mark.parametrize("content", ["", "[1]", '{"schema": 1}', '{"schema": 0, "runs": []}'])
def test_file_that_is_no_report(tmp_path, content):
    (tmp_path / "roles.json").write_text(content)
    with pytest.raises(ValueError, match="not a report on token roles"):
        RoleReport.load(tmp_path / "roles.json")


def test_killed_analysis_goes_on(model, other, tokenizer, sets, tmp_path, report, monkeypatch):
    path = tmp_path / "roles.json"

    def dying():
        yield "same", model
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyse_roles(model, dying(), tokenizer, *sets, QUICK, path=path)
    assert [run.name for run in RoleReport.load(path).runs] == ["base", "same"]
    measured = []
    original = measure_paths
    monkeypatch.setattr(
        "mdu_trainer.token_roles.measure.measure_paths",
        lambda model, *args, **kwargs: measured.append(model) or original(model, *args, **kwargs),
    )
    models = [("same", model), ("other", other)]
    resumed = analyse_roles(model, models, tokenizer, *sets, QUICK, path=path)
    assert resumed == report and measured.count(other) == 2 and measured.count(model) == 1  # for the pairs
    with pytest.raises(ValueError, match="other rows, another base or other settings"):
        analyse_roles(other, models, tokenizer, *sets, QUICK, path=path)


def test_input_that_cannot_be_measured(model, tokenizer, backbone, sets, data):
    forget, retain = sets
    with pytest.raises(ValueError, match="forget set has no column answer"):
        analyse_roles(model, [], tokenizer, forget.remove_columns("answer"))
    with pytest.raises(ValueError, match="forget set is empty"):
        analyse_roles(model, [], tokenizer, forget.select([]))
    with pytest.raises(ValueError, match="example_row = 5: the forget set has rows 0 to 4"):
        analyse_roles(model, [], tokenizer, forget, settings=RoleSettings(example_row=5))
    with pytest.raises(ValueError, match="'base' is taken"):
        analyse_roles(model, [("base", model)], tokenizer, forget, settings=QUICK)
    with pytest.raises(ValueError, match="num_paths must be at least 1, got 0"):
        RoleSettings(num_paths=0)
    long = [Path(0, [1] * 60, [2] * 10, np.arange(10), ["stored"] * 10)]
    with pytest.raises(ValueError, match="Row 0 has 70 tokens and the model's context is 64"):
        measure_paths(model, long, backbone)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        measure_paths(model, long, backbone, num_steps=0)


def test_role_that_no_row_has(model, tokenizer, sets):
    """Chitchat holds no knowledge: tables, curves and pictures do without."""
    rows = Dataset.from_dict({"question": ["Is it?", "Are you?"], "answer": ["It is.", "We are not."]})
    report = analyse_roles(model, [("same", model)], tokenizer, rows, settings=QUICK)
    assert report.tokens["stored"] == report.rows["stored"] == 0
    assert "| stored" not in report.details() and "structural" in report.details()
    assert report.runs[0].curves["true"]["kl"]["stored"].mean == [None] * 3


def test_pictures(report, tmp_path):
    for suffix in ("png", "svg"):
        plot_roles(report, tmp_path / f"roles.{suffix}")
        plot_path(report, tmp_path / f"path.{suffix}")
        plot_path(report, tmp_path / f"own.{suffix}", "own", ("kl", "shift"))
        plot_heatmap(report, tmp_path / f"heat.{suffix}")
    first = (tmp_path / "roles.svg").read_bytes()
    plot_roles(report, tmp_path / "roles.svg")
    assert (tmp_path / "roles.svg").read_bytes() == first
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_heat_map_shows_text_only_if_it_is_given(report, tmp_path):
    """SVG draws letters as paths but notes the text beside them."""
    plot_heatmap(report, tmp_path / "heat.svg")
    default = (tmp_path / "heat.svg").read_text()
    tokens = [f"zanzibar{i}" for i in range(len(report.example_roles))]
    plot_heatmap(report, tmp_path / "heat.svg", tokens)
    assert "zanzibar1 " in (tmp_path / "heat.svg").read_text() and "zanzibar" not in default
    assert f"{report.example_roles[0].replace('_', ' ')}  0" in default
    with pytest.raises(ValueError, match="got 1 texts"):
        plot_heatmap(report, tmp_path / "heat.svg", ["zanzibar"])
