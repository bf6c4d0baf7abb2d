"""Use the KV of prompts again that begin alike, from memory and from a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from cmr import PluginError, hookimpl, plugin
from cmr_plugins.prefix_cache.folder import MOST_TOKENS, Folder
from cmr_plugins.prefix_cache.key import key_name, key_parts
from cmr_plugins.prefix_cache.layout import Layout
from cmr_plugins.prefix_cache.store import Store
from cmr_plugins.prefix_cache.tree import Tree
from cmr_plugins.sizes import read_size

WHOLE = ("empty", "one token", "other ")  # reasons that concern no token in particular


@plugin
class PrefixCache:
    """Use the KV of prompts again that begin alike, from memory and from a folder.

    Only tokens that were computed as prompt are stored: what was generated went through other kernels, and
    would give other bits to a request that has it in its prompt. With `answers` it is stored all the same.
    """

    memory: Annotated[int | str, "most bytes of KV in memory, as 1500000000, 512MB or 2GiB"] = "1GB"
    dir: Annotated[Path | None, "a folder to keep KV in for later runs and other processes"] = None
    disk: Annotated[int | str, "most bytes of files in the folder"] = "8GB"
    block: Annotated[int, "tokens in a block, the unit that is stored and removed"] = 64
    answers: Annotated[bool, "store what was generated too, so that later turns may get other tokens"] = False

    def __post_init__(self) -> None:
        if not 1 <= self.block <= MOST_TOKENS:
            raise ValueError(f"block is 1 to {MOST_TOKENS}, not {self.block}")
        self.disk_limit = _bytes("disk", self.disk)
        self.tree = Tree(_bytes("memory", self.memory), self.block)
        self.stores: WeakKeyDictionary[Any, Store] = WeakKeyDictionary()
        self.keys: list[dict[str, str]] = []
        self.requests = self.hits = self.prompt = self.reused = 0
        self.missed: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.unstored: Counter[str] = Counter()
        self.last = ""

    @property
    def exact(self) -> bool:
        """A prompt that takes the KV of an answer has not the bits that it would compute."""
        return not self.answers

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what the session's KV depends on, how it is stored, and what the folder has of it."""
        plan = session.plan
        for name, thing in plan.plugins.items():
            if getattr(thing, "evidence", ()):
                raise PluginError(
                    f"prefix-cache cannot run beside {name}, which follows attention over the whole prompt; "
                    "use one of them alone"
                )
        layout = Layout(plan)
        parts = key_parts(session, layout, self.block, self.answers)
        folder = Folder(self.dir, key_name(parts), parts, self.disk_limit) if self.dir is not None else None
        if parts not in self.keys:
            self.keys.append(parts)
        self.stores[session] = Store(self.tree, layout, parts, self.keys, folder)

    @hookimpl
    def restore_prefix(self, seq: Any) -> int | None:
        """Fill the caches with the longest stored beginning of the prompt."""
        store = self.stores.get(seq.session)
        if store is None:
            return None
        count, why = store.restore(seq.tokens[: seq.n_prompt], seq.caches)
        seq.notes["prefix-cache"] = self._count(seq.n_prompt, count, why)
        return count or None

    @hookimpl
    def store_prefix(self, seq: Any) -> None:
        """Store the leading tokens of the prompt role, or all that is cached."""
        store = self.stores.get(seq.session)
        prompt, end = seq.role(0)
        end = seq.cached if self.answers else min(end, seq.cached)
        if store is None or not prompt or end < 1:
            return
        why = store.store(seq.tokens[:end], seq.caches)
        if why:
            self.unstored[why] += 1

    @hookimpl
    def report(self, session: Any) -> dict[str, Any]:
        """Return what was reused, why no more was, and the bytes held.

        `missed` counts the reasons of requests that reused nothing, `ended` those of the others that reused
        only a part of their prompt; `last` tells of the latest one, as notes["prefix-cache"] of each sequence
        does of that.
        """
        said: dict[str, Any] = {
            "requests": self.requests,
            "hits": self.hits,
            "prompt_tokens": self.prompt,
            "reused_tokens": self.reused,
            "missed": dict(self.missed),
            "ended": dict(self.ended),
            "unstored": dict(self.unstored),
            "last": self.last,
            "blocks": len(self.tree.nodes),
            "evicted": self.tree.evicted,
            "memory_bytes": self.tree.nbytes,
        }
        store = self.stores.get(session)
        if store is not None and store.folder is not None:
            folder = store.folder
            said |= {"disk_bytes": folder.nbytes(), "unwritten": folder.unwritten, "trouble": folder.trouble}
        return said

    def _count(self, prompt: int, reused: int, why: str) -> str:
        """Add a request to the figures and tell of it in a sentence."""
        self.requests += 1
        self.hits += reused > 0
        self.prompt += prompt
        self.reused += reused
        why = why or ("one token" if not reused else "")
        if why:
            (self.ended if reused else self.missed)[why] += 1
        where = "" if not why or why.startswith(WHOLE) else f" at token {reused}"
        self.last = f"{reused} of {prompt} reused" + (f": {why}{where}" if why else "")
        return self.last


def _bytes(option: str, value: int | str) -> int:
    """Read a number of bytes, 0 among them; ValueError says how to write one."""
    try:
        size = value if isinstance(value, int) else int(read_size(value))
    except ValueError:
        size = -1
    if size < 0:
        raise ValueError(f"{option} is a number of bytes such as 1500000000, 512MB or 2GiB, not {value!r}")
    return size
