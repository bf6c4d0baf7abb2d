"""From a grammar as users write it to one that llguidance reads, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmr_plugins.grammar.gbnf import parse
from cmr_plugins.grammar.lexemes import to_lark

KINDS = ("gbnf", "json_schema", "regex", "lark")
# Masks of all that is allowed, not only of the tokens that a tokenizer would take for text that must come.
OPTIONS = '%llguidance {"no_forcing": true}\n'
# As in llama.cpp's grammars: models that like blanks would write them without end.
BLANKS = {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}

_PLACE = re.compile(r"^at \d+\(\d+\): ")  # in what was written of it


def one_of(options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the kind and the text of the one grammar among these options, or None; ValueError for two."""
    given = {kind: options[kind] for kind in KINDS if options.get(kind, "") != ""}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two grammars; give one")
    for kind, value in given.items():
        if not isinstance(value, str):
            if kind != "json_schema":
                raise ValueError(f"{kind} is a text, not {value!r:.80}")
            try:
                value = json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"json_schema is no JSON: {error}") from None
        return kind, value
    return None


def read(path: Path, kind: str | None) -> tuple[str, str]:
    """Return the kind and the text of a grammar in a file; its name tells the kind where that is not given."""
    kind = kind or {"json": "json_schema"}.get(path.suffix[1:], path.suffix[1:])
    if kind not in KINDS:
        raise ValueError(f"the name of {path} does not tell what it holds; add kind={', kind='.join(KINDS)}")
    try:
        return kind, path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def lark_of(kind: str, text: str) -> str:
    """Return a grammar in llguidance's notation; ValueError says what is wrong with it."""
    try:
        made = f"{WRITTEN[kind](text)}\n{OPTIONS}"
    except RecursionError:
        raise ValueError(f"the {kind} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the {kind} cannot be read: {error}") from None
    from llguidance import LLMatcher

    wrong, said = LLMatcher.validate_grammar_with_warnings(made)
    if wrong:
        why = first_line(said[0])
        raise ValueError(f"the {kind} cannot be used: {why if kind == 'lark' else _PLACE.sub('', why)}")
    return made


def first_line(text: str) -> str:
    """The first line of what llguidance says, whose others show its state."""
    return text.strip().partition("\n")[0]


def _from_schema(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object, or true or false")
    if isinstance(schema, dict):
        schema = schema | {"x-guidance": BLANKS | schema.get("x-guidance", {})}
    return f"start: %json {json.dumps(schema)}\n"


def _from_regex(text: str) -> str:
    from llguidance import LLMatcher

    return json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]


WRITTEN: dict[str, Callable[[str], str]] = {
    "gbnf": lambda text: to_lark(parse(text)),
    "json_schema": _from_schema,
    "regex": _from_regex,
    "lark": str,
}
