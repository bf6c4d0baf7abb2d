"""Choose how keys and values are kept by measuring, on the user's own text, what each way costs."""

from __future__ import annotations

import codecs
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from cmr import DepthProbe, PluginError, Session, cache_folder, hookimpl, plugin
from cmr_plugins.kv_auto.memory import Memory
from cmr_plugins.kv_auto.table import PLAIN, Row, cheapest, heading

SETTINGS = (
    "kv-quant:bits=2",
    "kv-quant:bits=4",
    "kv-quant:bits=4,rotate=false",
    "kv-quant:k=q4_0,v=q4_0",
    "kv-quant:bits=4,recent=64",
    "kv-quant:bits=5",
    "kv-quant:k=q8_0,v=q4_0",
    "kv-quant:k=q8_0,v=q5_0",
    "kv-quant:bits=8",
    "kv-tiers:f16=64,q8=128",
)
SHALLOW, MEASURED = 64, 64
LEAST = SHALLOW + MEASURED + 1
READ = 1 << 16  # bytes of the text, many times more than these tokens take
NEVER_OURS = {"start_session", "report"}  # hooks of a chosen plugin that need not run


@plugin
class KvAuto:
    """Measure ways to keep keys and values on your own text, and take the smallest under a bound on KL.

    Divergence counts at every depth, bytes at the deepest; of ways of one size the fastest is taken. Without one
    under the bound, f16 stays. What was measured is remembered for the model and the text.
    """

    exact = False
    needs = ("tokenizer",)
    text: Annotated[Path, "a file of text such as the model will see; its beginning is measured"]
    kl: Annotated[float, "most KL divergence from f16, in nats, the mean of 64 tokens"] = 0.01
    tokens: Annotated[int, "of the text, 129 at least: recent tokens in f16 weigh less among many"] = 256
    settings: Annotated[tuple[str, ...], "what to choose from, instead of ten of kv-quant and kv-tiers"] = ()
    seconds: Annotated[float, "no further setting is begun after so long; a later session goes on"] = 120.0
    dir: Annotated[Path | None, "where figures are remembered, instead of the user's cache folder"] = None

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ValueError(f"kl is a number of nats above 0, not {self.kl}")
        if not self.seconds >= 0:
            raise ValueError(f"seconds is at least 0, not {self.seconds}")
        if self.tokens < LEAST:
            raise ValueError(f"tokens is {LEAST} at least, not {self.tokens}")
        self.content = read_text(self.text)
        self.model: Any = None
        self.caches: tuple[Callable[[], Any], ...] | None = None
        self.chosen = PLAIN
        self.rows: dict[str, Row] = {}
        self.measured, self.took = 0, 0.0

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Callable[[], Any] | None:
        """Return what the chosen plugin makes a layer's cache with; None where f16 stays."""
        if self.model is None:
            self._settle(model)
            self.model = model
        if self.model is not model:
            raise PluginError("kv-auto has chosen for another model; give this one a KvAuto of its own")
        return None if self.caches is None else self.caches[layer]

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return what was chosen, its divergence and share of f16's bytes, and what measuring took now."""
        row = self.rows.get(self.chosen)
        return {
            "chosen": self.chosen,
            "kl": row.worst if row else 0.0,
            "share_of_f16": row.kv_bytes / self.rows[PLAIN].kv_bytes if row else 1.0,
            "measured": self.measured,
            "seconds": self.took,
        }

    def _settle(self, model: Any) -> None:
        """Choose a setting, by what is remembered or by measuring, and say it."""
        tokens = model.tokenizer.encode(self.content, bos=True)[: min(self.tokens, model.config.n_ctx)]
        if len(tokens) < LEAST:
            raise PluginError(too_short(self.text, len(tokens), model.config.n_ctx))
        depths = sorted({SHALLOW, len(tokens) - MEASURED - 1})
        sessions = self._sessions(model, len(tokens))
        keys = {name: session.fingerprint() for name, session in sessions.items()}
        keys[PLAIN] = Session.open(model).fingerprint()
        digest = hashlib.sha256(repr((tokens, depths)).encode()).hexdigest()
        memory = Memory(self._folder(), f"{keys[PLAIN]} {digest}", say)
        self.rows = {name: memory.rows[key] for name, key in keys.items() if key in memory.rows}
        choice = cheapest(self.rows, self.kl) if PLAIN in self.rows else PLAIN
        missing = [name for name in sessions if name not in self.rows]
        if choice == PLAIN and missing:
            try:
                self._measure(model, tokens, depths, missing)
            finally:
                if self.rows:
                    memory.keep({keys[name]: row for name, row in self.rows.items()})
            choice = cheapest(self.rows, self.kl)
        self.chosen, self.settled = choice, (choice,)
        self.caches = None if choice == PLAIN else sessions[choice].plan.caches
        self._tell(list(sessions))

    def _sessions(self, model: Any, context: int) -> dict[str, Session]:
        """Open a session with each setting that this model can have, those that keep the fewest bytes first."""
        opened, refused = [], {}
        for setting in dict.fromkeys(self.settings or SETTINGS):
            try:
                session = Session.open(model, [setting], context=context)
            except PluginError as error:
                if self.settings:
                    raise
                refused[setting] = str(error)
                continue
            _need_kv_only(setting, session.plan)
            opened.append((session.plan.memory.kv, setting, session))
        if refused:
            say(f"this model cannot have {'; '.join(refused)}: {next(iter(refused.values()))}")
        return {setting: session for _, setting, session in sorted(opened, key=lambda item: item[0])}

    def _measure(self, model: Any, tokens: list[int], depths: list[int], settings: list[str]) -> None:
        """Measure the plain model and these settings into self.rows, a line for each, until time is over."""
        began = perf_counter()
        say(f"measuring {len(settings)} settings on {len(tokens)} tokens of {self.text}, once")
        probes = [DepthProbe(model, tokens, depth, MEASURED) for depth in depths]
        plain = Row((0.0,) * len(depths), probes[-1].kv_bytes, probes[-1].base_seconds)
        self.rows[PLAIN] = plain
        say(heading(depths))
        say(plain.line(PLAIN, plain))
        for setting in settings:
            if perf_counter() - began >= self.seconds:
                break
            costs = [probe.measure([setting]) for probe in probes]
            kl = tuple(cost.divergence.mean for cost in costs)
            self.rows[setting] = Row(kl, costs[-1].kv_bytes, costs[-1].seconds)
            say(self.rows[setting].line(setting, plain))
            self.measured += 1
        self.took = perf_counter() - began

    def _tell(self, settings: list[str]) -> None:
        """Say what was chosen, or that nothing could be."""
        left = [name for name in settings if name not in self.rows]
        whence = "" if self.measured or not self.rows else ", as remembered"
        if self.chosen == PLAIN:
            rest = f"; {len(left)} not measured yet: more seconds than {self.seconds:g} would" if left else ""
            say(f"no setting smaller than f16 lies under a KL of {self.kl:g}{whence}{rest}; f16 stays")
        else:
            row = self.rows[self.chosen]
            cost = f"{row.worst:.2g}, {row.kv_bytes / self.rows[PLAIN].kv_bytes:.0%} of f16"
            say(f"{self.chosen}, the smallest under a KL of {self.kl:g}: {cost}{whence}")

    def _folder(self) -> Path | None:
        if self.dir is not None:
            return self.dir
        folder = cache_folder()
        return folder and folder / "kv-auto"


def say(line: str) -> None:
    """Write a line for people."""
    sys.stderr.write(f"kv-auto: {line}\n")


def read_text(path: Path) -> str:
    """Return the beginning of a text in UTF-8; ValueError where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(READ)
    except OSError as error:
        raise ValueError(f"text={path} cannot be read: {error.strerror}") from None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < READ)
    except UnicodeDecodeError as error:
        raise ValueError(f"text={path} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def too_short(path: Path, tokens: int, context: int) -> str:
    """Say that a text, or the context it goes into, has too few tokens."""
    if context < LEAST:
        return f"kv-auto measures {LEAST} tokens at least, and this context holds {context}"
    return f"kv-auto: text={path} is too short: {tokens} tokens, and measuring takes {LEAST}"


def _need_kv_only(setting: str, plan: Any) -> None:
    """Refuse a setting whose plugin does anything else than keep keys and values."""
    hooks = [hook for hook, owners in plan.owners.items() if set(owners) != {"built in"}]
    hooks += [hook for hook, names in plan.names.items() if names and hook not in NEVER_OURS]
    for thing in plan.plugins.values():
        hooks += [name for name in ("conflicts", "evidence") if getattr(thing, name, ())]
    if hooks != ["kv_cache"]:
        raise PluginError(
            f"kv-auto chooses between plugins that provide kv_cache alone, and {setting} has "
            f"{', '.join(hooks) or 'nothing'}"
        )
