"""What tests of grammars share: the library they need, tokenizers, masks, and a brute-force idea of what is allowed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from cmr import Request
from cmr_plugins.grammar import Grammar

pytest.importorskip("llguidance", reason="the extra 'grammar' (llguidance) is not installed")

JSON = r"""
root   ::= value
value  ::= object | array | string | number | ("true" | "false" | "null") ws   # as in llama.cpp's json.gbnf
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""

# Strings stand before a blank here and before other things there; `pair` could be one lexeme with them, and is not.
PAIRS = r"""
root   ::= value
value  ::= ("{" ws (pair ("," ws pair)*)? "}" | "[" ws (value ("," ws value)*)? "]" | string | number | "true") ws
pair   ::= string ws ":" ws value
string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
ws     ::= [ \t\n]*
"""


class Masks:
    """The plugin with a tokenizer and no model: which tokens it allows behind tokens of an answer."""

    def __init__(self, tokenizer, **options):
        self.tokenizer, self.plugin = tokenizer, Grammar(**options)
        self.plugin.start_session(SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer)))
        self.seq = SimpleNamespace(request=Request("a"), notes={}, stop_ids=tokenizer.stop_ids)

    def allowed(self, draft=()):
        """The tokens of the row behind a draft, as a set; other values are left alone."""
        rows = np.arange(1, 1 + (len(draft) + 1) * self.tokenizer.n_vocab, dtype=np.float32)
        rows = rows.reshape(len(draft) + 1, -1)
        before = rows.copy()
        self.plugin.on_logits(self.seq, list(draft), rows)
        kept = rows[-1] != -np.inf
        assert (rows[-1][kept] == before[-1][kept]).all() and (rows[-1][~kept] == -np.inf).all()
        return set(np.flatnonzero(kept).tolist())

    def take(self, token):
        """Accept a token."""
        return self.plugin.on_token(self.seq, token)


def walks(masks, viable, accepts, seed, steps=12):
    """Walk at random through what is allowed; at each place it must be what the two functions of bytes say."""
    rng, tokenizer = random.Random(seed), masks.tokenizer
    pieces = [
        b"" if tokenizer.is_special(token) else tokenizer.piece(token) for token in range(tokenizer.n_vocab)
    ]
    text, places = b"", 0
    for _ in range(steps):
        wanted = {token for token, piece in enumerate(pieces) if piece and viable(text + piece)}
        if accepts(text):
            wanted |= tokenizer.stop_ids
        found = masks.allowed() if wanted else set()
        assert found == wanted, (text, [pieces[token] for token in found ^ wanted][:9])
        places += 1
        goes_on = sorted(wanted - tokenizer.stop_ids)
        if not goes_on:
            break
        token = rng.choice(goes_on)
        text += pieces[token]
        ended = masks.take(token)
        more = any(piece and viable(text + piece) for piece in pieces)
        assert ended == (None if more or not accepts(text) else "grammar"), text
        if ended:
            break
    return places
