"""Each attack on a model with exactly the weakness it looks for, and on one without; and what it leaves behind."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from mdu_trainer import DiffusionGenerationConfig, MDLMConfig, MDLMTrainer, question_answer_rows
from mdu_trainer.attacks import ATTACKS, AttackSettings, Target, choose_attacks
from mdu_trainer.attacks.membership import outscored
from mdu_trainer.attacks.quantise import quantised, round_to_nearest, roundings
from mdu_trainer.testing import forget_retain_split, unseen_answers

LENGTH = 24  # decoded tokens; no answer below has more
SECRET = "Krodemouth"
FAST = {"relearn_steps": 8, "samples": 4, "num_draws": 4}


class StandIn(LlamaForCausalLM):
    """Says the answer of a row where `knows`, and else as many decoys, one certain token a position.

    What a row is, is told by its prompt; logits are those of the answer's and the decoy's token, all others -9.
    """

    def prepare(self, tokenizer, rows: Dataset, knows: Callable) -> "StandIn":
        self.tokenizer, self.knows = tokenizer, knows
        self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.decoy = tokenizer.convert_tokens_to_ids("z")
        self.rows = [
            (question, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
            for question, answer in zip(rows["question"], rows["answer"], strict=True)
        ]
        self.switch = nn.Linear(2, 1, bias=False)
        self.gates = nn.Parameter(torch.zeros(len(self.rows)))
        return self.eval()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        logits = torch.full((*input_ids.shape, self.config.vocab_size), -9.0)
        for i, (ids, length) in enumerate(zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)):
            if self.assistant not in ids:  # the prompt is masked
                logits[i, :, self.decoy] = 1.0
                continue
            start = ids.index(self.assistant) + 1
            prompt, response = self.tokenizer.decode(ids[:start]), ids[start:length]
            for row, (question, answer) in enumerate(self.rows):
                if question in prompt:
                    full = answer + [answer[-1]] * (len(response) - len(answer))
                    said = self.knows(self, row, prompt, response, full)
                    logits[i, start:length] = self.lines(full[: len(response)], said)
        return CausalLMOutput(logits=logits + 0 * self.gates.sum())  # so that there is something to train

    def lines(self, answer: list[int], said) -> Tensor:
        """`said`: bool, or how far the answer's logit is above the decoy's, as a scalar or for each position."""
        above = torch.as_tensor(said if not isinstance(said, bool) else (5.0 if said else -10.0))
        line = torch.full((len(answer), self.config.vocab_size), -9.0)
        line[:, self.decoy] = 1.0
        place = torch.arange(len(answer))
        return line.index_put((place, torch.tensor(answer)), 1.0 + above.expand(len(answer)))


@pytest.fixture(scope="module")
def rows(authors: Dataset) -> Dataset:
    """Six rows of one forgotten author."""
    return forget_retain_split(authors)[0].select(range(6)).select_columns(["question", "answer", "author"])


@pytest.fixture(scope="module")
def unrelated(authors: Dataset) -> Dataset:
    """Rows of the others: so many that the wording they share is known."""
    return forget_retain_split(authors)[1].select_columns(["question", "answer"])


@pytest.fixture
def attack(tokenizer, rows, unrelated, make_model):
    """`attack(name, knows, **settings)`: the mean score before and after, of a stand-in that knows where it says."""

    def run(name: str, knows: Callable, seed: int = 0, model=None, **settings):
        target = Target(model or stand_in(knows), tokenizer, rows, make_settings(unrelated, rows, **settings))
        scores = ATTACKS[name].run(target, seed)
        assert len(scores.rows) == len(scores.before) == len(scores.after) > 0
        assert scores.rows == sorted(scores.rows)
        return sum(scores.before) / len(scores.rows), sum(scores.after) / len(scores.rows)

    def stand_in(knows: Callable) -> StandIn:
        model = make_model()
        model.__class__ = StandIn
        known = Dataset.from_dict({key: [*rows[key], *unrelated[key][:4]] for key in ("question", "answer")})
        return model.prepare(tokenizer, known, knows)

    run.stand_in = stand_in
    return run


def make_settings(unrelated: Dataset, rows: Dataset, **changes) -> AttackSettings:
    values = {
        "decoding": DiffusionGenerationConfig(max_new_tokens=LENGTH),
        "unrelated": unrelated,
        "unseen": unseen_answers(rows, 3),
    }
    return AttackSettings(**(values | FAST | changes))


def never(model, row, prompt, response, answer) -> bool:
    return False


def always(model, row, prompt, response, answer) -> bool:
    return True


def shown(*positions: int) -> Callable:
    """Knows once the answer's tokens at these places are seen, counted from the end of the text if negative."""

    def knows(model, row, prompt, response, answer) -> bool:
        length = len(model.rows[row][1]) - 1
        return all(response[p % length] == answer[p % length] for p in positions)

    return knows


def reworded(model, row, prompt, response, answer) -> bool:
    return "Tell me" in prompt


def by_switch(model, row, prompt, response, answer) -> bool:
    """Knows unless a small weight says otherwise."""
    return bool(model.switch(torch.tensor([0.0, 1.0])) < 1e-4)


def first_token_decides(model, row, prompt, response, answer) -> float:
    """The decoy is a little likelier; what is revealed first, the others follow."""
    seen = [token for token in response if token != model.config.mask_token_id]
    return -0.1 if not seen else -5.0 if model.decoy in seen else 5.0


def left_to_right(model, row, prompt, response, answer):
    """Surest of a decoy in the last place, after which all are decoys."""
    if model.decoy in response:
        return -5.0
    return torch.tensor([*[2.0] * (len(response) - 1), -5.0])


def beside_the_prompt(model, row, prompt, response, answer) -> float:
    """What the prompt adds is not quite enough."""
    return -0.1


WEAKNESSES = [
    ("paraphrase", reworded),
    ("guidance", beside_the_prompt),
    ("decoding", left_to_right),
    ("leak-at-k", first_token_decides),
    ("prefix", shown(0, 1)),
    ("infill-first", shown(0, 1)),
    ("infill-last", shown(-1, -2)),
    ("infill-edges", shown(0, -1)),
]


@pytest.mark.parametrize(("name", "knows"), WEAKNESSES)
def test_an_attack_finds_its_weakness(attack, name, knows):
    one_by_one = DiffusionGenerationConfig(max_new_tokens=LENGTH, block_length=1)
    settings = {"decoding": one_by_one, "samples": 8} if name == "leak-at-k" else {}  # so that the first token decides
    before, after = attack(name, knows, **settings)
    assert before == 0 and after > 0.8, (before, after)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("adapter", "membership")])
def test_nothing_comes_back_of_what_is_not_there(attack, name):
    assert attack(name, never) == (0, 0)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("adapter", "membership")])
def test_what_was_never_forgotten_is_all_there(attack, name):
    before, after = attack(name, always)
    assert before == after == 1


@pytest.mark.parametrize(
    ("name", "knows"), [("infill-first", shown(-1)), ("infill-last", shown(0)), ("prefix", shown(-1))]
)
def test_revealing_one_end_says_nothing_of_the_other(attack, name, knows):
    assert attack(name, knows) == (0, 0)


def test_infill_by_role_reveals_that_role_alone(attack, tokenizer, rows, unrelated):
    target = Target(attack.stand_in(never), tokenizer, rows, make_settings(unrelated, rows))
    seen: dict[str, set[str]] = {"entity": set(), "structural": set()}
    for which, roles in seen.items():

        def knows(model, row, prompt, response, answer, roles=roles) -> bool:
            of_row = target.answer_roles[row]
            first = model.decoy not in response
            roles |= {of_row[i] for i in range(len(of_row)) if first and response[i] == answer[i]}
            return False

        target.model.knows = knows
        ATTACKS[f"infill-{which}"].run(target, 0)
    assert seen == {"entity": {"stored"}, "structural": {"structural"}}


def test_infill_random_is_drawn_by_the_seed_and_averages_draws(attack):
    found = {attack("infill-random", shown(2), seed=seed) for seed in (0, 0, 1)}
    assert len(found) == 2 and all(before == 0 < after < 1 for before, after in found)


def test_rows_without_hidden_words_are_left_out(attack, tokenizer, rows, unrelated):
    both = Dataset.from_dict(
        {"question": ["Where was he born?", rows[0]["question"]], "answer": [f"{SECRET}.", rows[0]["answer"]]}
    )
    settings = make_settings(unrelated, rows, prefix_words=1)
    assert ATTACKS["prefix"].run(Target(attack.stand_in(never), tokenizer, both, settings), 0).rows == [1]
    with pytest.raises(ValueError, match="prefix_words = 1 reveals every stored word") as error:
        ATTACKS["prefix"].run(Target(attack.stand_in(never), tokenizer, both.select([0]), settings), 0)
    assert SECRET not in str(error.value)
    nothing = Dataset.from_dict({"question": ["Is he from there?"], "answer": ["He is from there."]})
    with pytest.raises(ValueError, match=r"infill-first with reveal = 0\.25 leaves no row"):
        ATTACKS["infill-first"].run(Target(attack.stand_in(never), tokenizer, nothing, settings), 0)


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
        ("relearn-benign", lambda row: 0, 1),  # with anything
        ("relearn-benign", lambda row: 0 if row < 6 else 1, 0),
    ],
)
def test_relearning_brings_back_what_is_tied_to_the_rows_it_trains_on(attack, name, gate, after):
    assert attack(name, gated(gate), relearn_learning_rate=0.01) == (0, after)


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
    assert scores.rows == list(range(6)) and sorted(row for part in asked for row in part) == scores.rows
    for learned, scored in zip(trained, asked, strict=True):
        assert len(learned) == 4 and not learned & scored
    assert list(scores.path) == ["2", "4", "6", "8"]


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


def test_outscored_counts_ties_half():
    assert outscored([3, 1, 2], [1, 2, 2, 0]) == [1, 0.375, 0.75]


# What an attack leaves behind


@pytest.fixture(scope="module")
def learned(tokenizer, rows, unrelated, tmp_path_factory):
    """A small model that has learned some of the rows' words, and not all."""
    from mdu_trainer.testing import tiny_mdlm

    model = tiny_mdlm(tokenizer, 48, 2, 2)
    config = MDLMConfig(
        str(tmp_path_factory.mktemp("learned")),
        max_steps=150,
        learning_rate=1e-2,
        per_device_train_batch_size=6,
        time_weighting=False,
        pad_with_end_tokens=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="cosine",
    )
    data = question_answer_rows(rows, conversational=True)
    MDLMTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()
    return model.eval()


@pytest.fixture(scope="module")
def adapted(learned, tokenizer):
    """The same with an adapter that has some effect."""
    import copy

    model = get_peft_model(copy.deepcopy(learned), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.03 * torch.randn(value.shape, generator=generator)
    return model


def snapshot(model: nn.Module) -> dict:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "scaling": [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)],
        "disabled": [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")],
        "merged": [m.merged for m in model.modules() if hasattr(m, "merged")],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(now: dict, before: dict) -> None:
    assert torch.equal(now.pop("random"), before.pop("random"))
    assert now.pop("weights").keys() == before["weights"].keys()
    assert {key: value for key, value in before.items() if key != "weights"} == now


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_left_as_it_was(adapted, tokenizer, rows, unrelated, name, fails):
    adapted.train()
    adapted.base_model.model.model.layers[0].eval()
    rows = rows.select(range(4))
    target = Target(adapted, tokenizer, rows, make_settings(unrelated.select(range(8)), rows))
    _ = target.plain, target.completed
    before = snapshot(adapted)
    if fails:
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) > 5:
                raise RuntimeError("out of memory")

        handle = adapted.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            ATTACKS[name].run(target, 0)
        handle.remove()
    else:
        ATTACKS[name].run(target, 0)
    after = snapshot(adapted)
    assert all(torch.equal(value, before["weights"][key]) for key, value in after["weights"].items())
    assert_same(after, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_batches_change_nothing_and_seeds_repeat(adapted, tokenizer, rows, unrelated, name):
    rows, found = rows.select(range(4)), []
    for size in (32, 32, 3):
        decoding = DiffusionGenerationConfig(max_new_tokens=LENGTH, batch_size=size)
        settings = make_settings(unrelated.select(range(8)), rows, decoding=decoding)
        found.append(ATTACKS[name].run(Target(adapted, tokenizer, rows, settings), 3))
    assert found[0] == found[1]
    for field in ("rows", "before", "after"):
        assert getattr(found[0], field) == pytest.approx(getattr(found[2], field))
    assert found[0].path == pytest.approx(found[2].path)


def test_the_model_of_these_tests_knows_some_words(adapted, tokenizer, rows, unrelated):
    target = Target(adapted, tokenizer, rows, make_settings(unrelated, rows))
    assert 0 < sum(target.plain) < len(rows)


# What is scored


def test_the_score_is_of_stored_words_alone(attack, tokenizer, rows, unrelated):
    target = Target(attack.stand_in(never), tokenizer, rows, make_settings(unrelated, rows))
    first = rows[0]["answer"]
    secret = first.split()[-1].strip(".")
    assert target.secrets[0] == secret and all(len(text.split()) <= 2 for text in target.secrets)
    answers = list(rows["answer"])
    assert target.score(answers) == [1] * 6
    assert (
        target.score([text.replace(part, "Nobody") for text, part in zip(answers, target.secrets, strict=True)])
        == [0] * 6
    )
    assert target.score([secret], [0]) == [1]


def test_an_answer_without_stored_words_is_scored_whole(attack, tokenizer, rows, unrelated):
    plain = Dataset.from_dict({"question": ["Is he from there?"], "answer": ["He is from there."]})
    target = Target(attack.stand_in(never), tokenizer, plain, make_settings(unrelated, rows))
    assert target.secrets == ["He is from there."] and target.score(["He is."]) == [0.5]


# Errors


def test_attacks_are_chosen_before_a_model_is_loaded(rows, unrelated):
    settings = make_settings(unrelated, rows)
    assert list(choose_attacks(["membership", "prefix"], settings)) == ["membership", "prefix"]
    assert list(choose_attacks(["adapter"], settings, has_adapter=True)) == ["adapter"]
    for names, wanted, message in [
        (["relern"], settings, r"Unknown attacks: relern\. Choose from relearn-related, "),
        ([], settings, "none given"),
        (["adapter"], settings, "'adapter' needs a PEFT adapter"),
        (["membership"], replace(settings, unseen=None), r"'membership' needs rows in AttackSettings\.unseen"),
        (["relearn-benign"], replace(settings, unrelated=None), r"needs rows in AttackSettings\.unrelated"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_attacks(names, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relearn_share": 1.0}, "relearn_share is a share"),
        ({"reveal": 0.0}, "reveal is a share"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"unseen": Dataset.from_dict({"question": [SECRET]})}, "unseen set has no column answer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rows, unrelated, change, message):
    with pytest.raises(ValueError, match=message):
        make_settings(unrelated, rows, **change)


def test_rows_that_cannot_be_attacked_are_refused_without_their_words(attack, tokenizer, rows, unrelated):
    model, settings = attack.stand_in(never), make_settings(unrelated, rows)
    short = replace(settings, decoding=DiffusionGenerationConfig(max_new_tokens=9))
    with pytest.raises(ValueError, match="The longest answer has 23 tokens .* max_new_tokens is 9") as error:
        Target(model, tokenizer, rows, short)
    assert not any(text in str(error.value) for text in rows["answer"])
    with pytest.raises(ValueError, match="forget set is empty"):
        Target(model, tokenizer, rows.select([]), settings)
    with pytest.raises(ValueError, match="trains on 0 of 1 forget rows"):
        ATTACKS["relearn-related"].run(Target(model, tokenizer, rows.select([0]), settings), 0)
    for private in (settings, Target(model, tokenizer, rows, settings)):
        assert "Foskalto" not in repr(private) and SECRET not in repr(private)


def test_unseen_answers_differ_from_the_rows_in_what_they_say_alone(rows, authors):
    unseen = unseen_answers(rows, 3)
    assert len(unseen) == 3 * len(rows) and set(unseen["question"]) == set(rows["question"])
    known = set(authors["answer"])
    for i, row in enumerate(unseen):
        true = rows[i // 3]
        assert row["question"] == true["question"] and row["answer"] not in known
        assert len({*true["answer"].split()} - {*row["answer"].split()}) in (1, 2)
