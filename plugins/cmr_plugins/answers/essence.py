"""Which words of a prompt carry its meaning, and how alike two prompts are by them.

Nothing is understood here. What may differ is listed: courtesies, articles, forms of be and do, how a question
begins, capitals, blanks, the marks of sentences, short forms, British spellings, and numbers of one word. The lists
are English; in other languages only capitals, blanks and marks may differ.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np

ALMOST = 0.999  # the most that prompts of other words can be alike
WIDTH = 256  # numbers in a vector

QUOTED = re.compile(r"```.*?```|`[^`]*`|\"[^\"]*\"|“[^”]*”|(?<!\w)'[^'\n]+'(?!\w)", re.S)
PLACE = "\ue000"  # of something quoted
WORD = re.compile(
    r"\n[ \t]+(?=\S)"  # an indent
    r"|(?<![\w)])-(?=\d)|\d+(?:[.,:]\d+)*"  # a sign, a number
    r"|[^\W\d_]+(?:[-'][^\W\d_]+)*"
    r"|(?<=\w)[.:(](?=\w)|!(?=[\w=(])|[^\w\s.,;:!?\"'()…–—]|_"  # what code and sums are made of
)
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
ABBREVIATION = re.compile(r"(?<!\w)[A-Z]{2,}(?!\w)")
NAME = re.compile(r"(?<=[\w,] )[A-Z][\w-]+")

_BEGIN = r"(?:^|(?<=[.!?]\s)|(?<=\n))"
_THANKS = r"(?:thanks|thank you)(?: very much| so much| a lot| in advance)?"
SAME = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"(?<=\S)[ \t]+", " "),
        (r"\bcan't\b|\bcannot\b", "can not"),
        (r"\bwon't\b", "will not"),
        (r"n't\b", " not"),
        (r"'(?:re|m|s)\b", ""),  # forms of be, or a genitive
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
        (r"'d\b", " would"),
        (rf"{_BEGIN}(?:hi|hello|hey)(?: there)?\b[,.!]*\s*", ""),
        (rf"{_BEGIN}(?:please|kindly)\b,?\s*", ""),
        (rf"{_BEGIN}(?:can|could|would|will) you\b(?: please| kindly)?\s*(?:help me\b(?: to)?\s*)?", ""),
        (rf"{_BEGIN}i (?:want you|need you|would (?:like|love) you) to\s+", ""),
        (rf"{_BEGIN}(?:tell|show|give) me\s+", ""),
        (rf"{_BEGIN}find me\b", "find"),
        (rf"{_BEGIN}(?:is|are|am|do|does)\b", "whether"),
        (r"\bhow (?:(?:do|does|can|could|should|would) (?:i|you|we|one)|to)\b", "how"),
        (r",\s*please(?=\s*[.!?]|\s*$)", ""),
        (rf"(?:(?<=[.!?,\n])|(?<=[.!?,\n]\s)){_THANKS}\s*[.!]*\s*$", ""),
    )
]
_LEFT_OUT = "a an the is are am be been do does of to what"
_NEGATING = "not never no without except unless neither nor none nobody nothing"
FREE, NEGATIONS = frozenset(_LEFT_OUT.split()), frozenset(_NEGATING.split())
_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
NUMBERS = {word: str(value) for value, word in enumerate(_COUNTED.split())}
AMERICAN = [
    (re.compile(r"(?<=[^aeiou])our(?=$|s$|ed$|ing$|ite|ful|able|al)"), "or"),
    (re.compile(r"is(?=(?:e|ed|es|er|ers|ing|ation|ations)$)"), "iz"),
]


@dataclass(frozen=True)
class Essence:
    """The `words` of a prompt that carry meaning, in order; which of them are `firm`, and its `names`.

    Firm are numbers, negations, abbreviations, what is quoted, and the signs of code and sums.
    """

    words: tuple[str, ...]
    firm: tuple[str, ...]
    names: frozenset[str]

    @cached_property
    def grams(self) -> Counter[str]:
        """Words and pairs of neighbours, counted."""
        pairs = map("\0".join, zip(self.words, self.words[1:]))
        return Counter([*self.words, *pairs])

    def vector(self) -> np.ndarray:
        """Return float32 [WIDTH] of length 1, whose products come near the cosine of grams."""
        made = np.zeros(WIDTH, np.float32)
        for gram, count in self.grams.items():
            digest = zlib.crc32(gram.encode())
            made[digest % WIDTH] += count if digest >> 31 else -count
        return made / max(float(np.linalg.norm(made)), 1e-9)


def essence(text: str) -> Essence:
    """Return what of a text carries its meaning."""
    text = text.replace("’", "'").strip()
    quoted = iter(QUOTED.findall(text))
    text = QUOTED.sub(PLACE, text.replace(PLACE, " "))
    names = frozenset(name.lower() for name in NAME.findall(text))
    words = [next(quoted) if word == PLACE else word for word in _words(text)]
    firm = [word for word in words if word in NEGATIONS or not (word.islower() and word[0].isalpha())]
    return Essence(tuple(words), tuple(firm), names)


def alike(a: Essence, b: Essence) -> float:
    """Return 1 for the same words in the same order, 0 where firm ones or names differ, else the cosine of grams."""
    if a.words == b.words:
        return 1.0
    mine, yours = ({word.lower() for word in one.words} for one in (a, b))
    if a.firm != b.firm or not a.names <= yours or not b.names <= mine:
        return 0.0
    product = sum(count * b.grams[gram] for gram, count in a.grams.items())
    lengths = [sum(count * count for count in one.grams.values()) for one in (a, b)]
    return min(ALMOST, product / sqrt(lengths[0] * lengths[1])) if product else 0.0


def _words(text: str) -> list[str]:
    """The words of a text in which what is quoted is a PLACE."""
    if text.upper() == text:
        text = text.lower()
    kept = ABBREVIATION.findall(text)
    text = ABBREVIATION.sub("\ue001", text.replace("\ue001", " ")).lower()
    for pattern, put in SAME:
        text = pattern.sub(put, text)
    text = THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    abbreviations = iter(kept)
    words = [next(abbreviations) if word == "\ue001" else word for word in WORD.findall(text)]
    return [_usual(NUMBERS.get(word, word)) for word in words if word not in FREE]


def _usual(word: str) -> str:
    """A word in its American spelling, by its ending alone."""
    if len(word) > 4 and word.isalpha():
        for pattern, put in AMERICAN:
            word = pattern.sub(put, word)
    return word
