"""The contracts of a plugin: what it declares is true, requests stay apart, mistakes are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from cmr.discovery import DECLARED, check_hooks, declared, find, hooks_of, parse, plugin_name
from cmr.errors import PluginError
from cmr.hookspecs import hookimpl
from cmr.options import fill, options_of
from cmr.sequence import Sequence
from cmr.session import Session
from cmr.testing.laws import Broken, CacheLaws, require
from cmr.testing.toy import ToyModel

PROMPTS = (
    "the cat sat on the mat, the cat sat on the hat, ",
    "abc",
    "one two three four five six seven eight " * 4,
)
CHUNKS = (512, 7)


@dataclass(frozen=True)
class Finding:
    """One contract, whether it holds, and why not."""

    contract: str
    holds: bool
    why: str = ""


class Turns:
    """A scheduler that gives every sequence a few rows of each step."""

    exact = True

    def __init__(self) -> None:
        self.queue: list[Sequence] = []

    @hookimpl
    def scheduler(self) -> Turns:
        """Return this object."""
        return self

    def add(self, seq: Sequence) -> None:
        """Take a sequence in."""
        self.queue.append(seq)

    def pick(self) -> list[tuple[Sequence, int]]:
        """Pick all sequences, the latest first."""
        return [(seq, 5) for seq in reversed(self.queue)]

    def remove(self, seq: Sequence) -> None:
        """Let a sequence go."""
        self.queue.remove(seq)


class Contracts:
    """The contracts of one plugin, given as `NAME:key=value` or as a class or function that makes it.

    They run on a ToyModel, or on any open model. `tokens` is how long each answer is.
    """

    def __init__(self, plugin: str | Callable[[], Any], model: Any = None, tokens: int = 24) -> None:
        self.model, self.tokens = model or ToyModel(), tokens
        self.plugin = plugin

    def made(self) -> Any:
        """Return a new instance of the plugin with its options."""
        if not isinstance(self.plugin, str):
            return self.plugin()
        name, options = parse(self.plugin)
        return fill(find(name)[0], name, options)

    def session(self, *others: Any, plain: bool = False, **limits: Any) -> Session:
        """Open a session with a new instance of the plugin and others, or a plain one."""
        named = self.plugin if isinstance(self.plugin, str) else self.made()
        return Session.open(self.model, others if plain else [named, *others], **limits)

    def answer(self, session: Session, prompt: str, **options: Any) -> tuple[list[int], str | None]:
        """Return the tokens of an answer and the reason why it ended."""
        options = {"max_tokens": self.tokens, "temp": 0.0, **options}
        text = session.text(prompt, **options)
        for _ in text:
            pass
        return text.seq.new, text.stop

    # -- the contracts --

    def is_described(self) -> None:
        """It says in a sentence what it does, declares whether it is exact, and its hooks exist."""
        made = self.made()
        cls = type(made)
        require(
            bool(inspect.getdoc(cls)), f"{cls.__name__} has no docstring; one sentence is what users read"
        )
        require(any("exact" in vars(base) for base in cls.__mro__), f"{cls.__name__} does not declare exact")
        for name, default in DECLARED.items():
            value, kinds = declared(made, name), (bool,) if name == "exact" else (tuple, list, dict)
            require(isinstance(value, kinds), f"{name} is {value!r}, expected one like {default!r}")
        check_hooks(plugin_name(cls), made)

    def refuses_mistakes(self) -> None:
        """An option that does not exist is refused, and so is one of the wrong type, by name."""
        cls = type(self.made())
        name = plugin_name(cls)
        for option, value in [("no_such_option", "1"), *_wrong_values(cls)]:
            try:
                fill(cls, name, {option: value})
            except PluginError as error:
                require(option in str(error), f"the refusal of {option}={value} does not name it: {error}")
                continue
            raise Broken(f"{name} accepts {option}={value}")

    def is_exact(self) -> None:
        """If it declares so: each token is the plain run's, for several prompts, samplers and chunks."""
        if not declared(self.made(), "exact"):
            return
        for prompt in PROMPTS:
            for options in ({"temp": 0.0}, {"temp": 1.0, "seed": 7}):
                wanted = self.answer(self.session(plain=True), prompt, **options)
                for chunk in CHUNKS:
                    found = self.answer(self.session(chunk=chunk), prompt, **options)
                    _require_same(found, wanted, f"{options} in chunks of {chunk} after {prompt!r:.30}")

    def repeats_itself(self) -> None:
        """A request gives the same tokens when it comes again in the same session."""
        session = self.session()
        for options in ({"temp": 0.0}, {"temp": 1.0, "seed": 7}):
            first = self.answer(session, PROMPTS[0], **options)
            again = self.answer(session, PROMPTS[0], **options)
            require(again[0] == first[0], f"the same request gave {first[0]}, then {again[0]}")

    def keeps_requests_apart(self) -> None:
        """Requests that run by turns give what each gives alone."""
        alone = [self.answer(self.session(), prompt)[0] for prompt in PROMPTS]
        schedules = "scheduler" in hooks_of(self.made())
        session = self.session(*([] if schedules else [Turns()]))
        texts = [session.text(prompt, max_tokens=self.tokens, temp=0.0) for prompt in PROMPTS]
        for _ in zip_longest(*texts):
            pass
        for prompt, text, wanted in zip(PROMPTS, texts, alone):
            found = text.seq.new
            require(found == wanted, f"by turns {prompt!r:.30} gives {found}, alone {wanted}")

    def survives_cancelling(self) -> None:
        """A request that is given up halfway leaves the session as good as new."""
        wanted = self.answer(self.session(), PROMPTS[1])
        session = self.session()
        text = session.text(PROMPTS[0], max_tokens=self.tokens, temp=0.0)
        next(text, None)
        session.cancel(text.seq)
        found = self.answer(session, PROMPTS[1])
        require(found == wanted, f"after a cancelled request the answer is {found}, before it was {wanted}")

    def keeps_cache_laws(self) -> None:
        """If it brings a cache: the laws of a cache, with a tolerance for coarse storage."""
        plan = self.session().plan
        made = {plan.owners["kv_cache"][layer]: plan.caches[layer] for layer in plan.kv_layers}
        for owner, make in made.items():
            if owner != "built in":
                CacheLaws(make, tolerance=0.5).check()

    def reports(self) -> None:
        """What it reports is a dict that can be printed as JSON."""
        import json

        session = self.session()
        self.answer(session, PROMPTS[0])
        json.dumps(session.report())

    def every(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the contracts by name."""
        for check in (
            self.is_described, self.refuses_mistakes, self.is_exact, self.repeats_itself,
            self.keeps_requests_apart, self.survives_cancelling, self.keeps_cache_laws, self.reports,
        ):  # fmt: skip
            yield check.__name__.replace("_", " "), check


def check(plugin: str | Callable[[], Any], model: Any = None) -> list[Finding]:
    """Try every contract on a plugin (see Contracts) and return the findings; nothing is raised."""
    contracts, findings = Contracts(plugin, model), []
    for name, run in contracts.every():
        try:
            run()
        except Exception as error:
            why = (
                str(error) if isinstance(error, Broken | PluginError) else f"{type(error).__name__}: {error}"
            )
            findings.append(Finding(name, False, why))
        else:
            findings.append(Finding(name, True))
    return findings


def _wrong_values(cls: type) -> list[tuple[str, Any]]:
    """For each option that is a number or a switch, a word that is neither."""
    kinds = (int, float, bool)
    return [(name, "neither") for name, option in options_of(cls).items() if option.kind in kinds]


def _require_same(found: tuple[list[int], Any], wanted: tuple[list[int], Any], when: str) -> None:
    """Equal tokens; an answer may end sooner, for a reason of the plugin's own."""
    sooner = found[1] not in ("eos", "length", "stop", "context") and found[1] != wanted[1]
    tokens = wanted[0][: len(found[0])] if sooner else wanted[0]
    require(found[0] == tokens, f"{when} it gives {found[0]} ({found[1]}), the plain run {wanted[0]}")
