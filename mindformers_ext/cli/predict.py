# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py --run_mode predict`` on the terminal: answers stream as they come, Ctrl-C keeps what is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

from mindformers_ext.cli.outcome import INTERRUPTED, interruptible
from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.predict import Predictor, Prompt, Written, open_predictor, write_results
from mindformers_ext.jobs.predict.prompts import STANDARD_INPUT, read_prompts

SAVED_EVERY = 10.0  # seconds


def predict(run: RunSpec, spec: NetworkSpec, chat: bool) -> int:
    """Answer every prompt of ``run``; 0 when all are answered, 130 after Ctrl-C."""
    predictor = open_predictor(run, spec, chat)
    if chat and run.prompts == (STANDARD_INPUT,) and sys.stdin.isatty():
        return _talk(predictor)
    prompts = predictor.prompts(read_prompts(run.prompts))
    predictor.load()
    _tell(predictor)
    done: list[Written] = []
    save = (lambda: write_results(done, run, predictor.timing)) if run.use_parallel else None
    code = _answer(predictor, prompts, done, save)
    if predictor.rank:
        print(
            f"note: process {predictor.rank} of those that answer together: the first one has the answers",
            file=sys.stderr,
        )
        return code
    path = write_results(done, run, predictor.timing)
    timing = predictor.timing
    print(
        f"note: {len(done)} of {len(prompts)} prompts answered: {timing.prompt_tokens} prompt tokens, "
        f"{timing.new_tokens} new tokens, {timing.tokens_per_second:.1f} tokens/s, first token after "
        f"{timing.first_token:.2f} s, compiled in {timing.compile:.1f} s. Kept in {path}",
        file=sys.stderr,
    )
    return code


def _tell(predictor: Predictor) -> None:
    for note in predictor.notes:
        print(f"note: {note}", file=sys.stderr)
    predictor.notes.clear()


def _answer(
    predictor: Predictor, prompts: list[Prompt], done: list[Written], save: Callable[[], object] | None = None
) -> int:
    """Print the answers as they grow; fills ``done``.

    ``save`` belongs to processes that answer together: the launcher kills them, so the first one keeps what is done
    every few seconds and signals are left as they are.
    """
    started: set[int] = set()
    saved = time.monotonic()

    def show(prompt: int, text: str) -> None:
        if predictor.rank:
            return
        if prompt not in started:
            started.add(prompt)
            sys.stdout.write(prompts[prompt].text if predictor.template is None else "")
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        with nullcontext() if save else interruptible():
            for written in predictor.answers(prompts, show):
                done.append(written)
                if predictor.rank:
                    continue
                print(flush=True)
                if save and time.monotonic() - saved > SAVED_EVERY:
                    save()
                    saved = time.monotonic()
    except KeyboardInterrupt:
        print(flush=True)  # the cursor goes to a line of its own
        print("stopped by Ctrl-C; finished answers are kept", file=sys.stderr)
        return INTERRUPTED
    return 0


def _talk(predictor: Predictor) -> int:
    """A conversation: each line is a message, the model sees all before it. Ctrl-D ends it."""
    print("Write a message and press Enter; Ctrl-D ends.", file=sys.stderr)
    history: list[dict[str, str]] = []
    predictor.load()
    _tell(predictor)
    while True:
        try:
            message = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not message.strip():
            continue
        prompts = _fitting(predictor, message, history)
        if not prompts:
            continue
        done: list[Written] = []
        started = time.perf_counter()
        code = _answer(predictor, prompts, done)
        if code == 0:
            history += [{"role": "user", "content": message}, {"role": "assistant", "content": done[0].answer}]
            print(f"note: {done[0].new_tokens} tokens in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def _fitting(predictor: Predictor, message: str, history: list[dict[str, str]]) -> list[Prompt]:
    """The conversation with ``message``, as much of its end as fits; takes the rest out of ``history``.

    None when the message alone is too long, which the user is told.
    """
    while True:
        try:
            return predictor.prompts([message], history)
        except UserError as error:
            if not history:
                print(f"error: {error}", file=sys.stderr)
                return []
            del history[:2]
            print("note: the oldest messages are left out, all of them would be too long", file=sys.stderr)
