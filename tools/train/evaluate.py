"""Measure a model in torch: held-out loss, also at early exits, a greedy story, accuracies on the tasks."""

import math
import random
from functools import partial

import torch
import torch.nn.functional as F
from tools.train import tasks
from tools.train.rows import Rows

DISTANCES = (0, 100, 300, 600)
QUESTIONS = ("Hello!", "What is 3 + 4?", "Tell me a story about a dog.")


def held_out_rows(path, vocabulary, length):
    """Return the held-out text as rows [n, length + 1], each after a begin mark."""
    ids = vocabulary.encode(path.read_text("utf-8"))
    return torch.tensor([[vocabulary.bos, *ids[i : i + length]] for i in range(0, len(ids) - length, length)])


@torch.no_grad()
def loss(model, rows, layers=None):
    """Return the mean loss in nats a token over `rows`, after `layers` layers where given."""
    losses = []
    for part in rows.split(8):
        logits = model(part[:, :-1], layers).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def greedy(model, tokens, count, stop=()):
    """Return up to `count` greedily chosen tokens after `tokens`, ending before any of `stop`."""
    tokens, made = list(tokens), []
    while len(made) < count and len(tokens) < model.shape.context:
        hidden = model.hidden(torch.tensor([tokens]))[model.shape.layers]
        token = int(model.head(hidden[:, -1]).argmax())
        if token in stop:
            break
        made.append(token)
        tokens.append(token)
    return made


def report(model, vocabulary, held_out):
    """Return every figure that goes on the model's card."""
    rows = held_out_rows(held_out, vocabulary, min(512, model.shape.context - 1))[:96]
    story = greedy(model, [vocabulary.bos, *vocabulary.encode("Once upon a time")], 200, (vocabulary.eos,))
    nats = loss(model, rows)
    return {
        "held_out_loss": nats,
        "held_out_perplexity": math.exp(nats),
        "exit_losses": {n: loss(model, rows, n) for n in model.shape.exits},
        "story": "Once upon a time" + vocabulary.decode(story),
        **accuracies(model, vocabulary),
        "chat": {question: chat_answer(model, vocabulary, question) for question in QUESTIONS},
    }


def accuracies(model, vocabulary, count=40):
    """Return the share of exact answers for each task, `count` examples each."""
    room = model.shape.context
    found = {}
    filler = _stories(vocabulary)
    for distance in [d for d in DISTANCES if d + 60 < room]:
        example = partial(recall_example, distance=distance, filler=filler)
        found[f"recall_{distance}"] = _share(model, vocabulary, count, example)
    for length in (4, 8, 16):
        found[f"copy_{length}"] = _share(model, vocabulary, count, partial(copy_example, length=length))
    found["arithmetic"] = _share(model, vocabulary, 2 * count, sum_example)
    return found


def recall_example(rng, distance, filler):
    """Return (prompt, answer): two facts, about `distance` tokens of story, a question for the first."""
    owners = rng.sample(tasks.NAMES, 2)
    values = [tasks.value(rng), tasks.value(rng)]
    facts = "".join(f"The secret of {o} is {v}.\n" for o, v in zip(owners, values, strict=True))
    middle = f"\n{filler(rng, distance)}\n\n" if distance else ""
    return f"{facts}{middle}The secret of {owners[0]} is", f" {values[0]}."


def copy_example(rng, length):
    """Return (prompt, answer): copy `length` words."""
    text = " ".join(rng.choice(tasks.WORDS) for _ in range(length))
    return f"Copy: {text}\nCopy:", f" {text}\n"


def sum_example(rng):
    """Return (prompt, answer): two solved sums and one to solve."""
    lines = ["{} {} {} = {}\n".format(*tasks.sum_of(rng)) for _ in range(3)]
    prompt, answer = lines[2].split(" =")
    return f"{lines[0]}{lines[1]}{prompt} =", answer


def _stories(vocabulary):
    """Return filler(rng, tokens): simple made-up sentences, so that the suite needs no text file."""

    def filler(rng, count):
        text = ""
        while len(vocabulary.encode(text)) < count:
            name, thing, color = rng.choice(tasks.NAMES), rng.choice(tasks.THINGS), rng.choice(tasks.COLORS)
            text += f"{name} saw a {color} {thing}. {name} was happy and played with the {thing} all day. "
        return text.strip()

    return filler


def _share(model, vocabulary, count, example):
    rng, right = random.Random(7), 0
    for _ in range(count):
        prompt, answer = example(rng)
        goal = vocabulary.encode(answer)
        ids = [vocabulary.bos, *vocabulary.encode(prompt)]
        right += vocabulary.decode(greedy(model, ids, len(goal))).strip() == answer.strip()
    return right / count


def chat_answer(model, vocabulary, question):
    """Return the greedy answer to one question in the chat format."""
    rows = Rows(vocabulary, {})
    ids = [t for t, _ in rows.encode(tasks.chat(question, "")[:4])]
    return vocabulary.decode(greedy(model, [vocabulary.bos, *ids], 80, (vocabulary.end, vocabulary.eos)))
