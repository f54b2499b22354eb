# SPDX-License-Identifier: Apache-2.0
"""``--shard i/n`` of running text and conversations: every n-th batch encoded here, and all of them joined in order.

A shard reads the whole input, which is cheap beside tokenising, and writes what it encodes into a file of frames beside
the output. Joined, the batches are the same, in the same order, as if one command had encoded them.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import shared_file
from mindformers_ext.formats.frames import Frame, FrameWriter, read_frames
from mindformers_ext.jobs.preprocess.encode import Tokens
from mindformers_ext.jobs.preprocess.request import Checked, PreprocessRequest

ARRAYS = ("ids", "labels", "lengths")
NUMBERS = ("documents", "truncated", "cut", "masked", "padding")  # of an encoded batch


@dataclass(frozen=True)
class ShardReport:
    """What a shard has written."""

    path: Path
    batches: int


def shard_path(request: PreprocessRequest, number: int, count: int) -> Path:
    """The file of shard ``number`` of ``count``."""
    return request.output_file.with_name(f"{request.output_file.name}.shard-{number:05}-of-{count:05}")


def what_makes(checked: Checked, tokenizer_sha256: str) -> str:
    """What makes the batches the same: shards of another text or other options do not fit together."""
    request = checked.request
    files = [[str(path), path.stat().st_size] for path in checked.files]
    special = [checked.special.bos, checked.special.eos, checked.special.pad]
    words = [
        request.dataset_type,
        request.field,
        request.document,
        [request.by_document, request.chat, request.prompt_length] if request.by_document else None,
        checked.row_length,
        special,
        tokenizer_sha256,
        files,
    ]
    return sha256(json.dumps(words).encode()).hexdigest()


def write_shard(
    request: PreprocessRequest, made: str, encoded: Iterable[Tokens], counts: dict[str, int]
) -> ShardReport:
    """Write the encoded batches of this shard. ``counts``: what the reader counts, final when all is read."""
    number, count = request.own_shard or (0, 1)
    path, batches = shard_path(request, number, count), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with shared_file(path) as beside, FrameWriter(beside) as writer:
        for tokens in encoded:
            found = {name: getattr(tokens, name) for name in ARRAYS}
            arrays = {name: array for name, array in found.items() if array is not None}
            writer.add({name: getattr(tokens, name) for name in NUMBERS}, arrays)
            batches += 1
        writer.ending.update(made=made, counts=counts)
    return ShardReport(path, batches)


def find_shards(request: PreprocessRequest, made: str) -> list[Path]:
    """The files of all shards, in order; ``made``: what they must be made of.

    Raises:
        UserError: none; some are missing, damaged, made of another text or with other options, or of two numbers.
    """
    name = request.output_file.name
    found = sorted(
        path for path in request.output_file.parent.glob("*.shard-?????-of-?????") if path.name[:-21] == name
    )
    if not found:
        raise UserError(f"no shard of '{request.output_file}' is there: run --shard 0/n to n-1/n first")
    count = int(found[0].name[-5:])
    wanted = [shard_path(request, number, count) for number in range(count)]
    missing = [path.name for path in wanted if path not in found]
    if missing or len(found) > count:
        what = f"{', '.join(missing[:5])} of {count} is missing" if missing else "there are shards of two numbers"
        raise UserError(f"the shards of '{request.output_file}' are not whole ({what}): run them, or remove the others")
    for path in wanted:
        if _ending(path).get("made") != made:
            raise UserError(f"'{path}' was made of another text or with other options: run this shard again")
    return wanted


def _ending(path: Path) -> Mapping[str, Any]:
    """The facts at a file's end, behind frames whose arrays are passed over."""
    facts: Mapping[str, Any] = {}
    for frame in read_frames(path):
        facts = frame.facts
    return facts


def joined(paths: Sequence[Path], counts: dict[str, int]) -> Generator[Tokens, None, None]:
    """The batches of all shards in their order; ``counts`` gets what their readers counted."""
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(read_frames(path))) for path in paths]
        number = 0
        while not (frame := next(readers[number % len(paths)])).last:
            yield _tokens(frame)
            number += 1
        counts.update(frame.facts["counts"])


def _tokens(frame: Frame) -> Tokens:
    labels, lengths = (frame.read(name) if name in frame else None for name in ARRAYS[1:])
    numbers = {name: int(frame.facts[name]) for name in NUMBERS}
    return Tokens(frame.read(ARRAYS[0]), labels, **numbers, lengths=lengths)
