"""Constrained decoding: only tokens that a grammar allows, found by llguidance."""

from __future__ import annotations

import hashlib
import importlib
from collections import OrderedDict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np

from cmr import PluginError, RequestError, hookimpl, plugin
from cmr_plugins.grammar.follower import Follower
from cmr_plugins.grammar.sources import KINDS, first_line, lark_of, one_of, read
from cmr_plugins.grammar.tokens import ll_tokenizer

KEPT = 64  # grammars of requests that are kept ready
# Items of one mask: grammars of single characters need many, at some 20,000 a millisecond.
ITEMS = 5_000_000


@plugin
class Grammar:
    """Allow only what a grammar, a JSON schema or a regular expression allows: the plugin's, or the request's own."""

    exact = False
    needs = ("tokenizer",)
    told = KINDS
    gbnf: Annotated[str, "a grammar in llama.cpp's notation"] = ""
    json_schema: Annotated[str | dict | bool, "a JSON schema; {} allows any JSON"] = ""
    regex: Annotated[str, "a regular expression for the whole answer"] = ""
    lark: Annotated[str, "a grammar in llguidance's variant of Lark's notation"] = ""
    file: Annotated[Path | None, "a file with one of these"] = None
    kind: Annotated[
        Literal["gbnf", "json_schema", "regex", "lark"] | None,
        "which of them; by default what the file's name ends with: .gbnf, .json, .regex, .lark",
    ] = None

    def __post_init__(self) -> None:
        self.llguidance = _llguidance()
        self.source = one_of({kind: getattr(self, kind) for kind in KINDS})
        if self.file is not None:
            if self.source is not None:
                raise ValueError(f"{self.source[0]} and file are two grammars; give one")
            self.source = read(self.file, self.kind)
        elif self.kind is not None:
            raise ValueError("kind says what is in a file; add file=")
        if self.source:
            lark_of(*self.source)  # what is wrong with it is said before a model is read
        self.ready: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self.compiled = self.masks = self.completed = 0
        self.seconds = 0.0

    @property
    def settled(self) -> tuple[str, ...]:
        """What decides masks beside the options: the library's version, and what was in the file."""
        version = f"llguidance {self.llguidance.__version__}"
        if self.source is None:
            return (version,)
        kind, text = self.source
        return version, f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Make the grammar ready, if there is one, and refuse what this vocabulary cannot write."""
        self.tokenizer = session.model.tokenizer
        try:
            self._matcher(self.source)
        except ValueError as error:
            raise PluginError(f"grammar: {error}") from None

    @hookimpl
    def prepare_request(self, request: Any) -> None:
        """Check the request's own grammar, and make it ready."""
        try:
            self._matcher(self._source(request))
        except ValueError as error:
            raise RequestError(f"grammar: {error}") from None

    @hookimpl
    def on_logits(self, seq: Any, draft: list[int], logits: np.ndarray) -> None:
        """Forbid in each row what the grammar does not allow there."""
        follower = self._follower(seq)
        if follower is None:
            return
        began = perf_counter()
        follower.forbid(draft, logits)
        self.masks += len(logits)
        self.seconds += perf_counter() - began

    @hookimpl
    def on_token(self, seq: Any, token: int) -> str | None:
        """Follow the text; stop where nothing can come any more."""
        follower = self._follower(seq)
        if follower is None or token in seq.stop_ids:
            return None
        if not follower.take(token):
            raise PluginError(
                f"grammar: token {token} was chosen against the grammar; a plugin behind it forces tokens"
            )
        if follower.complete:
            self.completed += 1
            return "grammar"
        return None

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return grammars compiled, rows masked, what a row took, and answers that came to the grammar's end."""
        each = 1e6 * self.seconds / self.masks if self.masks else 0.0
        return {"compiled": self.compiled, "rows": self.masks, "us_a_row": each, "completed": self.completed}

    def _source(self, request: Any) -> tuple[str, str] | None:
        """The kind and text of a request's grammar, its own before the plugin's."""
        return one_of(request.plugins.get("grammar", {})) or self.source

    def _follower(self, seq: Any) -> Follower | None:
        """What follows a sequence from where its answer begins; None where there is no grammar."""
        try:
            return seq.notes["grammar"]
        except KeyError:
            pass
        matcher, found = self._matcher(self._source(seq.request)), None
        if matcher is not None:
            found = Follower(matcher.deep_copy(), self.tokenizer.n_vocab, seq.stop_ids)
        seq.notes["grammar"] = found
        return found

    def _matcher(self, source: tuple[str, str] | None) -> Any:
        """A grammar at its beginning, compiled once; ValueError where it is none, or none for this vocabulary."""
        if source is None:
            return None
        matcher = self.ready.get(source)
        if matcher is None:
            limits = self.llguidance.LLParserLimits(step_max_items=ITEMS, verbose_errors=False)
            tokenizer, lark = ll_tokenizer(self.tokenizer), lark_of(*source)
            matcher = self.llguidance.LLMatcher(tokenizer, lark, log_level=0, limits=limits)
            if matcher.is_error():
                raise ValueError(f"the {source[0]} cannot be used: {first_line(matcher.get_error())}")
            self.ready[source] = matcher
            self.compiled += 1
        self.ready.move_to_end(source)
        if len(self.ready) > KEPT:
            self.ready.popitem(last=False)
        return matcher


def _llguidance() -> Any:
    """Import llguidance, or say how to get it."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise ValueError(
            "it needs the package llguidance; pip install 'cmr-runner[grammar]' installs it"
        ) from None
