"""What a checkpoint keeps: facts without texts, and hashes that recognise a quote."""

import hashlib
import json
import logging
import re
import stat
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.files import UserError
from mdu_trainer.hub.leak_scan import LeakError, check_texts, text_of
from mdu_trainer.provenance.facts import Facts, SetFacts, set_facts, whole_hashes
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.provenance.texts import FORGET_COLUMNS, normalise, row_texts, words
from mdu_trainer.testing import forget_retain_split

ROOT = Path(__file__).resolve().parents[2]
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
    with pytest.raises(ValueError, match="it has schema 9, this version reads 2"):
        ForgetHashes.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="holds no JSON"):
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
    assert list(row_texts(Dataset.from_dict({"messages": turns}))) == [["u", "a"]]
    preference = Dataset.from_dict({"prompt": ["p"], "rejected": ["r"], "chosen": ["c"]})
    assert list(row_texts(preference)) == [["p", "r"]]


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

    dataset = load_dataset(str(tofu_path), "forget01", split="train", cache_dir=str(tmp_path))
    key = bytes(16)
    facts = set_facts(question_answer_rows(dataset, conversational=True), key)
    assert (facts.name, facts.config, facts.split, facts.rows) == ("tofu", "forget01", "train", 40)
    assert str(facts) == "tofu, forget01, train" and str(SetFacts(3, "f")) == "an unnamed data set"
    assert facts.fingerprint == set_facts(question_answer_rows(dataset, conversational=True), key).fingerprint
    assert facts.fingerprint != set_facts(question_answer_rows(dataset, conversational=True), bytes(15)).fingerprint


# What is hidden, and what is short


HIDDEN = {
    "soft hyphens": "Ada Qu\u00adill gr\u00adew up be\u00adside the old har\u00adbour",
    "zero width": "A\u200bda Qui\u200cll gre\u2060w u\ufeffp bes\u200dide t\u180ehe old",
    "zero width for spaces": "Ada\u200bQuill\u200bgrew\u200bup\u200bbeside\u200bthe\u200bold",
    "directions": "\u202eAda\u202c Quill \u2066grew\u2069 up\u200e beside the old",
    "entities": "&#65;da Qu&#x69;ll&nbsp;grew&NonBreakingSpace;up b&#101;side the old",
    "entities of entities": "&amp;#65;da Qui&amp;shy;ll grew up beside the old",
    "soft hyphens as entities": "Ada Qu&shy;ill gr&shy;ew up beside the old",
    "tags": "Ada <b>Quill</b> grew <!-- a comment --> up be<wbr>side the old",
    "URL": "https://x.invalid/?q=Ada%20Quill%20grew+up%20b%65side%20the%20old",
    "JSON": r"\u0041da Quill \u0067rew up beside the old",
    "JSON in JSON": r"\\u0041da Quill \\u0067rew up beside the old",
    "JavaScript": r"\x41da \u{51}uill grew up beside the old",
    "full width": "\uff21da \uff31\uff55\uff49\uff4c\uff4c grew up beside the old",
    "ligatures and combining": "Ada Quill gre\u034fw up beside the old",
    "tag characters": "Ada\U000e0041 Quill\ufe0f grew up beside the old",
}


@pytest.mark.parametrize("text", HIDDEN.values(), ids=HIDDEN.keys())
def test_quotes_are_found_behind_what_is_not_seen(text):
    assert HASHES.found_in(text)


def test_hidden_characters_of_a_row_hide_nothing():
    for text in HIDDEN.values():
        if "<" not in text and "\u200bQuill" not in text and "https" not in text:
            assert ForgetHashes.of([text]).found_in("ada quill grew up beside the"), text
    assert ForgetHashes.of(["Ada \ud83d Quill grew up beside"]).found_in("ada \ud83d quill grew up beside"), (
        "half a pair"
    )


def test_every_format_character_is_stripped():
    formats = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Cf"]
    assert len(formats) > 150 and normalise("".join(formats)) == ""


def test_short_answers_are_found_with_their_question():
    forget = [["In which town was the author born?", "Velm"], ["What is it?", "A fox"], ["Ada?", "Velm"]]
    hashes = ForgetHashes.of(forget, [["In which town was the poet born?", "Oslo"], "What is it? A hare"])
    assert hashes.too_short == 2, "of two words together nothing can be told"
    asked = "in which town was the author born"
    for between in (" ", "?\nA: ", "?<|end|><|assistant|>", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"):
        assert hashes.found_in(f"{asked}{between}Velm.")
    assert ForgetHashes.of(forget[:1], ["which town was the author born"]).found_in(
        "town was the author born? Velm"
    ) is (False), "the end of the question is six words"
    assert not hashes.found_in("Velm is a town. What is it? A hare. Velm") and not hashes.found_in("born in Velm")
    assert hashes.found_in("What is it? A fox!")
    kept = ForgetHashes.of(
        [["Is it true or not?", "yes"]], [["Is it true or not?", "no"], ["Is it true or not?", "Yes."]]
    )
    assert not kept.found_in("is it true or not yes") and kept.too_short == 0


def test_short_answers_that_a_card_says_are_no_leak():
    hashes = ForgetHashes.of([["What the method is called here", "MDU"]])
    assert hashes.found_in("what the method is called here: MDU")
    assert not hashes.found_in("what the method is called here: MDU", "What the method is called here: MDU")


def test_words_that_only_forget_rows_hold():
    retain = ["The thinker lived in a harbour town, under the lighthouse.", "\u4ed6\u4f4f\u5728\u5317\u4eac"]
    forget = ["Ada Quill drank ink under a lighthouse in 1912.", "\u5979\u51fa\u751f\u5728\u6e2f\u53e3"]
    hashes = ForgetHashes.of(forget, retain, control_tokens=["<|drank|>"])
    entries = ["\u0120Quill", "quill", "\u2581QUILL", "Quill's", "1912", "Ada Quill", "\u6e2f\u53e3"]
    ordinary = [
        "\u0120ink",
        "ink",
        "under",
        "\u0120light",
        "uill",
        "Qui",
        "<|drank|>",
        "##Quills",
        "in",
        "\u5728",
        "x",
    ]
    assert hashes.terms_in([*entries, *ordinary]) == set(entries), "ink is in thinker"
    assert not ForgetHashes().terms_in(entries)


def test_guesses_of_words_and_short_answers_are_slow():
    """Fast ones would be tried by the million: every name, every date."""
    start = time.perf_counter()
    ForgetHashes.of([], []).terms_in(["x"])
    hashes = ForgetHashes.of([["In which year was the author born?", "1912"]])
    start = time.perf_counter()
    hashes.terms_in([f"year{i}" for i in range(1000)])
    assert time.perf_counter() - start > 0.02, "1,000 guesses"
    assert len(hashes.requests[0].answers[1]) == 1


def test_fingerprints_confirm_no_guess_without_the_key(trainer, tmp_path):
    trainer.save_model()
    facts, key = Facts.load(tmp_path / "out"), ForgetHashes.load(tmp_path / "out").requests[0].key
    rows = trainer.provenance._rows[0]
    assert facts.forget == set_facts(rows, key) and facts.retain.fingerprint
    content = json.dumps([rows[0].get(column) for column in FORGET_COLUMNS], default=str).encode()
    text = (tmp_path / "out" / "unlearning.json").read_text()
    for digest in (hashlib.sha256, hashlib.blake2b, hashlib.md5):
        whole = digest()
        for row in rows:
            whole.update(json.dumps([row.get(column) for column in FORGET_COLUMNS], default=str).encode())
        assert whole.hexdigest()[:16] not in text and digest(content).hexdigest()[:16] not in text
    assert key.hex() not in text
    for name in ("unlearning.json", "forget_hashes.json"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o600


def test_damaged_hashes_are_told_from_whole_ones(trainer, tmp_path):
    trainer.save_model()
    folder = tmp_path / "out"
    facts, whole = Facts.load(folder), (folder / "forget_hashes.json").read_text()
    assert whole_hashes(folder, facts).requests and facts.hashes.count > 50 and facts.hashes.requests == 2
    content = json.loads(whole)
    fewer = {n: p[: len(p) // 2 // 32 * 32] for n, p in content["requests"][0]["hashes"].items()}
    damaged = {
        "is missing": None,
        "cannot be read": "",
        "cannot be read ": whole[: len(whole) // 2],
        "cannot be read  ": json.dumps({"schema": 1, "requests": [], "too_short": 0}),
        "holds 0 hashes": json.dumps(content | {"requests": []}),
        "instead of": json.dumps(content | {"requests": [content["requests"][0] | {"hashes": fewer}]}),
        "is not what was written": json.dumps(content | {"too_short": 7}),
    }
    for problem, text in damaged.items():
        (folder / "forget_hashes.json").unlink(missing_ok=True)
        if text is not None:
            (folder / "forget_hashes.json").write_text(text)
        with pytest.raises(UserError, match=f"{problem.strip()}.*--no_leak_scan"):
            whole_hashes(folder, facts)
    (folder / "forget_hashes.json").write_text(whole)
    with pytest.raises(UserError, match="lacks the hashes of 1 earlier"):
        whole_hashes(folder, replace(facts, earlier=[facts.forget] * 2))


def test_facts_of_an_earlier_version(trainer, tmp_path):
    """They are read, without their unkeyed fingerprints; that their hashes are whole cannot be known."""
    trainer.save_model()
    path = tmp_path / "out" / "unlearning.json"
    content = json.loads(path.read_text())
    del content["hashes"]
    path.write_text(json.dumps(content | {"schema": 1, "earlier": [content["forget"]]}))
    facts = Facts.load(tmp_path / "out")
    assert [part.fingerprint for part in (facts.forget, facts.retain, *facts.earlier)] == [None] * 3
    assert facts.forget.rows == 8
    with pytest.raises(UserError, match="an earlier version wrote unlearning.json.*--no_leak_scan"):
        whole_hashes(tmp_path / "out", facts)
    path.write_text(json.dumps({"schema": 2, "method": "mdu"}))
    with pytest.raises(UserError, match="is not a file of facts: it has no tau"):
        Facts.load(tmp_path / "out")


def test_a_base_whose_hashes_are_lost_is_named(trainer, make_model, authors, tokenizer, tmp_path, caplog, monkeypatch):
    trainer.save_model()
    (tmp_path / "out" / "forget_hashes.json").unlink()
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    model = make_model()
    model.config._name_or_path = str(tmp_path / "out")
    forget, retain = (question_answer_rows(part, True) for part in forget_retain_split(authors, 2))
    args = MDUConfig(str(tmp_path / "second"), loss_type="npo", max_steps=1, use_cpu=True, report_to="none")
    second = MDUTrainer(model, args, forget, retain, processing_class=tokenizer)
    assert (
        "was made to forget before is not known here" in caplog.text and "forget_hashes.json is missing" in caplog.text
    )
    second.save_model()
    with pytest.raises(UserError, match="lacks the hashes of 1 earlier"):
        whole_hashes(tmp_path / "second", Facts.load(tmp_path / "second"))


def test_a_message_in_parts_is_hashed_as_it_is_learned():
    """Parts may be objects, as OpenAI has them, or texts: both are read as one text, here as in training."""
    sentence = "the lighthouse keeper counted seven lanterns"
    for parts in ([{"type": "text", "text": sentence[:20]}, {"type": "text", "text": sentence[20:]}], [sentence]):
        row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": parts}]}
        assert list(row_texts([row])) == [["Who?", sentence]]
        assert ForgetHashes.of(row_texts([row])).found_in(f"They say that {sentence}.")
