"""Chat templates: the families' Jinja, the helpers they call, the sandbox, and refusals in one sentence."""

import datetime

import pytest

from cmr.chat import NAMED, ChatTemplate, chat_template, with_system
from cmr.errors import RequestError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]

MISTRAL = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate, found ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}
        {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- set text = message.content if message.content is string else '' %}
    {%- if '</think>' in text and loop.index0 < ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + text }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def test_chatml():
    assert ChatTemplate(NAMED["chatml"]).render(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama3_starts_with_bos_and_trims():
    text = ChatTemplate(NAMED["llama3"], "<|begin_of_text|>", "<|eot_id|>").render(TALK)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    )
    assert "\n\nHi<|eot_id|>" in text
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_gemma_calls_the_assistant_model():
    assert ChatTemplate(NAMED["gemma"], "<bos>").render(TALK[1:]) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_phi3_ends_with_eos_when_no_answer_is_wanted():
    template = ChatTemplate(NAMED["phi3"], eos="<|endoftext|>")
    assert template.render(TALK[1:2]) == "<|user|>\nHi <|end|>\n<|assistant|>\n"
    assert template.render(TALK[1:3], add_generation_prompt=False).endswith("Hello.<|end|>\n<|endoftext|>")


def test_mistral_puts_the_system_text_into_the_last_user_turn_and_tolerates_the_generation_tag():
    text = ChatTemplate(MISTRAL, "<s>", "</s>").render(TALK)
    assert text == "<s>[INST] Hi  [/INST] Hello.</s>[INST] Be brief.\n\nBye [/INST]"


def test_mistral_refuses_two_user_turns_in_a_row():
    with pytest.raises(RequestError, match="Roles must alternate, found user"):
        ChatTemplate(MISTRAL, "<s>", "</s>").render([TALK[1], TALK[1]])


def test_qwen3_thinking_can_be_switched_off():
    template = ChatTemplate(QWEN3)
    assert template.render(TALK[:2]).endswith("<|im_start|>assistant\n")
    assert template.render(TALK[:2], enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_qwen3_drops_old_thoughts():
    talk = [TALK[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}, TALK[3]]
    assert "<|im_start|>assistant\nHello.<|im_end|>" in ChatTemplate(QWEN3).render(talk)


def test_qwen3_tools_are_json_without_html_escapes():
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & 'ü'"}}]
    text = ChatTemplate(QWEN3).render(TALK[:2], tools=tools)
    assert '{"type": "function", "function": {"name": "f", "description": "a < b & \'ü\'"}}' in text
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{")


def test_qwen3_tool_calls_without_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"x": 1}}}]}
    assert '<tool_call>{"x": 1}</tool_call>' in ChatTemplate(QWEN3).render([TALK[1], call])


def test_tojson_takes_the_arguments_of_pythons_json():
    compact = "tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':'))"
    text = ChatTemplate("{{ x | tojson(indent=2) }}|{{ x | " + compact + " }}").render(
        [], x={"b": "é", "a": 1}
    )
    assert text == '{\n  "b": "é",\n  "a": 1\n}|{"a":1,"b":"\\u00e9"}'


def test_strftime_now_gives_todays_date():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) in {
        str(datetime.datetime.now().year),
        str(datetime.datetime.now().year - 1),
    }


def test_blocks_leave_no_blank_lines():
    assert ChatTemplate("  {% if true %}\nx\n  {% endif %}\ny").render([]) == "x\ny"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}{{ messages.clear() }}",
        "{% set x = raise_exception('no') %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'other' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_may_not_do_is_one_error(source):
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_template_that_cannot_be_parsed_is_one_error():
    with pytest.raises(RequestError, match="cannot be read"):
        ChatTemplate("{% for x in %}")


def test_a_system_message_moves_where_the_template_has_no_place_for_it():
    gemma = ChatTemplate(NAMED["gemma"], "<bos>")
    dropping = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    for template in (gemma, dropping):
        assert "Be brief.\n\nHi" in template.render(with_system(TALK, template))
    chatml = ChatTemplate(NAMED["chatml"])
    assert with_system(TALK, chatml) is TALK


def test_templates_are_found_by_name_text_and_file_variant():
    metadata = {"tokenizer.chat_template.tool_use": "T{{ messages | length }}"}
    assert chat_template("tool_use", metadata).render(TALK) == "T4"
    assert chat_template("chatml", metadata).source == NAMED["chatml"]
    assert chat_template("{{ bos_token }}!", metadata, "<s>").render(TALK) == "<s>!"
    with pytest.raises(RequestError, match="no chat template called 'chatlm'.*chatml"):
        chat_template("chatlm", metadata)
