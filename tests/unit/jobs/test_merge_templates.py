# SPDX-License-Identifier: Apache-2.0
"""Chat templates that a merge can name render what mergekit 0.1.5's of the same name render."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.jobs.merge.templates import TEMPLATES, chosen_template, write_template

SYSTEM, USER = {"role": "system", "content": " Be kind. \n"}, {"role": "user", "content": " Hi?\n"}
ANSWER, CONTEXT = {"role": "assistant", "content": " Yes. "}, {"role": "user_context", "content": " c "}
TALKS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, USER],
    [SYSTEM],
    [ANSWER],
    [USER, USER],
    [USER, SYSTEM, USER],
    [SYSTEM, ANSWER],
    [CONTEXT, USER],
]
# SHA-256 of the JSON list of what mergekit's files give in transformers' environment, each talk with and without a
# prompt for the answer; "refused" where the template raises. Made by rendering them.
GOLDEN = {
    "chatml": "25fb51580ba0b1e0b5aee6fff4d4b78f3fa06d3416c1c48a4ef76fd3b2370086",
    "llama3": "cceec233eee098c2f89cf5c774c7064c6c51e07c1476e9776f1c16f50dc48563",
    "mistral": "321e27e13c943f9233ba4467bc204891e5e48870c3ccd1872ccba7245a5caf62",
    "alpaca": "8e8dbcb8d39e540aa18ada9a3e5ff3f1ebb436b4bc551fc7302cb029fd953f4b",
    "exaone": "899099c9f9850967d897f45259602afbdc4e3de30d7daccb352f0c6756f44f0d",
}
SHOWN = {  # the fourth talk, with a prompt for the answer
    "mistral": "<s> [INST]  Be kind. \n\n\n Hi?\n [/INST]  Yes. </s> [INST]  Hi?\n [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi?\n\n### Response:\nYes.\n\n### Instruction:\nHi?### Response:\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_mergekit(name: str, tmp_path: Path) -> None:
    words = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    write_template(tmp_path, TEMPLATES[name])
    template = ChatTemplate(tmp_path)

    def text(talk: list[dict[str, str]], ask: bool) -> str:
        try:
            return template.render(talk, ask)
        except UserError:
            return "refused"

    assert text(TALKS[3], True) == SHOWN.get(name, text(TALKS[3], True))
    found = [text(talk, ask) for talk in TALKS for ask in (True, False)]
    assert sha256(json.dumps(found).encode()).hexdigest() == GOLDEN[name]


def test_auto_is_the_most_common_of_the_inputs_wherever_it_is_written(tmp_path: Path) -> None:
    for name, file, content in (
        ("a", "tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "one"}]})),
        ("b", "chat_template.jinja", "one"),
        ("c", "chat_template.json", json.dumps({"chat_template": "two"})),
        ("d", "other.json", "{}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    folders = [tmp_path / name for name in "cabd"]
    assert chosen_template("auto", folders) == "one" and chosen_template("auto", folders[:1]) == "two"
    assert chosen_template("auto", folders[3:]) is None and chosen_template("{{ x }} own", folders) == "{{ x }} own"


def test_a_template_that_is_written_goes_before_every_default_that_was_copied(tmp_path: Path) -> None:
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    for name in ("default", "tool_use"):
        (more / f"{name}.jinja").write_text(f"old {name}")
    write_template(tmp_path, "new")
    assert ChatTemplate(tmp_path).render([USER]) == "new"
    assert [path.name for path in more.iterdir()] == ["tool_use.jinja"]
