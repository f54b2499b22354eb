# SPDX-License-Identifier: Apache-2.0
"""Chat prompts are the strings of transformers' ``apply_chat_template``: shapes of real templates, kinds of talk."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data import chat_template
from mindformers_ext.data.chat_template import ChatTemplate

SHAPES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + tools|tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "phi3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "generation": """{% set note = 'outside' %}
{% for message in messages %}
  {% if message.role == 'assistant' %}
    {% generation %}
  {% set note = 'inside' %}
{{ message.content + eos_token }}
    {% endgeneration %}
  {% else %}
[{{ message.role }}] {{ message.content }} {{ note }}
  {% endif %}
{% endfor %}""",
    "break_continue": "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{{ message.content }}|{% endfor %}",
    "macro": """{% macro turn(role, text, end='<end>') %}
<{{ role }}>{{ text | trim | upper }}{{ end }}
{% endmacro %}
{%- set ns = namespace(count=0, last=none) -%}
{% for message in messages %}{% set ns.count = ns.count + 1 %}
{%- set ns.last = message %}{{ turn(message.role, message.content) }}{% endfor %}
{{ ns.count }} {{ ns.last.role }} {{ ns.last | items | list | length }}""",
    "tojson": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}"
    "{{ messages[-1].content | tojson(ensure_ascii=true) }}{{ pad_token is defined }}"
    "{{ additional_special_tokens }}{{ image }}",
    "nothing_given": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ thinking is defined }}"
    "{% if not tools and not documents %}{{ messages[-1]['content'].split('\\n')[-1][::-1] }}{% endif %}"
    "{{ unk_token }}",
}
TALKS = [
    [{"role": "user", "content": "Hi?"}],
    [{"role": "system", "content": "  Be <brief> & 'kind'.\n"}, {"role": "user", "content": "a\n\nb é漢\u2028"}],
    [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": "{{ 3 }}"},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "s"},
    ],
    [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],  # several templates refuse it
]
WORDS = {
    "tokenizer_class": "LlamaTokenizer",
    "additional_special_tokens": ["<|im_start|>"],
    "extra_special_tokens": {"image": "<i>"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.parity.test_tokenizer_folders import train_small

    return train_small(tmp_path_factory.mktemp("chat"))


class Fixed(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9, 4, 5)


def same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every talk with and without a prompt for the answer; how many the template takes."""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)
    monkeypatch.setattr(chat_template, "datetime", Fixed)
    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), ChatTemplate(folder)
    taken = 0
    for talk in TALKS:
        for ask in (True, False):
            try:
                expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
            except Exception as error:  # noqa: BLE001
                with pytest.raises(UserError) as ours_too:
                    ours.render(talk, ask)
                assert str(error) in str(ours_too.value)
            else:
                assert ours.render(talk, ask) == expected
                taken += 1
    return taken


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(name, model, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**WORDS, "chat_template": SHAPES[name]}))
    assert same(tmp_path, monkeypatch) >= 5


@pytest.mark.parametrize("config", [None, "in config", [{"name": "default", "template": "of {{ bos_token }}"}]])
@pytest.mark.parametrize("file", [None, "in a file\r\nwith {{ eos_token }}\n"])
@pytest.mark.parametrize("more", [(), ("tool_use",), ("tool_use", "default")])
def test_a_place(config, file, more, model, tmp_path, monkeypatch):
    """Which template counts where several are: also that a folder of named ones without a default is refused."""
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(WORDS | ({"chat_template": config} if config else {})))
    if file:
        (tmp_path / "chat_template.jinja").write_bytes(file.encode())
    for name in more:
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / f"additional_chat_templates/{name}.jinja").write_text(f"additional {name}")
    if not file and "default" not in more and (more or not config):
        with pytest.raises(UserError, match="none is the text of 'default'" if more else "has no chat template"):
            ChatTemplate(tmp_path)
        return
    assert same(tmp_path, monkeypatch) == 2 * len(TALKS)


def test_what_a_template_may_not_do(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    for text, message in {
        "{{ ''.__class__.__mro__ }}": "refuses these messages",
        "{{ messages.append(1) }}": "refuses these messages",
        "{% for i in range(10 ** 9) %}{% endfor %}": "refuses these messages",
        "{{ 1 / 0 }}": "refuses these messages",
        "{{ messages[0].content + 1 }}": "refuses these messages",
        "{% include 'x' %}": "refuses these messages",
        "{% for": "is no Jinja template",
    }.items():
        config.write_text(json.dumps({"chat_template": text}))
        with pytest.raises(UserError, match=message):
            ChatTemplate(tmp_path).render(TALKS[0])
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    config.write_text("{}")
    assert ChatTemplate(tmp_path).render(TALKS[0]) == "of a processor"
