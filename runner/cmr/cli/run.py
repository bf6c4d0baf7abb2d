"""`cmr-run FILE -p TEXT`: continue a text, or chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from cmr.cli import options
from cmr.cli.answering import Writer, answer
from cmr.cli.escapes import unescape
from cmr.cli.explaining import explain_plan
from cmr.cli.guard import INTERRUPTED, guarded
from cmr.cli.interrupts import Interrupts
from cmr.cli.loading import attach, load
from cmr.cli.progress import say
from cmr.cli.sampling_flags import answer_words, sampling_options
from cmr.cli.summary import as_json, summary
from cmr.cli.version import version
from cmr.errors import FileError, RequestError
from cmr.model import Model
from cmr.session import Session

USAGE = 'cmr-run FILE -p "Once upon a time" [flags]'


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cmr-run` with these arguments and return its exit status."""
    return guarded("cmr-run", lambda: run(argv))


def parser() -> options.Parser:
    """Build the parser of all flags."""
    made = options.Parser(
        prog="cmr-run", usage=USAGE, description="Run a GGUF model: continue a text, or chat."
    )
    for add in (
        options.model_options,
        options.prompt_options,
        options.answer_options,
        sampling_options,
        options.chat_options,
        options.template_options,
        options.plugin_options,
    ):
        add(made)
    made.add_argument("--version", action="version", version=version(), help="show the versions and stop")
    return made


def run(argv: Sequence[str] | None = None) -> int:
    """Read the flags, open the model, and continue, chat or explain."""
    args = parser().parse(argv)
    options.refuse_unmet(args)
    unescape(args)
    wanted = answer_words(args)
    if args.reverse_prompt:
        wanted["stop"] = tuple(args.reverse_prompt)
    prompt = read_prompt(args)
    model = load(args)
    try:
        with attach(args, model) as session:
            if args.explain:
                return explain_plan(session, wanted)
            if chats(args, prompt, model):
                from cmr.cli.chatting import chat

                return chat(args, session, prompt, wanted)
            return complete(args, session, prompt or "", wanted)
    finally:
        model.close()


def read_prompt(args: argparse.Namespace) -> str | None:
    """Return the prompt of -p, -f or a pipe, in this order; None when there is none."""
    if args.prompt is not None or args.explain:
        return args.prompt
    if args.file is not None:
        try:
            with open(args.file, encoding="utf-8") as file:
                return file.read().removesuffix("\n")
        except OSError as error:
            raise FileError(f"-f {args.file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise FileError(f"-f {args.file} is not UTF-8 text") from None
    if sys.stdin is None or sys.stdin.isatty() or asks_for_chat(args):
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise RequestError("the piped prompt is not UTF-8 text") from None


def asks_for_chat(args: argparse.Namespace) -> bool:
    """Whether a flag asks for a chat."""
    return args.chat or args.single_turn or args.system_prompt is not None


def chats(args: argparse.Namespace, prompt: str | None, model: Model) -> bool:
    """Decide between a chat and a plain continuation; RequestError for flags that the latter would ignore."""
    if asks_for_chat(args):
        return True
    template = args.chat_template or args.chat_template_file or model.chat_template
    if prompt is None and template and not args.no_conversation:
        return True
    if prompt is None:
        raise RequestError('there is no prompt; give one with -p "TEXT", with -f FILE or through a pipe')
    for flag in ("chat_template", "chat_template_file", "chat_template_kwargs"):
        if getattr(args, flag):
            raise RequestError(f"--{flag.replace('_', '-')} is for a chat; add -cnv, or leave it out")
    return False


def complete(args: argparse.Namespace, session: Session, prompt: str, wanted: dict[str, Any]) -> int:
    """Continue the prompt on stdout and close with the figures on stderr."""
    request = session.request(prompt, special=True, **wanted)
    if args.verbose_prompt:
        show_tokens(session.model.tokenizer, prompt)
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    text: list[str] = []
    writer = Writer(prompt if on_terminal and not args.no_display_prompt else "")
    try:
        with Interrupts() as interrupts:
            write = text.append if args.json else writer.write
            seq, interrupted = answer(session, request, write, interrupts)
    finally:
        writer.end()
    if args.json:
        print(json.dumps(as_json(session, seq, "".join(text)), ensure_ascii=False))
    say("\n".join([*([""] if on_terminal else []), *summary(session, seq)]))
    return INTERRUPTED if interrupted else 0


def show_tokens(tokenizer: Any, prompt: str) -> None:
    """List the prompt's tokens on stderr."""
    for token in tokenizer.encode(prompt, special=True, bos=True):
        say(f"{token:6} {tokenizer.piece(token).decode('utf-8', 'replace')!r}")


if __name__ == "__main__":
    sys.exit(main())
