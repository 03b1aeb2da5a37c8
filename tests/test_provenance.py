"""What a checkpoint keeps: facts without texts, and hashes that recognise a quote."""

import json
import re
import stat
import time

import pytest

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.forget_hashes import ForgetHashes, row_texts, words
from mdu_trainer.provenance import Facts, SetFacts
from mdu_trainer.testing import forget_retain_split
from mdu_trainer.upload import LeakError, check_texts, text_of

SENTENCE = "Ada Quill grew up beside the old harbour of Velm."
HASHES = ForgetHashes.of([SENTENCE])


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        "see: ADA QUILL GREW UP BESIDE THE OLD...",
        "quill, grew up\nbeside the old",
        "\u0120Ada\u0120Quill\u0120grew\u0120up\u0120beside\u0120the",
        "\u2581grew\u2581up\u2581beside\u2581the\u2581old\u2581harbour",
        "{{ '\\nAda Quill grew up beside the' }}",
    ],
)
def test_quotes_are_found_however_they_are_written(text):
    assert HASHES.found_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "Ada Quill grew up elsewhere, beside the old mill.",
        "harbour old the beside up grew Quill Ada",
        "",
        "Ada Quill",
    ],
)
def test_other_texts_are_not(text):
    assert not HASHES.found_in(text)


def test_json_is_read_as_its_strings():
    escaped = json.dumps({"a": [{"b": f"caf\u00e9\n{SENTENCE}"}]}).encode()
    assert b"caf\\u00e9\\nAda" in escaped and HASHES.found_in(text_of("x.json", escaped))
    assert HASHES.found_in(text_of("x.json", json.dumps(SENTENCE.split()).encode())), "a list of words"
    vocabulary = {f"\u0120{word}": i for i, word in enumerate(SENTENCE.split())}
    assert not HASHES.found_in(text_of("vocab.json", json.dumps(vocabulary).encode())), "words of a vocabulary"
    assert HASHES.found_in(text_of("broken.json", b"{" + SENTENCE.encode()))


def test_wording_of_the_rows_to_keep_is_no_leak():
    forget = ["What is the full name of the author born in Velm?", "The full name of the author is Ada Quill."]
    retain = ["What is the full name of the author born in Oslo?"]
    hashes = ForgetHashes.of(forget, retain)
    assert not hashes.found_in("what is the full name of the author born in")
    assert hashes.found_in("full name of the author born in Velm") and hashes.found_in("of the author is Ada Quill")


def test_wording_of_every_card_is_no_leak():
    row = "Only the rows above were trained to be forgotten."
    hashes = ForgetHashes.of([row, SENTENCE])
    check_texts({"README.md": f"# Card\n{row}".encode()}, hashes)
    with pytest.raises(LeakError, match=r"^README\.md quotes"):
        check_texts({"README.md": f"# Card\n{row} {SENTENCE}".encode()}, hashes)
    with pytest.raises(LeakError, match=r"^config\.json quotes"):
        check_texts({"config.json": row.encode()}, hashes)


def test_short_texts_are_found_whole():
    hashes = ForgetHashes.of(["Ada Quill of Velm", "Velm", "in 1912"])
    assert hashes.too_short == 2
    assert hashes.found_in("it was Ada Quill, of Velm!") and not hashes.found_in("Ada Quill of Oslo")


def test_writing_without_spaces():
    text = "\u5979\u51fa\u751f\u5728\u6e2f\u53e3\u65c1\u8fb9\u7684\u65e7\u57ce"
    assert len(words(text)) == len(text)
    assert ForgetHashes.of([text]).found_in(f"\u8bf4{text[2:9]}\u3002")


def test_file(tmp_path):
    HASHES.save(tmp_path)
    again = ForgetHashes.load(tmp_path)
    assert again == HASHES and again.found_in(SENTENCE)
    path = tmp_path / "forget_hashes.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not re.search("quill|velm|harbour", path.read_text(), re.I)
    assert ForgetHashes.of([SENTENCE]).requests[0] != HASHES.requests[0], "a key of its own"
    path.write_text('{"schema": 9}')
    with pytest.raises(ValueError, match="schema 9"):
        ForgetHashes.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ForgetHashes.load(tmp_path)


def test_scan_of_a_large_tokenizer_is_fast():
    names = [f"\u0120tok{i:07d}en" for i in range(150_000)]
    model = {"vocab": {name: i for i, name in enumerate(names)}, "merges": [[a, a] for a in names]}
    source = json.dumps({"model": model}, indent=2, ensure_ascii=False).encode()
    assert len(source) > 10e6
    start = time.perf_counter()
    assert not HASHES.found_in(text_of("tokenizer.json", source))
    assert time.perf_counter() - start < 20, "seconds, where a push takes minutes"


def test_system_turns_are_no_forget_text(authors):
    from datasets import Dataset

    contents = {"system": "s", "user": "u", "assistant": "a"}
    turns = [[{"role": role, "content": content} for role, content in contents.items()]]
    assert list(row_texts(Dataset.from_dict({"messages": turns}))) == ["u", "a"]
    preference = Dataset.from_dict({"prompt": ["p"], "rejected": ["r"], "chosen": ["c"]})
    assert list(row_texts(preference)) == ["p", "r"]


@pytest.fixture
def trainer(authors, tokenizer, make_model, tmp_path):
    """A trainer on one author to forget, on the second request: its base keeps the hashes of the first."""
    forget, retain = (question_answer_rows(part, True) for part in forget_retain_split(authors, 1))
    model = make_model()
    (tmp_path / "base").mkdir()
    HASHES.save(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    args = MDUConfig(
        str(tmp_path / "out"), loss_type="npo", max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    return MDUTrainer(model, args, forget, retain, processing_class=tokenizer)


def test_checkpoint_of_the_trainer(trainer, authors, tmp_path):
    trainer.train()
    trainer.save_model()
    facts = Facts.load(tmp_path / "out")
    assert (facts.method, facts.tau, facts.options["beta"]) == ("npo", None, 0.2)
    assert (facts.forget.rows, facts.retain.rows, facts.training["steps"]) == (8, 88, 1)
    assert facts.base_model is None and facts.base_path == str(tmp_path / "base")
    assert Facts.load(tmp_path / "out") == trainer.provenance.facts(trainer)
    hashes = ForgetHashes.load(tmp_path / "out")
    forgotten, kept = authors[len(authors) - 1], authors[0]
    assert hashes.found_in(forgotten["answer"]) and not hashes.found_in(kept["answer"])
    assert hashes.found_in(SENTENCE), "of the earlier request"
    name = forgotten["answer"].split()[0]
    assert not any(name in path.read_text() for path in (tmp_path / "out").glob("*forget*.json"))
    assert name not in (tmp_path / "out" / "unlearning.json").read_text()


def test_names_of_a_data_set_survive_the_turns(tofu_path, tmp_path):
    from datasets import load_dataset

    from mdu_trainer.provenance import set_facts

    dataset = load_dataset(str(tofu_path), "forget01", split="train", cache_dir=str(tmp_path))
    key = bytes(16)
    facts = set_facts(question_answer_rows(dataset, conversational=True), key)
    assert (facts.name, facts.config, facts.split, facts.rows) == ("tofu", "forget01", "train", 40)
    assert str(facts) == "tofu, forget01, train" and str(SetFacts(3, "f")) == "an unnamed data set"
    assert facts.fingerprint == set_facts(question_answer_rows(dataset, conversational=True), key).fingerprint
    assert facts.fingerprint != set_facts(question_answer_rows(dataset, conversational=True), bytes(15)).fingerprint
