# SPDX-License-Identifier: Apache-2.0
"""``mfext completion SHELL``: what bash, zsh or fish needs to complete the names, options and choices of ``mfext``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from mindformers_ext.cli.command import Command

EPILOG = """examples:
  eval "$(mfext completion bash)"        in ~/.bashrc
  eval "$(mfext completion zsh)"         in ~/.zshrc, behind compinit
  mfext completion fish | source         in ~/.config/fish/config.fish
The names mergekit-yaml and mergekit-moe come with it, where no mergekit is installed.
"""
Quoted = Callable[[Iterable[str]], str]
MERGEKIT = ("mergekit-yaml", "mergekit-moe")


@dataclass(frozen=True)
class Words:
    """What may follow a sub-command: its options with their help and choices, and its first words."""

    name: str
    summary: str
    options: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    first: tuple[str, ...] = ()


def table() -> list[Words]:
    """Every sub-command of ``mfext``, from its own parser."""
    from mindformers_ext.cli.mfext import ROWS, command_of

    found = []
    for row in ROWS:
        if row.command:
            found.append(_words(row.name, row.summary, command_of(row).parser(), row.words))
        else:
            found.append(Words(row.name, row.summary, {"--torchrun": "torchrun instead of msrun", "--help": ""}))
    return found


def _words(name: str, summary: str, parser: argparse.ArgumentParser, fixed: tuple[str, ...]) -> Words:
    """What ``parser`` takes, and its own sub-commands; ``fixed``: the one of them that is meant."""
    result = Words(name, summary)
    first: tuple[str, ...] = ()
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += [action.choices[word] for word in fixed or action.choices]
            first = () if fixed else tuple(action.choices)
        elif not action.option_strings and action.choices:
            first = tuple(map(str, action.choices))
    for action in (action for one in parsers for action in one._actions if action.help != argparse.SUPPRESS):
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        for option in action.option_strings:
            result.options[option] = text.partition(";")[0]
            if action.choices:
                result.choices[option] = tuple(map(str, action.choices))
    return replace(result, first=first)


def bash(words: list[Words]) -> Iterator[str]:
    """Lines for bash."""
    yield "_mfext() {"
    yield '    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} name=${COMP_WORDS[1]} found=""'
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f"        found={shlex.quote(' '.join(row.name for row in words))}"
    yield "    else"
    yield from (f"        {line}" for line in _cases('"$name $before"', '"$word"', '"$name"', words, _quoted))
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$found" -- "$word"))'
    yield "}"
    yield "complete -o default -F _mfext mfext"
    for name in MERGEKIT:
        yield f'command -v {name} >/dev/null 2>&1 || {name}() {{ mfext {name} "$@"; }}'


def zsh(words: list[Words]) -> Iterator[str]:
    """Lines for zsh."""
    yield "_mfext() {"
    yield "    local -a found"
    yield "    if (( CURRENT == 2 )); then"
    rows = (f"{row.name}:{row.summary.replace(':', ' -')}" for row in words)
    yield f"        found=({' '.join(shlex.quote(row) for row in rows)})"
    yield "        _describe command found"
    yield "        return"
    yield "    fi"
    before, word = '"${words[2]} ${words[CURRENT-1]}"', '"${words[CURRENT]}"'
    yield from (f"    {line}" for line in _cases(before, word, '"${words[2]}"', words, _listed))
    yield "    (( $#found )) && compadd -a found || _files"
    yield "}"
    yield "compdef _mfext mfext"
    for name in MERGEKIT:
        yield f'command -v {name} >/dev/null 2>&1 || {name}() {{ mfext {name} "$@"; }}'


def fish(words: list[Words]) -> Iterator[str]:
    """Lines for fish."""
    for row in words:
        yield f"complete -c mfext -n __fish_use_subcommand -f -a {row.name} -d {_fish(row.summary)}"
    for row in words:
        start = f"complete -c mfext -n '__fish_seen_subcommand_from {row.name}'"
        if row.first:
            yield f"{start} -f -a {_fish(' '.join(row.first))}"
        for option, text in row.options.items():
            kind = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            some = f" -x -a {_fish(' '.join(row.choices[option]))}" if option in row.choices else ""
            yield f"{start} {kind}{some} -d {_fish(text)}"
    for name in MERGEKIT:
        yield f"command -q {name}; or alias {name} 'mfext {name}'"


def _cases(before: str, word: str, name: str, words: list[Words], quoted: Quoted) -> Iterator[str]:
    """A ``case`` of bash and zsh that fills ``found``: a choice, an option, or a first word."""
    yield f"case {before} in"
    for row in words:
        for option, choices in row.choices.items():
            yield f"    {shlex.quote(f'{row.name} {option}')}) found={quoted(choices)} ;;"
    yield f"    *) case {word} in"
    yield f"        -*) case {name} in"
    for row in words:
        yield f"            {row.name}) found={quoted(row.options)} ;;"
    yield "            esac ;;"
    yield f"        *) case {before} in"
    for row in words:
        if row.first:
            yield f"            {shlex.quote(f'{row.name} {row.name}')}) found={quoted(row.first)} ;;"
    yield "            esac ;;"
    yield "        esac ;;"
    yield "esac"


def _quoted(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _listed(words: Iterable[str]) -> str:
    return f"({' '.join(map(shlex.quote, words))})"


def _fish(text: str) -> str:
    """Quoted for fish, which knows two escapes inside single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("shell", choices=tuple(SHELLS), help="the shell that will read it")


def _run(arguments: argparse.Namespace) -> int:
    print("\n".join(SHELLS[arguments.shell](table())))
    return 0


COMMAND = Command(
    prog="mfext completion",
    description="Print what a shell needs to complete the commands, options and choices of mfext.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
