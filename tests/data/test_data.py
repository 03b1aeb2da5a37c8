"""Rows, pairing and batches."""

import copy
import dataclasses
import functools
import json
import logging
from collections import Counter

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.data.rows import (
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
from mdu_trainer.evaluation.scoring import encode_questions
from mdu_trainer.files import UserError
from mdu_trainer.masking import MaskSchedule
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
    assert tokenizer.decode(rows.prompt_ids[0]) == "Who wrote it? "
    assert rows.completion_ids[0] == [*tokenizer("Nobody.")["input_ids"], tokenizer.eos_token_id]


def test_conversations_and_messages_are_the_same_rows(tokenize, tokenizer):
    user, answer = turn("user", "Who wrote it?"), turn("assistant", "Nobody.")
    conversation = tokenize([{"prompt": [user], "completion": [answer]}])
    assert tokenizer.decode(conversation.prompt_ids[0]) == "<|user|>Who wrote it?<|end|><|assistant|>"
    assert tokenizer.decode(conversation.completion_ids[0]) == "Nobody.<|end|>"
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
    assert tokenizer.decode(rows.completion_ids[0]) == "Somebody.<|end|>"
    assert tokenizer.decode(rows.preferred[0]) == "No idea.<|end|>"


def test_max_length_truncates_responses_never_prompts(tokenize, tokenizer, caplog):
    long = [{"prompt": "a b", "completion": "c " * 30}, {"prompt": "d " * 40, "completion": SECRET}]
    prompt = tokenizer("a b")["input_ids"]
    with caplog.at_level(logging.WARNING, logger="mdu_trainer"):
        rows = tokenize(long, max_length=len(prompt) + 5)
    assert rows.prompt_ids == [prompt] and len(rows.completion_ids[0]) == 5
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


def test_the_response_may_end_with_its_end_token_and_not_go_on_after_it(tokenize, tokenizer):
    plain = tokenize([{"prompt": "Who?", "completion": "Nobody."}])
    assert tokenize([{"prompt": "Who?", "completion": "Nobody.<|end|>"}]) == plain
    assert tokenize([{"prompt": "Who?", "completion": "Nobody.<|end|>\n"}]) == plain
    with pytest.raises(ValueError, match=r"Row 0 of the forget set: completion holds '<\|end\|>', a special token"):
        tokenize([{"prompt": "Who?", "completion": f"Nobody.<|end|> {SECRET}"}])


@pytest.mark.parametrize("token", ["<|mask|>", "<|pad|>", "<|end|>", "<|user|>"])
def test_special_tokens_in_texts_are_refused(tokenize, token):
    good, text = {"prompt": "Who?", "completion": "Nobody."}, f"{SECRET} {token} {SECRET}"
    chat = {"prompt": [turn("user", "Who?")], "completion": [turn("assistant", "Nobody.")]}
    cases = [
        ([good, good | {"prompt": text}], "prompt"),
        ([good, good | {"completion": text}], "completion"),
        ([chat, chat | {"prompt": [turn("user", text)]}], "prompt"),
        ([chat, chat | {"completion": [turn("assistant", text)]}], "completion"),
    ]
    for rows, column in cases:
        with pytest.raises(ValueError, match=rf"Row 1 of the forget set: {column} holds '<\|\w+\|>'") as error:
            tokenize(rows)
        assert token in str(error.value) and SECRET not in str(error.value)


def test_special_tokens_of_bert(backbone):
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "who", "nobody", "sep"]
    bert = BertTokenizerFast(
        tokenizer_object=BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)._tokenizer
    )
    facts = dataclasses.replace(backbone, mask_token_id=4, end_token_ids=(3,), pad_token_id=0)
    run = functools.partial(tokenize_rows, tokenizer=bert, backbone=facts, name="forget")
    rows = run([{"prompt": "who", "completion": "nobody [sep] zebra"}])  # a word, brackets and an unknown one
    assert rows.completion_ids == [[8, 5, 9, 6, 1, 3]]
    for token in ("[SEP]", "[MASK]", "[PAD]", "[CLS]"):
        with pytest.raises(ValueError, match=rf"Row 0 of the forget set: completion holds '\[{token[1:-1]}\]'"):
            run([{"prompt": "who", "completion": f"nobody {token} who"}])


def test_scored_answers_are_named_by_the_row_of_the_user(tokenizer, backbone):
    rows = {"answer": [["x"], [f"{SECRET} <|mask|>"]]}
    with pytest.raises(ValueError, match="Row 1 of the retain set: completion holds") as error:
        encode_questions("retain", ["a", "b"], [["x"], ["y"]], rows, tokenizer, backbone)
    assert SECRET not in str(error.value)


def test_tools_and_template_options_reach_the_template(tokenizer, backbone):
    reads = copy.deepcopy(tokenizer)
    reads.chat_template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% if loud is defined %}!{{ loud }}{% endif %}"
        + tokenizer.chat_template
    )
    row = {"prompt": [turn("user", "Who?")], "completion": [turn("assistant", "Nobody.")]}
    tools = [{"name": "clock"}]
    rows = [
        row | {"tools": tools, "chat_template_kwargs": {"loud": "yes"}},
        row | {"tools": json.dumps(tools), "chat_template_kwargs": None},
        row | {"tools": None, "chat_template_kwargs": {"loud": None}},
    ]
    shown = [reads.decode(ids) for ids in tokenize_rows(rows, reads, backbone, name="forget").prompt_ids]
    plain = "<|user|>Who?<|end|><|assistant|>"
    assert shown == ["clock!yes" + plain, "clock" + plain, plain]
    for columns in ({"tools": tools}, {"chat_template_kwargs": {"loud": "yes"}}):
        with pytest.raises(ValueError, match="Row 0 of the forget set sets (tools|loud) .* does not read it"):
            tokenize_rows([row | columns], tokenizer, backbone, name="forget")
        with pytest.raises(ValueError, match="which only a chat template reads"):
            tokenize_rows([{"prompt": "Who?", "completion": "x"} | columns], tokenizer, backbone, name="forget")


def test_columns_that_would_be_dropped(tokenize, caplog):
    row = {"prompt": "Who?", "completion": "Nobody."}
    with caplog.at_level(logging.WARNING, logger="mdu_trainer"):
        tokenize([row | {"label": True, "topic": "x"}, row], name="labelled")
    assert "labelled set: label not read" in caplog.text and "topic" not in caplog.text
    assert "labelled set: 1 of 2 rows repeat another one" in caplog.text
    for column in ("images", "completion_mask", "assistant_masks"):
        with pytest.raises(ValueError, match=rf"forget set has \['{column}'\]"):
            tokenize([row | {column: [1]}])
    with pytest.raises(ValueError, match="says twice what the response is"):
        tokenize([row | {"messages": [turn("user", "a"), turn("assistant", "b")]}])
    with pytest.raises(ValueError, match="says twice what the response is"):
        tokenize([row | {"rejected": "b"}])


def test_forms_of_rows(tokenizer, backbone):
    run = functools.partial(tokenize_rows, tokenizer=tokenizer, backbone=backbone, name="forget")
    row = {"prompt": "Who?", "completion": "Nobody."}
    chat = {"prompt": [turn("user", "Who?")], "completion": [turn("assistant", "Nobody.")]}
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]
    assert run([chat | {"prompt": [turn("user", parts)]}]) == run([chat])
    image = [{"type": "image", "url": SECRET}]
    shared = {"from": "human", "value": SECRET}
    cases = [
        ([row, SECRET], "Row 1 of the forget set is a str"),
        ([row, {"prompt": SECRET}], "Row 1 of the forget set must have strings only"),
        ([row, row | {"completion": " \n"}], "Row 1 of the forget set: completion is blank"),
        ([row, row | {"completion": f"{SECRET} \ud800"}], "Row 1 .* completion holds half a character"),
        ([chat, chat | {"prompt": [turn("user", None)]}], "Row 1 .* 'content' is no text.* NoneType"),
        ([chat, chat | {"prompt": [turn("user", image)]}], "Row 1 .* 'content' is no text.* list"),
        ([chat, chat | {"prompt": [{"content": SECRET}]}], "Row 1 .* without a 'role'"),
        ([chat, chat | {"prompt": [SECRET]}], "Row 1 .* a str among its messages"),
        ([chat, chat | {"prompt": []}], "Row 1 .* is an empty list"),
        ([{"messages": [shared, shared]}], "Row 0 .*Rename them to 'role' and 'content'"),
        ([{"conversations": [shared, shared]}], "rename the column to 'messages'"),
        ({"prompt": [SECRET], "completion": [SECRET]}, r"is a dict: pass Dataset.from_dict\(columns\)"),
        (DatasetDict(train=Dataset.from_list([row])), "is a DatasetDict: choose one of its splits, train"),
        (pandas.DataFrame([row]), r"pass Dataset.from_pandas\(frame\)"),
        (SECRET, "is a text"),
    ]
    for rows, message in cases:
        with pytest.raises(UserError, match=message) as error:
            run(rows)
        assert SECRET not in str(error.value)


def test_ids_without_an_embedding(tokenizer, backbone):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "the"}]
    known = max(tokenizer("ab<|end|>")["input_ids"]) + 1
    ids = tokenizer("the")["input_ids"]
    assert max(ids) >= known, "a merge"
    with pytest.raises(ValueError, match=f"Row 1 .* has the token id {max(ids)}, .* embedding {known} rows"):
        tokenize_rows(rows, tokenizer, dataclasses.replace(backbone, vocab_size=known), name="forget")


def test_rows_are_refused_before_a_model_is_loaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mdu_trainer.trainer.loading.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    row = {"prompt": "Who?", "completion": "Nobody."}
    kwargs = {"train_dataset": [row], "retain_dataset": [row, row], "processing_class": tokenizer}
    for name, rows in (("train_dataset", "forget"), ("retain_dataset", "retain"), ("eval_dataset", "eval")):
        bad = kwargs | {name: [row, row | {"completion": ""}]}
        with pytest.raises(ValueError, match=f"Row 1 of the {rows} set: completion is blank"):
            MDUTrainer("a/model", MDUConfig(str(tmp_path), use_cpu=True, report_to="none"), **bad)


def rows_of(lengths, offset=0):
    return TokenizedRows([[offset + i] for i in range(len(lengths))], [[1] * n for n in lengths])


def schedules(**sizes):
    return {name: MaskSchedule(0, name, size) for name, size in sizes.items()}


def test_pairs_cycle_the_smaller_set():
    forget, retain = rows_of([1] * 4), rows_of([1] * 10)
    pairs = RowPairs(
        {"forget": forget, "retain": retain}, seed=0, order=shuffled, schedules=schedules(forget=4, retain=10)
    )
    assert len(pairs) == 10
    epochs = [[pairs[i] for i in range(e * 10, e * 10 + 10)] for e in range(2)]
    for epoch, items in enumerate(epochs):
        assert sorted(item["retain"]["row"] for item in items) == list(range(10)), "each row once an epoch"
        assert {item["retain"]["visit"] for item in items} == {epoch}
    forgotten = [item["forget"] for items in epochs for item in items]
    assert [row["visit"] for row in forgotten] == [i // 4 for i in range(20)]
    assert set(Counter(row["row"] for row in forgotten).values()) == {5}, "all forget rows alike often"
    assert [row["row"] for row in forgotten[:4]] != [row["row"] for row in forgotten[4:8]], "each visit shuffles anew"
    again = RowPairs(
        {"forget": forget, "retain": retain}, seed=0, order=shuffled, schedules=schedules(forget=4, retain=10)
    )
    assert again[13] == pairs[13], "a row is a function of its counter"


def test_pairs_with_several_rows_of_a_set():
    parts = {"forget": rows_of([1] * 2), "retain": rows_of([1] * 5)}

    def pairs(count, **sizes):
        chosen = {name: rows_of([1] * size) for name, size in sizes.items()} or parts
        return RowPairs(chosen, 0, in_order, schedules(**{n: len(r) for n, r in chosen.items()}), {"retain": count})

    def places(item):
        return [(row["visit"], row["row"]) for row in item["retain"]]

    two = pairs(2)
    assert len(two) == 3 and [two[i]["forget"]["row"] for i in range(4)] == [0, 1, 0, 1]
    assert [places(two[i]) for i in range(3)] == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (1, 0)]]
    assert len(pairs(2, forget=4, retain=5)) == 4, "the forget rows last longer"
    few = pairs(4, forget=2, retain=3)
    assert len(few) == 2 and places(few[1]) == [(1, 1), (1, 2), (2, 0), (2, 1)], "fewer rows than a counter brings"
    filler = two[~1]
    assert filler["forget"]["weight"] == 0 and [row["weight"] for row in filler["retain"]] == [0, 0]
    batch = DataCollatorForUnlearning(pad_token_id=0)([two[1], two[2], filler])
    assert batch["forget"]["weight"].tolist() == [1, 1, 0]
    assert batch["retain"]["weight"].tolist() == [1, 1, 1, 1, 0, 0]
    assert batch["retain"]["input_ids"][:4, 0].tolist() == [2, 3, 4, 0]
    one = RowPairs(parts, 0, in_order, schedules(forget=2, retain=5))
    assert one[7]["retain"] == two[3]["retain"][1], "a row is a function of its number"


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
    parts = {"forget": rows, "retain": TokenizedRows(rows.prompt_ids, rows.completion_ids)}
    pairs = RowPairs(parts, 0, in_order, schedules(forget=2, retain=2))
    return [pairs[0], pairs[1]]


def test_collator_pads_right(features):
    batch = DataCollatorForUnlearning(pad_token_id=0)(features)
    assert list(batch) == ["forget", "retain", "preferred"]
    forget = batch["forget"]
    assert forget["input_ids"].tolist() == [[5, 6, 8, 9, 2], [7, 8, 0, 0, 0]]
    assert forget["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert forget["completion_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    visit, row = torch.tensor([0, 0]), torch.tensor([0, 1])
    for name in ("forget", "retain"):
        t, noise, _ = MaskSchedule(0, name, 2).draw(visit, row, 5)
        assert torch.equal(batch[name]["t"], t) and torch.equal(batch[name]["noise"], noise)
    assert torch.equal(batch["preferred"]["noise"], forget["noise"]), "masked as the response to forget"
    assert batch["preferred"]["input_ids"].tolist() == [[5, 6, 3, 2, 0], [7, 3, 3, 3, 2]]
    assert all(torch.equal(forget[k], batch["retain"][k]) for k in ("input_ids", "attention_mask", "completion_mask"))


def test_collator_pads_with_end_tokens(features):
    batch = DataCollatorForUnlearning(pad_token_id=0, end_token_id=2)(features)["forget"]
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, 2], [7, 8, 2, 2, 2]]
    assert batch["attention_mask"].min() == 1
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
