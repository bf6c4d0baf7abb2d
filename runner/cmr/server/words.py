"""The words of a request's body: which there are, what they become, and which cannot be honoured and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from cmr.errors import RequestError
from cmr.options import hint
from cmr.sampling import SamplerSettings

HARMLESS = {
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "cache_prompt",
}  # fmt: skip
"""Words that change nothing in an answer here; they are taken and not looked at."""

RENAMED = {
    "temperature": "temp",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "mirostat_tau": "mirostat_ent",
    "mirostat_eta": "mirostat_lr",
}
SAMPLING = {setting.name for setting in fields(SamplerSettings)} | set(RENAMED)
OWN = {"max_tokens", "stop", "ignore_eos", "priority", "n", "model", "stream", "stream_options"}
GRAMMAR = {"grammar", "json_schema", "response_format"}
COMPLETION = SAMPLING | OWN | GRAMMAR | HARMLESS | {"prompt", "logprobs"}
CHAT = SAMPLING | OWN | GRAMMAR | HARMLESS | {"messages", "chat_template_kwargs", "logprobs", "top_logprobs"}
MOST_LIKELY = 20  # tokens that are shown beside each, at most, as OpenAI has it for chats

_NO_TOOLS = "this server calls no tools"
_TEXT_ONLY = "this server reads and writes text only"
# What OpenAI's API has and this server has not: the sentence, and the values that ask for nothing.
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": (_NO_TOOLS, (True, False)),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "web_search_options": (_NO_TOOLS, ()),
    "audio": (_TEXT_ONLY, ()),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "echo": ("the prompt is not repeated in the answer", (False,)),
    "suffix": ("a text is continued, not filled in", ("",)),
    "best_of": ("answers are not ranked; n gives several", (1,)),
    "prediction": ("predicted answers are not used; the plugin spec-lookup drafts from the prompt", ()),
    "reasoning_effort": (
        "effort is not a setting here; chat_template_kwargs reaches the model's template",
        (),
    ),
    "verbosity": ("verbosity is not a setting here; ask for it in a message", ()),
    "service_tier": ("all requests are served alike; priority orders them", ("auto", "default")),
}


@dataclass
class Wanted:
    """What a body asks for: its own words, and `options` for Session.request beside the seed of each choice."""

    body: dict[str, Any]
    model: str | None
    n: int
    stream: bool
    usage: bool
    options: dict[str, Any] = field(default_factory=dict)

    def choice(self, index: int) -> dict[str, Any]:
        """Return the options of the choice with this index: each has a seed of its own, counted from the one given."""
        seed = self.options.get("seed")
        return self.options | ({} if seed in (None, -1) else {"seed": seed + index})


def read(body: Any, known: Iterable[str]) -> Wanted:
    """Read a body whose words must be `known`; raises RequestError for what cannot be honoured."""
    words = _given(body, known)
    stream = _of(bool, words.pop("stream", False), "stream", "true or false")
    wanted = Wanted(
        body=words,
        model=_of(str, words.pop("model", None), "model", "a name"),
        n=_count(words.pop("n", 1)),
        stream=stream,
        usage=_usage(words.pop("stream_options", None), stream),
    )
    wanted.options = {word: words.pop(word) for word in list(words) if word in SAMPLING | OWN}
    chances = _chances(words, "messages" in known)
    if chances is not None:
        wanted.options["logprobs"] = chances
    _rename(wanted.options)
    _check(wanted.options)
    told = _grammar({word: words.pop(word) for word in list(words) if word in GRAMMAR})
    if told:
        wanted.options["plugins"] = {"grammar": told}
    return wanted


def _given(body: Any, known: Iterable[str]) -> dict[str, Any]:
    """Return the words that have a value and a meaning; null is as good as absent."""
    if not isinstance(body, dict):
        raise RequestError(f"the body is {body!r:.80}; it must be a JSON object")
    known, words = set(known), {}
    for word, value in body.items():
        if value is None or word in HARMLESS:
            continue
        if word in REFUSED and word not in known:
            why, neutral = REFUSED[word]
            if not any(type(value) is type(no) and value == no for no in neutral):
                raise RequestError(f"{word} cannot be honoured: {why}; leave it out")
        elif word not in known:
            raise RequestError(f"a request has no word {word!r}{_hint(word, known)}")
        else:
            words[word] = value
    return words


def _hint(word: str, known: Iterable[str]) -> str:
    said = hint(word, known)
    return said if "did you mean" in said else "; the words are OpenAI's, and the names of sampling settings"


def _of(kind: type, value: Any, word: str, noun: str) -> Any:
    if value is None or isinstance(value, kind):
        return value
    raise RequestError(f"{word} is {value!r:.80}; it must be {noun}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(n: Any) -> int:
    if not _whole(n) or n < 1:
        raise RequestError(f"n is {n!r:.80}; it must be a whole number of at least 1")
    return n


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options needs stream: true")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options is {options!r:.80}; it must be an object")
    for word in options:
        if word not in ("include_usage", "include_obfuscation"):
            raise RequestError(f"stream_options has no word {word!r}{hint(word, ['include_usage'])}")
    if options.get("include_obfuscation"):
        raise RequestError("include_obfuscation cannot be honoured: nothing is padded; leave it out")
    return bool(_of(bool, options.get("include_usage"), "include_usage", "true or false"))


def _chances(words: dict[str, Any], chat: bool) -> int | None:
    """How many of the likeliest tokens are wanted beside each: a number, beside true or false in a chat."""
    wanted, most = words.pop("logprobs", False), words.pop("top_logprobs", None)
    if chat:
        if not _of(bool, wanted, "logprobs", "true or false"):
            if most:
                raise RequestError("top_logprobs needs logprobs: true")
            return None
        wanted = most or 0
    if wanted is False:
        return None
    if not _whole(wanted) or not 0 <= wanted <= MOST_LIKELY:
        word = "top_logprobs" if chat else "logprobs"
        raise RequestError(f"{word} is {wanted!r:.80}; it must be a whole number of 0 to {MOST_LIKELY}")
    return wanted


def _rename(options: dict[str, Any]) -> None:
    """Give words the names of CMR's options; two names of one option must agree."""
    for word, name in RENAMED.items():
        if word in options:
            value = options.pop(word)
            if options.setdefault(name, value) != value:
                raise RequestError(f"{word} is {value!r} and {name} is {options[name]!r}; give one of them")


def _check(options: dict[str, Any]) -> None:
    """Check what Request takes on trust; SamplerSettings checks the rest."""
    for word in ("max_tokens", "priority", "seed"):
        if word in options and not _whole(options[word]):
            raise RequestError(f"{word} is {options[word]!r:.80}; it must be a whole number")
    stop = options.get("stop", [])
    if not isinstance(stop, str) and not (
        isinstance(stop, list) and all(isinstance(text, str) for text in stop)
    ):
        raise RequestError(f"stop is {stop!r:.80}; it must be a text or a list of texts")
    samplers = options.get("samplers", "")
    if not isinstance(samplers, str) and not isinstance(samplers, list):
        raise RequestError(f"samplers is {samplers!r:.80}; it must be a list of names")
    breakers = options.get("dry_sequence_breakers", [])
    if not isinstance(breakers, list):
        raise RequestError(f"dry_sequence_breakers is {breakers!r:.80}; it must be a list of texts")
    _of(bool, options.get("ignore_eos"), "ignore_eos", "true or false")
    if "logit_bias" in options:
        options["logit_bias"] = _bias(options["logit_bias"])


def _bias(value: Any) -> dict[int, float]:
    """Read OpenAI's {"id": bias} or llama-server's [[id, bias], ...], where false forbids a token."""
    pairs = value.items() if isinstance(value, dict) else value
    wrong = RequestError(
        f'logit_bias is {value!r:.80}; it must be {{"token id": bias}} or [[token id, bias], ...]'
    )
    biases = {}
    try:
        for token, bias in pairs:
            if isinstance(token, bool | float) or bias is True:
                raise wrong
            biases[int(token)] = -math.inf if bias is False else bias
    except (TypeError, ValueError):
        raise wrong from None
    return biases


def _grammar(words: dict[str, Any]) -> dict[str, Any]:
    """Return what the plugin `grammar` is told, from whichever of the three words is there."""
    told = []
    if "grammar" in words:
        told.append({"gbnf": _of(str, words["grammar"], "grammar", "a grammar's text")})
    if "json_schema" in words:
        told.append({"json_schema": _of(dict, words["json_schema"], "json_schema", "a JSON schema")})
    format = _of(dict, words.get("response_format", {}), "response_format", "an object")
    if format and format.get("type") != "text":
        told.append({"json_schema": _schema(format)})
    if len(told) > 1:
        raise RequestError(f"{' and '.join(words)} both say what an answer may be; give one of them")
    return told[0] if told else {}


def _schema(format: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a response_format: any object for json_object without one."""
    kind = format.get("type")
    if kind == "json_object":
        schema = format.get("schema", {"type": "object"})
    elif kind == "json_schema":
        inner = format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else format.get("schema")
    else:
        raise RequestError(
            f"response_format has no type {kind!r:.80}; there are: text, json_object, json_schema"
        )
    if not isinstance(schema, dict):
        raise RequestError('response_format wants {"type": "json_schema", "json_schema": {"schema": {...}}}')
    return schema
