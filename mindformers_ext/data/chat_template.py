# SPDX-License-Identifier: Apache-2.0
"""The chat template that comes with a tokenizer, rendered as transformers' ``apply_chat_template`` renders it.

Jinja's immutable sandbox with what transformers adds to it: loop controls, ``{% generation %}``, ``raise_exception``,
``strftime_now``, and a ``tojson`` that escapes nothing. ``tools`` and ``documents`` are None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.text_lines import decoded
from mindformers_ext.data.tokenizer_settings import SETTINGS, read_settings, read_table

TEMPLATE_FILE, MORE_FOLDER, PROCESSOR_FILE = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
DEFAULT = "default"
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # of a template's code


class ChatTemplate:
    """Messages to the text that an instruct model was trained to answer."""

    def __init__(self, folder: Path) -> None:
        """Read the template of the tokenizer in ``folder``.

        Raises:
            UserError: there is none, or it is no Jinja template.
        """
        import jinja2

        self.folder = folder
        settings = read_settings(folder)
        self._tokens = settings.texts
        text = chat_template_of(folder, settings.chat_template)
        if text is None:
            raise UserError(
                f"the tokenizer in {folder} has no chat template (chat_template in {SETTINGS}, or "
                f"{TEMPLATE_FILE}): leave out --chat, or give an instruct model's tokenizer"
            )
        try:
            self._template = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the chat template in {folder} is no Jinja template ({error})") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of ``messages``, which have "role" and "content", up to where the model answers.

        Raises:
            UserError: the template refuses these messages.
        """
        import jinja2

        words: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self._template.render(messages=list(messages), **words, **self._tokens))
        except (jinja2.TemplateError, *FAULTS) as error:
            raise UserError(f"the chat template in {self.folder} refuses these messages: {error}") from error


def chat_template_of(folder: Path, of_settings: Any) -> str | None:
    """The template in ``folder`` that no name has to be given for, None where there is none.

    Files go before tokenizer_config.json, as in transformers; chat_template.json, which transformers reads for models
    of several kinds of input, comes last.

    Args:
        folder: the tokenizer's.
        of_settings: ``chat_template`` of its tokenizer_config.json: a text, or several by name.

    Raises:
        UserError: templates with names, none of which is the default.
    """
    paths = {DEFAULT: folder / TEMPLATE_FILE}
    paths |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / MORE_FOLDER).glob("*.jinja"))}
    named: dict[Any, Any] = {name: path for name, path in paths.items() if path.is_file()}
    if not named:
        if isinstance(of_settings, list):
            named = {item.get("name"): item.get("template") for item in of_settings if isinstance(item, dict)}
        elif isinstance(of_settings, dict):
            named = of_settings
        else:
            named = {} if of_settings is None else {DEFAULT: of_settings}
    if not named and (of_processor := read_table(folder / PROCESSOR_FILE).get("chat_template")):
        named = {DEFAULT: of_processor}
    if not named:
        return None
    found = named.get(DEFAULT)
    if isinstance(found, Path):
        return "".join(decoded(found)).replace("\r\n", "\n").replace("\r", "\n")
    if not isinstance(found, str):
        raise UserError(
            f"the chat templates in {folder} are called {', '.join(sorted(map(str, named)))}, and none is the text of "
            f"'{DEFAULT}': write the one to use into {TEMPLATE_FILE}"
        )
    return found


@cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what an assistant says, for masks in training; the text is what stands inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    result.filters["tojson"] = _to_json
    result.globals["raise_exception"] = _refuse
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return result


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
