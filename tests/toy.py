"""Runs on the toy model: short prompts, and what a session gives for them."""

from __future__ import annotations

from typing import Any

from cmr import Session, hookimpl
from cmr.testing import ToyModel

MODEL = ToyModel()
PROMPT = "the cat sat on the mat, the cat sat on the hat, and "
PROMPTS = ("abc", "one two three four", PROMPT, "a long story about a fox and a hen and a barn " * 3)


def answer(session: Session, prompt: Any = PROMPT, max_tokens: int = 32, **options: Any) -> list[int]:
    """Return the tokens of a greedy answer (or as options say)."""
    return list(session.generate(session.request(prompt, max_tokens=max_tokens, **{"temp": 0.0} | options)))


def run(*plugins: Any, prompt: Any = PROMPT, model: Any = MODEL, **options: Any) -> list[int]:
    """Return the tokens of a greedy answer in a new session with these plugins."""
    return answer(Session.open(model, plugins), prompt, **options)


class Sees:
    """A plugin that only looks, at every runtime hook, and counts."""

    exact = True

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl
    def on_attention(self, seq, layer, q, cache):
        self.seen.append("on_attention")

    @hookimpl
    def on_layer(self, step, layer, hidden):
        self.seen.append("on_layer")

    @hookimpl
    def on_logits(self, seq, draft, logits):
        self.seen.append("on_logits")

    @hookimpl
    def on_token(self, seq, token):
        self.seen.append("on_token")

    @hookimpl
    def on_step(self, step):
        self.seen.append("on_step")


class Repeats:
    """A plugin that makes the text periodic, so that drafts and stop rules have something to find."""

    def __init__(self, period: int = 5) -> None:
        self.period = period

    @hookimpl
    def on_logits(self, seq, draft, logits):
        for row in range(len(logits)):
            logits[row, (len(seq.tokens) + row) % self.period] += 1e4


class Drafts:
    """A drafter that proposes what it is told: a function of the sequence."""

    exact = True

    def __init__(self, propose) -> None:
        self.propose = propose

    @hookimpl
    def drafter(self):
        return self


class Bans:
    """A plugin that never writes the token that a request names."""

    told = ("token", "why")

    @hookimpl
    def on_logits(self, seq, draft, logits):
        if "bans" in seq.request.plugins:
            logits[:, seq.request.plugins["bans"]["token"]] = -float("inf")


class Copies:
    """A drafter that copies what followed the last token the time before."""

    exact = True

    @hookimpl
    def drafter(self):
        return self

    def propose(self, seq):
        tokens, last = seq.tokens, seq.tokens[-1]
        places = [i for i, token in enumerate(tokens[:-1]) if token == last]
        return tokens[places[-1] + 1 : places[-1] + 9] if places else []


class Together:
    """A scheduler of all sequences at once, a few rows each."""

    exact = True

    def __init__(self, rows: int = 16, width: int = 8) -> None:
        self.rows, self.width, self.queue = rows, width, []

    @hookimpl
    def scheduler(self):
        return self

    def add(self, seq):
        self.queue.append(seq)

    def pick(self):
        return [(seq, self.rows) for seq in self.queue[: self.width]]

    def remove(self, seq):
        self.queue.remove(seq)


class Preempts(Together):
    """Together, but now and then a sequence's KV is given up: it is fed again from its tokens."""

    def pick(self):
        for seq in self.queue:
            if seq.n_new in (5, 21, 30, 90, 130) and seq.notes.get("freed") != seq.n_new:
                seq.notes["freed"] = seq.n_new
                seq.rollback(0)
        return super().pick()
