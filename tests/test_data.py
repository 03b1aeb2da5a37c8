"""Rows, pairing and batches."""

import logging
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset

from mdu_trainer.data import (
    DataCollatorForUnlearning,
    EpochSampler,
    RowPairs,
    TokenizedRows,
    count_overlap,
    in_order,
    length_grouped,
    question_answer_rows,
    shuffled,
    tokenize_rows,
)
from mdu_trainer.models import resolve_backbone

SECRET = "Zanthor Quibble"  # stands for private text: no message may hold it


@pytest.fixture
def backbone(make_model, tokenizer):
    return resolve_backbone(make_model(), tokenizer)


@pytest.fixture
def tokenize(tokenizer, backbone):
    def run(rows, **kwargs):
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return tokenize_rows(rows, tokenizer, backbone, **({"name": "forget"} | kwargs))

    return run


def turn(role, text):
    return {"role": role, "content": text}


def test_text_rows_end_with_the_end_token(tokenize, tokenizer):
    rows = tokenize([{"prompt": "Who wrote it? ", "completion": "Nobody."}])
    assert tokenizer.decode(rows.prompts[0]) == "Who wrote it? "
    assert rows.responses[0] == [*tokenizer("Nobody.")["input_ids"], tokenizer.eos_token_id]


def test_conversations_and_messages_are_the_same_rows(tokenize, tokenizer):
    user, answer = turn("user", "Who wrote it?"), turn("assistant", "Nobody.")
    conversation = tokenize([{"prompt": [user], "completion": [answer]}])
    assert tokenizer.decode(conversation.prompts[0]) == "<|user|>Who wrote it?<|end|><|assistant|>"
    assert tokenizer.decode(conversation.responses[0]) == "Nobody.<|end|>"
    assert tokenize([{"messages": [user, answer]}]) == conversation


def test_question_answer_rows(authors, tokenize):
    plain = question_answer_rows(authors, conversational=False)
    renamed = authors.select_columns(["question", "answer"]).rename_columns(
        {"question": "prompt", "answer": "completion"}
    )
    assert plain.to_list() == renamed.to_list()
    chat = question_answer_rows(authors, conversational=True, preferred="refusal")
    assert chat[0]["chosen"] == [turn("assistant", authors[0]["refusal"])]
    with pytest.raises(ValueError, match="no column.*'answer'.*'prompt'"):
        question_answer_rows(Dataset.from_list([{"prompt": "x", "question": "y"}]), conversational=False)


def test_preference_rows(tokenize, tokenizer):
    rows = tokenize([{"prompt": "Who?", "rejected": "Somebody.", "chosen": "No idea."}], preferred=True)
    assert tokenizer.decode(rows.responses[0]) == "Somebody.<|end|>"
    assert tokenizer.decode(rows.preferred[0]) == "No idea.<|end|>"


def test_max_length_truncates_responses_never_prompts(tokenize, tokenizer, caplog):
    long = [{"prompt": "a b", "completion": "c " * 30}, {"prompt": "d " * 40, "completion": SECRET}]
    prompt = tokenizer("a b")["input_ids"]
    with caplog.at_level(logging.WARNING, logger="mdu_trainer"):
        rows = tokenize(long, max_length=len(prompt) + 5)
    assert rows.prompts == [prompt] and len(rows.responses[0]) == 5
    assert "1 of 2 rows dropped" in caplog.text and "1 responses truncated" in caplog.text
    assert SECRET not in caplog.text


@pytest.fixture(autouse=True)
def propagate(monkeypatch):
    """Let caplog see what transformers' logger holds back."""
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)


def test_errors_name_the_fix_and_no_text(tokenize, backbone):
    row = {"prompt": SECRET, "completion": SECRET}
    cases = [
        (lambda: tokenize(Dataset.from_list([row]).select([])), "forget set is empty"),
        (lambda: tokenize([{"text": SECRET}]), r"needs 'prompt' and 'completion'.*\['text'\]"),
        (lambda: tokenize([row], preferred=True), "column 'chosen'.*'completion', 'prompt'"),
        (lambda: tokenize([row], max_length=3), "truncated away.*max_length = 3.*Raise max_length"),
        (
            lambda: tokenize([row | {"prompt": "x " * 400}], name="retain"),
            "1 of 1 prompts of the retain set.*256 tokens",
        ),
        (lambda: tokenize([{"messages": [turn("user", SECRET)]}]), "Row 0 of the forget set: .*an assistant turn"),
        (lambda: tokenize([row, row | {"completion": None}]), "Row 1 of the forget set .*'completion': 'NoneType'"),
        (lambda: tokenize([{"prompt": [turn("user", SECRET)], "completion": SECRET}]), "'list', 'completion': 'str'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert SECRET not in str(error.value)
    with pytest.raises(TypeError, match="IterableDataset"):
        tokenize(IterableDataset.from_generator(lambda: iter([row])))


def rows_of(lengths, offset=0):
    return TokenizedRows([[offset + i] for i in range(len(lengths))], [[1] * n for n in lengths])


def test_pairs_cycle_the_smaller_set():
    forget, retain = rows_of([1] * 4), rows_of([1] * 10)
    pairs = RowPairs({"forget": forget, "retain": retain}, seed=0, order=shuffled)
    assert len(pairs) == 10
    epochs = [[pairs[i] for i in range(e * 10, e * 10 + 10)] for e in range(2)]
    for epoch, items in enumerate(epochs):
        assert sorted(item["retain"]["row"] for item in items) == list(range(10)), "each row once an epoch"
        assert {item["retain"]["visit"] for item in items} == {epoch}
    forgotten = [item["forget"] for items in epochs for item in items]
    assert [row["visit"] for row in forgotten] == [i // 4 for i in range(20)]
    assert set(Counter(row["row"] for row in forgotten).values()) == {5}, "all forget rows alike often"
    assert [row["row"] for row in forgotten[:4]] != [row["row"] for row in forgotten[4:8]], "each visit shuffles anew"
    again = RowPairs({"forget": forget, "retain": retain}, seed=0, order=shuffled)
    assert again[13] == pairs[13], "a row is a function of its counter"


def test_orders():
    rows = rows_of([5, 1, 4, 2, 3, 6, 9])
    assert in_order(rows, 0, 3).tolist() == list(range(7))
    grouped = length_grouped(2)(rows, 0, 0).tolist()
    assert sorted(grouped) == list(range(7))
    batches = [sorted(rows.lengths[i] for i in grouped[k : k + 2]) for k in (0, 2, 4)]
    assert sorted(batches) == [[2, 3], [4, 5], [6, 7]] and grouped[6] == 6


def test_sampler_reads_the_epoch_when_it_starts():
    epoch = 0
    sampler = EpochSampler(3, lambda: epoch)
    assert list(sampler) == [0, 1, 2] and len(sampler) == 3
    epoch = 2
    assert list(sampler) == [6, 7, 8]


def test_overlap():
    rows = TokenizedRows([[1], [2]], [[3], [4]])
    assert count_overlap(rows, TokenizedRows([[2], [1]], [[4], [9]])) == 1


@pytest.fixture
def features():
    rows = TokenizedRows([[5, 6], [7]], [[8, 9, 2], [8]], preferred=[[3, 2], [3, 3, 3, 2]])
    pairs = RowPairs({"forget": rows, "retain": TokenizedRows(rows.prompts, rows.responses)}, 0, in_order)
    return [pairs[0], pairs[1]]


def test_collator_pads_right(features):
    batch = DataCollatorForUnlearning(pad_token_id=0)(features)
    assert list(batch) == ["forget", "retain", "preferred"]
    forget = batch["forget"]
    assert forget["input_ids"].tolist() == [[5, 6, 8, 9, 2], [7, 8, 0, 0, 0]]
    assert forget["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert forget["response_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert forget["row"].tolist() == [0, 1] and forget["visit"].tolist() == [0, 0]
    assert batch["preferred"]["input_ids"].tolist() == [[5, 6, 3, 2, 0], [7, 3, 3, 3, 2]]
    assert all(torch.equal(forget[k], batch["retain"][k]) for k in forget)


def test_collator_pads_with_end_tokens(features):
    batch = DataCollatorForUnlearning(pad_token_id=0, end_token_id=2)(features)["forget"]
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, 2], [7, 8, 2, 2, 2]]
    assert batch["attention_mask"].min() == 1
    assert batch["response_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
