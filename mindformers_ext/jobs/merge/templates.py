# SPDX-License-Identifier: Apache-2.0
"""Chat templates that a merge's ``chat_template`` can name, or find among the models: Jinja texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.links import lies_inside

SETTINGS, JINJA = "tokenizer_config.json", "chat_template.jinja"
_EACH, _END = "{% for message in messages %}", "{% endfor %}"
_ASK = "{% if add_generation_prompt %}"
_REFUSE = "{{ raise_exception('this template knows the roles user and assistant only') }}"


def _turns(user: str, assistant: str, system: str, ask: str) -> str:
    """A template from what each role's message becomes."""
    body = (
        f"{_EACH}{{% if message['role'] == 'user' %}}{user}{{% elif message['role'] == 'assistant' %}}{assistant}"
        f"{{% elif message['role'] == 'system' %}}{system}{{% else %}}{_REFUSE}{{% endif %}}{_END}"
    )
    return body + (f"{_ASK}{ask}{{% endif %}}" if ask else "")


def _headed(start: str, middle: str, end: str, ask: str) -> str:
    """A template where a message of any role is ``start`` role ``middle`` content ``end``."""
    return (
        f"{_EACH}{{{{ '{start}' + message['role'] + '{middle}' + message['content'] + '{end}' }}}}{_END}"
        f"{_ASK}{{{{ '{ask}' }}}}{{% endif %}}"
    )


# Formats as their models' cards describe them; each is a text of our own.
TEMPLATES = {
    "chatml": _headed("<|im_start|>", r"\n", r"<|im_end|>\n", r"<|im_start|>assistant\n"),
    "llama3": "{{ bos_token }}"
    + _headed(
        "<|start_header_id|>",
        r"<|end_header_id|>\n\n",
        "<|eot_id|>",
        r"<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": "{{ bos_token }}"
    + _turns(
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}", "{{ ' ' + message['content'] + eos_token }}", _REFUSE, ""
    ),
    "alpaca": _turns(
        r"{{ '### Instruction:\n' + message['content'] + '\n\n' }}",
        r"{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}",
        r"{{ message['content'] + '\n\n' }}",
        r"{{ '### Response:\n' }}",
    ),
    "exaone": _turns(
        r"{{ '[|user|]' + message['content'] + '\n' }}",
        r"{{ '[|assistant|]' + message['content'] + '[|endofturn|]\n' }}",
        r"{{ '[|system|]' + message['content'] + '[|endofturn|]\n' }}",
        "{{ '[|assistant|]' }}",
    ),
}


def chosen_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The Jinja text that ``chat_template`` asks for; "auto" is the most common one of the inputs."""
    if wanted != "auto":
        return TEMPLATES.get(wanted, wanted)
    found = Counter(text for folder in folders if (text := _template_of(folder)))
    return found.most_common(1)[0][0] if found else None


def _template_of(folder: Path) -> str | None:
    if lies_inside(folder, JINJA):  # what a link elsewhere leads to is not written into the merge
        return (folder / JINJA).read_text(encoding="utf-8")
    config = folder / SETTINGS
    if not lies_inside(folder, SETTINGS):
        return None
    try:
        text = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{config}' is not a table of settings: copy it again") from error
    return text if isinstance(text, str) else None


def write_template(folder: Path, template: str) -> None:
    """Put the chat template where transformers 4 and 5 look for it."""
    (folder / JINJA).write_text(template, encoding="utf-8")
    config = folder / SETTINGS
    if config.is_file():
        settings = {**json.loads(config.read_text(encoding="utf-8")), "chat_template": template}
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
