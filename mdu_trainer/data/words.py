"""Words of a text in any script: the one definition for all that compares texts, from ROUGE to the scan for quotes.

A word is a run of letters, digits and the marks on them (vowel signs, points, accents). Where a script is written
without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...), a character with its marks is one. So
is an emoji, however many code points it is made of, and any other picture or Braille cell. Punctuation, mathematical
and currency signs, and those that stand beside words (degree, copyright, ...) belong to none.
"""

import unicodedata
from functools import lru_cache

import regex

# Letters between which a line may be broken: what Unicode (UAX #14) knows of writing without spaces. Latin has spaces,
# however wide it is.
_BREAKABLE = "".join(rf"\p{{LB={name}}}" for name in ("ID", "CJ", "NS", "SA", "AK", "AP", "AS", "VI", "VF"))
UNSPACED = rf"[[[\p{{L}}\p{{M}}\p{{Nl}}]&&[{_BREAKABLE}]]--\p{{Latin}}]"
# Latin-1 and letterlike signs stand beside words; U+FFFD is what cannot be decoded.
_BESIDE_WORDS = r"\u0000-\u00ff\u2000-\u214f\ufffc\ufffd\p{L}\p{M}\p{N}"
SYMBOL = rf"[[\p{{So}}\p{{Regional_Indicator}}\p{{Extended_Pictographic}}]--[{_BESIDE_WORDS}]]"
SINGLE = rf"(?:(?=[{UNSPACED}{SYMBOL}])\X|[#*]\ufe0f?\u20e3)"  # a grapheme cluster: a character, a flag, a family
# invisible characters amid a word (joiners, soft hyphens, marks of direction) do not end it; a zero-width space does
WORD_CHARACTER = rf"[[\p{{L}}\p{{M}}\p{{N}}\p{{DI}}]--[{UNSPACED}\u200b]]"
RUN = rf"[[\p{{L}}\p{{N}}]--{UNSPACED}]{WORD_CHARACTER}*"

_POINTS = r"\u0f0b\u0f0c\u1361"  # what stands for a space in Tibetan and Ethiopic
# what stands between spaces, and of scripts without spaces a character, each with its punctuation
WRITTEN_WORD = regex.compile(
    rf"\p{{P}}*{SINGLE}[\p{{P}}\u200b]*|[\S--[{UNSPACED}{SYMBOL}{_POINTS}]]+[{_POINTS}]*|[{_POINTS}]+", regex.V1
)

_WORD = regex.compile(f"{RUN}|{SINGLE}", regex.V1)
_ASCII_WORD = regex.compile("[a-z0-9]+")
_SYMBOL = regex.compile(f"{SYMBOL}|[#*]", regex.V1)
_VARIATION = regex.compile("[\ufe0e\ufe0f]")
# Hebrew points and Arabic and Syriac vowels, which most writers leave out; the stroke that widens an Arabic word
_IGNORED = regex.compile(r"\p{DI}|\u0640|[\p{Mn}&&[\p{scx=Hebrew}\p{scx=Arabic}\p{scx=Syriac}]]", regex.V1)


def split_words(text: str) -> list[str]:
    """Return the words of a text, in order, as `fold` makes them comparable."""
    if text.isascii():  # the same, faster
        return _ASCII_WORD.findall(text.lower())
    return [word for word in map(fold, _WORD.findall(text)) if word]


def has_words(text: str) -> bool:
    """Whether a text holds a word at all. One that does not cannot be compared, so it cannot be scored."""
    return bool(split_words(text))


@lru_cache(maxsize=1 << 16)
def fold(word: str) -> str:
    """Return a word without what does not make it another word.

    Unicode's compatibility forms (NFKC) and case (casefold) do not, nor do invisible characters, Hebrew points, Arabic
    and Syriac vowel signs, and the script of decimal digits. Accents and the vowel signs of other scripts do.
    """
    if word.isascii():
        return word.lower()
    if _SYMBOL.match(word):  # a joiner tells a family from its members, a variation selector only how it is drawn
        return _VARIATION.sub("", word)
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    return "".join(str(unicodedata.decimal(c, c)) for c in _IGNORED.sub("", plain))
