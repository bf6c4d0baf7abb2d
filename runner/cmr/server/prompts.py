"""What a body gives to continue: texts, token ids or messages, as the token ids of each prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

from cmr.chat import ChatTemplate, with_system, writes_bos
from cmr.errors import RequestError
from cmr.options import hint

ROLES = ("system", "user", "assistant")
MESSAGE = ("role", "content", "name", "reasoning_content")
_MEDIA = ("image_url", "input_audio", "file", "image", "video_url")


class Prompt(NamedTuple):
    """The ids to continue, and the last message where they are a conversation."""

    tokens: list[int]
    message: str | None = None


def completion_prompts(prompt: Any, tokenizer: Any) -> list[Prompt]:
    """Read a text, token ids, or a list of either; special tokens in a text count as such."""
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    wrong = RequestError(
        "prompt must be a text, a list of token ids, or a list of such prompts, and not empty"
    )
    if not isinstance(prompt, list) or not prompt:
        raise wrong
    found = []
    for one in prompt:
        if isinstance(one, str):
            found.append(Prompt(tokenizer.encode(one, special=True, bos=True)))
        elif _is_ids(one):
            found.append(Prompt(one))
        else:
            raise wrong
    return found


def chat_prompt(
    messages: Any, variables: dict[str, Any], template: ChatTemplate | None, tokenizer: Any
) -> Prompt:
    """Write messages with the template, up to where the answer begins."""
    if template is None:
        raise RequestError(
            "the model's file has no chat template; start the server with --chat-template, or use /v1/completions"
        )
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of messages, and not empty")
    said = [_message(message) for message in messages]
    text = template.render(with_system(said, template), **variables)
    tokens = tokenizer.encode(text, special=True, bos=not writes_bos(text, tokenizer))
    return Prompt(tokens, said[-1]["content"])


def _is_ids(prompt: Any) -> bool:
    """Whether this is a prompt of token ids; true and false are none."""
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _message(message: Any) -> dict[str, Any]:
    """Check one message; its content becomes one text."""
    if not isinstance(message, dict):
        raise RequestError(f'a message is {message!r:.80}; it must be {{"role": ..., "content": ...}}')
    given = {word: value for word, value in message.items() if value is not None and value != []}
    role = given.get("role")
    if role in ("tool", "function") or {"tool_calls", "function_call"} & set(given):
        raise RequestError("messages of tools cannot be honoured: this server calls no tools")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise RequestError(f"a message has the role {role!r:.80}; there are: {', '.join(ROLES)}")
    for word in given:
        if word not in MESSAGE:
            raise RequestError(f"a message has no word {word!r}{hint(word, MESSAGE)}")
    return given | {"role": role, "content": _content(given.get("content", ""))}


def _content(content: Any) -> str:
    """Return a text, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"a message's content is {content!r:.80}; it must be a text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _MEDIA:
            raise RequestError(f"a part of the type {kind} cannot be honoured: this server reads text only")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'a part of a message is {part!r:.80}; it must be {{"type": "text", "text": ...}}'
            )
        texts.append(part["text"])
    return "".join(texts)
