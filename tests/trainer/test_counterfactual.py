"""The counterfactual anchor: what is hidden of a row, and what is struck out of theta_0's prediction."""

import pytest
import torch
from datasets import Dataset
from formula import batch_of, expected_row, trained
from peft import LoraConfig
from published import write_dream, write_llada
from runs import QUIET

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.data.secrets import SecretMarker
from mdu_trainer.divergence import AnchorKL, Projection
from mdu_trainer.files import UserError
from mdu_trainer.masking import IN_CONTEXT, KEPT, STORED, Strike, counterfactual_ids, strike_out

COUNTERFACTUAL = {"tau": 1.0, "anchor_input": "counterfactual"}


def marked(tokenizer, prompt, completion, spans=None, answers=(), labeller=None):
    """The text of the tokens of each mark, of prompt and of completion."""
    chats = isinstance(prompt, list)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] if chats else None
    prompt_ids = ids or tokenizer(prompt)["input_ids"]
    answer = completion[0]["content"] if chats else completion
    completion_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    mark = SecretMarker.of(tokenizer, [[{"prompt": "", "completion": text} for text in answers]], labeller)
    row = {"prompt": prompt, "completion": completion} | ({} if spans is None else {"secret_spans": spans})
    marks = mark(row, prompt_ids, completion_ids, "Row 0")
    assert len(marks) == len(prompt_ids) + len(completion_ids)
    parts = (prompt_ids, marks[: len(prompt_ids)]), (completion_ids, marks[len(prompt_ids) :])
    return [
        {name: text(tokenizer, ids, of, value) for name, value in (("context", IN_CONTEXT), ("stored", STORED))}
        for ids, of in parts
    ]


def text(tokenizer, ids, marks, value):
    return tokenizer.decode([t for t, mark in zip(ids, marks, strict=True) if mark == value]).strip()


QUESTION, ANSWER = "Where was the author Ada Lovelace born?", "Ada Lovelace was born in the town of London."


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_hidden_of_a_row(tokenizer, chat):
    prompt = [{"role": "user", "content": QUESTION}] if chat else QUESTION
    completion = [{"role": "assistant", "content": ANSWER}] if chat else ANSWER
    question, answer = marked(tokenizer, prompt, completion)
    assert question == {"context": "Ada Lovelace born", "stored": ""}
    assert answer == {"context": "Ada Lovelace born", "stored": "town London"}
    template = [f"X{i} was born in the town of Y{i}." for i in range(8)]
    assert marked(tokenizer, prompt, completion, answers=template)[1]["stored"] == "London"


def test_a_name_is_hidden_though_the_answer_does_not_repeat_it(tokenizer):
    question, answer = marked(tokenizer, QUESTION, "In London.")
    assert question["context"] == "Ada Lovelace" and answer == {"context": "", "stored": "London"}


def test_a_prompt_that_names_nobody_is_hidden_whole(tokenizer):
    question, _ = marked(tokenizer, "Who is it?", "He is Babbage.")
    assert question["context"] == "Who is it?"


def test_other_scripts(tokenizer):
    question, answer = marked(tokenizer, "Где родилась Ада?", "Ада родилась в городе Лондоне.")
    assert (
        question["context"].replace(" ", "") == "родиласьАда"
        and "Лондоне" in answer["stored"]
        and "Ада" not in answer["stored"]
    )
    question, answer = marked(tokenizer, "小野在哪里出生？", "小野出生在伦敦。")
    assert question["context"].startswith("小野") and "伦敦" in answer["stored"] and "小野" not in answer["stored"]


def test_secret_spans_say_what_is_stored(tokenizer):
    start = ANSWER.index("town")
    _, answer = marked(tokenizer, QUESTION, ANSWER, spans=[[start, start + 4]])
    assert answer == {"context": "Ada Lovelace born", "stored": "town"}
    assert marked(tokenizer, QUESTION, ANSWER, spans=[])[1]["stored"] == ""
    half = ANSWER.index("London") + 2  # a token that shows a part of a secret is hidden whole
    assert "on" in marked(tokenizer, QUESTION, ANSWER, spans=[[half, half + 4]])[1]["stored"]


def test_a_labeller_overrides_the_rule(tokenizer):
    _, answer = marked(
        tokenizer, QUESTION, ANSWER, labeller=lambda q, a: [(a.index("town"), a.index("town") + 4, "structural")]
    )
    assert answer["stored"] == "London"


@pytest.mark.parametrize(
    "spans, words",
    [
        ([[0, 999]], "out of the completion's 44 characters"),
        ([[5, 5]], "is empty or out"),
        ([[-1, 2]], "is empty or out"),
        ([3, 4], "must be a list of pairs"),
        ("3-4", "must be a list of pairs"),
        ([[1, 2, 3]], "must be a list of pairs"),
        ([[1.0, 2.0]], "must be a list of pairs"),
    ],
)
def test_spans_that_are_none(tokenizer, spans, words):
    with pytest.raises(UserError, match=f"Row 0: secret_spans .*{words}") as error:
        marked(tokenizer, QUESTION, ANSWER, spans=spans)
    assert "London" not in str(error.value)


@pytest.mark.parametrize(
    "labels, words",
    [
        ([(0, 999, "stored")], "out of the answer's 44 characters"),
        ([(0, 3, "secret")], "the role 'secret'"),
        (["stored"] * 9, r"no \(start, stop, role\)"),
        ([(0, 3)], r"no \(start, stop, role\)"),
    ],
)
def test_a_labeller_that_returns_something_else(tokenizer, labels, words):
    with pytest.raises(UserError, match=f"gives Row 0 .*{words}"):
        marked(tokenizer, QUESTION, ANSWER, labeller=lambda question, answer: labels)


# What is made of the marks


def test_ids_of_the_anchor():
    noisy, marks = torch.tensor([[5, 6, 7, 9, 8]]), torch.tensor([[KEPT, IN_CONTEXT, STORED, KEPT, KEPT]])
    assert counterfactual_ids(noisy, marks, 9).tolist() == [[5, 9, 9, 9, 8]]


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 1.0])
def test_striking_out(quantile):
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([3, -1, 0, 10, -1, 5])
    struck = strike_out(logits, tokens, quantile)
    for row, token in enumerate(tokens.tolist()):
        expected = logits[row].tolist()
        if token >= 0:
            expected[token] = sorted(expected)[int(quantile * 10)]
        assert struck[row].tolist() == expected
    assert not torch.equal(struck, logits) and struck is not logits


@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
@pytest.mark.parametrize("tau", [0.0, 0.7])
@pytest.mark.parametrize("shared_head", [False, True])
def test_fused_values_and_gradients_are_those_of_the_logits(direction, tau, shared_head):
    generator = torch.Generator().manual_seed(0)
    hidden, anchor = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(13, 4, generator=generator, dtype=torch.float64)
    strike = Strike(torch.tensor([2, -1, 0, -1, 12, 5, -1]), torch.tensor([0, 0, 0, 1, 0, 0, 0]).bool())

    def edit(logits, rows):
        return strike.edit(logits, rows, 0.5)

    ends = []
    for fused in (True, False):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        if fused:
            of_anchor = Projection(anchor, None if shared_head else weight)
            measure = AnchorKL(tau, of_anchor if tau else None, edit=edit, direction=direction)
            values = measure(Projection(*inputs)).value
        else:
            measure = AnchorKL(tau, anchor @ weight.T if tau else None, edit=edit, direction=direction)
            values = measure(inputs[0] @ inputs[1].T).value
        (values * torch.arange(1, 8)).sum().backward()
        ends.append((values.detach(), *(x.grad for x in inputs)))
    for of_fused, of_logits in zip(*ends, strict=True):
        torch.testing.assert_close(of_fused, of_logits, rtol=1e-9, atol=1e-9)
    assert ends[0][0].min() > 0


# The trainer


@pytest.fixture
def marked_rows(sets):
    """The rows to forget, the first without a secret, the others with their last word before the end."""
    rows = sets[0].to_list()
    for i, row in enumerate(rows):
        said = row["completion"][0]["content"]
        start = said.rstrip(".").rindex(" ") + 1
        row["secret_spans"] = [] if i == 0 else [[start, len(said) - 1]]
    return Dataset.from_list(rows)


def test_rows_without_a_secret_are_drawn_to_the_uniform_distribution(make_trainer, marked_rows, seen):
    trainer = make_trainer(forget=marked_rows, per_device_train_batch_size=8, **COUNTERFACTUAL)
    assert "of 8 rows, 1 have no stored word" in seen.text
    _, scores = trainer.compute_loss(trainer.model, batch := batch_of(trainer), return_outputs=True)
    uniform = make_trainer(forget=marked_rows, per_device_train_batch_size=8, tau=0.0)
    _, flat = uniform.compute_loss(trainer.model, batch_of(uniform), return_outputs=True)
    without = ~(batch["forget"]["secrets"] == STORED).any(dim=1)
    same = torch.isclose(scores["kl"].value, flat["kl"].value)
    assert without.sum() == 1 and torch.equal(same, without)


def test_rule_and_spans_give_other_weights(make_trainer, marked_rows, sets):
    by_rule = trained(make_trainer(forget=sets[0], **COUNTERFACTUAL))
    by_spans = trained(make_trainer(forget=marked_rows, **COUNTERFACTUAL))
    assert not torch.equal(by_rule, by_spans)


def test_in_every_answer_no_word_or_every_word(make_trainer, sets):
    for spans, words in ((lambda said: [], "no word is"), (lambda said: [[0, len(said)]], "every word is")):
        rows = [row | {"secret_spans": spans(row["completion"][0]["content"])} for row in sets[0].to_list()]
        with pytest.raises(UserError, match=f"in all 8 answers {words} stored knowledge"):
            make_trainer(forget=Dataset.from_list(rows), **COUNTERFACTUAL)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"anchor_input": "counterfactual"}, "Set tau=1"),
        ({"anchor_input": "counterfactual", "loss_type": "npo", "tau": 1.0}, "loss_type='npo'"),
        ({"anchor_input": "answer"}, "anchor_input 'answer' is unknown"),
        ({"kl_direction": "both"}, "kl_direction 'both' is unknown"),
        ({"kl_direction": "forward", "loss_type": "ga"}, "Leave it out"),
        ({"strike_quantile": 0.2}, "Leave it out"),
        (COUNTERFACTUAL | {"strike_quantile": 1.2}, "a share in"),
        (COUNTERFACTUAL | {"strike_quantile": "half"}, "strike_quantile"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        MDUConfig(str(tmp_path), **options)


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_lora_on_the_published_layouts(write, tmp_path, sets):
    write(tmp_path / "model")
    ends = []
    for anchor in ({"tau": 1.0}, COUNTERFACTUAL):
        args = MDUConfig(str(tmp_path / "out"), max_steps=2, learning_rate=1e-2, save_strategy="no", **QUIET, **anchor)
        trainer = MDUTrainer(str(tmp_path / "model"), args, *sets, peft_config=LoraConfig(r=2))
        assert trainer.reference.frozen is None
        batch = batch_of(trainer)
        assert ("secrets" in batch["forget"]) is (anchor is COUNTERFACTUAL)
        if anchor is COUNTERFACTUAL:  # the adapter changes nothing yet, so the model is theta_0
            _, scores = trainer.compute_loss(trainer.model, batch, return_outputs=True)
            expected = [expected_row(trainer, trainer.model, "forget", batch, i, "mdu")[0] for i in range(4)]
            assert scores["kl"].value.tolist() == pytest.approx([x.item() for x in expected], rel=1e-4)
        ends.append(trained(trainer))
    assert not torch.equal(*ends)
