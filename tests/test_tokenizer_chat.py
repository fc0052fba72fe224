"""Chat templates: what real ones write, and what hostile ones cannot do."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from tempo_mlx.errors import ModelError, PromptError, TempoError
from tempo_mlx.weights.chat_template import ChatTemplate
from tests.patience import patient

# The shapes in use: ChatML, Llama 3's, Gemma's, Qwen 3's backward search for the last question, SmolLM3's marks.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n{{- bos_token }}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not "
    "(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
    "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
    "    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}\n{%- endfor %}\n"
    "{{- ns.last_query_index }}{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\n\n</think>\n\n' }}\n    {%- endif %}\n{%- endif %}"
)
SMOLLM3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message | tojson }}{% endif %}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}{{ {'a': [1, 'é', none, true]} | tojson(indent=2) }}{{ '%s-%d' % ('x', 3) }}"
    "{{ 'a{}b{:>3}'.format(1, 2) }}{% macro m(x) %}[{{ x | upper }}]{% endmacro %}{{ m('y') }}"
)
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "  What is <this>? é😀\n"}],
    "conversation": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>hm</think>\nhello"},
        {"role": "user", "content": "bye"},
    ],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, QWEN3, SMOLLM3])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_templates_write_what_transformers_writes(template: str, chat: str, thinking: bool | None) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    settings: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    if thinking is not None:
        settings["enable_thinking"] = thinking
    theirs, _ = utilities.render_jinja_template(
        [CHATS[chat]], chat_template=template, add_generation_prompt=True, **settings
    )
    ours = ChatTemplate(template).render(CHATS[chat], {**settings, "add_generation_prompt": True})
    assert ours == theirs[0]


# What Jinja has and some model's template uses, in conversations and tools as transformers gives them.
WRITINGS = [
    "{% for role, own in messages | groupby('role') %}{{ role }}{{ own | length }};{% endfor %}",
    "{% for pair in messages | batch(2, 'none') %}{{ pair | map(attribute='role') | join('+') }};{% endfor %}",
    "{% for part in messages | slice(2) %}{{ part | length }};{% endfor %}",
    "{{ '%s-%03d' | format('a', 7) }}{{ messages[0].content | wordcount }}",
    "{{ messages[0] | pprint }}",
    "{{ messages[0].content | urlencode }}{{ {'a b': 'c&d'} | urlencode }}",
    "{{ 'the cat sat on the mat' | wordwrap(7) }}|{{ 'thecat' | wordwrap(3, wrapstring='/') }}",
    "{{ 'a' | center(5) }}|{{ 'a long text' | truncate(8) }}|{{ 123456 | filesizeformat }}",
    "{% set comma = joiner(', ') %}{% for m in messages %}{{ comma() }}{{ m.role }}{% endfor %}",
    "{% set turn = cycler('odd', 'even') %}{% for m in messages %}{{ turn.next() }} {% endfor %}",
    "{{ '<b>x</b> y' | striptags }}{{ '<' | forceescape }}",
    "{% for name, value in messages[0] | dictsort %}{{ name }}={{ value }}{% endfor %}",
    "{% for tool in tools %}{{ tool | tojson }}{{ tool.function.name }}{% endfor %}",
    "{% if reasoning_effort is defined %}Reasoning: {{ reasoning_effort }}{% endif %}{{ documents is none }}",
    "{% for key, value in tools[0].function.parameters.properties.items() %}{{ key }}: {{ value.type }}{% endfor %}",
    "{{ today or strftime_now('%Y') | length }}{% filter upper %}abc{% endfilter %}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "é", "parameters": {"properties": {"city": {"type": "string"}}},
        },
    }
]  # fmt: skip


@pytest.mark.parametrize("template", WRITINGS)
def test_jinja_s_own_filters_and_any_variable_are_there(template: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    chat, variables = CHATS["conversation"], {"reasoning_effort": "high", "today": "2026-11-28"}
    theirs, _ = utilities.render_jinja_template([chat], chat_template=template, tools=TOOLS, **variables)
    ours = ChatTemplate(template).render(chat, {"tools": TOOLS, **variables})
    assert ours == theirs[0]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_the_name_that_a_template_reads(name: str) -> None:
    template = ChatTemplate("{{ messages[0].thinking }} {{ messages[0].reasoning_content }}")
    assert template.render([{"role": "assistant", "content": "4", name: "2 + 2"}], {}) == "2 + 2 2 + 2"


def test_what_a_message_leaves_open_is_not_written() -> None:
    """As OpenAI's SDK gives an answer that is a call alone."""
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].get('refusal', '-') }}")
    assert template.render([{"role": "assistant", "content": None, "refusal": None}], {}) == "-"


def test_a_refusal_is_the_users_to_mend() -> None:
    with pytest.raises(PromptError, match="System role not supported"):
        ChatTemplate(GEMMA).render([{"role": "system", "content": "x"}], {"bos_token": ""})


def test_the_date_is_there() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([], {})) == 10


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ 'a' | nosuchfilter }}", "{% nosuchtag %}", "{{", "{% for x in %}"]
)
def test_a_malformed_template_is_an_error(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(template).render([], {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nothing.more }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ none + 1 }}",
        "{{ 'abc' | int(default=none) + 1 }}", "{% include 'x' %}", "{{ [] | first | upper | length + none }}",
    ],
)  # fmt: skip
def test_a_template_that_fails_is_an_error(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(template).render([{"role": "user", "content": "x"}], {})


# CVE-2024-34359 and its relatives: ways that led from a template to Python.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'].__base__.__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ ('a' ~ 'b').format.__self__.__class__ }}",
    "{{ '{0.__class__.__base__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
    "{{ [1] | sum(attribute='__class__') }}",
    "{% for x in messages %}{{ x.__class__.__bases__ }}{% endfor %}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ joiner(',').__init__.__globals__ }}",
    "{% set c = cycler(1) %}{{ c.next.__func__.__globals__ }}",
    "{% for k, v in messages | groupby('__class__') %}{{ k }}{% endfor %}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ messages[0].__init__ | pprint }}",
    "{{ range.__self__ }}",
    "{{ caller.__globals__ }}",
    "{{ loop.__class__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(template: str) -> None:
    try:
        written = ChatTemplate(template).render([{"role": "user", "content": "x"}], {})
    except TempoError as error:
        written = str(error)
    for leak in ("<class", "subclass", "<module", "function", "uid=", "<built-in", "__builtins__", "0x"):
        assert leak not in written, written


def test_messages_cannot_be_changed() -> None:
    messages = [{"role": "user", "content": "x"}]
    for change in ("messages.append(1)", "messages[0].update(a=1)", "messages[0].clear()", "messages.pop()"):
        with pytest.raises(ModelError):
            ChatTemplate("{{ " + change + " }}").render(messages, {})
    assert messages == [{"role": "user", "content": "x"}]


DOUBLE = "{% for i in range(60) %}{% set ns.s = EXPRESSION %}{% endfor %}"
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s ~ ns.s"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s + ns.s"),
    "{% set ns = namespace(s=[1, 2]) %}" + DOUBLE.replace("EXPRESSION", "ns.s + ns.s"),
    "{% set ns = namespace(s=[1]) %}" + DOUBLE.replace("EXPRESSION", "[ns.s, ns.s]") + "{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}" + DOUBLE.replace("EXPRESSION", "[ns.s, ns.s]") + "{{ ns.s | tojson }}",
    "{% set ns = namespace(s=[1]) %}"
    + DOUBLE.replace("EXPRESSION", "[ns.s, ns.s]")
    + "{{ ns.s | string | length }}",
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s | replace('x', 'xx')"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s.replace('x', 'xx')"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "[ns.s, ns.s] | join(ns.s)"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s.join([ns.s, ns.s])"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "'{}{}'.format(ns.s, ns.s)"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "'%s%s' % (ns.s, ns.s)"),
    "{% set s %}xx{% endset %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60 + "{{ s }}",
    "{{ 'a' * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ messages * 10**8 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a' | center(width=1000000000) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list | length }}",
    "{{ '%1000000000d' | format(1) }}",
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "ns.s | wordwrap(1, wrapstring=ns.s)"),
    "{% set ns = namespace(s='xx') %}" + DOUBLE.replace("EXPRESSION", "'%s%s' | format(ns.s, ns.s)"),
    "{% set ns = namespace(s=[1]) %}" + DOUBLE.replace("EXPRESSION", "[ns.s, ns.s]") + "{{ ns.s | pprint }}",
    "{{ ('a\n' * 1000) | indent(1000000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ range(10**10) | list | length }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{{ lipsum(n=100000) }}",
    "(" * 100_000 + "{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}",
    "{{" + "[" * 5_000 + "]" * 5_000 + "}}",
]


@pytest.mark.parametrize("index", range(len(BOMBS)))
def test_a_bomb_is_defused(index: int) -> None:
    """Each ends in an error, within seconds and without taking memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(TempoError):
            ChatTemplate(BOMBS[index]).render([{"role": "user", "content": "x"}], {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < patient(20)
    assert peak < 400 << 20


def test_a_long_conversation_is_within_the_budget() -> None:
    chat = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    for template in (CHATML, LLAMA3, GEMMA, QWEN3):
        assert len(ChatTemplate(template).render(chat, {"bos_token": ""})) > 990_000
