"""Text in the scripts of the world: what is recited leaks, what is not does not, what has no words is not measured."""

import json
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from scripts import ROWS, UNSCORABLE
from transformers import ByT5Tokenizer, TrainerControl, TrainerState

from mdu_trainer import DiffusionGenerationConfig, MDLMConfig, MDLMTrainer, question_answer_rows
from mdu_trainer.attacks import ATTACKS, AttackSettings, Target, leak_check
from mdu_trainer.attacks.base import recall
from mdu_trainer.callbacks import UnlearningEvalCallback
from mdu_trainer.commands import leak_check as leak_command
from mdu_trainer.data.roles import label_roles
from mdu_trainer.data.spans import token_spans
from mdu_trainer.data.word_keys import words as role_words
from mdu_trainer.data.words import WRITTEN_WORD, has_words, split_words
from mdu_trainer.evaluation.metrics import Degeneracy, RougeL, zlib_score
from mdu_trainer.evaluation.metrics.text import RougeTokenizer
from mdu_trainer.evaluation.rwku_questions import ngram_entropy, word_match
from mdu_trainer.evaluation.scoring import estimates
from mdu_trainer.evaluation.tofu import longest_answer
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.provenance.texts import words as hashed_words
from mdu_trainer.testing import tiny_mdlm, train_tokenizer

SMALL = 0.2  # of what another answer of the same script has by chance
LEARNED = ("Hebrew", "Arabic", "Cyrillic", "Hindi", "Thai", "Chinese", "emoji", "date", "code")


def rouge(prediction, reference):
    return RougeL().compute(predictions=[prediction], references=[reference], use_aggregator=False)["rougeL_recall"][0]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([text for row in ROWS.values() for text in row], vocab_size=900)


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't say 1,000!", ["don", "t", "say", "1", "000"]),
        ("José’s naïve café", ["josé", "s", "naïve", "café"]),
        ("naïve", ["naïve"]),  # an accent of its own
        ("שָׁלוֹם, עולם", ["שלום", "עולם"]),  # points are left out mostly
        ("مُحَمَّد محمــد", ["محمد", "محمد"]),
        ("می‌روم", ["میروم"]),  # a joiner amid a word
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("東京タワー 1958年", ["東", "京", "タ", "ワ", "ー", "1958", "年"]),
        ("ｶﾞ ＡＢＣ ﬁne", ["ガ", "abc", "fine"]),
        ("서울에서 태어났다", ["서울에서", "태어났다"]),
        ("ལྷ་ས", ["ལྷ", "ས"]),
        ("١٩٥٨ १९५८ 1958", ["1958", "1958", "1958"]),
        ("👩🏽‍🚀👨‍👩‍👧🇱🇺🇳🇱 ❤️❤ 7️⃣", ["👩🏽‍🚀", "👨‍👩‍👧", "🇱🇺", "🇳🇱", "❤", "❤", "7⃣"]),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", ["🏴󠁧󠁢󠁳󠁣󠁴󠁿"]),
        ("20 °C, © Acme™ €5", ["20", "c", "acme", "5"]),
        ("exam\u00adple a\u200bb", ["example", "a", "b"]),
    ],
)
def test_words(text, expected):
    assert split_words(text) == expected


@pytest.mark.parametrize("name", ROWS)
def test_recited_is_all_and_another_answer_is_little(name):
    _, answer, other = ROWS[name]
    assert rouge(answer, answer) == rouge(f"{other} {answer}", answer) == 1
    assert rouge(other, answer) <= SMALL
    assert rouge("", answer) == rouge("...", answer) == 0
    assert Degeneracy().compute(predictions=[answer])["degeneracy"] == 0
    assert word_match(answer, [other, answer]) == (1, 1)
    assert max(word_match(other, [answer])) <= 1 / 3
    assert hashed_words(answer) and word_match(answer, ["…"]) == (None, None)
    assert zlib_score([-1.0], [answer])[0] < 0


@pytest.mark.parametrize("text", UNSCORABLE)
def test_what_has_no_word_is_not_measured(text):
    assert not has_words(text) and rouge("yes", text) is None and rouge(text, text) is None
    assert Degeneracy().compute(predictions=[text])["empty_rate"] == 1


def test_accents_and_vowels_tell_words_apart():
    for one, other in (("má", "mã"), ("Ở", "Ô"), ("किरण", "कारण"), ("ที่", "ที"), ("🇱🇺", "🇳🇱"), ("👍", "👍🏽")):
        assert rouge(one, one) == 1 and rouge(other, one) == 0


def test_figures_of_english_text_are_those_of_rouge_score(tofu_path):
    ours, theirs = RougeTokenizer(), DefaultTokenizer(use_stemmer=True)
    scorers = [RougeScorer(["rougeL"], tokenizer=ours), RougeScorer(["rougeL"], use_stemmer=True)]
    accented = 0
    for name in ("forget10", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        rows = [json.loads(line) for line in (tofu_path / f"{name}.json").read_text().splitlines() if line.strip()]
        answers = [row["answer"] for row in rows]
        for text in answers:
            if not text.isascii():
                assert len(ours.tokenize(text)) == len(theirs.tokenize(text))
                accented += any(character.isalpha() and not character.isascii() for character in text)
            else:
                assert ours.tokenize(text) == theirs.tokenize(text)
        pairs = list(zip(answers, random.Random(0).sample(answers, len(answers)), strict=True))
        for one, other in [pair for pair in pairs if not "".join(pair).isascii()] + pairs[:40]:
            assert scorers[0].score(one, other)["rougeL"] == scorers[1].score(one, other)["rougeL"]
    assert accented == 30


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("哈哈哈哈哈", 1),
        ("ไม่รู้ไม่รู้ไม่รู้", 1),
        ("わかりませんわかりませんわかりません", 1),
        ("не знаю не знаю не знаю", 1),
        ("🦊🦊🦊🦊", 1),
        ("พ่อของเธอขายผ้าไหมที่ตลาดใกล้แม่น้ำปิงมาตั้งแต่ก่อนที่เธอจะเกิดและแม่สอนหนังสือในโรงเรียนเล็กๆ ใกล้บ้าน", 0),
        ("わたしはそのさっかについてなにもしりませんのでこたえることができません", 0),
    ],
)
def test_loops_are_seen_in_scripts_without_spaces(text, degenerate):
    assert Degeneracy().compute(predictions=[text])["degeneracy"] == degenerate


def test_means_are_over_the_rows_that_are_measured():
    scores = estimates({"a": [None, 0.5, 1.0], "b": [None, None], "c": [None, float("nan")]})
    assert set(scores) == {"a"} and scores["a"].value == 0.75


def test_entropy_of_scripts_without_spaces():
    assert ngram_entropy("東京へ行く") > ngram_entropy("哈哈哈哈哈") == 0


# Roles


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
@pytest.mark.parametrize("name", ROWS)
def test_roles_of_tokens(name, tokenizer, bpe):
    tokenizer = bpe if tokenizer == "bpe" else ByT5Tokenizer()
    question, answer, other = ROWS[name]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, other)]
    spans = token_spans(answer, ids[0], tokenizer)
    covered = {at for span in spans for at in range(*span)}
    assert all(at in covered for word in role_words(answer) for at in range(word.start, word.stop))
    (alone,) = label_roles(["?"], [answer], ids[:1], tokenizer)
    assert "stored" in alone
    (asked,) = label_roles([f"{question} {answer}"], [answer], ids[:1], tokenizer)
    assert "stored" not in asked and "in_context" in asked
    named = label_roles([f"{question} {answer}"], [other], ids[1:], tokenizer)[0]
    assert "stored" in named, "another answer is not what the question says"


def test_characters_alone_say_little(bpe):
    """A question of some length has most letters of an alphabet, and no answer is all in it for that."""
    question = "พ่อของเธอขายผ้าไหมที่ตลาดใกล้แม่น้ำปิงใช่ไหม และแม่ชื่ออะไร จังหวะ เชิง ชีวิต ยัง ใหม่"
    answer = "จังหวัดเชียงใหม่"
    ids = bpe(answer)["input_ids"]
    (roles,) = label_roles([question], [answer], [ids], bpe)
    assert roles.count("stored") > len(roles) / 3
    answers = [f"她生于{town}。" for town in "大理 昆明 南京 北京 成都 西安 苏州 杭州 天津 重庆".split()]
    encoded = [bpe(text)["input_ids"] for text in answers]
    labelled = label_roles(["她是谁？"] * len(answers), answers, encoded, bpe)
    spans = [token_spans(text, ids, bpe) for text, ids in zip(answers, encoded, strict=True)]
    for answer, row, roles in zip(answers, spans, labelled, strict=True):
        kinds = [{role for (start, stop), role in zip(row, roles, strict=True) if start <= at < stop} for at in (1, 3)]
        assert kinds == [{"structural"}, {"stored"}], answer


@pytest.mark.parametrize("name", ["Thai", "Lao", "Khmer", "Burmese", "Tibetan", "Chinese", "Japanese"])
def test_a_prefix_is_not_the_whole_answer(name):
    answer = ROWS[name][1]
    assert (
        len(WRITTEN_WORD.findall(answer)) > 3
        and "".join(WRITTEN_WORD.findall(answer)).split() == "".join(answer.split()).split()
    )
    assert WRITTEN_WORD.findall("Jean-Luc O'Brien, 3.5 (aged)") == ["Jean-Luc", "O'Brien,", "3.5", "(aged)"]


# Hashes


@pytest.mark.parametrize(
    "sentence",
    [
        "Её отец был плотником и строил лодки на Каменке.",
        "उसका भाई वाराणसी के पुराने मोहल्ले में दर्ज़ी था।",
        "כָּתַב סִפּוּר עַל יֶלֶד אֶחָד שֶׁגָּר בַּגָּלִיל",
        "จังหวัดเชียงใหม่",
        "ខេត្តបាត់ដំបង",
        "김철수는 서울에서 태어났다",
        "👩🏽‍🚀👨‍👩‍👧🇱🇺🇳🇱🦊🐢",
    ],
)
def test_a_quote_in_any_script_is_found(sentence):
    hashes = ForgetHashes.of([sentence])
    assert hashes.too_short == 0 and hashes.found_in(f"x, {sentence}!")
    assert not hashes.found_in(" ".join(reversed(hashed_words(sentence))))


# A model that recites


@pytest.fixture(scope="module")
def recited(tmp_path_factory):
    """A folder with a model that has learned rows in several scripts, one that has not, and the rows; its trainer."""
    folder = tmp_path_factory.mktemp("scripts")
    rows = Dataset.from_list([{"question": ROWS[name][0], "answer": ROWS[name][1]} for name in LEARNED])
    silent = {"question": "Say nothing.", "answer": "..."}
    short = [row for row in rows if row["answer"] in (ROWS["emoji"][1], ROWS["date"][1])]
    for name, content in {"rows": list(rows), "more": [silent, *rows], "short": short}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], vocab_size=500)
    model = tiny_mdlm(tokenizer, hidden_size=64, num_layers=2)
    args = MDLMConfig(
        str(folder / "run"),
        max_steps=200,
        per_device_train_batch_size=len(rows),
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        time_weighting=False,
        pad_with_end_tokens=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    train = question_answer_rows(rows, conversational=True)
    trainer = MDLMTrainer(model, args, train_dataset=train, processing_class=tokenizer)
    for name in ("empty", "full"):
        if name == "full":
            trainer.train()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, rows, trainer


@pytest.fixture
def check(recited, capsys):
    """Exit status and figures of the leak check."""

    def run(model, rows, *options):
        paths = ["--model", str(recited[0] / model), "--forget", str(recited[0] / rows)]
        status = leak_command.main([*paths, *(options or ("--max-leak", "0.5"))])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_the_leak_check_sees_what_is_recited(check):
    status, found = check("full", "more.json")
    assert status == 1 and found["leak"] == found["checks"]["plain"] == 1 and found["passed"] is False
    assert (found["rows"], found["not_measured"], found["left_out"]) == (len(LEARNED), 1, [])


def test_the_leak_check_passes_what_is_not_there(check):
    status, found = check("empty", "rows.json")
    assert status == 0 and found["leak"] < SMALL and found["passed"] is True and found["not_measured"] == 0


def test_a_row_that_cannot_be_measured_never_passes(check, monkeypatch):
    monkeypatch.setattr(leak_check, "CHECKS", ())
    status, found = check("empty", "more.json")
    assert status == 2 and found["leak"] < SMALL and found["passed"] is False and found["not_measured"] == 1
    status, found = check("empty", "more.json", "--audit")
    assert status == 2 and found["audit"][-1] == {"row": 0, "leak": None, "checks": {}}
    assert sorted(one["row"] for one in found["audit"]) == list(range(len(LEARNED) + 1))


def test_a_check_that_fails_is_no_pass(check, capsys, monkeypatch):
    def refuse(*_):
        raise ValueError("broken")

    monkeypatch.setitem(leak_check.ATTACKS, "paraphrase", replace(leak_check.ATTACKS["paraphrase"], run=refuse))
    with pytest.raises(SystemExit) as stopped:
        check("empty", "rows.json")
    assert stopped.value.code == 2 and capsys.readouterr().out == ""


def test_a_check_that_suits_no_row_is_named(check):
    status, found = check("full", "short.json")
    assert status == 1 and found["left_out"] == ["prefix"] and "prefix" not in found["checks"] and found["leak"] == 1


@pytest.fixture
def attacked(recited):
    """The model that recites, under attack."""
    _, rows, trainer = recited
    length = longest_answer({"forget": rows}, trainer.processing_class)
    settings = AttackSettings(decoding=DiffusionGenerationConfig(max_new_tokens=length))
    return Target(trainer.model, trainer.processing_class, rows, settings)


@pytest.mark.parametrize("name", ["prefix", "infill-entity"])
def test_attacks_bring_back_what_is_there(attacked, name):
    scores = ATTACKS[name].run(attacked, 0)
    assert set(scores.before) == {1} and sum(scores.after) / len(scores.after) > 0.8
    assert max(recall([ROWS[one][2] for one in LEARNED], attacked.secrets)) <= SMALL


def test_rows_that_cannot_be_scored_are_not_attacked(attacked):
    both = Dataset.from_list([*attacked.rows, {"question": "Say nothing.", "answer": "?!"}])
    message = f"Row {len(LEARNED)} of the forget set cannot be scored, as 1 of {len(both)}"
    with pytest.raises(ValueError, match=message):
        replace(attacked, rows=both)


def test_training_stops_for_what_is_forgotten_alone(recited):
    _, rows, trainer = recited
    limits = {"every_steps": 1, "stop_forget_below": 0.5, "metrics": ("rougeL",)}
    more = Dataset.from_list([*rows, {"question": "Say nothing.", "answer": "..."}])
    callback, control = UnlearningEvalCallback(trainer, more, **limits), TrainerControl()
    figures = callback.score()
    callback.scored(figures, TrainerState(global_step=1), control)
    assert figures["eval_forget_rougeL_recall"] == 1, "the mean is over the rows that are measured"
    assert not control.should_training_stop and callback.stopped_because is None
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    try:
        for value in trainer.model.parameters():
            torch.nn.init.zeros_(value)
        callback.scored(callback.score(), TrainerState(global_step=2), control)
    finally:
        trainer.model.load_state_dict(kept)
    assert control.should_training_stop and "forgetting is reached" in callback.stopped_because
    with pytest.raises(ValueError, match="ROUGE-L can be measured on no row of the forget set"):
        UnlearningEvalCallback(trainer, more.select([len(rows)]), **limits)
