"""From a request to a sequence: its options, tokens and sampler, and whether the model is needed at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from operator import index
from typing import Any

from cmr.answer import Answer
from cmr.discovery import declared
from cmr.errors import ModelError, PluginError, RequestError
from cmr.options import hint
from cmr.sequence import Request, Sequence

ALIASES = {
    "temperature": "temp",
    "predict": "max_tokens",
    "n_predict": "max_tokens",
    "reverse_prompt": "stop",
}
REQUEST_WORDS = frozenset(field.name for field in fields(Request)) - {"prompt", "tokens"}


def make_request(prompt: str | list[int], options: dict[str, Any]) -> Request:
    """Make a Request from options in the words of Request, SamplerSettings and the command line."""
    check_words(options)
    words = {ALIASES.get(key, key): value for key, value in options.items()}
    sampling_words = _sampling_words()
    chosen = {key: words.pop(key) for key in list(words) if key in sampling_words}
    settings = words.pop("sampling", None) or _plain_settings()
    return Request(prompt, sampling=replace(settings, **chosen), **words)


def check_words(options: Iterable[str]) -> None:
    """Raise RequestError for an option that no request has."""
    refuse_unknown(options, {*REQUEST_WORDS, *_sampling_words(), *ALIASES}, "a request has no option")


def refuse_unknown(words: Iterable[str], known: Iterable[str], complaint: str) -> None:
    """Raise RequestError for a word that is not known, with the nearest one that is."""
    for word in words:
        if word not in known:
            raise RequestError(f"{complaint} {word!r}{hint(word, known)}")


def admit(session: Any, request: Request, text: bool = False) -> Sequence:
    """Make a request a sequence of a session, checked, with its sampler, but not running yet.

    With `text`, or stop strings, its answer is decoded as it comes. Raises RequestError for a request that
    cannot be served; a plugin's answer ends the sequence here.
    """
    from cmr.sampling import Chances

    earlier, model = request.after, session.model
    if earlier is not None and (earlier.session is not session or earlier.stop is None):
        raise RequestError("a request goes on after a sequence that has ended in the same session")
    _check_told(session.plan.plugins, request.plugins)
    request.tokens = _encoded(model, request)
    for hook in session.plan.prepare_request:
        with session.plan.blame:
            hook(request)
    seq = Sequence(request, _prompt(request.tokens, model.n_vocab, session.longest), session=session)
    room = session.context - seq.n_prompt
    seq.limit = seq.n_prompt + (room if request.max_tokens is None else min(room, request.max_tokens))
    seq.sampler = _sampler(session, seq)
    if text or request.stop:
        begins = seq.tokens == [model.tokenizer.bos]  # nothing was written before the answer
        seq.text = Answer(model.tokenizer.stream(start=begins), tuple(request.stop))
    session.loop.figures.requests += 1
    if request.logprobs is not None:
        seq.chances = Chances(request.logprobs)
    else:
        _answer(session, seq)
    return seq


def _check_told(plugins: dict[str, Any], told: dict[str, dict[str, Any]]) -> None:
    """Refuse what a request tells a plugin that is not there, or that would not listen."""
    refuse_unknown(told, plugins, "this session has no plugin")
    for name, options in told.items():
        refuse_unknown(options, declared(plugins[name], "told"), f"{name} takes from a request no option")


def _encoded(model: Any, request: Request) -> list[int]:
    if isinstance(request.prompt, str):
        return model.tokenizer.encode(request.prompt, special=request.special, bos=True)
    return _ids(request.prompt, model.n_vocab)


def _prompt(tokens: Any, n_vocab: int, context: int) -> list[int]:
    ids = _ids(tokens, n_vocab)
    if not ids:
        raise RequestError(
            "the prompt is empty and the model has no token to begin a text with; write a word"
        )
    if len(ids) >= context:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and the context holds {context}, answer included; "
            "shorten it or raise the context"
        )
    return ids


def _ids(tokens: Any, n_vocab: int) -> list[int]:
    """Token ids as a list of ints; RequestError where they are none, or not of the vocabulary."""
    try:
        ids = [index(token) for token in tokens]
    except TypeError:
        raise RequestError(f"a prompt is a text or a list of token ids, not {tokens!r:.200}") from None
    for token in ids:
        if not 0 <= token < n_vocab:
            raise RequestError(f"token {token} is not in the vocabulary, which has ids 0 to {n_vocab - 1}")
    return ids


def _sampler(session: Any, seq: Sequence) -> Any:
    """Make the sequence's sampler, and settle which tokens end it."""
    from cmr.sampling import Sampler

    request, settings, tokenizer = (
        seq.request,
        seq.request.sampling or _plain_settings(),
        _tokenizer(session.model),
    )
    stop_ids = request.stop_ids
    if stop_ids is None:
        stop_ids = tokenizer.stop_ids if tokenizer else frozenset()
    if request.ignore_eos:
        settings = replace(settings, logit_bias={**settings.logit_bias, **dict.fromkeys(stop_ids, -math.inf)})
    else:
        seq.stop_ids = frozenset(stop_ids)
    return Sampler(settings, session.model.n_vocab, tokenizer)


def _answer(session: Any, seq: Sequence) -> None:
    """Let a plugin answer in the model's place."""
    plan = session.plan
    for name, hook in zip(plan.names["answer_request"], plan.answer_request):
        with plan.blame:
            answer = hook(seq.request, seq)
        if answer is None:
            continue
        try:
            tokens = _ids(answer, session.model.n_vocab)
        except RequestError:
            raise PluginError(
                f"{name} returned {answer!r:.200} from answer_request; it returns token ids or None"
            ) from None
        if seq.text is not None:
            any(token not in seq.stop_ids and seq.text.push(token) for token in tokens)
        seq.tokens += tokens
        seq.out.extend(tokens)
        seq.stop = "answered"
        session.loop.finish(seq)
        return


def _tokenizer(model: Any) -> Any:
    """The model's tokenizer, or None where its file has none."""
    try:
        return model.tokenizer
    except ModelError:
        return None


def _plain_settings() -> Any:
    from cmr.sampling import SamplerSettings

    return SamplerSettings()


def _sampling_words() -> set[str]:
    return {field.name for field in fields(_plain_settings())}
