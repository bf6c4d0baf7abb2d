"""The objects of OpenAI's API that answers travel in, whole or piece by piece, and the frames of an event stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from cmr.server.mailbox import Ended

DONE = b"data: [DONE]\n\n"


def frame(content: dict[str, Any]) -> bytes:
    """Return one server-sent event that carries an object."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(ends: list[Ended], n: int) -> dict[str, int]:
    """Count the tokens of answers, of which each prompt has `n`; a prompt counts once."""
    prompt = sum(end.prompt_tokens for end in ends[::n])
    new = sum(end.new_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def notes(end: Ended) -> dict[str, Any]:
    """Return what plugins told of an answer as a choice shows it, if they did."""
    return {"notes": end.told} if end.told else {}


def finish_reason(reason: str) -> str:
    """Return OpenAI's word for why an answer ended: stop where the model, a stop text or a plugin ended it."""
    return "length" if reason in ("length", "context") else "stop"


class Completion:
    """The objects of one /v1/completions request."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, fingerprint: str, counts: bool = False) -> None:
        """Give the request an id; `counts` says whether chunks have a place for usage."""
        self._facts = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._counts = counts

    def whole(self, texts: list[str], ends: list[Ended], n: int) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        choices = [
            self.choice(index, text, finish_reason(end.reason)) | notes(end)
            for index, (text, end) in enumerate(zip(texts, ends))
        ]
        return {"object": self.whole_kind, **self._facts, "choices": choices, "usage": usage(ends, n)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks that come before a choice's text."""
        return []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk([self.delta(index, text, None)])

    def closing(self, index: int, end: Ended) -> dict[str, Any]:
        """Return the last chunk of a choice."""
        return self._chunk([self.delta(index, "", finish_reason(end.reason)) | notes(end)])

    def counted(self, ends: list[Ended], n: int) -> dict[str, Any]:
        """Return the chunk of the usage, which has no choices."""
        return self._chunk([]) | {"usage": usage(ends, n)}

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return what a chunk adds to a choice."""
        return self.choice(index, text, reason)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        place: dict[str, Any] = {"usage": None} if self._counts else {}
        return {"object": self.chunk_kind, **self._facts, "choices": choices, **place}


class Chat(Completion):
    """The objects of one /v1/chat/completions request."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that says who speaks."""
        return [self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)])]

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return a choice with a message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Return what a chunk adds to the message."""
        return self._delta(index, {"content": text} if text else {}, reason)

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
