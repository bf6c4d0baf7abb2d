"""A chat as the model sees it: messages, and the tokens that stand for them so far."""

from __future__ import annotations

from typing import Any

from cmr.chat import ChatTemplate, with_system, writes_bos
from cmr.tokenizer import Tokenizer


class Conversation:
    """Messages in, prompt tokens out; what was fed or written before keeps its tokens, and so its KV.

    `system` is the first message; `variables` go to the template with every turn.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        system: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.system, self.variables = system, variables or {}
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, Any]] = []
        self._text, self._tokens = "", list[int]()
        if self.system:
            self.messages.append({"role": "system", "content": self.system})

    def ask(self, message: str) -> list[int]:
        """Add the user's message; return the tokens of the conversation up to where the answer begins."""
        self.messages.append({"role": "user", "content": message})
        try:
            text = self.template.render(with_system(self.messages, self.template), **self.variables)
        except BaseException:
            self.messages.pop()
            raise
        self._tokens, self._text = self._encode(text), text
        return list(self._tokens)

    def answered(self, text: str, tokens: list[int]) -> None:
        """Add what the model wrote: the shown text and its tokens, without the one that ended it."""
        self.messages.append({"role": "assistant", "content": text})
        stream = self.tokenizer.stream(special=True)
        self._text += "".join(map(stream.push, tokens)) + stream.flush()
        self._tokens += tokens

    def take_back(self) -> None:
        """Remove the user's last message, which was not answered."""
        self.messages.pop()
        self._text, self._tokens = "", []

    def _encode(self, text: str) -> list[int]:
        """Encode a prompt so that it begins with the tokens so far, wherever its text begins with theirs."""
        tokens = self.tokenizer.encode(text, special=True, bos=not writes_bos(text, self.tokenizer))
        if tokens[: len(self._tokens)] == self._tokens or not text.startswith(self._text):
            return tokens
        # A model may spell its answer in other tokens than the tokenizer would.
        return self._tokens + self.tokenizer.encode(text[len(self._text) :], special=True)
