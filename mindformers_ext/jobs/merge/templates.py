# SPDX-License-Identifier: Apache-2.0
"""Chat templates that a merge's ``chat_template`` can name, or find among the models: Jinja texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.data.chat_template import DEFAULT, MORE_FOLDER, TEMPLATE_FILE, chat_template_of
from mindformers_ext.data.tokenizer_settings import SETTINGS, read_table
from mindformers_ext.jobs.checkpoint.companions import belongs

_EACH, _END = "{% for message in messages %}", "{% endfor %}"
_ASK, _ENDIF = "{% if add_generation_prompt %}", "{% endif %}"
_ORDER = "{{ raise_exception('user and assistant must take turns, behind a system message at most') }}"

# Each renders what mergekit's template of this name renders (mergekit 0.1.5, in transformers' environment), blanks and
# line breaks included; each is a text of our own.
TEMPLATES = {
    "chatml": (
        _EACH
        + r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        + _END
        + _ASK
        + r"{{ '<|im_start|>assistant\n' }}"
        + _ENDIF
    ),
    "llama3": (
        _EACH
        + "{% if loop.first %}{{ bos_token }}{% endif %}"
        + r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        + r"{{ message['content'] | trim }}{{ '<|eot_id|>\n' }}"
        + _END
        + _ASK
        + r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        + _ENDIF
    ),
    "mistral": (
        "{% set told = messages[0]['role'] == 'system' %}{{ bos_token }}"
        "{% for message in (messages[1:] if told else messages) %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        + _ORDER
        + _ENDIF
        + "{% if message['role'] == 'user' %}"
        r"{{ ' [INST] ' + (messages[0]['content'] + '\n\n' if told and loop.first else '') }}"
        "{{ message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}" + _ORDER + _ENDIF + _END
    ),
    "alpaca": (
        "{% set told = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}"
        r"{{ (told[-1] | trim if told else '') + '\n\n' }}"
        "{% set heads = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}"
        + _EACH
        + "{% if message['role'] in heads %}"
        r"{{ '### ' + heads[message['role']] + ':\n' + message['content'] | trim }}"
        r"{% if not loop.last %}{{ '\n\n' }}{% endif %}"
        "{% endif %}" + _END + "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
        r"{{ '### Response:\n' }}" + _ENDIF
    ),
    "exaone": (
        _EACH
        + "{% if loop.first and message['role'] != 'system' %}"
        + r"{{ '        [|system|][|endofturn|]\n\n' }}"
        + _ENDIF
        + r"{{ '    [|' + message['role'] + '|]' + message['content'] + '\n        ' }}"
        + r"{{ '\n\n' if message['role'] == 'user' else '[|endofturn|]\n\n' }}"
        + _END
        + _ASK
        + r"{{ '    [|assistant|]\n' }}"
        + _ENDIF
    ),
}


def chosen_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The Jinja text that ``chat_template`` asks for; "auto" is the most common one of the inputs."""
    if wanted != "auto":
        return TEMPLATES.get(wanted, wanted)
    found = Counter(text for folder in folders if (text := _own(folder)))
    return found.most_common(1)[0][0] if found else None


def _own(folder: Path) -> str | None:
    """The folder's own template: what a link elsewhere leads to is not written into the merge."""
    files = [folder / name for name in (TEMPLATE_FILE, SETTINGS)]
    if not all(belongs(file, folder) for file in files if file.exists()):
        return None
    return chat_template_of(folder, read_table(folder / SETTINGS).get("chat_template"))


def write_template(folder: Path, template: str) -> None:
    """Put the chat template where transformers 4 and 5 look for it, and nothing before it."""
    (folder / MORE_FOLDER / f"{DEFAULT}.jinja").unlink(missing_ok=True)  # it would go first
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    config = folder / SETTINGS
    if config.is_file():
        settings = {**read_table(config), "chat_template": template}
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
