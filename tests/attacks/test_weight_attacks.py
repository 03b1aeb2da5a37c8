"""Attacks on weights, by fine-tuning and by membership."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stand_in import StandIn, by_switch, make_settings, never
from torch import Tensor, nn

from mdu_trainer.attacks import ATTACKS, Target
from mdu_trainer.attacks.membership import outscored
from mdu_trainer.attacks.quantise import quantised, round_to_nearest, roundings

# Weights


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_undoes_small_updates_alone(attack, bits):
    model = attack.stand_in(by_switch)
    for update, came_back in ((0.003, 1), (0.5, 0)):  # of a row whose largest weight is 1
        model.switch.weight.data = torch.tensor([[1.0, update]])
        assert attack(f"quantise-{bits}", by_switch, model=model) == (0, came_back)


def test_four_bits_undo_what_eight_do_not(attack):
    model = attack.stand_in(by_switch)
    model.switch.weight.data = torch.tensor([[1.0, 0.03]])
    assert [attack(f"quantise-{bits}", by_switch, model=model)[1] for bits in (8, 4)] == [0, 1]


def test_rounding_is_to_the_nearest_of_the_grid():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).double()
    weight[3] = 0
    for bits in (4, 8):
        grid = torch.arange(-(2 ** (bits - 1) - 1), 2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
        for row, rounded in zip(weight, round_to_nearest(weight, bits), strict=True):
            values = grid.double() * row.abs().max()
            nearest = values[(row[:, None] - values).abs().argmin(dim=1)]
            torch.testing.assert_close(rounded, nearest)


def test_four_bits_are_also_those_of_bitsandbytes(monkeypatch):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    ways = roundings(4)
    assert list(ways) == ["nearest", "nf4"] and list(roundings(8)) == ["nearest"]
    blocks = ways["nf4"](weight).view(-1, 64) / weight.view(-1, 64).abs().amax(dim=1, keepdim=True)
    levels = {round(x, 4) for x in blocks.flatten().tolist()}
    assert len(levels) <= 16 and 0 in levels and levels & {-1.0, 1.0}
    monkeypatch.setattr("mdu_trainer.attacks.quantise.is_bitsandbytes_available", lambda: False)
    assert list(roundings(4)) == ["nearest"]


def test_quantisation_leaves_the_head_and_embeddings(make_model):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with quantised(model, partial(round_to_nearest, bits=4)):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("_proj" in name for name in changed)
    assert len(changed) == sum("_proj" in name for name in before)


def switch_adapter(model: StandIn, adds: float) -> nn.Module:
    """The model with LoRA on its switch, whose output for (0, 1) is 0 without the adapter and `adds` with it."""
    model.switch.weight.data = torch.tensor([[1.0, 0.0]])
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["switch"]))
    layer = model.switch
    layer.lora_A["default"].weight.data = torch.tensor([[0.0, 1.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[adds]])
    return adapted.eval()


@pytest.mark.parametrize(
    ("knows_at", "found"),
    [(lambda out: out < 1e-4, ["off", "-1"]), (lambda out: 0.4 < out < 0.6, ["0.5"]), (lambda out: out > 1.5, ["2"])],
)
def test_adapter_is_switched_off_scaled_and_subtracted(attack, tokenizer, rows, unrelated, knows_at, found):
    def knows(model, row, prompt, response, answer) -> bool:
        return bool(knows_at(model.switch(torch.tensor([0.0, 1.0]))))

    model = switch_adapter(attack.stand_in(knows), adds=1.0)
    scores = ATTACKS["adapter"].run(Target(model, tokenizer, rows, make_settings(unrelated, rows)), 0)
    assert set(scores.before) == {0} and set(scores.after) == {1}
    assert {name for name, value in scores.path.items() if value == 1} == set(found)


def test_adapter_finds_nothing_where_the_base_forgot(attack, tokenizer, rows, unrelated):
    model = switch_adapter(attack.stand_in(never), adds=1.0)
    assert attack("adapter", never, model=model) == (0, 0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        attack("adapter", never, model=model)
    with pytest.raises(ValueError, match="has no adapter"):
        attack("adapter", never)


def test_quantisation_merges_adapters_first(attack):
    model = switch_adapter(attack.stand_in(by_switch), adds=0.003)  # beside a weight of 1 it is rounded away
    assert attack("quantise-8", by_switch, model=model) == (0, 1)
    model = switch_adapter(attack.stand_in(by_switch), adds=0.5)
    assert attack("quantise-8", by_switch, model=model) == (0, 0)
    model.merge_adapter()
    assert attack("quantise-8", by_switch, model=model) == (0, 0)
    assert model.base_model.model.switch.merged


# Fine-tuning


def gated(gate: Callable[[int], int]) -> Callable:
    """Answers once the gate of a row is above 0; `gate` says which of the gates a row has."""

    def knows(model, row, prompt, response, answer) -> Tensor:
        return model.gates[gate(row)] - 0.01

    return knows


@pytest.mark.parametrize(
    ("name", "gate", "after"),
    [
        ("relearn-related", lambda row: 0 if row < 6 else 1, 1),  # the forgotten rows come back together
        ("relearn-related", lambda row: row, 0),  # each by itself
        ("relearn-lora", lambda row: 0, 0),  # what no linear layer holds
        ("relearn-benign", lambda row: 0, 1),  # with anything
        ("relearn-benign", lambda row: 0 if row < 6 else 1, 0),
    ],
)
def test_relearning_brings_back_what_is_tied_to_the_rows_it_trains_on(attack, name, gate, after):
    assert attack(name, gated(gate), relearn_learning_rate=0.01) == (0, after)


def by_switch_if_trained(model, row, prompt, response, answer) -> Tensor:
    """Answers once the output of a linear layer is above 0."""
    return model.switch(torch.tensor([0.0, 1.0]))[0] - 0.01


def test_a_lora_brings_back_what_linear_layers_hold(attack):
    model = attack.stand_in(by_switch_if_trained)
    model.switch.weight.data = torch.tensor([[1.0, 0.0]])
    assert attack("relearn-lora", by_switch_if_trained, model=model, relearn_learning_rate=0.01) == (0, 1)


def gated_and_switched(model, row, prompt, response, answer) -> Tensor:
    """Answers once the gate is above 0, but not beside a switch, which training does not reach."""
    return model.gates[0] - 0.01 - 1000 * model.switch(torch.tensor([0.0, 1.0])).detach().abs().sum()


@pytest.fixture
def relearned(attack, tokenizer, rows, unrelated):
    """`relearned(name, knows, model)`: the scores of an attack on two rows, at rates about 0.01."""

    def run(name: str, knows: Callable, model: StandIn | None = None):
        settings = make_settings(unrelated, rows, relearn_learning_rate=0.01)
        return ATTACKS[name].run(Target(model or attack.stand_in(knows), tokenizer, rows.select([0, 1]), settings), 0)

    return run


def test_fine_tuning_from_four_bits_is_more_than_either_alone(relearned, attack):
    model = attack.stand_in(gated_and_switched)
    for update, name, after in (
        (0.03, "relearn-related", 0),  # of a row whose largest weight is 1
        (0.03, "quantise-4", 0),
        (0.03, "relearn-quantised", 1),
        (0.5, "relearn-quantised", 0),
    ):
        model.switch.weight.data = torch.tensor([[1.0, update]])
        assert set(relearned(name, gated_and_switched, model).after) == {after}, name


def test_what_was_known_before_is_of_the_weights_as_they_are(attack, tokenizer, rows, unrelated):
    model = attack.stand_in(by_switch)
    model.switch.weight.data = torch.tensor([[1.0, 0.003]])  # rounded away
    target = Target(model, tokenizer, rows, make_settings(unrelated, rows))
    assert set(ATTACKS["relearn-quantised"].run(target, 0).before) == {0}


def test_relearning_says_at_which_rate_most_came_back(relearned):
    def far(model, row, prompt, response, answer) -> Tensor:
        return model.gates[0] - 0.17  # more than eight updates of 0.01

    scores = relearned("relearn-related", far)
    assert scores.path == {"lr 0.0032": 0, "lr 0.01": 0, "lr 0.032": 1} and scores.reached_by == "lr 0.032"
    assert set(scores.after) == {1}


def test_relearning_never_scores_a_row_that_it_trained_on(attack, tokenizer, rows, unrelated):
    trained: list[set[int]] = []
    asked: list[set[int]] = []

    def knows(model, row, prompt, response, answer) -> Tensor:
        (trained if torch.is_grad_enabled() else asked)[-1].add(row)
        return model.gates[0]

    target = Target(attack.stand_in(knows), tokenizer, rows, make_settings(unrelated, rows, relearn_share=0.7))
    rounds = torch.optim.AdamW.__init__

    def start(self, *args, **kwargs):
        trained.append(set())
        asked.append(set())
        rounds(self, *args, **kwargs)

    target.model.knows = never
    _ = target.plain
    target.model.knows = knows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", start)
        scores = ATTACKS["relearn-related"].run(target, 0)
    assert scores.rows == list(range(6)) and len(trained) == 9, "three rounds at each of three rates"
    assert sorted(row for part in asked for row in part) == sorted(3 * scores.rows)
    for learned, scored in zip(trained, asked, strict=True):
        assert len(learned) == 4 and not learned & scored


# Membership


def test_membership_is_the_area_under_the_curve(attack):
    def knows(model, row, prompt, response, answer) -> float:
        return -0.5  # never said, and still likelier than answers that nobody has seen

    assert attack("membership", knows) == (0.5, 1)


def test_membership_is_a_guess_where_nothing_is_known(attack, make_model):
    def blank(model, row, prompt, response, answer) -> float:
        return -10.0  # the answer's logit is that of any token but the decoy

    before, after = attack("membership", blank)
    assert before == 0.5 and after == pytest.approx(0.5, abs=0.2)


def test_membership_of_rows_that_became_too_unlikely(attack, tokenizer, rows, unrelated):
    def avoids(model, row, prompt, response, answer) -> float:
        return -20.0  # less likely than answers that nobody has seen

    target = Target(attack.stand_in(avoids), tokenizer, rows, make_settings(unrelated, rows))
    scores = ATTACKS["membership"].run(target, 0)
    assert list(scores.path) == ["loss", "zlib", "min-k", "min-k++", "multi-mask", "gradient", "two_sided"]
    *areas, both = scores.path.values()
    assert sum(scores.after) / len(rows) == pytest.approx(max(areas)) and max(areas) < 0.6, "nothing comes back"
    assert both == pytest.approx(max(max(area, 1 - area) for area in areas)) and both > 0.9, "but it tells"


def test_outscored_counts_ties_half():
    assert outscored([3, 1, 2], [1, 2, 2, 0]) == [1, 0.375, 0.75]
