"""Run tests on one model: who takes part, in which order, and what is known about each result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import cmr
from cmr.bench.cases import Case
from cmr.bench.decoding import Decoding
from cmr.bench.figures import Ratio, Spread, ratio, spread
from cmr.bench.forward import CHUNK, Forward
from cmr.bench.peer import Peer
from cmr.bench.quiet import Watch
from cmr.bench.rounds import Contender, Rounds, interleave
from cmr.bench.work import Work, work_of
from cmr.eval import AtDepth, divergence_at_depth, written_text

KL_DEPTH, KL_TOKENS = 64, 192  # where prompts are random or short, and how many tokens are compared
SPARE = 8  # tokens of context beyond a case's own


@dataclass(frozen=True)
class Side:
    """A session to measure: its name in the table, its plugins."""

    name: str
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How to measure: `rounds` of each case; `loop` times the whole token loop, not the forward pass alone.

    Two sides are measured against each other, with the divergence of the second from the first, at the depth
    of the case where the text is long enough, in so many `stretches` of it. `text` is a file that prompts are
    cut from, None for random tokens. Without `mapped` the model is read into memory first.
    """

    sides: tuple[Side, ...] = (Side("cmr"),)
    rounds: int = 5
    loop: bool = False
    device: str = "cpu"
    text: str | None = None
    watch: Watch = field(default_factory=Watch)
    mapped: bool = True
    roofs: bool = True
    stretches: int = 1

    @property
    def whole_loop(self) -> bool:
        """Whether sessions are timed: plugins act in the loop."""
        return self.loop or len(self.sides) > 1 or any(side.plugins for side in self.sides)


@dataclass(frozen=True)
class Row:
    """One line of the table: a contender's seconds for a case and what stands beside them.

    `ratio` is to the contender named `against`; roofs are medians in units a second.
    """

    case: Case
    name: str
    seconds: tuple[float, ...]
    rejected: int
    disturbed: int
    work: Work
    roofs: dict[str, float]
    ratio: Ratio | None = None
    against: str | None = None
    far: AtDepth | None = None
    plugins: tuple[str, ...] = ()
    device: str = "cpu"
    kv_bytes: int | None = None
    version: str | None = None
    mapped: bool = True

    @property
    def rates(self) -> Spread:
        """Tokens a second of all sequences together."""
        return spread([self.case.tokens / seconds for seconds in self.seconds])


def measure(
    path: str,
    cases: Iterable[Case],
    settings: Settings,
    peer: Peer | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """Run the cases on a file and yield a row for each contender and case; `tell` hears what is next."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.threads, []).append(case)
    for threads, group in groups.items():
        with ExitStack() as stack:
            need = max(case.context for case in group) + SPARE
            model = _open(path, threads, need, settings)
            stack.callback(model.close)
            yield from _on_threads(model, group, settings, peer, tell, stack)


def _open(path: str, threads: int, need: int, settings: Settings) -> Any:
    words: dict[str, Any] = {"threads": threads, "device": settings.device, "mapped": settings.mapped}
    model = cmr.open_model(path, **words)
    if need <= model.config.n_ctx:
        return model
    model.close()
    return cmr.open_model(path, **words, context=need)


def _on_threads(
    model: Any,
    group: Sequence[Case],
    settings: Settings,
    peer: Peer | None,
    tell: Callable[[str], None],
    stack: ExitStack,
) -> Iterator[Row]:
    text = _text(model, settings.text)
    ours = [_contender(model, side, settings, text) for side in settings.sides]
    for each in ours:
        stack.callback(each.close)
    roofs = _roofs(model, group[0].threads, settings, stack)
    far: dict[int, AtDepth] = {}
    for case in group:
        tell(f"{model.path.name} {case.name}, {case.threads} threads")
        # The peer goes last and is the one to compare with, else the first side is.
        all_: list[Contender] = [*ours, *([peer] if peer else [])]
        rounds = interleave(all_, case, settings.rounds, settings.watch, lambda case=case: roofs(case))  # type: ignore[misc]
        if len(settings.sides) > 1 and case.depth not in far:
            tell(f"{model.path.name}: KL divergence of {settings.sides[1].name}")
            far[case.depth] = _divergence(model, settings, text, case.depth)
        yield from _rows(model, case, all_, rounds, peer, settings, far.get(case.depth))


def _contender(model: Any, side: Side, settings: Settings, text: Sequence[int] | None) -> Contender:
    def open_session() -> Any:
        return cmr.Session.open(model, list(side.plugins))

    if settings.whole_loop:
        return Decoding(open_session, side.name, text)
    return Forward(open_session(), side.name, CHUNK)


def _rows(
    model: Any,
    case: Case,
    contenders: Sequence[Contender],
    rounds: Rounds,
    peer: Peer | None,
    settings: Settings,
    far: AtDepth | None,
) -> Iterator[Row]:
    speeds = [[case.tokens / s for s in rounds.seconds(i)] for i in range(len(contenders))]
    base = len(contenders) - 1 if peer else 0
    roofs = {name: spread([each.roofs[name] for each in rounds.kept]).median for name in rounds.kept[0].roofs}
    for i, contender in enumerate(contenders):
        compared = i != base
        yield Row(
            case,
            contender.name,
            tuple(rounds.seconds(i)),
            rounds.rejected,
            rounds.disturbed,
            work_of(model, case),
            roofs,
            ratio(speeds[i], speeds[base]) if compared else None,
            contenders[base].name if compared else None,
            far if i == 1 and contender is not peer else None,
            () if contender is peer else settings.sides[i].plugins,
            settings.device,
            contender.kv_bytes if isinstance(contender, Decoding) else None,
            peer.version if contender is peer and peer else None,
            settings.mapped,
        )


def _roofs(
    model: Any, threads: int, settings: Settings, stack: ExitStack
) -> Callable[[Case], dict[str, float]]:
    """Make a function that measures the roofs a case is held against."""
    if settings.roofs and settings.device == "cuda":
        return lambda case: {"read": model.ops.read_rate()}
    if not settings.roofs or settings.device != "cpu":
        return lambda case: {}
    from cmr.bench.roof import Roof, file_spans

    roof = Roof(threads, file_spans(model.file))
    stack.callback(roof.close)

    def take(case: Case) -> dict[str, float]:
        found = {"read": roof.read_rate(False), "prefetched": roof.read_rate(True)}
        return found | ({"dots": roof.dot_rate()} if case.n_prompt else {})

    return take


def _divergence(model: Any, settings: Settings, text: Sequence[int] | None, depth: int) -> AtDepth:
    """How far the second side is from the first, as deep as the case is, the text, or the context allows."""
    tokens, depth = list(text or ()), max(depth, KL_DEPTH)
    if len(tokens) < depth + 2:
        depth = KL_DEPTH
        with cmr.Session.open(model) as plain:
            tokens = written_text(plain, min(depth + KL_TOKENS, model.config.n_ctx - SPARE))
    depth = min(depth, len(tokens) // 2 if len(tokens) < depth + 2 else depth)
    count = min(KL_TOKENS, len(tokens) - depth - 1, model.config.n_ctx - depth - 1)
    first, second = (list(side.plugins) for side in settings.sides[:2])
    return divergence_at_depth(model, second, tokens, depth, count, base=first, stretches=settings.stretches)


def _text(model: Any, path: str | None) -> list[int] | None:
    """The tokens of a text file."""
    return None if path is None else model.tokenizer.encode(read_text(path), bos=True)


def read_text(path: str) -> str:
    """Return the first megabyte of a text file; raises RequestError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        raise cmr.RequestError(f"{path} cannot be read as text: {error}") from None
