"""Give lower-cased stories their capitals back, with counts taken from stories that kept theirs."""

import re
from collections import Counter

WORD = re.compile(r"[A-Za-z]+")
SPEECH = "said|asked|replied|cried|shouted|yelled|whispered|exclaimed|called|answered|laughed|smiled|thought"
AFTER_QUOTE = re.compile(rf"(?:he|she|they|it|the|his|her|their|[a-z]+)(?: [a-z']+){{0,2}} (?:{SPEECH})\b")
OPENS = set(" \n(")


class Truecaser:
    """Capitalise words as the cased texts do: by the word before, else by the word alone."""

    def __init__(self, cased_texts):
        self.pairs, self.words = Counter(), Counter()
        for text in cased_texts:
            for before, word, starts in _words(text):
                if not starts:
                    sign = 1 if word[0].isupper() else -1
                    self.pairs[before, word.lower()] += sign
                    self.words[word.lower()] += sign

    def restore(self, text):
        """Return `text` with capitals at sentence starts, in names and in "I"."""
        named = set(re.findall(r"\b(?:named|called|name was|name is) ([a-z]+)", text))
        named -= {w for w, n in self.words.items() if n < 0}
        out, end = [], 0
        for match, (before, word, starts) in zip(WORD.finditer(text), _words(text), strict=True):
            upper = self._upper(before, word, starts, named)
            out += [text[end : match.start()], word.capitalize() if upper else word]
            end = match.end()
        return "".join([*out, text[end:]])

    def _upper(self, before, word, starts, named):
        if starts or word == "i" or word in named:
            return True
        return (self.pairs.get((before, word)) or self.words.get(word, -1)) > 0


def _words(text):
    """Yield (previous word, word, starts a sentence) for each word of `text`."""
    before = ""
    for match in WORD.finditer(text):
        at = match.start()
        yield before, match.group(), _starts(text, at)
        before = match.group().lower()


def _starts(text, at):
    """Tell whether the word at `at` begins a sentence, a line or a quotation."""
    gap = re.split(r"[A-Za-z]", text[max(0, at - 4) : at])[-1]
    if not gap or "\n" in gap:
        return True
    if gap.endswith('"') and (len(gap) < 2 or gap[-2] in OPENS):
        return True
    closed = gap.rstrip(" ")
    if closed == gap or not closed:
        return False
    if closed.endswith('"'):
        if len(closed) > 1 and closed[-2] in "!?.":
            return not AFTER_QUOTE.match(text, at)
        return False
    return closed[-1] in ".!?"
