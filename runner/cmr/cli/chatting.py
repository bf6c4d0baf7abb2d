"""The chat: messages in, answers out, and the KV of earlier turns kept."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from cmr.cli.answering import Writer, answer
from cmr.cli.conversation import Conversation
from cmr.cli.guard import INTERRUPTED
from cmr.cli.interrupts import Interrupts
from cmr.cli.loading import find_template
from cmr.cli.progress import say
from cmr.cli.summary import as_json, summary
from cmr.cli.terminal import Typing
from cmr.errors import CMRError, RequestError
from cmr.sequence import Sequence
from cmr.session import Session

HELP = """\
/clear  forget the conversation     /exit  leave     /help  this
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a message of several lines.
Ctrl-C ends an answer."""


def chat(args: argparse.Namespace, session: Session, prompt: str | None, wanted: dict[str, Any]) -> int:
    """Chat until the input ends; `prompt` is the first message. Returns the exit status."""
    if args.json and not args.single_turn:
        raise RequestError("--json gives one answer; add -st for a chat of one turn")
    return Chat(args, session, wanted).run(prompt)


class Chat:
    """One conversation with its session."""

    def __init__(self, args: argparse.Namespace, session: Session, wanted: dict[str, Any]) -> None:
        self.args, self.session, self.wanted = args, session, wanted
        template = find_template(args, session.model)
        system, variables = args.system_prompt, args.chat_template_kwargs
        self.talk = Conversation(template, session.model.tokenizer, system, variables)
        self.interrupts = Interrupts()
        self.typing = Typing(self.interrupts)
        self.last: Sequence | None = None
        self.interrupted = False

    def run(self, prompt: str | None) -> int:
        """Answer messages until there are no more."""
        if self.typing.person and not self.args.single_turn:
            say("/help tells what can be typed here; /exit leaves")
        try:
            with self.interrupts:
                self._turns(prompt)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            self.interrupted = True
        if self.last is not None:
            say("\n".join(summary(self.session, self.last)))
        return INTERRUPTED if self.interrupted else 0

    def _turns(self, prompt: str | None) -> None:
        while (message := prompt if prompt is not None else self.typing.message()) is not None:
            prompt = None
            if message.startswith("/") and self.typing.person:
                if not self._command(message.strip()):
                    break
            elif message.strip():
                self._turn(message)
            if self.interrupted or self.args.single_turn and self.last is not None:
                break

    def _command(self, word: str) -> bool:
        """Obey a command; return whether the chat goes on."""
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/clear":
            self.talk.clear()
            self.last = None
            say("the conversation is forgotten")
        elif word == "/help":
            say(HELP)
        else:
            say(f"there is no {word}; {HELP}")
        return True

    def _turn(self, message: str) -> None:
        """Answer one message; what cannot be answered is taken back, and ends a chat that nobody types in."""
        talk = self.talk
        tokens = talk.ask(message)
        text: list[str] = []
        writer = Writer()
        try:
            request = self.session.request(tokens, after=self.last, message=message, **self.wanted)
            write = _both(text, None if self.args.json else writer)
            seq, interrupted = answer(self.session, request, write, self.interrupts)
        except CMRError as error:
            writer.end()
            if not self.typing.person or self.args.single_turn:
                raise
            talk.take_back()
            say(f"cmr-run: {error}; /clear begins anew")
            return
        if self.args.json:
            print(json.dumps(as_json(self.session, seq, "".join(text)), ensure_ascii=False))
        writer.end()
        if interrupted and not text and self.typing.person:
            sys.stderr.write("\n")  # behind the ^C that the terminal shows
        self.last = seq
        self.interrupted = interrupted and not self.typing.person
        written = seq.new
        if written and written[-1] in seq.stop_ids:
            written = written[:-1]
        talk.answered("".join(text), written)


def _both(text: list[str], writer: Writer | None) -> Any:
    def write(piece: str) -> None:
        text.append(piece)
        if writer is not None:
            writer.write(piece)

    return write
