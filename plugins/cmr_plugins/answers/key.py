"""All that decides an answer beside the text of its prompt, as a key."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

# Answers that ended for these reasons are not what the same request would give again.
PASSING = ("cancelled", "error", "answered")


def answer_key(request: Any, *facts: Any) -> str | None:
    """Return `facts` and what a request asks for beside its prompt as JSON; None where that cannot be said.

    So it is where earlier turns lie in the KV cache, a new seed is drawn, or plugins are told what JSON has not.
    """
    if request.after is not None:
        return None
    if request.sampling is None:  # a seed is drawn anew each time
        return None
    told = _exactly(request.plugins)
    if told is None:
        return None
    sampling = asdict(request.sampling)
    if sampling["temp"] <= 0 and not sampling["xtc_probability"]:
        sampling["seed"] = None  # nothing is drawn
    stop_ids = None if request.stop_ids is None else sorted(request.stop_ids)
    limits = [request.max_tokens, list(request.stop), request.ignore_eos, stop_ids]
    return json.dumps([*facts, limits, sampling, told], sort_keys=True)


def _exactly(told: dict[str, Any]) -> str | None:
    """What plugins are told, as JSON with its keys in their order (a grammar may follow it), or None."""
    try:
        text = json.dumps(told)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == told else None
