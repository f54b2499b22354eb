# SPDX-License-Identifier: Apache-2.0
"""The chat template that comes with a tokenizer: Hugging Face's Jinja text, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """Messages to the text that an instruct model was trained to answer."""

    def __init__(self, folder: Path) -> None:
        """Read the template of the tokenizer in ``folder``.

        Raises:
            UserError: there is none, or it is no Jinja template.
        """
        import jinja2
        import jinja2.sandbox

        self.folder = folder
        config = _config(folder / CONFIG_FILE)
        self._tokens = {name: _text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(_template(folder, config))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template in {folder} is no Jinja template ({error})") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the model answers; ``messages`` have "role" and "content".

        Raises:
            UserError: the template refuses these messages.
        """
        import jinja2

        try:
            return str(self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template in {self.folder} refuses these messages: {error}") from error

    def starts_with_bos(self, text: str) -> bool:
        """Whether the template has written the start token itself."""
        bos = self._tokens["bos_token"]
        return bool(bos) and text.startswith(bos)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named ones
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}.get("default")
    if not isinstance(found, str):
        raise UserError(
            f"the tokenizer in {folder} has no chat template (chat_template in {CONFIG_FILE}, or "
            f"{TEMPLATE_FILE}): leave out --chat, or give an instruct model's tokenizer"
        )
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): mend it") from error
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> str:
    """A special token is a string, or a table with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
