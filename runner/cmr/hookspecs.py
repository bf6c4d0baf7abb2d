"""Every place where a plugin can attach, in the order in which a run reaches them."""

from __future__ import annotations

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("cmr")
hookimpl = pluggy.HookimplMarker("cmr")

# -- plan: asked once a session, before weights are read. One plugin owns each; others may wrap it. --


@hookspec(firstresult=True)
def weight_source(model: Any) -> Any:
    """Return what serves the layers' weights: an object with acquire(layer) -> Layer and release(layer)."""


@hookspec(firstresult=True)
def layer_order(model: Any) -> Any:
    """Return the layers to run, as indices in order (leaving some out, say)."""


@hookspec(firstresult=True)
def kv_cache(model: Any, layer: int) -> Any:
    """Return a function without arguments that makes this layer's LayerCache for a new sequence."""


@hookspec(firstresult=True)
def attention(model: Any, layer: int) -> Any:
    """Return an AttnRule for this layer, or an attend(q, cache, q_pos, out, prompt) of your own."""


@hookspec(firstresult=True)
def drafter(model: Any) -> Any:
    """Return an object whose propose(seq) -> token ids guesses what follows; the model verifies the guess."""


@hookspec(firstresult=True)
def scheduler(model: Any) -> Any:
    """Return an object with add(seq), pick() -> [(seq, most rows to feed)] and remove(seq)."""


# -- pre: once a session, then once a request --


@hookspec
def start_session(session: Any) -> None:
    """See the session once its plan stands and before its first request."""


@hookspec
def prepare_request(request: Any) -> None:
    """Edit request.tokens or the request's options in place before it becomes a sequence."""


@hookspec(firstresult=True)
def answer_request(request: Any, seq: Any) -> Any:
    """Return the answer's token ids to leave the model out, or None; seq.notes may say where they are from."""


@hookspec(firstresult=True)
def restore_prefix(seq: Any) -> Any:
    """Fill seq.caches with the beginning of seq.tokens; return how many tokens they hold now, or None."""


# -- runtime: every step, as plain calls in the order of the command line; no wrappers --


@hookspec
def on_attention(seq: Any, layer: int, q: Any, cache: Any) -> None:
    """See one sequence's queries, float32 [rows, heads, dim], and its cache after a layer's attention."""


@hookspec
def on_layer(step: Any, layer: int, hidden: Any) -> Any:
    """See a layer's output, float32 [rows, n_embd]; return True to leave the remaining layers out."""


@hookspec
def on_logits(seq: Any, draft: list[int], logits: Any) -> None:
    """Edit the logits, float32 [len(draft) + 1, n_vocab], in place; row i follows seq.tokens + draft[:i]."""


@hookspec
def on_token(seq: Any, token: int) -> Any:
    """See an accepted token, now the last of seq.tokens; return a reason (str) to stop there, or None."""


@hookspec
def on_step(step: Any) -> None:
    """Act after a step, its tokens accepted and rejected drafts rolled back (evict, compress, count)."""


# -- background: between steps, never during one --


@hookspec
def run_idle(session: Any) -> None:
    """Do a little background work (milliseconds) while no step runs."""


# -- post: once a request, then whenever figures are asked for --


@hookspec
def store_prefix(seq: Any) -> None:
    """Keep what seq.caches hold (the first seq.cached of seq.tokens) for later sequences."""


@hookspec
def finish_request(request: Any, tokens: list[int], reason: str) -> None:
    """See a request's answer, token ids, and the reason why it ended."""


@hookspec
def report(session: Any) -> Any:
    """Return this plugin's figures for the session's report, as a dict."""


PLAN = ("weight_source", "layer_order", "kv_cache", "attention", "drafter", "scheduler")
CALLS = (
    "start_session", "prepare_request", "answer_request", "restore_prefix",
    "on_attention", "on_layer", "on_logits", "on_token", "on_step", "run_idle",
    "store_prefix", "finish_request", "report",
)  # fmt: skip
HOOKS = PLAN + CALLS
