"""Words of an answer as roles are given to them, and when two of them count as the same word.

Words are those of `mdu_trainer.data.words`, joined where English and numbers have a sign amid a word: an
apostrophe, a decimal point, the hyphen of "twenty-one". Inflections of a word count as the same.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import regex
from nltk.stem.porter import PorterStemmer

from .words import RUN, SINGLE, UNSPACED, WORD_CHARACTER, fold

_UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = """
    first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
    sixteenth seventeenth eighteenth nineteenth
""".split()
_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}

NUMBERS = {word: str(i) for i, word in enumerate(_UNITS)} | {word: str(20 + 10 * i) for i, word in enumerate(_TENS)}
NUMBERS |= {word: f"{i}{_SUFFIXES.get(i, 'th')}" for i, word in enumerate(_ORDINALS, start=1)}
NUMBERS |= {f"{tens[:-1]}ieth": f"{NUMBERS[tens]}th" for tens in _TENS}
NUMBERS |= {  # "twenty-one", "twenty-first"
    f"{tens}-{unit}": NUMBERS[tens][0] + NUMBERS[unit] for tens in _TENS for unit in (*_UNITS[1:10], *_ORDINALS[:9])
}

_FORMS = """
    become became, begin began begun, bring brought, build built, buy bought, child children, choose chose chosen,
    come came, draw drew drawn, fall fell fallen, find found, foot feet, give gave given, go went gone,
    grow grew grown, hold held, keep kept, know knew known, lead led, leave left, life lives, lose lost, make made,
    man men, mean meant, meet met, person people, run ran, say said, see saw seen, sell sold, send sent, show shown,
    speak spoke spoken, take took taken, teach taught, tell told, think thought, win won, woman women,
    write wrote written
""".split(",")  # those that no stemmer unites, after the word that stands for all of them
IRREGULAR = {form: base for base, *forms in map(str.split, _FORMS) for form in forms}
IRREGULAR |= {"life": "live", "lives": "live", "lived": "live"}  # noun and verb meet in "lives"

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither both all another other others such same own no
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves who whom whose which what whatever whoever one ones
    someone something anyone anything everyone everything nobody nothing none here there where when why how s

    about above across after against along among amongst around as at before behind below beneath beside besides
    between beyond by despite down during except for from in inside into like near of off on onto out outside over
    per since than through throughout till to toward towards under until up upon via with within without and but or
    nor so yet if because although though while whereas unless whether once

    am is are was were be been being do does did doing done have has had having can could may might must shall
    should will would cannot not can't won't isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't
    couldn't mustn't shouldn't wouldn't i'm i've i'd i'll you're you've we're we've they're they've

    also too very just only even still quite rather more most less least much many few several then thus hence
    therefore thereby indeed however moreover furthermore additionally often always never ever already again well
    """.split()
)  # determiners and pronouns; prepositions and conjunctions; auxiliaries and negation; degree and order
ALSO_NAMES = frozenset({"may", "will", "us", "it", "who"})  # capitalised amid a sentence they are none

_TENS_AND_UNIT = f"(?i:(?:{'|'.join(_TENS)})-(?:{'|'.join((*_UNITS[1:10], *_ORDINALS[:9]))}))(?![\\p{{L}}])"
_WORD = regex.compile(
    rf"{_TENS_AND_UNIT}"
    rf"|{SINGLE}"
    rf"|\d+(?:[.,٫٬]\d+)*[{WORD_CHARACTER}--\p{{N}}]*"  # 1,000  3.5  21st  1990s
    rf"|{RUN}(?:['’](?!s\b)\p{{L}}[\p{{L}}\p{{M}}]*)*",  # apostrophes amid it (O'Brien, don't), a possessive 's not
    regex.V1,
)
_UNSPACED = regex.compile(UNSPACED, regex.V1)
_POINTS = str.maketrans("٫٬", ".,")
_THOUSANDS = regex.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?\p{L}*")
_STARTS_SENTENCE = regex.compile(r"(?:^|[.!?:;\p{STerm}])[\s\p{P}]*$")
_stemmer = PorterStemmer()


class Word(NamedTuple):
    """A word of a text: characters `start` to `stop` (exclusive).

    Attributes:
        key: the same for words that count as the same.
        pairs: keys of a character of a script without spaces, together with the one before and the one after. Such a
            character says little by itself, so two of them count as the same where a pair does.
        capital: whether it starts with a capital letter.
        first: whether it starts a sentence, where a capital letter says nothing.
        function: whether it is a function word.
    """

    start: int
    stop: int
    key: str
    capital: bool
    first: bool
    function: bool
    pairs: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys by which it is compared: its pairs, or its own key where it stands alone."""
        return self.pairs or (self.key,)


def words(text: str) -> Iterator[Word]:
    """The words of a text, in order. Punctuation, spaces and other signs belong to none."""
    pairs = _pairs(text)
    for match in _WORD.finditer(text):
        word = match.group()
        if not fold(word):
            continue
        first = _STARTS_SENTENCE.search(text, 0, match.start()) is not None
        capital = word[0] != word[0].lower()
        plain = _plain(word)
        named = plain in ALSO_NAMES and capital and not first
        function = plain in FUNCTION_WORDS and not named
        yield Word(*match.span(), word_key(word), capital, first, function, pairs.get(match.start(), ()))


def _pairs(text: str) -> dict[int, tuple[str, ...]]:
    """Start of a character that stands beside another of a script without spaces -> its pairs."""
    if text.isascii():
        return {}
    singles = [match for match in _WORD.finditer(text) if _UNSPACED.match(match.group())]
    found: dict[int, tuple[str, ...]] = {}
    for one, other in pairwise(singles):
        if one.end() == other.start():
            pair = (word_key(one.group()) + word_key(other.group()),)
            found[one.start()] = found.get(one.start(), ()) + pair
            found[other.start()] = pair
    return found


@lru_cache(maxsize=1 << 16)
def word_key(word: str) -> str:
    """The key of a word, the same for words that count as the same.

    Case and Unicode's compatibility forms do not count; numbers agree however they are written ("two" and "2", "1,000"
    and "1000", "twenty-first" and "21st"); other words agree with their Porter stem, after a table of irregular forms.
    """
    plain = _plain(word)
    if plain in NUMBERS:
        return NUMBERS[plain]
    if plain[0].isdigit():
        plain = plain.translate(_POINTS)
        return plain.replace(",", "") if _THOUSANDS.fullmatch(plain) else plain
    return _stemmer.stem(IRREGULAR.get(plain, plain))


def _plain(word: str) -> str:
    return fold(word).replace("’", "'")
