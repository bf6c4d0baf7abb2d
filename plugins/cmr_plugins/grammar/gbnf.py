"""Read llama.cpp's grammar notation: rules of literals, classes of characters, groups and repetitions.

Notation: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

LAST = 0x10FFFF
ESCAPED = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
DIGITS = {"x": 2, "u": 4, "U": 8}
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TIMES = re.compile(r"[*+?]|\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")


class Chars(NamedTuple):
    """One character of these ranges of code points, both ends included, sorted and apart."""

    ranges: tuple[tuple[int, int], ...]


class Seq(NamedTuple):
    """Parts one after the other; none: the empty text."""

    parts: tuple[Node, ...]


class Alt(NamedTuple):
    """One of several."""

    choices: tuple[Node, ...]


class Repeat(NamedTuple):
    """A part `low` to `high` times; None: any number."""

    part: Node
    low: int
    high: int | None


class Ref(NamedTuple):
    """What the rule of this name says."""

    name: str


Node = Chars | Seq | Alt | Repeat | Ref


def parse(text: str) -> dict[str, Node]:
    """Return the rules of a grammar by name; ValueError says where it cannot be read, or what is missing."""
    reader, rules = _Reader(text), dict[str, Node]()
    reader.skip(lines=True)
    while not reader.ended:
        name = reader.name("a rule's name")
        reader.expect("::=")
        reader.skip(lines=True)
        if name in rules:
            raise ValueError(f"the rule {name!r} is there twice")
        rules[name] = reader.alternatives(nested=False)
        if not reader.ended and text[reader.pos] not in "\r\n":
            reader.fail("the end of the rule")
        reader.skip(lines=True)
    if "root" not in rules:
        raise ValueError(
            f"there is no rule 'root'; there are: {', '.join(rules)}" if rules else "it is empty"
        )
    for name in sorted(reader.named):
        if name not in rules:
            raise ValueError(f"there is no rule {name!r}; there are: {', '.join(rules)}")
    return rules


def ranges_of(pairs: list[tuple[int, int]], negated: bool = False) -> tuple[tuple[int, int], ...]:
    """Sort ranges and join those that meet; negated, return all other characters."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    if not negated:
        return tuple(joined)
    edges = [-1, *(edge for pair in joined for edge in pair), LAST + 1]
    gaps = zip(edges[::2], edges[1::2])
    return tuple((low + 1, high - 1) for low, high in gaps if low + 1 <= high - 1)


@dataclass
class _Reader:
    """A place in a text, and what is read from there."""

    text: str
    pos: int = 0

    def __post_init__(self) -> None:
        self.named: set[str] = set()

    @property
    def ended(self) -> bool:
        return self.pos >= len(self.text)

    def fail(self, wanted: str) -> NoReturn:
        line = self.text.count("\n", 0, self.pos) + 1
        found = repr(self.text[self.pos : self.pos + 20].partition("\n")[0]) if not self.ended else "the end"
        raise ValueError(f"line {line}: {wanted} is expected, and there is {found}")

    def skip(self, lines: bool) -> None:
        """Go on behind blanks and comments, over ends of lines too if these do not count."""
        blank = (_BLANK_LINES if lines else _BLANK).match(self.text, self.pos)
        self.pos = blank.end() if blank else self.pos

    def expect(self, word: str) -> None:
        self.skip(lines=False)
        if not self.text.startswith(word, self.pos):
            self.fail(repr(word))
        self.pos += len(word)

    def name(self, what: str) -> str:
        found = _NAME.match(self.text, self.pos)
        if not found:
            self.fail(what)
        self.pos = found.end()
        return found[0]

    def alternatives(self, nested: bool) -> Node:
        """Read what stands between `|`, up to the end of the rule or of the group."""
        choices = [self.sequence(nested)]
        while self.text.startswith("|", self.pos):
            self.pos += 1
            self.skip(lines=True)
            choices.append(self.sequence(nested))
        return choices[0] if len(choices) == 1 else Alt(tuple(choices))

    def sequence(self, nested: bool) -> Node:
        parts: list[Node] = []
        while not self.ended and self.text[self.pos] not in ("|)" if nested else "|)\r\n"):
            parts.append(self.repeated(self.one()))
            self.skip(lines=nested)
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def one(self) -> Node:
        """Read a literal, a class, a group, any character, or the name of a rule."""
        sign = self.text[self.pos]
        if sign == '"':
            return self.literal()
        if sign == "[":
            return self.class_of_characters()
        if sign == ".":
            self.pos += 1
            return Chars(((0, LAST),))
        if sign == "(":
            self.pos += 1
            self.skip(lines=True)
            inner = self.alternatives(nested=True)
            self.skip(lines=True)
            self.expect(")")
            return inner
        name = self.name("a literal, a class, a group or a rule's name")
        self.named.add(name)
        return Ref(name)

    def repeated(self, part: Node) -> Node:
        """Read how often it comes; several signs apply one after the other."""
        self.skip(lines=False)
        while found := _TIMES.match(self.text, self.pos):
            self.pos = found.end()
            low = int(found[1]) if found[1] else int(found[0] == "+")
            high = {"*": None, "+": None, "?": 1}.get(found[0], low)
            if found[2]:
                high = int(found[3]) if found[3] else None
            if high is not None and high < low:
                raise ValueError(f"it repeats something {found[0]} times, at least more than at most")
            part = Repeat(part, low, high)
            self.skip(lines=False)
        return part

    def literal(self) -> Node:
        self.pos += 1
        parts: list[Node] = []
        while not self.text.startswith('"', self.pos):
            code = self.character()
            parts.append(Chars(((code, code),)))
        self.pos += 1
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def class_of_characters(self) -> Node:
        self.pos += 1
        negated = self.text.startswith("^", self.pos)
        self.pos += negated
        pairs: list[tuple[int, int]] = []
        while not self.text.startswith("]", self.pos):
            low = high = self.character()
            if self.text.startswith("-", self.pos) and self.text[self.pos + 1 : self.pos + 2] != "]":
                self.pos += 1
                high = self.character()
            if high < low:
                raise ValueError(f"a class has the range {chr(low)}-{chr(high)}, which holds nothing")
            pairs.append((low, high))
        self.pos += 1
        ranges = ranges_of(pairs, negated)
        if not ranges:
            raise ValueError("a class of no characters allows nothing")
        return Chars(ranges)

    def character(self) -> int:
        """Read one character or escape of a literal or class."""
        if self.ended:
            self.fail("the end of a literal or class")
        sign, self.pos = self.text[self.pos], self.pos + 1
        if sign != "\\":
            return ord(sign)
        kind, self.pos = self.text[self.pos : self.pos + 1], self.pos + 1
        if kind in ESCAPED:
            return ord(ESCAPED[kind])
        digits = self.text[self.pos : self.pos + DIGITS.get(kind, 0)]
        if kind not in DIGITS or not re.fullmatch(rf"[0-9A-Fa-f]{{{DIGITS[kind]}}}", digits):
            raise ValueError(f"\\{kind}{digits} is no escape; there are \\xHH, \\uHHHH, \\UHHHHHHHH, "
                             "\\n, \\r, \\t, and \\ before \\, \", [, ] and -")  # fmt: skip
        self.pos += len(digits)
        code = int(digits, 16)
        if code > LAST or 0xD800 <= code < 0xE000:
            raise ValueError(f"\\{kind}{digits} is no character of Unicode")
        return code
