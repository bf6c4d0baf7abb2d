"""`cmr serve FILE`: serve a model over HTTP, in the manner of OpenAI's API and llama-server."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmr.cli import options
from cmr.cli.explaining import explain_plan
from cmr.cli.loading import attach, find_template, load
from cmr.cli.progress import CompileNotice, Progress, say
from cmr.cli.sampling_flags import answer_words, sampling_options
from cmr.discovery import find, parse, provides
from cmr.errors import CMRError, FileError, PluginError, RequestError
from cmr.profiles import read_profile

NEEDED = ("starlette", "uvicorn")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    args = parser().parse(argv)
    options.settle_model(args, "cmr serve model.gguf --port 8080")
    wanted = answer_words(args)
    args.plugin = with_scheduler(args)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CMRError(f"cmr serve needs {' and '.join(missing)}: pip install 'cmr-runner[server]'")
    keys = read_keys(args)
    model = load(args)
    try:
        with attach(args, model) as session:
            if args.explain:
                return explain_plan(session, wanted)
            session.defaults |= wanted
            session.request([])  # which checks the words of flags and profile, before anybody waits
            return listen(args, session, keys)
    finally:
        model.close()


def parser() -> options.Parser:
    """Build the parser of all flags."""
    made = options.Parser(prog="cmr serve", usage="cmr serve FILE [flags]", description=__doc__)
    add = made.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="the address to listen on; 0.0.0.0: every one")
    add("--port", type=options.whole(0), default=8080, metavar="N", help="the port; 0: a free one")
    add("-a", "--alias", action="append", default=[], metavar="NAME",
        help="a name that requests may call the model by, in place of the file's; may be repeated")  # fmt: skip
    add("-np", "--parallel", type=options.whole(1), metavar="N",
        help="answers that are computed together: --plugin batching:width=N (default: 8)")  # fmt: skip
    add("--queue", type=options.whole(0), default=64, metavar="N", help="answers that may wait beside them")
    add("--api-key", action="append", default=[], metavar="KEY", help="ask for this key; may be repeated")
    add("--api-key-file", metavar="FILE", help="ask for one of the keys in a file, one a line")
    add("--cors", action="append", default=[], metavar="ORIGIN",
        help="let pages of this origin (* for all) ask from browsers; may be repeated")  # fmt: skip
    add("--metrics", action="store_true", help="show figures for Prometheus under /metrics")
    add("-v", "--verbose", action="store_true", help="write a line for each request to stderr")
    for more in (
        options.model_options,
        options.answer_options,
        sampling_options,
        options.template_options,
        options.plugin_options,
    ):
        more(made)
    return made


def with_scheduler(args: argparse.Namespace) -> list[str]:
    """Return the plugins with `batching`, unless another one of them schedules; -np is its width."""
    given = dict(map(parse, args.plugin))
    profile = read_profile(args.profile).plugins if args.profile else {}
    others = [name for name in given | profile if name != "batching" and provides(find(name)[0], "scheduler")]
    if args.parallel is not None:
        if others:
            raise PluginError(
                f"-np is for the plugin batching, and {others[0]} schedules; use its own options"
            )
        if "width" in given.get("batching", {}):
            raise PluginError(
                "both -np and --plugin batching:width say how many answers run together; choose one"
            )
        return [*args.plugin, f"batching:width={args.parallel}"]
    return args.plugin if others else [*args.plugin, "batching"]


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys of the flags; an empty one would let everybody in."""
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"--api-key-file {args.api_key_file} cannot be read: {error}") from None
        keys += filter(None, map(str.strip, lines))
        if not keys:
            raise RequestError(f"--api-key-file {args.api_key_file} holds no key")
    if not all(key.strip() == key and key for key in keys):
        raise RequestError("--api-key wants a key without spaces around it")
    return tuple(keys)


def listen(args: argparse.Namespace, session: Any, keys: tuple[str, ...]) -> int:
    """Listen, and serve what comes."""
    from cmr.server.app import Settings, make_app
    from cmr.server.engine import Engine
    from cmr.server.listen import address, open_socket, serve

    model = session.model
    template = None
    if args.chat_template or args.chat_template_file or model.chat_template:
        template = find_template(args, model)
    settings = Settings(
        names=tuple(args.alias) or (Path(model.path).stem,),
        template=template,
        variables=args.chat_template_kwargs,
        keys=keys,
        origins=tuple(args.cors),
        metrics=args.metrics,
        log=say if args.verbose else None,
    )
    model.ops.compiling = CompileNotice(Progress("compiling kernels"))
    width = getattr(session.plan.scheduler, "width", 1)
    with open_socket(args.host, args.port) as opened:
        engine = Engine(session, width + args.queue, say)
        app = make_app(engine, settings)

        def ready() -> None:
            say(f"{settings.names[0]} is served at {address(opened)}; Ctrl-C ends it")
            if not keys and args.host not in LOOPBACK:
                say("everybody who reaches this address may ask; --api-key KEY asks for a key")

        engine.start()
        serve(app, engine, opened, ready)
    return 0
