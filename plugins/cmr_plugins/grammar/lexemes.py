"""Write rules as a grammar for llguidance, which reads lexemes greedily, so that no text is lost by that.

A parser over lexemes takes the longest one: of `[a-z]+ "x"` it never sees the end, for the class takes the x, too. So
lexemes are single characters, but for parts that end where they end whatever follows (a quoted string, a keyword) and
that begin like no other lexeme: those keep their speed. A grammar without recursion is one regular expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

from cmr_plugins.grammar.gbnf import Alt, Chars, Node, Ref, Repeat, Seq

MOST = 2000  # parts of one lexeme, written out, and places for characters in it
MOST_OF_ALL = 50_000  # parts of an expression for all of a grammar
RUN = 16  # parts of a sequence that are tried as one lexeme


class TooLarge(Exception):
    """A part that would be written out at too great a length."""


def to_lark(rules: dict[str, Node]) -> str:
    """Return the rules in llguidance's notation; `root` becomes `start`."""
    whole = _as_expression(rules)
    return f"start: /{whole}/\n" if whole else _Writer(rules).text()


def _as_expression(rules: dict[str, Node]) -> str:
    """All rules as one regular expression; empty where they call themselves, or it would be too long."""
    try:
        return _pattern(_inlined(rules["root"], rules, _sizes(rules), MOST_OF_ALL))
    except (TooLarge, RecursionError):
        return ""


def _sizes(rules: dict[str, Node]) -> dict[str, float]:
    """How many parts each rule has, written out; infinity where that has no end."""
    sizes, found = dict.fromkeys(rules, inf), True
    while found:
        found = False
        for name, node in reversed(rules.items()):
            if sizes[name] == inf and (size := _size(node, sizes)) < inf:
                sizes[name], found = size, True
    return sizes


def _size(node: Node, sizes: dict[str, float]) -> float:
    match node:
        case Ref(name):
            return sizes[name]
        case Seq(parts) | Alt(parts):
            return 1 + sum(_size(part, sizes) for part in parts)
        case Repeat(part, _, _):
            return 1 + _size(part, sizes)
    return 1


def _inlined(node: Node, rules: dict[str, Node], sizes: dict[str, float], most: int) -> Node:
    """Put rules in the place of their names; TooLarge where that has more parts than `most`, or no end."""
    if _size(node, sizes) > most:
        raise TooLarge
    match node:
        case Ref(name):
            return _inlined(rules[name], rules, sizes, most)
        case Seq(parts):
            return Seq(tuple(_inlined(part, rules, sizes, most) for part in parts))
        case Alt(choices):
            return Alt(tuple(_inlined(choice, rules, sizes, most) for choice in choices))
        case Repeat(part, low, high):
            return Repeat(_inlined(part, rules, sizes, most), low, high)
    return node


def _pattern(node: Node) -> str:
    """A node without names as a regular expression."""
    match node:
        case Chars(ranges):
            return _class(ranges)
        case Seq(parts):
            return "".join(map(_pattern, parts))
        case Alt(choices):
            return f"(?:{'|'.join(map(_pattern, choices))})"
        case Repeat(part, low, high):
            return f"(?:{_pattern(part)}){_times(low, high)}"
    raise TypeError(node)


def _class(ranges: tuple[tuple[int, int], ...]) -> str:
    return "[" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges) + "]"


def _times(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


@dataclass
class _Places:
    """A part's places (Glushkov 1961): where it can begin and end, and what can follow each of them."""

    chars: list[Chars] = field(default_factory=list)
    follow: list[set[int]] = field(default_factory=list)

    def read(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """Add a node's places; return whether it may be empty, its first and its last ones."""
        match node:
            case Chars():
                if len(self.chars) >= MOST:
                    raise TooLarge
                self.chars.append(node)
                self.follow.append(set())
                return False, {len(self.chars) - 1}, {len(self.chars) - 1}
            case Seq(parts):
                return self._chain(self.read(part) for part in parts)
            case Alt(choices):
                empty, first, last = zip(*map(self.read, choices))
                return any(empty), set().union(*first), set().union(*last)
            case Repeat(part, low, high):
                return self._chain(self._repeated(part, low, high))
        raise TypeError(node)

    def _chain(self, parts: Iterable[tuple[bool, set[int], set[int]]]) -> tuple[bool, set[int], set[int]]:
        empty, first, last = True, set[int](), set[int]()
        for may_be_empty, begins, ends in parts:
            for place in last:
                self.follow[place] |= begins
            first = first | begins if empty else first
            last = last | ends if may_be_empty else ends
            empty = empty and may_be_empty
        return empty, first, last

    def _repeated(self, part: Node, low: int, high: int | None) -> Iterator[tuple[bool, set[int], set[int]]]:
        count = max(1, low) if high is None else high
        for turn in range(count):
            empty, first, last = self.read(part)
            if high is None and turn == count - 1:
                for place in last:
                    self.follow[place] |= first
            yield empty or turn >= low, first, last


def _first_of_lexeme(node: Node) -> tuple[tuple[int, int], ...] | None:
    """The characters that a part begins with, if it ends where it ends whatever follows; else None.

    It does if each next character leads to one place, and none leads on from the last ones.
    """
    places = _Places()
    try:
        empty, first, last = places.read(node)
    except TooLarge:
        return None
    if empty or any(places.follow[place] for place in last):
        return None
    for together in (first, *places.follow):
        if not _apart(places.chars[place].ranges for place in together):
            return None
    return tuple(sorted(pair for place in first for pair in places.chars[place].ranges))


def _apart(sets: Iterable[tuple[tuple[int, int], ...]]) -> bool:
    """Whether no character is in two of these sets."""
    pairs = sorted(pair for ranges in sets for pair in ranges)
    return all(before[1] < after[0] for before, after in zip(pairs, pairs[1:]))


class _Writer:
    """Writes recursive rules, with lexemes where that is safe."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self.rules = rules
        self.names = {name: f"r{place}" for place, name in enumerate(rules)} | {"root": "start"}
        self.lexemes: dict[str, tuple[tuple[int, int], ...]] = {}  # pattern -> first characters
        self.sizes = _sizes(rules)
        self.refused: set[str] = set()
        self.known: dict[Node, tuple[str, tuple[tuple[int, int], ...] | None]] = {}

    def text(self) -> str:
        """Write all rules, and anew without the longer ones of lexemes that begin alike, until there are none."""
        while True:
            self.lexemes.clear()
            lines = [f"{self.names[name]}: {self._write(node)}" for name, node in self.rules.items()]
            clashing = self._clashing()
            if not clashing:
                return "\n".join(lines) + "\n"
            self.refused |= clashing

    def _clashing(self) -> set[str]:
        """The longer one of each two neighbours that share a first character, single characters aside."""
        begun = sorted((pair, pattern) for pattern, first in self.lexemes.items() for pair in first)
        found, last = set[str](), ((-1, -1), "")
        for pair, pattern in begun:
            if pair[0] <= last[0][1]:
                found.add(max(pattern, last[1], key=lambda one: (one.startswith("(?:"), len(one))))
            last = max(last, (pair, pattern), key=lambda one: one[0][1])
        return {pattern for pattern in found if pattern.startswith("(?:")}

    def _write(self, node: Node) -> str:
        whole = self._lexeme(node)
        if whole:
            return whole
        match node:
            case Ref(name):
                return self.names[name]
            case Alt(choices):
                return f"({' | '.join(map(self._write, choices))})"
            case Repeat(part, low, high):
                return f"({self._write(part)}){_times(low, high)}"
            case Seq(parts) if all(isinstance(part, Chars) for part in parts):
                return " ".join(map(self._write, parts)) or '""'
            case Seq(parts):
                return " ".join(self._runs(parts))
        raise TypeError(node)

    def _runs(self, parts: tuple[Node, ...]) -> Iterator[str]:
        """Write parts, as many together as make a lexeme."""
        start = 0
        while start < len(parts):
            for end in range(min(len(parts), start + RUN), start, -1):
                run = self._lexeme(Seq(parts[start:end])) if end > start + 1 else self._write(parts[start])
                if run:
                    break
            yield run
            start = end

    def _lexeme(self, node: Node) -> str:
        """Write a part as a lexeme, if it can be one."""
        if node not in self.known:
            self.known[node] = self._as_lexeme(node)
        pattern, first = self.known[node]
        if not first or pattern in self.refused:
            return ""
        self.lexemes[pattern] = first
        return f"/{pattern}/"

    def _as_lexeme(self, node: Node) -> tuple[str, tuple[tuple[int, int], ...] | None]:
        """A part as a regular expression, and the characters it begins with; None if it is no lexeme."""
        try:
            plain = _inlined(node, self.rules, self.sizes, MOST)
            pattern = _class(plain.ranges) if isinstance(plain, Chars) else f"(?:{_pattern(plain)})"
        except (TooLarge, RecursionError):
            return "", None
        return pattern, _first_of_lexeme(plain)
