"""The way from a model's weights to the base's, and the standardised likelihoods that its loss is taken beside."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stand_in import make_settings

from mdu_trainer.attacks import Target, membership
from mdu_trainer.attacks.membership import SIZES, gradient_norms, masked_log_p, standardised, standardised_log_p
from mdu_trainer.attacks.results import WeightPath
from mdu_trainer.attacks.weights import weight_path, weights_of


@pytest.fixture
def target(tokenizer, rows, unrelated):
    """`target(model)`: two rows before a model."""
    return lambda model: Target(model.eval(), tokenizer, rows.select([0, 1]), make_settings(unrelated, rows))


def test_distance_and_losses_against_an_independent_computation(make_model, target):
    base, other = make_model(seed=0), make_model(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    path = weight_path(target(other), weights_of(base), seed=3)
    assert all(value.equal(before[name]) for name, value in other.state_dict().items()), "left as it was"
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (base, other)]
    assert path.distance == pytest.approx(float((flat[1] - flat[0]).norm() / flat[0].norm()), rel=1e-5)
    assert list(path.losses) == ["0", "0.25", "0.5", "0.75", "1"]
    for at in (0.0, 0.25, 1.0):
        between = copy.deepcopy(base)
        with torch.no_grad():
            for p, first, last in zip(between.parameters(), other.parameters(), base.parameters(), strict=True):
                p.copy_((1 - at) * first + at * last)
        asked = target(between)
        loss = -masked_log_p(asked, asked.questions, 3, draws=1).mean()
        assert path.losses[f"{at:g}"] == pytest.approx(loss, abs=1e-3)
    assert len({round(loss, 3) for loss in path.losses.values()}) == 5


def test_an_adapter_counts_as_merged(make_model, target):
    model = make_model()
    base = weights_of(model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert weight_path(target(adapted), base, 0).distance == 0
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.1)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    path = weight_path(target(adapted), base, 0)
    assert all(value.equal(before[name]) for name, value in adapted.state_dict().items()), "left as it was"
    merged = weights_of(adapted.merge_and_unload())
    moved = math.sqrt(sum(float((merged[name] - base[name]).square().sum()) for name in base))
    norm = math.sqrt(sum(float(value.square().sum()) for value in base.values()))
    assert path.distance == pytest.approx(moved / norm, rel=1e-5) and path.distance > 0
    assert path.losses["0"] != path.losses["1"]


def test_models_of_other_shapes_have_no_way_between_them(make_model, target):
    assert weight_path(target(make_model()), weights_of(make_model(hidden_size=16)), 0) is None
    assert weight_path(target(make_model()), weights_of(make_model(num_layers=1)), 0) is None


def test_a_barrier_is_what_rises_above_the_straight_line():
    assert WeightPath(0.1, {"0": 4.0, "0.5": 3.5, "1": 2.0}).barrier == 0.5
    assert WeightPath(0.1, {"0": 4.0, "0.5": 1.0, "1": 2.0}).barrier == 0


def test_standardised_likelihoods_against_an_independent_computation(make_model, target):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = standardised(logits, torch.tensor([0, 1, 2, 3, 6]))
    for row, y, value in zip(logits.double(), (0, 1, 2, 3, 6), found, strict=True):
        p = row.softmax(0)
        log_p = p.log()
        mean = (p * log_p).sum()
        spread = (p * log_p**2).sum() - mean**2
        assert float(value) == pytest.approx(float((log_p[y] - mean) / spread.sqrt()), rel=1e-4)
    asked = target(make_model(initializer_range=0.2))
    rows = standardised_log_p(asked, asked.questions, 0)
    assert [len(values) for values in rows] == [len(ids) for ids in asked.answer_ids] and len(SIZES) == 4
    assert all(abs(value) < 50 for values in rows for value in values) and len(set(rows[0])) > 5


def test_gradient_norms_against_finite_differences(make_model, target):
    model = make_model(initializer_range=0.2).double()
    asked = target(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = gradient_norms(asked, asked.questions, 0)
    assert all(p.grad is None for p in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())

    def loss() -> float:
        with torch.no_grad():
            return sum(float(asked.masked_nll(batch).sum()) for batch in batches) / len(SIZES)

    own = asked.questions[:1]
    batches = [membership._masked_batch(asked, own, 0, places) for places in membership._passes(asked, own, draws=1)]
    gradient = torch.autograd.grad(
        sum(asked.masked_nll(batch).sum() for batch in batches) / len(SIZES), list(model.parameters())
    )
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    with torch.no_grad():  # along the gradient, the loss rises by its norm
        levels = []
        for step in (1e-4, -1e-4):
            for p, part in zip(model.parameters(), gradient, strict=True):
                p.add_(step * part / norm)
            levels.append(loss())
            for p, part in zip(model.parameters(), gradient, strict=True):
                p.sub_(step * part / norm)
    assert first == pytest.approx((levels[0] - levels[1]) / 2e-4, rel=1e-3) and first != pytest.approx(second)
