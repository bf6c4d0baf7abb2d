"""Pairs of prompts that ask the same, and of such as nearly do.

The folder holds mt-bench.jsonl, ifeval.jsonl, arena-hard-v0.1.jsonl and sgd-dialogues-dev.jsonl. Pairs are made of
their prompts (250 of each of the first three or all, 300 first turns of the last, 2000 characters at most) by the rules
below. Natural pairs are prompts as they stand beside the nearest other one: of the same data, and for dialogues of the
same service and with other names or numbers in it. `prompt_pairs.tsv`, written by hand, lies beside this file.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins")]

from cmr_plugins.answers.essence import NUMBERS  # noqa: E402

MOST = {"mt-bench": 250, "ifeval": 250, "arena-hard-v0.1": 250, "sgd-dialogues-dev": 300}
IMPERATIVE = re.compile(
    r"(?:Write|Create|Explain|Describe|Give|List|Draft|Find|Suggest|Make|Rewrite|Summarize|Provide|Show)\b"
)
SHORT = "do not/don't|does not/doesn't|is not/isn't|I am/I'm|cannot/can't|should not/shouldn't|I would/I'd"
BRITISH = (
    "color/colour|favorite/favourite|summarize/summarise|organize/organise|behavior/behaviour|analyze/analyse"
)
SYNONYMS = (
    "Write/Compose|big/large|buy/purchase|help/assist|show/display|movie/film|start/begin|need/require|"
    "looking for/searching for|Find/Search for|use/utilize|about/regarding"
)
UNITS = (
    "km/miles|kilometers/miles|minutes/hours|words/sentences|paragraphs/sections|meters/feet|kg/pounds|days/weeks|"
    "dollars/euros|years/months|am/pm|morning/evening"
)
OPPOSITES = (
    "best/worst|increase/decrease|first/last|before/after|more/less|maximum/minimum|ascending/descending|"
    "advantages/disadvantages|at least/at most|all/some|pros/cons|largest/smallest|uppercase/lowercase|old/new"
)
LANGUAGES = "Python/Java|JavaScript/Python|English/French|German/Italian|Spanish/German|Hindi/Urdu|React/Vue"
NEGATED = "do not/do|don't/do|should/should not|is/is not|can/cannot|will/will not|with/without"
SLOT = re.compile(r"(?<=[a-z,] )[A-Z]\w+|\d[\d:.]*")


class Pair(NamedTuple):
    """Two prompts, how the second was made, and where: rules, natural, or by hand."""

    kind: str
    rule: str
    a: str
    b: str


def swapped(text: str, table: str, back: bool = True) -> str:
    """Put the second of a pair of words in place of the first, or the other way round, once."""
    for pair in table.split("|"):
        first, second = pair.split("/")
        for old, new in ((first, second), (second, first))[: 1 + back]:
            changed = re.sub(rf"\b{re.escape(old)}(?!\w)", new, text, count=1)
            if changed != text:
                return changed
    return text


def typo(text: str, rng: random.Random) -> str:
    """Swap two letters within the longest word."""
    word = max(re.findall(r"\b[a-z]{6,}\b", text), key=len, default=None)
    if word is None:
        return text
    k = rng.randrange(1, len(word) - 2)
    return text.replace(word, word[:k] + word[k + 1] + word[k] + word[k + 2 :], 1)


def lowered(text: str) -> str:
    """Write all in small letters, where no abbreviation or code would suffer."""
    return text if re.search(r"[A-Z]{2,}|[`{}=<>\[\]]", text) else text.lower()


def asked(text: str, begin: str) -> str:
    """Put a courtesy before an imperative."""
    return begin + text[0].lower() + text[1:] if IMPERATIVE.match(text) else text


def same(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield rewordings that ask the same, by rule."""
    yield "Please ...", asked(text, "Please ")
    yield "Could you ...", asked(text, "Could you ")
    yield "... Thank you!", text.rstrip() + " Thank you!"
    yield "Hi! ...", f"Hi! {text}"
    yield "small letters", lowered(text)
    yield "no mark at the end", text.rstrip().rstrip(".?!")
    yield "double blanks", re.sub(r"(?<=[a-z]) (?=[a-z])", "  ", text, count=3)
    yield "short forms", swapped(text, SHORT)
    yield "spelling", swapped(text, BRITISH)
    yield "synonym", swapped(text, SYNONYMS)
    yield "letters swapped", typo(text, rng)


def replaced(text: str, found: list[re.Match[str]], rng: random.Random, put: Callable[[str], str]) -> str:
    """Replace one of the matches."""
    if not found:
        return text
    match = rng.choice(found)
    return text[: match.start()] + put(match.group()) + text[match.end() :]


def other(text: str, rng: random.Random, names: list[str], rare: list[str]) -> Iterator[tuple[str, str]]:
    """Yield near misses, which ask something else, by rule; `names` and `rare` words are of other prompts."""
    numbers = list(NUMBERS)[2:]
    words = [match for match in re.finditer(r"\b[a-z]{5,}\b", text) if match.group() in rare]
    yield "number", replaced(text, list(re.finditer(r"\d+", text)), rng, lambda n: str(int(n) + 1))
    yield "number word", swapped(text, "|".join(map("/".join, zip(numbers, numbers[1:]))), False)
    yield "negation", swapped(text, NEGATED, False)
    named = list(re.finditer(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", text))
    yield (
        "name",
        replaced(text, named, rng, lambda old: rng.choice([n for n in names if n != old] or ["Anna"])),
    )
    yield (
        "word",
        replaced(text, words, rng, lambda old: rng.choice([w for w in rare if w != old] or ["things"])),
    )
    yield "word gone", replaced(text, words, rng, lambda word: "")
    yield "unit", swapped(text, UNITS)
    yield "opposite", swapped(text, OPPOSITES)
    yield "language", swapped(text, LANGUAGES)
    yield "answer's language", f"{text.rstrip()} Answer in {rng.choice(['French', 'German', 'Hindi'])}."
    yield "from and to", re.sub(r"\bfrom ([\w-]+) to ([\w-]+)", r"from \2 to \1", text, count=1)
    yield (
        "order",
        re.sub(r"\b([\w-]+) (than|over|versus|instead of|before|after) ([\w-]+)", r"\3 \2 \1", text),
    )
    yield "and, or", re.sub(r"\b([a-z]{4,}) and ([a-z]{4,})\b", r"\1 or \2", text, count=1)


def read(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the prompts of each data set, and the service of each dialogue's first turn."""
    found: dict[str, list[str]] = defaultdict(list)
    services = {}
    for name in MOST:
        for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines():
            one = json.loads(line)
            prompt = one.get("prompt") or (one.get("turns") or [one["messages"][0]["content"]])[0]
            found[name].append(prompt)
            if "services" in one:
                services[prompt] = one["services"][0]
    return {name: list(dict.fromkeys(prompts)) for name, prompts in found.items()}, services


def by_rule(data: dict[str, list[str]], rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Return pairs that ask the same, and near misses."""
    pairs: tuple[list[Pair], list[Pair]] = [], []
    for name, prompts in data.items():
        chosen = rng.sample(prompts, min(len(prompts), MOST[name]))
        chosen = [prompt for prompt in chosen if len(prompt) < 2000]
        names = sorted({n for p in chosen for n in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", p)})
        count = Counter(word for p in chosen for word in set(re.findall(r"\b[a-z]{5,}\b", p)))
        rare = sorted(word for word in count if count[word] <= 8)
        for prompt in chosen:
            for found, made in ((pairs[0], same(prompt, rng)), (pairs[1], other(prompt, rng, names, rare))):
                found += [Pair("by rule", rule, prompt, text) for rule, text in made if text != prompt]
    return pairs


def natural(data: dict[str, list[str]], services: dict[str, str]) -> list[Pair]:
    """Return prompts beside the nearest other one that asks something else."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, prompts in data.items():
        for prompt in prompts:
            groups[services.get(prompt, name)].append(prompt)
    slots = lambda p: sorted(NUMBERS.get(s, s.lower()) for s in SLOT.findall(p))  # noqa: E731
    pairs = []
    for group, prompts in groups.items():
        vectors = np.stack([_hashed(letters(prompt)) for prompt in prompts])
        for prompt, near in zip(prompts, np.argsort(-(vectors @ vectors.T), axis=1)):
            others = [prompts[place] for place in near[:10] if prompts[place] != prompt]
            if group not in MOST:
                others = [one for one in others if slots(one) != slots(prompt) and len(slots(one)) > 0]
            pairs += [Pair("natural", "nearest", prompt, one) for one in others[:1]]
    return pairs


def by_hand() -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of prompt_pairs.tsv."""
    lines = [line.split("\t") for line in (ROOT / "tools/prompt_pairs.tsv").read_text("utf-8").splitlines()]
    same, other = (
        [Pair("by hand", what, a, b) for what, a, b in lines if what == w] for w in ("same", "other")
    )
    return same, other


def letters(text: str) -> list[str]:
    """Return the runs of 3 to 5 letters, ends of words included."""
    text = f" {' '.join(text.lower().split())} "
    return [text[i : i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1)]


def _hashed(grams: list[str]) -> np.ndarray:
    """Logarithmic counts of grams, float32 [4096], of length 1."""
    made = np.zeros(4096, np.float32)
    for gram, count in Counter(grams).items():
        made[zlib.crc32(gram.encode()) % 4096] += 1 + math.log(count)
    return made / max(float(np.linalg.norm(made)), 1e-9)
