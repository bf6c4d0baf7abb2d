"""Render conversations with the Jinja template that a model file carries."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

from .errors import RequestError

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('gemma has no system role') }}{% endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""

PHI3 = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif -%}
"""

NAMED = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "phi3": PHI3}


class ChatTemplate:
    """A compiled chat template with the texts of its first and last tokens.

    `source` is Jinja text, run in Jinja2's immutable sandbox; RequestError when it cannot be parsed.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        import jinja2

        self.source, self.bos, self.eos = source, bos, eos
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template cannot be read: {error}") from error

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """Write the messages ({"role", "content", ...} each) as one prompt; RequestError where it refuses."""
        variables = {"bos_token": self.bos, "eos_token": self.eos, **kwargs}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except RecursionError:
            raise RequestError("the chat template recurses without end") from None
        except Exception as error:  # a template may raise anything: Jinja runs its expressions as Python
            raise RequestError(f"the chat template refused the conversation: {error}") from error

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether a system message reaches the prompt; some templates refuse it, some drop it."""
        mark = "system-message-probe"
        try:
            text = self.render([{"role": "system", "content": mark}, {"role": "user", "content": "hello"}])
        except RequestError:
            return False
        return mark in text


def with_system(messages: list[dict], template: ChatTemplate) -> list[dict]:
    """Move a leading system message into the first user message where the template has no place for it."""
    if len(messages) < 2 or messages[0]["role"] != "system" or template.takes_system:
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def writes_bos(text: str, tokenizer: Any) -> bool:
    """Whether a conversation written as text begins with BOS itself, so that encoding must not add another."""
    bos = tokenizer.bos
    return bos is not None and text.startswith(tokenizer.piece(bos).decode("utf-8", "replace"))


def chat_template(source: str, metadata: dict[str, Any], bos: str = "", eos: str = "") -> ChatTemplate:
    """Find a template by Jinja text, by a name built in here, or by a name in the model file."""
    own = metadata.get(f"tokenizer.chat_template.{source}")
    if own is not None:
        return ChatTemplate(own, bos, eos)
    if source in NAMED:
        return ChatTemplate(NAMED[source], bos, eos)
    if "{" in source:
        return ChatTemplate(source, bos, eos)
    raise RequestError(
        f"there is no chat template called {source!r}; there are: {', '.join(NAMED)}; "
        "Jinja text and --chat-template-file work too"
    )


@functools.cache
def _environment() -> Any:
    """Build the sandbox that templates of model files expect, as transformers sets it up."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _generation_tag() -> type:
    """Make the extension for {% generation %}, which marks text for training: its body stays."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without HTML escapes, which Jinja's own filter would put in."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise RequestError(message)
