"""What must be the same for stored KV to be of use: model, machine, positions, template, plan, layout."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from typing import Any

# Who answers these decides what KV is or how it is stored; the others below only if they change tokens.
ALWAYS = ("layer_order", "kv_cache", "attention")
INEXACT = ("weight_source", "on_attention", "on_layer", "on_step", "restore_prefix")


def key_parts(session: Any, layout: Any, block: int, answers: bool) -> dict[str, str]:
    """Return what a session's KV depends on besides the tokens, as texts by name, the most telling first.

    With `answers` what is stored may have been generated.
    """
    model, plan = session.model, session.plan
    changing = [
        name for name, thing in plan.plugins.items() if name != "prefix-cache" and _changes(plan, name, thing)
    ]
    others = [name for name in plan.plugins if name not in changing]
    rules = [model.rule(layer) for layer in range(model.n_layers)]
    ropes = getattr(model.config, "rope", None)
    parts = {
        "model": f"{model.config.arch} {model.config.name}, {model.file.nbytes} bytes",
        "machine": f"{model.ops.name} on {platform.machine()} {_processor()}".rstrip(),
        "positions": f"context {session.context} of {model.config.n_ctx}, {_digest(repr((rules, ropes)))}",
        "template": _digest(model.chat_template or ""),
        "plan": f"layers {_digest(repr(plan.layers))} {' '.join(changing)}".rstrip(),
        "layout": f"blocks of {block}, {'answers too, ' * answers}{_digest(str(layout))}",
    }
    return parts | {"weights, options or version": session.fingerprint(*others)}


def key_name(parts: dict[str, str]) -> bytes:
    """Return 16 bytes for the parts of a key."""
    return hashlib.blake2b(repr(sorted(parts.items())).encode(), digest_size=16).digest()


def difference(parts: dict[str, str], others: Iterable[dict[str, str]]) -> str | None:
    """Return 'other model' or the like: where the key that comes nearest first differs; None without one."""
    places = [next((i for i, part in enumerate(parts) if other.get(part) != parts[part]), -1)
              for other in others]  # fmt: skip
    return f"other {list(parts)[max(places)]}" if places else None


def _changes(plan: Any, name: str, thing: Any) -> bool:
    """Whether a plugin takes part in what the KV of a prompt is."""
    hooks = ALWAYS if getattr(thing, "exact", False) else (*ALWAYS, *INEXACT)
    for hook in hooks:
        owners = " ".join(set(plan.owners.get(hook, ()))).replace(", wrapped by ", " ").split()
        if name in owners or name in plan.names.get(hook, ()):
            return True
    return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _processor() -> str:
    """The processor that code is compiled for: another one may round sums otherwise."""
    binding = sys.modules.get("llvmlite.binding")
    return binding.get_host_cpu_name() if binding is not None else ""
