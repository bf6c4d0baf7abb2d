"""The objects of OpenAI's API that answers travel in, whole or piece by piece, and the frames of an event stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from cmr.server.mailbox import Ended, Piece

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

    def __init__(self, model: str, fingerprint: str, counts: bool = False, speller: Any = None) -> None:
        """Give the request an id; `counts` says whether chunks have a place for usage.

        `speller` is the tokenizer where the chances of tokens are wanted.
        """
        self._facts = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._counts, self._speller = counts, speller

    def whole(self, answers: list[Piece], ends: list[Ended], n: int) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        choices = [
            self.choice(index, answer, finish_reason(end.reason)) | notes(end)
            for index, (answer, end) in enumerate(zip(answers, ends))
        ]
        return {"object": self.whole_kind, **self._facts, "choices": choices, "usage": usage(ends, n)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks that come before a choice's text."""
        return []

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk([self.delta(index, piece, None)])

    def closing(self, index: int, end: Ended) -> dict[str, Any]:
        """Return the last chunk of a choice."""
        return self._chunk([self.delta(index, Piece(""), finish_reason(end.reason)) | notes(end)])

    def counted(self, ends: list[Ended], n: int) -> dict[str, Any]:
        """Return the chunk of the usage, which has no choices."""
        return self._chunk([]) | {"usage": usage(ends, n)}

    def choice(self, index: int, answer: Piece, reason: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        chances = self.chances(answer) if self._speller else None
        return {"index": index, "text": answer.text, "logprobs": chances, "finish_reason": reason}

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """Return what a chunk adds to a choice."""
        return self.choice(index, piece, reason) | ({} if piece.chances else {"logprobs": None})

    def chances(self, answer: Piece) -> dict[str, Any]:
        """Return how likely tokens were: lists side by side, the token itself always among the likeliest."""
        likely = answer.chances
        tops = [(*one.top, (one.token, one.logprob)) for one in likely]
        return {
            "tokens": [self._spelled(one.token) for one in likely],
            "token_logprobs": [_finite(one.logprob) for one in likely],
            "top_logprobs": [
                {self._spelled(token): _finite(chance) for token, chance in top} for top in tops
            ],
            "text_offset": [one.start for one in likely],
        }

    def _spelled(self, token: int) -> str:
        """A token's text, or the bytes of a part of a character in OpenAI's spelling."""
        piece = self._speller.piece(token)
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        place: dict[str, Any] = {"usage": None} if self._counts else {}
        return {"object": self.chunk_kind, **self._facts, "choices": choices, **place}


class Chat(Completion):
    """The objects of one /v1/chat/completions request."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that says who speaks."""
        return [self._chunk([self._delta(index, {"role": "assistant", "content": ""}, Piece(""), None)])]

    def choice(self, index: int, answer: Piece, reason: str | None) -> dict[str, Any]:
        """Return a choice with a message."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        chances = self.chances(answer) if self._speller else None
        return {"index": index, "message": message, "logprobs": chances, "finish_reason": reason}

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """Return what a chunk adds to the message."""
        return self._delta(index, {"content": piece.text} if piece.text else {}, piece, reason)

    def chances(self, answer: Piece) -> dict[str, Any]:
        """Return how likely tokens were: an object for each, with the likeliest in its place."""
        content = [
            self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*other) for other in one.top]}
            for one in answer.chances
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, chance: float) -> dict[str, Any]:
        return {
            "token": self._spelled(token),
            "logprob": _finite(chance),
            "bytes": list(self._speller.piece(token)),
        }

    def _delta(self, index: int, delta: dict[str, Any], piece: Piece, reason: str | None) -> dict[str, Any]:
        chances = self.chances(piece) if piece.chances else None
        return {"index": index, "delta": delta, "logprobs": chances, "finish_reason": reason}


def _finite(chance: float) -> float:
    """A logarithm that JSON can hold: OpenAI writes -9999 for what cannot be."""
    return max(chance, -9999.0)
