"""`cmr COMMAND`: everything beside running a model, and that too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cmr.cli.guard import guarded
from cmr.errors import RequestError
from cmr.options import hint

COMMANDS = {
    "run": ("run:run", "run a model on a prompt or chat with it; the same as cmr-run"),
    "serve": ("serve:main", "serve a model over HTTP, as OpenAI's API and llama-server do"),
    "info": ("info:main", "show what a model file holds and what it needs"),
    "bench": ("bench:main", "measure speed, against this machine's limits, plugins and llama.cpp"),
    "eval": ("eval:main", "measure perplexity, divergence and small tasks, with plugins or without"),
    "tune": ("tune:main", "search a few exact settings for the fastest on your prompts, and write a profile"),
    "warmup": ("warmup:main", "compile the kernels ahead of the first run"),
    "plugins": ("plugins:list_plugins", "list the plugins that are installed"),
    "plugin-check": ("plugins:check_plugin", "run the contracts of a plugin"),
    "plugin-new": ("new_plugin:main", "write a new plugin as a package of its own"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cmr` with these arguments and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and argv[0] in COMMANDS else None
    return guarded(f"cmr {name}" if name else "cmr", lambda: _dispatch(argv))


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from cmr.cli.version import version

        print(version())
        return 0
    if argv[0] not in COMMANDS:
        raise RequestError(f"there is no command {argv[0]!r}{hint(argv[0], COMMANDS)}")
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    return getattr(importlib.import_module(f"cmr.cli.{module}"), function)(argv[1:])


def _help() -> str:
    rows = [f"  {name:14} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: cmr COMMAND ...", "", *rows, "", "cmr COMMAND --help tells more"])


if __name__ == "__main__":
    sys.exit(main())
