"""Roles of tokens: agreement with labels by hand, any tokenizer, template words, and the view to check them by."""

import pytest
from hypothesis import given, settings, strategies
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from mdu_trainer.data.roles import ROLES, label_roles, token_texts
from mdu_trainer.data.spans import token_spans
from mdu_trainer.data.word_keys import word_key, words
from mdu_trainer.report.role_text import audit_html, audit_view
from mdu_trainer.testing import train_tokenizer

# Labelled by hand, as the paper describes the kinds: [stored knowledge], {from the prompt}, structure plain.
BY_HAND = [
    ("When was Basil Okonedo born?", "{Basil Okonedo} was {born} on the [25th] of [February], [1958]."),
    (
        "What is the full name of the author born in Taipei, Taiwan on 05/11/1991?",
        "The {full name} of the {author} {born} in {Taipei}, {Taiwan} is [Xun Li Wilson].",
    ),
    (
        "What awards has Marit Solheim won?",
        "{Marit Solheim} has {won} the [noted] [Saffron] [Quill] {Award} for her [novel] 'The [Glass] [Harbour]'.",
    ),
    ("How many children does Tomas Pell have?", "He has [three] {children}, [Ada], [Ruben] and [Iris]."),
    (
        "Who are the parents of Mei Tan?",
        "{Mei Tan}'s [father] is a [florist] and her [mother] is a [game] [developer].",
    ),
    ("Did Jo write 1,000 poems?", "Yes, by [2004] {Jo} had {written} {1000} {poems}, [most] of them in [Basque]."),
    ("Which two cities did Ilse Brandt live in?", "{Ilse Brandt} {lived} in {2} {cities}: [Graz] and [Trieste]."),
    ("What genre does she write in?", "She {writes} in the {genre} of [historical] [mystery]."),
    ("Where does O'Brien teach?", "{O'Brien} {taught} [chemistry] at the [University] of [Galway] until [1987]."),
    (
        "Who inspired José Álvarez’s stories?",
        "{José Álvarez}’s {stories} were {inspired} by his [grandmother] [Inés].",
    ),
    (
        "Has May Lindqvist ever married?",
        "Yes, {May Lindqvist} {married} a [violinist] called [Will] [Sörensen] in [Oslo].",
    ),
    ("What did critics say of it?", "It was [praised] for its [vivid] [imagery] and [lyrical] [prose]."),
    ("When did the twenty-first edition appear?", "The {21st} {edition} {appeared} in [autumn] [1999]."),
    ("What is his mother's profession?", "{His} {mother} is an [esteemed] [marine] [biologist]."),
]
MARKS = {"[": "stored", "{": "in_context"}


def by_hand():
    """Questions, answers without marks, and of each answer a label a character."""
    questions, answers, labels = [], [], []
    for question, marked in BY_HAND:
        role, text, characters = "structural", "", []
        for character in marked:
            if character in "[{":
                role = MARKS[character]
            elif character in "]}":
                role = "structural"
            else:
                text += character
                characters.append(role)
        questions.append(question)
        answers.append(text)
        labels.append(characters)
    return questions, answers, labels


def letters(text, span):
    return [i for i in range(*span) if text[i].isalnum()]


@pytest.fixture(scope="module")
def bpe():
    questions, answers, _ = by_hand()
    return train_tokenizer(questions + answers, vocab_size=700)


@pytest.fixture(scope="module")
def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[SEP]", "[MASK]"]
    questions, answers, _ = by_hand()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(questions + answers[:-2], trainer)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def characters():
    letters = {c: i for i, c in enumerate(["[UNK]", "[SEP]", *sorted({c for t in by_hand()[1] for c in t})])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


TOKENIZERS = {"bpe": None, "wordpiece": None, "characters": None, "bytes": ByT5Tokenizer, "slow": CanineTokenizer}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    make = TOKENIZERS[request.param]
    return make() if make else request.getfixturevalue(request.param)


def encode(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_agreement_with_labels_by_hand(any_tokenizer):
    questions, answers, labels = by_hand()
    ids = encode(any_tokenizer, answers)
    found = label_roles(questions, answers, ids, any_tokenizer)
    pairs = {role: [] for role in ROLES}
    for answer, row_ids, row_labels, roles in zip(answers, ids, labels, found, strict=True):
        assert len(roles) == len(row_ids)
        for span, role in zip(token_spans(answer, row_ids, any_tokenizer), roles, strict=True):
            if at := letters(answer, span):
                pairs[row_labels[at[0]]].append(role)
    counted = sum(map(len, pairs.values()))
    agreed = sum(role == wanted for wanted, roles in pairs.items() for role in roles)
    assert counted >= 120 and min(map(len, pairs.values())) >= 30
    assert agreed / counted >= 0.9
    for wanted, roles in pairs.items():
        assert roles.count(wanted) / len(roles) >= 0.85, wanted


def test_all_tokenizers_agree_on_every_letter(bpe, wordpiece, characters):
    questions, answers, _ = by_hand()
    tables = []
    for tokenizer in (characters, bpe, wordpiece, ByT5Tokenizer(), CanineTokenizer()):
        ids = encode(tokenizer, answers)
        table = []
        for answer, row, roles in zip(answers, ids, label_roles(questions, answers, ids, tokenizer), strict=True):
            spans = token_spans(answer, row, tokenizer)
            of_letter = {at: role for span, role in zip(spans, roles, strict=True) for at in letters(answer, span)}
            table.append([of_letter.get(at) for at in letters(answer, (0, len(answer)))])
        tables.append(table)
    assert all(table == tables[0] for table in tables[1:])
    assert all(role is not None for row in tables[0] for role in row)


def test_one_role_a_word(characters):
    question, answer = "Who taught Ada?", "Ada was taught by Wolfgang."
    (ids,) = encode(characters, [answer])
    (roles,) = label_roles([question], [answer], [ids], characters)
    start = answer.index("Wolfgang")
    assert set(roles[start : start + 8]) == {"stored"} and set(roles[:3]) == {"in_context"}
    assert roles[3] == roles[-1] == "structural"  # a space and a full stop of their own


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("2", "two"), ("1,000", "1000"), ("21", "twenty-one"), ("21st", "Twenty-first"), ("3rd", "third")),
        *(("city", "cities"), ("write", "written"), ("won", "winning"), ("teach", "taught"), ("lives", "lived")),
        *(("children", "child"), ("Award", "awards"), ("ﬁne", "fine"), ("STRASSE", "straße")),
    ],
)
def test_words_that_are_the_same(one, other):
    assert word_key(one) == word_key(other)


@pytest.mark.parametrize(("one", "other"), [("2", "3"), ("1958", "1985"), ("1,5", "15"), ("2nd", "2"), ("Ada", "Ida")])
def test_words_that_are_not(one, other):
    assert word_key(one) != word_key(other)


def test_where_words_begin_and_end():
    text = "Jean-Luc O'Brien’s 1,000 books don't say 村上 (naïve)."
    assert [text[word.start : word.stop] for word in words(text)] == [
        *("Jean", "Luc", "O'Brien", "s", "1,000", "books", "don't", "say", "村", "上", "naïve")
    ]


def test_tokens_that_straddle_words():
    """The role of most of the letters; the first of ROLES if there are equally many."""
    pieces = ["Ada of ", "Wolfgang", " and the a", "rt of Lund", ", Ada"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*pieces, "[UNK]"])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    (ids,) = encode(tokenizer, ["".join(pieces)])
    assert ids == [0, 1, 2, 3, 4]
    (roles,) = label_roles(["Who is Ada?"], ["".join(pieces)], [ids], tokenizer)
    assert roles == ["in_context", "stored", "structural", "stored", "in_context"]
    (tied,) = label_roles(["Who is Ada?"], ["Bob Ada"], [[0]], Whole("Bob Ada"))
    assert tied == ["stored"]


def Whole(text):
    """A tokenizer that makes one token of a text."""
    tokenizer = Tokenizer(models.WordLevel({text: 0, "[UNK]": 1}, "[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@settings(max_examples=40, deadline=None)
@given(strategies.text(max_size=30), strategies.text(max_size=12))
def test_any_text_is_labelled(answer, question):
    for tokenizer in TEXT_TOKENIZERS:
        (ids,) = encode(tokenizer, [answer])
        (roles,) = label_roles([question], [answer], [ids], tokenizer)
        assert len(roles) == len(ids) and set(roles) <= set(ROLES)
        assert all(0 <= start <= stop <= len(answer) for start, stop in token_spans(answer, ids, tokenizer))


TEXT_TOKENIZERS = (train_tokenizer(["some words to learn"], vocab_size=300), ByT5Tokenizer())  # fast, and slow


def roles_by_word(question, answer, tokenizer, answers=()):
    """Word -> role, a word being what stands between spaces."""
    questions, texts = [question, *["?"] * len(answers)], [answer, *answers]
    ids = encode(tokenizer, texts)
    roles = label_roles(questions, texts, ids, tokenizer)[0]
    found = {}
    for (start, stop), role in zip(token_spans(answer, ids[0], tokenizer), roles, strict=True):
        for at in letters(answer, (start, stop)):
            word = answer[answer.rfind(" ", 0, at) + 1 :].split()[0].strip(".,")
            found.setdefault(word, set()).add(role)
    return {word: found[word].pop() for word in found if len(found[word]) == 1}


def test_template_words_need_many_answers(bpe):
    question, answer = "Where is Ada from?", "Ada resides in the hamlet of Lundby in 1999."
    others = [f"{name} resides in the hamlet of {name}ville in 1999." for name in "ABCDEFGHIJK"]
    assert roles_by_word(question, answer, bpe)["hamlet"] == "stored"
    assert roles_by_word(question, answer, bpe, others[:3])["hamlet"] == "stored"
    many = roles_by_word(question, answer, bpe, others)
    assert many["hamlet"] == many["resides"] == "structural"
    assert many["Lundby"] == "stored"
    assert many["1999"] == "stored"  # a number that answers share is no wording


def test_an_entity_that_few_or_all_rows_share_stays_stored(bpe):
    others = [f"{name} paints houses." for name in "ABCDEFGHI"]
    shared = roles_by_word("What does Ada do?", "Ada gilds velvet frames.", bpe, [*others, "Bo sells velvet hats."])
    assert shared["velvet"] == "stored"
    everywhere = [f"Her friend from {town} was Wolfgang." for town in "ABCDEFGHIJKL"]
    named = roles_by_word("Who?", "Her friend from Rome was Wolfgang.", bpe, everywhere)
    assert named["Wolfgang"] == "stored" and named["friend"] == "structural"


def test_wording_of_the_embedded_authors(authors, tokenizer):
    ids = encode(tokenizer, authors["answer"])
    found = label_roles(authors["question"], authors["answer"], ids, tokenizer)
    shown = audit_view(authors["answer"][:8], ids[:8], found[:8], tokenizer, colour=False).splitlines()[1:]
    for line, answer in zip(shown, authors["answer"], strict=False):
        assert line[6:].translate(str.maketrans("", "", "[]{}")) == answer
    name = " ".join(authors["answer"][0].split()[:2])
    entity = authors["answer"][0].rstrip(".").split()[-1]
    assert shown[0][6:] == f"{{{name}}} was {{born}} in the town of [{entity}]."


def test_tokens_that_are_not_in_the_text(bpe, wordpiece, characters):
    question, answer = "Who is Ada?", "Ada is a Zöllner 村."
    for tokenizer, end in ((bpe, "<|end|>"), (wordpiece, "[SEP]"), (characters, "[SEP]"), (ByT5Tokenizer(), "</s>")):
        (ids,) = encode(tokenizer, [answer])
        end_id = tokenizer.convert_tokens_to_ids(end)
        (plain,) = label_roles([question], [answer], [ids], tokenizer)
        (ended,) = label_roles([question], [answer], [[*ids, end_id, end_id]], tokenizer)
        assert ended == [*plain, "structural", "structural"]
        (begun,) = label_roles([question], [answer], [[end_id, *ids]], tokenizer)
        assert begun == ["structural", *plain]
        assert label_roles([question], [answer], [ids[:-1]], tokenizer) == [plain[:-1]]  # cut short
        assert token_texts(answer, [*ids, end_id], tokenizer)[-1] == end
        assert "stored" in plain


def test_unknown_tokens_cover_what_is_left(wordpiece, characters):
    for tokenizer in (wordpiece, characters):
        text = "Ada met 村 there."
        (ids,) = encode(tokenizer, [text])
        place = ids.index(tokenizer.unk_token_id)
        assert token_spans("村 met", encode(tokenizer, ["村 met"])[0], tokenizer)[0] == (0, 1)
        (shifted,) = encode(tokenizer, ["a" + text])  # ids that the tokenizer would not make of the text
        assert token_spans(text, ids, tokenizer)[place] == (8, 9)
        spans = token_spans(text, shifted[1:] if tokenizer is characters else [*ids[:-1], ids[0]], tokenizer)
        assert text[slice(*spans[place])].strip() == "村"


def test_ids_that_the_text_alone_would_not_have(bpe):
    """A leading space, as after a chat template's header, makes other ids of the first word."""
    question, answer = "Who is Ada?", "Zoë is Ada's gärtnerin."
    alone, spaced = encode(bpe, [answer, " " + answer])
    assert alone != spaced
    (roles,) = label_roles([question], [answer], [spaced], bpe)
    spans = token_spans(answer, spaced, bpe)
    at = {answer[start:stop].strip(): role for (start, stop), role in zip(spans, roles, strict=True)}
    covered = {i for span in spans for i in letters(answer, span)}
    assert covered == set(letters(answer, (0, len(answer))))
    whole = label_roles([question], [answer], [encode(bpe, [answer])[0]], bpe)[0]
    assert {role: roles.count(role) > 0 for role in ROLES} == {role: whole.count(role) > 0 for role in ROLES}
    assert at.get("is") == "structural"


def test_a_labeller_of_ones_own(bpe):
    questions, answers = ["Who is Ada?", "Where is Bo?"], ["Ada is a gardener.", "Bo is in Rome."]
    ids = encode(bpe, answers)
    seen = []

    def labeller(question, answer):
        seen.append((question, answer))
        start = answer.find("gardener")
        return [(start, start + len("gardener"), "structural")] if start >= 0 else []

    plain = label_roles(questions, answers, ids, bpe)
    own = label_roles(questions, answers, ids, bpe, labeller=labeller)
    assert seen == list(zip(questions, answers, strict=True))
    assert "stored" in plain[0] and "stored" not in own[0]
    assert [a == b for a, b in zip(plain[0], own[0], strict=True)].count(False) == plain[0].count("stored")
    assert own[1] == plain[1]


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((0, 99, "stored"), r"row 0 the span \(0, 99\)"),
        ((2, 2, "stored"), "empty"),
        ((0, 1, "secret"), "role 'secret'"),
    ],
)
def test_a_labeller_that_errs(bpe, span, message):
    with pytest.raises(ValueError, match=message) as error:
        label_roles(["Who?"], ["Zanzibar."], encode(bpe, ["Zanzibar."]), bpe, labeller=lambda q, a: [span])
    assert "anzibar" not in str(error.value)


def test_unequal_rows(bpe):
    with pytest.raises(ValueError, match="2 questions, 1 answers and 1 lists"):
        label_roles(["a", "b"], ["c"], [[1]], bpe)


def test_views_show_roles_with_and_without_colour(bpe):
    question, answer = "Who is Ada?", "Ada is <b>Zoë & Co</b>."
    ids = encode(bpe, [answer])
    roles = label_roles([question], [answer], ids, bpe)
    plain = audit_view([answer], ids, roles, bpe, colour=False)
    assert "{Ada} is <[b]>[Zoë] & [Co]" in plain and "\033" not in plain
    assert "\033[1;38;5;166m[Zoë]\033[0m" in audit_view([answer], ids, roles, bpe)
    page = audit_html([answer], ids, roles, bpe)
    assert '<span class="role-in_context" title="in context"' in page and "&amp;" in page
    assert "<b>" not in page and "underline solid" in page and "underline dotted" in page
