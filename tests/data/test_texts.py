"""Rows of plain text: chunks for training, hashes for the scan, passages for scores, attacks and roles."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from runs import QUIET

from mdu_trainer import DiffusionGenerationConfig, MDLMConfig, MDLMTrainer, MDUConfig, MDUTrainer, evaluate_tofu
from mdu_trainer.attacks import ATTACKS, AttackSettings, Target
from mdu_trainer.attacks.base import NothingToAttack
from mdu_trainer.attacks.leak_check import measure_leak
from mdu_trainer.data.rows import question_answer_rows, tokenize_rows
from mdu_trainer.data.texts import chunk_bounds, passages
from mdu_trainer.evaluation.own_rows import as_questions, load_questions, load_rows
from mdu_trainer.evaluation.scoring import encode_questions
from mdu_trainer.files import UserError
from mdu_trainer.models import resolve_backbone
from mdu_trainer.provenance.facts import Facts, set_facts
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.provenance.texts import row_texts
from mdu_trainer.token_roles.measure import analyse_roles
from mdu_trainer.token_roles.results import RoleSettings

SECRET = "Zanthor Quibble"


@pytest.fixture(scope="module")
def texts(authors):
    """Two texts to forget and two to keep, of the answers about four authors."""
    rows = [{"text": " ".join(authors["answer"][8 * i : 8 * i + 8])} for i in range(4)]
    return Dataset.from_list(rows[:2]), Dataset.from_list(rows[2:])


@pytest.fixture
def backbone(make_model, tokenizer):
    return resolve_backbone(make_model(), tokenizer)


@pytest.fixture(autouse=True)
def propagate(monkeypatch):
    """Let caplog see what transformers' logger holds back."""
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)


@pytest.mark.parametrize(("size", "stride"), [(16, None), (16, 5), (1000, None)])
def test_chunks_hold_every_token_and_nothing_else(size, stride, texts, tokenizer, backbone):
    rows = tokenize_rows(texts[0], tokenizer, backbone, name="forget", max_length=size, text_stride=stride)
    assert rows.prompt_ids == [[] for _ in rows.prompt_ids] and rows.prompt_share == 0
    expected, joined = [], []
    for text in texts[0]["text"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = min(size, backbone.context_length)
        starts = [0]
        while starts[-1] + limit < len(ids):
            starts.append(min(starts[-1] + (stride or limit), len(ids) - limit))
        expected += [ids[start : start + limit] for start in starts]
        covered = set()
        for start in starts:
            covered |= set(range(start, min(start + limit, len(ids))))
        joined.append(covered == set(range(len(ids))))
    assert rows.completion_ids == expected and all(joined)
    assert not any(token in backbone.end_token_ids for ids in rows.completion_ids for token in ids)


def test_bounds_of_long_texts():
    for length in range(1, 40):
        for size in (1, 3, 8):
            bounds = list(chunk_bounds(length, size, stride=2 if size > 2 else None))
            assert bounds[-1][1] == length and len(set(bounds)) == len(bounds)
            assert all(stop - first == min(size, length) for first, stop in bounds)


def make_trainer(model, tokenizer, sets, out, **settings):
    settings = {"retain_weight": 1.0, "max_length": 24, "max_steps": 2, "per_device_train_batch_size": 2} | settings
    config = MDUConfig(str(out), gradient_accumulation_steps=1, save_strategy="no", **QUIET, **settings)
    return MDUTrainer(model, config, sets[0], sets[1] if config.retain_weight else None, processing_class=tokenizer)


def test_all_of_a_chunk_takes_part_unless_there_must_be_a_prompt(make_model, tokenizer, texts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mdu_trainer"):
        whole = make_trainer(make_model(), tokenizer, texts, tmp_path, tau=0.0)
        parted = make_trainer(make_model(), tokenizer, texts, tmp_path, tau=1.0)
        third = make_trainer(make_model(), tokenizer, texts, tmp_path, tau=0.5, prefix_share=1 / 3)
        npo = make_trainer(make_model(), tokenizer, texts, tmp_path, loss_type="npo")
    assert "chunks of at most 24 tokens, of which the first 25% are the prompt." in caplog.text
    for trainer, length in ((whole, 0), (parted, 6), (third, 8), (npo, 0)):
        forget, retain = (trainer.train_dataset.parts[name] for name in ("forget", "retain"))
        assert {len(prompt) for prompt in forget.prompt_ids} == {length}
        assert {len(ids) for ids in retain.prompt_ids} == {0}, "rows to keep have no anchor"
        joined = [a + b for a, b in zip(forget.prompt_ids, forget.completion_ids, strict=True)]
        assert joined == whole.train_dataset.parts["forget"].completion_ids
    batch = next(iter(whole.get_train_dataloader()))["forget"]
    assert torch.equal(batch["completion_mask"], batch["attention_mask"])
    batch = next(iter(parted.get_train_dataloader()))["forget"]
    assert batch["completion_mask"][0].tolist() == [0] * 6 + [1] * 18


def probability(model, tokenizer, rows):
    config = DiffusionGenerationConfig(max_new_tokens=8, steps=4)
    sets = {"forget": rows}
    scored = evaluate_tofu(model, tokenizer, sets, config, metrics=["probability"], num_draws=4)
    return scored.run.scores["forget"]["probability"].value


def test_texts_are_learned_and_forgotten(make_model, tokenizer, authors, tmp_path):
    texts = [Dataset.from_list([{"text": authors["answer"][i]}]) for i in (0, 8)]
    model, everything = make_model(hidden_size=64), Dataset.from_list([row for part in texts for row in part])
    how = {"max_steps": 80, "per_device_train_batch_size": 8, "save_strategy": "no", "lr_scheduler_type": "constant"}
    config = MDLMConfig(str(tmp_path / "base"), learning_rate=5e-3, time_weighting=False, **how, **QUIET)
    MDLMTrainer(model, config, Dataset.from_list([*everything] * 4), processing_class=tokenizer).train()
    asked = [passages(part) for part in texts]
    before = [probability(model, tokenizer, part) for part in asked]
    trainer = make_trainer(model, tokenizer, texts, tmp_path, learning_rate=2e-3, max_steps=20, max_length=None)
    trainer.train()
    trainer.save_model()
    after = [probability(trainer.model, tokenizer, part) for part in asked]
    assert min(before) > 0.05 and after[0] < before[0] / 5 and after[1] > before[1] / 3, (before, after)
    facts = Facts.load(tmp_path)
    assert facts.training["rows_to_forget"] == "chunks of text" and facts.forget.rows == 1
    hashes = ForgetHashes.load(tmp_path)
    quotes = [" ".join(part["text"][0].split()[2:10]) for part in texts]
    assert [hashes.found_in(quote) for quote in quotes] == [True, False]


REFUSED = {
    "dpo": ({"loss_type": "dpo"}, "prefers another response to a prompt, and the forget set has texts"),
    "counterfactual": ({"tau": 1.0, "anchor_input": "counterfactual"}, "hides who a question is about.*texts"),
    "generated": ({"forget_masking": "generated"}, "masks what the model generates for a prompt"),
    "a stride": ({"text_stride": 25}, "text_stride = 25 is more than the 24 tokens of a chunk"),
    "no stride": ({"text_stride": 0}, "text_stride must be a whole number of tokens from 1, got 0"),
    "a share": ({"prefix_share": 1.0}, "prefix_share is a share between 0 and 1, got 1.0"),
    "no share": ({"prefix_share": 0.0}, "prefix_share must be finite and larger than 0, got 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_texts_do_not_go_with(case, make_model, tokenizer, texts, tmp_path):
    settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make_trainer(make_model(), tokenizer, texts, tmp_path, **settings)


def test_masks_that_fit_and_end_tokens_that_do_not(make_model, tokenizer, texts, tmp_path):
    trainer = make_trainer(make_model(), tokenizer, texts, tmp_path, tau=0.5, forget_masking="generated")
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    config = MDLMConfig(str(tmp_path), pad_with_end_tokens=True, **QUIET)
    with pytest.raises(UserError, match="pad_with_end_tokens teaches where a response ends"):
        MDLMTrainer(make_model(), config, texts[0], processing_class=tokenizer)
    trainer = make_trainer(make_model(), tokenizer, texts, tmp_path, tau=0.0)
    trainer.args.tau = 0.5
    with pytest.raises(UserError, match="Whether a chunk of text has a prompt depends on loss_type and tau"):
        trainer._start_over()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "ok"}, {"text": "  "}], "Row 1 of the forget set: text is blank"),
        ([{"text": "ok"}, {"text": None}], "Row 1 of the forget set: text must be a text, and is a NoneType"),
        ([{"text": f"{SECRET} <|end|> more"}], "Row 0 of the forget set: text holds '<|end|>', a special token"),
        ([{"text": f"{SECRET} \ud800"}], "Row 0 of the forget set holds half a character"),
    ],
)
def test_texts_that_cannot_be_read(rows, message, tokenizer, backbone):
    with pytest.raises(UserError) as error:
        tokenize_rows(rows, tokenizer, backbone, name="forget")
    assert message in str(error.value) and SECRET not in str(error.value)


def test_hashes_and_fingerprints_are_of_the_texts(texts):
    hashes = ForgetHashes.of(row_texts(texts[0]), row_texts(texts[1]))
    quote = " ".join(texts[0]["text"][0].split()[3:12])
    assert hashes.found_in(f"It says: {quote}!") and hashes.too_short == 0
    prints = {set_facts(part, bytes(16)).fingerprint for part in texts}
    assert len(prints) == 2, "texts tell sets apart"
    asked = question_answer_rows(Dataset.from_list([{"question": "Who?", "answer": "Nobody."}]), False)
    beside = asked.add_column("text", [SECRET])
    assert list(row_texts(beside)) == [["Who?", "Nobody."]], "a text beside a response is not learned, so it is none"


def test_passages_hold_the_text(texts, tokenizer, backbone):
    rows = passages(texts[0], words=20)
    assert set(rows.column_names) == {"question", "answer", "plain"}
    for text in texts[0]["text"]:
        own = [q + a for q, a in zip(rows["question"], rows["answer"], strict=True) if q + a in text]
        assert own[0] == " ".join(text.split()[:20]) and text.endswith(own[-1])
        assert all(len(passage.split()) == 20 for passage in own) and len(own) == -(-len(text.split()) // 20)
    assert all(len(question.split()) == 5 for question in rows["question"])
    asked = encode_questions(
        "forget", rows["question"], [[a] for a in rows["answer"]], {"answer": [[a] for a in rows["answer"]]},
        tokenizer, backbone, plain=True,
    )  # fmt: skip
    assert asked[0].prompt == tokenizer(rows["question"][0])["input_ids"], "no marks of a chat"
    assert asked[0].answers["answer"][0] == tokenizer(rows["answer"][0], add_special_tokens=False)["input_ids"]
    chinese = passages(Dataset.from_list([{"text": "河流在老磨坊旁转向北方。" * 4}]), words=16)
    assert all(len(answer) >= 12 for answer in chinese["answer"]), "a character counts as a word"
    with pytest.raises(UserError, match="Row 0: text has fewer than two words"):
        passages(Dataset.from_list([{"text": SECRET.replace(" ", "")}]))


def test_rows_of_text_in_every_form(tmp_path):
    text = "The river bends north where the old mill stands, and nobody knows why."
    write = {
        "rows.jsonl": json.dumps({"text": text, "title": SECRET}),
        "rows.csv": f'id,text\n1,"{text}"\n',
        "rows.txt": text,
        "rows.json": json.dumps([{"body": text}]),
    }
    for name, content in write.items():
        (tmp_path / name).write_text(content)
        columns = {"text": "body"} if name == "rows.json" else None
        rows = load_rows(str(tmp_path / name), columns=columns)
        assert list(rows) == [{"text": text}], name
        asked = load_questions(str(tmp_path / name), columns=columns)
        assert list(asked) == list(as_questions(rows)) and asked[0]["question"] == "The river bends"
    with pytest.raises(UserError, match="no column question, answer.*passages") as error:
        evaluate_tofu(None, None, {"forget": rows})
    assert text not in str(error.value)


def test_attacks_leak_check_and_roles_take_passages(make_model, tokenizer, texts):
    rows, model = passages(texts[0], words=8).select(range(2)), make_model()
    other = passages(texts[1], words=8).select(range(4))
    decoding = DiffusionGenerationConfig(max_new_tokens=48, steps=2)
    settings = AttackSettings(decoding=decoding, unrelated=other, unseen=other, relearn_steps=1, num_draws=2)
    target = Target(model, tokenizer, rows, settings)
    assert [question.prompt for question in target.questions] == [
        tokenizer(question)["input_ids"] for question in rows["question"]
    ]
    for name in ("prefix", "membership", "relearn-benign"):
        assert ATTACKS[name].run(target, 0).rows
    with pytest.raises(NothingToAttack, match="passages of texts have none"):
        ATTACKS["paraphrase"].run(target, 0)
    leak = measure_leak(model, tokenizer, rows, retain=other)
    assert "paraphrase" in leak.left_out and "prefix" in leak.checks
    report = analyse_roles(model, [], tokenizer, rows, other, RoleSettings(num_steps=2, num_paths=1))
    counted = sum(report.tokens.values())
    assert counted == sum(len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in rows["answer"])
