"""Questions of the forms that the bundled family was trained on, drawn from a seed: a prompt and its answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import NamedTuple

words = str.split

NAMES = words(
    "Tom Lily Ben Mia Sam Anna Max Sue Tim Lucy Jack Amy Bob Ella Leo Sara John Jane Fin Rose Mark Nina Dan "
    "Kate"
)
THINGS = words(
    "ball box cat dog tree car hat book cup bird fish bear star flower cake apple boat door bed kite frog "
    "duck shoe bell rock leaf doll drum train pig cow sun moon egg key ring coat chair lamp spoon horse "
    "mouse sock bag toy"
)
COLORS = words("red blue green yellow pink black white brown orange purple gray gold")
ADJECTIVES = words("big small old new happy sad soft loud shiny pretty tall fast slow funny")
WORDS = THINGS + COLORS + ADJECTIVES

Filler = Callable[[random.Random, int], str]


class Question(NamedTuple):
    """What the model continues, and how a right continuation begins (blanks around do not count)."""

    prompt: str
    answer: str


def recall(rng: random.Random, filler: Filler, distance: int = 0, pairs: int = 2) -> Question:
    """State `pairs` facts, tell about `distance` tokens of other things, ask for one of the facts."""
    owners = rng.sample(NAMES, pairs)
    facts = {owner: secret(rng) for owner in owners}
    asked = rng.choice(owners)
    stated = "".join(f"The secret of {owner} is {fact}.\n" for owner, fact in facts.items())
    middle = f"\n{filler(rng, distance)}\n\n" if distance else ""
    return Question(f"{stated}{middle}The secret of {asked} is", f"{facts[asked]}.")


def secret(rng: random.Random) -> str:
    """Return a number of four digits or two words."""
    if rng.random() < 0.5:
        return "".join(rng.choice("0123456789") for _ in range(4))
    return f"{rng.choice(COLORS)} {rng.choice(THINGS)}"


def copy(rng: random.Random, length: int) -> Question:
    """Ask for the same `length` words again."""
    text = " ".join(rng.choice(WORDS) for _ in range(length))
    return Question(f"Copy: {text}\nCopy:", f"{text}\n")


def arithmetic(rng: random.Random) -> Question:
    """Show two small sums and ask for the result of a third."""
    sums = [_sum(rng) for _ in range(3)]
    shown = "".join(f"{left} = {result}\n" for left, result in sums[:2])
    return Question(f"{shown}{sums[2][0]} =", f"{sums[2][1]}\n")


def _sum(rng: random.Random) -> tuple[str, int]:
    top = rng.choice((5, 10, 10, 20))
    a, b = rng.randint(0, top), rng.randint(0, top)
    return (f"{a} + {b}", a + b) if rng.random() < 0.6 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))


def as_json(rng: random.Random) -> Question:
    """Say a few facts in a sentence and ask for the same as JSON."""
    name, age, color = rng.choice(NAMES), rng.randint(2, 12), rng.choice(COLORS)
    likes = rng.sample(THINGS, rng.randint(1, 3))
    text = f"{name} is {age} years old. {name} has a {color} hat and likes the {' and the '.join(likes)}."
    fact = {"name": name, "age": age, "color": color, "likes": likes}
    return Question(f"{text}\nJSON:", f"{json.dumps(fact)}\n")


def listing(rng: random.Random) -> Question:
    """Name things in a sentence and ask for them as a numbered list."""
    items = rng.sample(THINGS, rng.randint(2, 6))
    lines = "".join(f"{i}. {item}\n" for i, item in enumerate(items[1:], 2))
    prompt = f"I see a {', '.join(items[:-1])} and {items[-1]}.\n1. {items[0]}\n2."
    return Question(prompt, lines.removeprefix("2. "))


def counting(rng: random.Random) -> Question:
    """Count three numbers up or down and ask for the next three."""
    step = rng.choice((1, 1, 2, 5, 10, -1))
    start = rng.randint(6 if step < 0 else 0, 60)
    numbers = [start + step * i for i in range(6)]
    shown, asked = (", ".join(map(str, part)) for part in (numbers[:3], numbers[3:]))
    return Question(f"Count: {shown},", asked)


def made_up_stories(count_tokens: Callable[[str], int]) -> Filler:
    """Return a filler that makes simple sentences of at least so many tokens."""

    def filler(rng: random.Random, size: int) -> str:
        text = ""
        while count_tokens(text) < size:
            name, thing, color = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLORS)
            text += f"{name} saw a {color} {thing}. {name} was happy and played with the {thing} all day. "
        return text.strip()

    return filler
