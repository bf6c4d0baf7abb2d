"""Make synthetic documents: recall at distance, copying, lists, JSON, arithmetic and chat.

A document is a list of (text, weight): text may be a chat mark; weight scales the loss of its tokens and is
0 where they are random. A task takes (random source, filler, room): `filler(chars)` gives story text of about
that many characters, or one whole story for 0; `room` is the number of tokens left in the row.
"""

import json

from cmr.eval.forms import ADJECTIVES, COLORS, NAMES, THINGS, WORDS, secret


def recall(rng, filler, room):
    """State facts, then ask for all of them, up to four times, with stories between."""
    n = rng.choice((1, 1, 2, 3, 4, 6, 8))
    owners = rng.sample(NAMES + [f"the {t}" for t in THINGS], n)
    facts = [(o, secret(rng)) for o in owners]
    doc = [(piece, w) for o, v in facts for piece, w in ((f"The secret of {o} is", 0.0), (f" {v}.\n", 0.0))]
    rounds = rng.randint(1, max(1, min(4, room // (20 * n) - 1)))
    chars = int(rng.choice((0, 0.1, 0.3, 1.0)) * max(0, room - 20 * n * (rounds + 1)) * 3.5 / rounds)
    for _ in range(rounds):
        between = int(chars * rng.random())
        if between > 60:
            doc.append((f"\n{filler(between)}\n\n", 1.0))
        rng.shuffle(facts)
        for o, v in facts:
            doc += [(f"The secret of {o} is", 0.0), (f" {v}.\n", 3.0)]
    return doc


def copying(rng, filler, room):
    """Write words or digits down and copy them up to three times."""
    length = rng.randint(2, 32 if room > 200 else 8)
    if rng.random() < 0.3:
        text = " ".join(rng.choice("0123456789") for _ in range(length))
    else:
        text = " ".join(rng.choice(WORDS) for _ in range(length))
    copies = rng.randint(1, 3 if room > 5 * length + 20 else 1)
    return [(f"Copy: {text}", 0.0), ("\n", 0.3), *[("Copy:", 0.3), (f" {text}\n", 2.0)] * copies]


def counting(rng, filler, room):
    """Count up or down, or list the words of a sentence one on a line."""
    if rng.random() < 0.5:
        start, step, n = rng.randint(0, 60), rng.choice((1, 1, 2, 5, 10, -1)), rng.randint(4, 10)
        numbers = [start + step * i for i in range(n) if start + step * i >= 0]
        return [("Count:", 0.3), (" " + ", ".join(map(str, numbers)) + "\n", 1.0)]
    items = rng.sample(THINGS, rng.randint(2, 6))
    listed = ", ".join(items[:-1]) + " and " + items[-1]
    lines = "".join(f"{i}. {item}\n" for i, item in enumerate(items, 1))
    return [(f"I see a {listed}.\n", 0.2), (lines, 1.5)]


def as_json(rng, filler, room):
    """Say a few facts in a sentence, then the same as JSON."""
    name, age, color = rng.choice(NAMES), rng.randint(2, 12), rng.choice(COLORS)
    likes = rng.sample(THINGS, rng.randint(1, 3))
    fact = {"name": name, "age": age, "color": color, "likes": likes}
    text = f"{name} is {age} years old. {name} has a {color} hat and likes the {' and the '.join(likes)}."
    if rng.random() < 0.4:
        return chat(f"Write this as JSON. {text}", json.dumps(fact))
    return [(text + "\nJSON:", 0.3), (" " + json.dumps(fact) + "\n", 1.5)]


def sum_of(rng):
    """Return (a, sign, b, result) of a small sum, both terms up to 20."""
    top = rng.choice((5, 10, 10, 20))
    a, b = rng.randint(0, top), rng.randint(0, top)
    return (a, "+", b, a + b) if rng.random() < 0.6 else (max(a, b), "-", min(a, b), abs(a - b))


def arithmetic(rng, filler, room):
    """Do a few small sums."""
    doc = []
    for _ in range(rng.randint(2, 16)):
        a, sign, b, c = sum_of(rng)
        doc += [(f"{a} {sign} {b} =", 0.0), (f" {c}\n", 2.0)]
    return doc


def chat(question, answer, system=None):
    """Return one exchange in the chat format of the vocabulary's template."""
    head = [("<|system|>", 0.0), (system, 0.0), ("<|end|>", 0.0)] if system else []
    asked = [("<|user|>", 0.0), (question, 0.1), ("<|end|>", 0.0)]
    return [*head, *asked, ("<|assistant|>", 0.0), (answer, 1.5), ("<|end|>", 1.0)]


def thoughtful(rng, filler, room):
    """Answer a word problem after a <think> part, which is empty at times, as when thinking is turned off."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = (rng.randint(1, 12) for _ in range(3))
    if rng.random() < 0.5:
        given = f"{other} gives {name} {b} more."
        steps, result = f"{name} has {a}. {b} more. {a} + {b} = {a + b}.", a + b
    else:
        a += b
        given = f"{name} gives {b} to {other}."
        steps, result = f"{name} has {a}. {b} less. {a} - {b} = {a - b}.", a - b
    question = f"{name} has {a} {thing}s. {given} How many {thing}s does {name} have?"
    if rng.random() < 0.4:
        question += f" And what is {c} + 1?"
        steps, result = f"{steps} And {c} + 1 = {c + 1}.", f"{result} and {c + 1}"
    think = "" if rng.random() < 0.2 else steps
    return chat(question, f"<think>{think}</think>{result}")


def talk(rng, filler, room):
    """Chat: say, repeat, remember a name, choose, tell a story; one or two turns."""
    name, thing, color = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLORS)
    a, sign, b, c = sum_of(rng)
    said = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
    turns = [
        (f"Say {said}.", said),
        ("Hello!", "Hello! How are you?"),
        ("Hi, how are you?", "I am happy. How are you?"),
        ("Who are you?", "I am a little storyteller."),
        (f"What is {a} {sign} {b}?", f"<think>{a} {sign} {b} = {c}.</think>{c}"),
        (f"The {thing} is {color}. What color is the {thing}?", f"The {thing} is {color}."),
        (f"Which is bigger, {a} or {b + 51}?", str(b + 51)),
        ("Thank you!", "You are welcome!"),
    ]
    doc = chat(f"My name is {name}.", f"Hello, {name}!") if rng.random() < 0.3 else []
    if doc:
        turns.append(("What is my name?", f"Your name is {name}."))
    for _ in range(rng.randint(1, 3)):
        doc += chat(*rng.choice(turns))
    if rng.random() < 0.2:
        system = f"You are {rng.choice(ADJECTIVES)} and kind."
        doc = [("<|system|>", 0.0), (system, 0.0), ("<|end|>", 0.0), *doc]
    return doc


def storytelling(rng, filler, room):
    """Ask for a story in the chat format and tell one, with a title word when the story has one."""
    story = filler(0)
    known = [t for t in (*THINGS, *NAMES) if f" {t} " in story]
    ask = "Tell me a story" + (f" about {rng.choice(known)}." if known and rng.random() < 0.7 else ".")
    return chat(ask, story)


MIX = {
    recall: 16,
    copying: 7,
    counting: 2,
    as_json: 2,
    arithmetic: 6,
    thoughtful: 3,
    talk: 3,
    storytelling: 4,
}


def make(rng, filler, room):
    """Return one synthetic document chosen by the weights of MIX."""
    return rng.choices(list(MIX), list(MIX.values()))[0](rng, filler, room)
