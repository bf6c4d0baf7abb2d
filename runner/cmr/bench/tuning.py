"""Search settings for the fastest on a mix of prompts: by stages, in turns, until one is better than noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import cmr
from cmr.bench.figures import Ratio, ratio
from cmr.discovery import parse

CHUNKS = (256, 128)  # prompt rows in a step that are tried
PLUGINS = ("spec-lookup", "prefix-cache")  # exact, and worth it for some texts only
LEAST_ROUNDS = 5  # of the last stage, from which on an interval means something
EARLY_ROUNDS = 2  # of the stages before, so that one disturbed measurement decides nothing
GAIN = 1.01  # times plain speed that is worth a profile


@dataclass(frozen=True)
class Setting:
    """What differs from the plain run: limits as Session.open takes them, and plugins."""

    limits: tuple[tuple[str, int], ...] = ()
    plugins: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [f"{name.replace('_', '-')}={value}" for name, value in self.limits]
        return " ".join([*words, *self.plugins]) or "plain"

    @property
    def keys(self) -> set[str]:
        """What it decides: two settings of one key exclude each other."""
        return {name for name, _ in self.limits} | {parse(text)[0] for text in self.plugins}

    def beside(self, other: Setting) -> Setting:
        """Return both together."""
        return Setting(self.limits + other.limits, self.plugins + other.plugins)


PLAIN = Setting()


@dataclass(frozen=True)
class Found:
    """A setting's seconds and how many times as fast as plain it was, in so many rounds of its last stage."""

    setting: Setting
    seconds: tuple[float, ...]
    gain: Ratio


@dataclass(frozen=True)
class Outcome:
    """All that were tried, those of the last stage first; plain beside itself; what is better than noise, or None."""

    found: tuple[Found, ...]
    plain: Found
    again: Found
    winner: Found | None


def candidates(model: Any, given: Sequence[str]) -> Iterator[Setting]:
    """Yield changes of one thing each that leave all tokens as they are."""
    ops = model.ops
    for name, count in (("threads", ops.threads), ("threads_batch", ops.prompt_threads)):
        for shift in range(1, count.bit_length()):
            yield Setting(((name, count >> shift),))
    for rows in CHUNKS:
        yield Setting((("chunk", rows),))
    names = {parse(text)[0] for text in given}
    for name in PLUGINS:
        if name not in names:
            yield Setting(plugins=(name,))


def search(
    settings: Sequence[Setting],
    measure: Callable[[Setting], float],
    seconds: float,
    tell: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Measure settings against plain within about so many seconds of measuring, and say what is better than noise.

    Each stage lets all that are left run in turns, then the slower half goes; stages have the same time, half of all
    together. The last has the other half, and LEAST_ROUNDS at least: plain, plain again, the best two, and all
    changes together that were faster. What wins is faster than plain by GAIN, and by more than plain is than itself; of
    settings that noise cannot tell apart, that of the fewest changes.
    """
    left, gone = list(settings), list[Found]()
    share = seconds / 2 / max(1, (len(left) - 1).bit_length() - 1)
    while len(left) > 2:
        tell(f"{len(left)} settings")
        ranked = _ranked(_rounds([PLAIN, *left], measure, share, EARLY_ROUNDS)[1:])
        keep = -(-len(ranked) // 2)
        gone = ranked[keep:] + gone
        left = [each.setting for each in ranked[:keep]]
        kept = ranked[:keep]
    singles = _ranked([*kept, *gone]) if len(settings) > 2 else [_unknown(each) for each in left]
    finalists = list(dict.fromkeys([*left, _together(singles)]))
    finalists = [each for each in finalists if each != PLAIN]
    tell(f"the last {len(finalists)}")
    plain, again, *last = _rounds([PLAIN, PLAIN, *finalists], measure, seconds / 2, LEAST_ROUNDS)
    bar = max(1.0, again.gain.high)
    last = _ranked(last)
    faster = [each for each in last if each.gain.low > bar and each.gain.value >= GAIN]
    alike = [each for each in faster if each.gain.value >= faster[0].gain.low]
    winner = min(alike, key=lambda each: len(each.setting.keys), default=None)
    return Outcome((*last, *gone), plain, again, winner)


def _rounds(
    settings: Sequence[Setting], measure: Callable[[Setting], float], seconds: float, least: int
) -> list[Found]:
    """Let settings run in turns, each round beginning with another one; the first is what the others are held to."""
    took: list[list[float]] = [[] for _ in settings]
    spent, number = 0.0, 0
    while number < least or spent * (number + 1) / number <= seconds:
        order = list(range(len(settings)))
        for place in order[number % len(order) :] + order[: number % len(order)]:
            took[place].append(measure(settings[place]))
            spent += took[place][-1]
        number += 1
    return [
        Found(setting, tuple(ours), ratio(took[0], ours)) for setting, ours in zip(settings, took)
    ]  # seconds: plain's over ours


def _ranked(found: Sequence[Found]) -> list[Found]:
    return sorted(found, key=lambda each: -each.gain.value)


def _unknown(setting: Setting) -> Found:
    """A setting that nobody measured yet, taken to gain something."""
    return Found(setting, (), Ratio(GAIN, GAIN, GAIN))


def _together(ranked: Sequence[Found]) -> Setting:
    """All changes that were faster, the fastest first; of those that exclude each other the faster one."""
    made = PLAIN
    for each in ranked:
        if each.gain.value >= GAIN and each.gain.low > 1 and not made.keys & each.setting.keys:
            made = made.beside(each.setting)
    return made


class Mix:
    """Runs prompts, lists of token ids, one after the other under a setting, each with so many tokens of answer."""

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], tokens: int, plugins: Sequence[str], chunk: int
    ) -> None:
        self.model, self.prompts, self.tokens, self.plugins = model, prompts, tokens, list(plugins)
        self.limits = {
            "threads": model.ops.threads,
            "threads_batch": model.ops.prompt_threads,
            "chunk": chunk,
        }
        self.expected: list[list[int]] | None = None

    def open(self, setting: Setting) -> Any:
        """Open a session under a setting."""
        limits = self.limits | dict(setting.limits)
        return cmr.Session.open(self.model, [*self.plugins, *setting.plugins], **limits)

    def __call__(self, setting: Setting) -> float:
        """Return the seconds of the mix in a new session, which has answered something else before.

        Raises PluginError where a setting that promises the plain run's tokens gives others.
        """
        with self.open(setting) as session:
            self._answer(session, self.prompts[0][:1], 4)
            began = perf_counter()
            answers = [self._answer(session, prompt, self.tokens) for prompt in self.prompts]
            took = perf_counter() - began
            if setting == PLAIN and self.expected is None:
                self.expected = answers
            own = [session.plan.plugins[name] for name in setting.keys & set(session.plan.plugins)]
            if all(thing.exact for thing in own) and self.expected not in (None, answers):
                raise cmr.PluginError(
                    f"{setting} gave other tokens than the plain run, which it promises not to"
                )
        return took

    def _answer(self, session: Any, prompt: list[int], tokens: int) -> list[int]:
        wanted = {"max_tokens": tokens, "temp": 0.0, "ignore_eos": True}
        return list(session.generate(session.request(prompt, **wanted)))
