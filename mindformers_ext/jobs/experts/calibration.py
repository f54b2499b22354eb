# SPDX-License-Identifier: Apache-2.0
"""What a pass through a dense model starts from: the model, this process's rows of text, an engine and a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.run import CPU, PYTORCH
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.jobs.engine.door import check_device, check_engine, join_job
from mindformers_ext.jobs.experts.dense_model import StreamedModel, open_dense
from mindformers_ext.jobs.experts.probe import Course, Rows
from mindformers_ext.jobs.experts.ranks import Share
from mindformers_ext.jobs.experts.text_chats import read_chats
from mindformers_ext.jobs.experts.text_domains import (
    DOMAINS,
    check_length,
    check_percent,
    check_vocabulary,
    domain_files,
    limited,
    read_domains,
    read_plain_text,
    texts_hash,
    tokenizer_hash,
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is asked for. ``text``: one plain text file instead of the folder ``train_data_path`` of domains, or
    ``conversations``, a file of them."""

    model_path: Path
    train_data_path: Path | None = None
    train_data_cache_path: Path | None = None
    text: Path | None = None
    conversations: Path | None = None
    domains: Mapping[str, int] = field(default_factory=lambda: dict(DOMAINS))
    data_use_percent: float = 0.01
    block_size: int = 2048
    batch_size: int = 4
    max_tokens: int | None = None
    seed: int = 0
    engine: str = PYTORCH
    device_target: str = CPU
    device_id: int = 0
    quiet: bool = False

    def check(self) -> None:
        """What can be judged without reading anything.

        Raises:
            UserError: lists every option that does not fit.
        """
        problems = Problems("options")
        if sum(one is not None for one in (self.train_data_path, self.text, self.conversations)) != 1:
            problems.add("texts come from --train_data_path or from --text", "give one of the two")
        for name in ("block_size", "batch_size"):
            problems.positive(f"--{name}", getattr(self, name))
        if self.text is not None and not self.text.is_file():
            problems.add(f"the text '{self.text}' is no file", "give one plain text file")
        if self.conversations is not None and not self.conversations.is_file():
            problems.add(f"the conversations '{self.conversations}' are no file", "give a .json or .jsonl")
        if self.max_tokens is not None:
            problems.positive("--max_tokens", self.max_tokens)
        check_engine(problems, self.engine, self.device_target, self.device_id)
        problems.raise_if_any()
        check_percent(self.data_use_percent)

    def computed(self) -> dict[str, Any]:
        """How the rows are computed, which decides the last bits of what comes out."""
        return {"engine": self.engine, "device_target": self.device_target, "batch_size": self.batch_size}


def texts_of(asked: Calibration) -> dict[str, Any]:
    """What decides the rows, by content: texts, tokenizer, and how they are cut and drawn.

    Raises:
        UserError: no such texts.
    """
    found: dict[str, Any] = {"tokenizer": tokenizer_hash(open_tokenizer(asked.model_path).path)}
    for name in ("block_size", "max_tokens", "seed"):
        found[name] = getattr(asked, name)
    if asked.text is not None:
        return found | {"text": texts_hash([asked.text])}
    if asked.conversations is not None:
        return found | {"conversations": texts_hash([asked.conversations])}
    files = domain_files(asked.train_data_path or Path(), asked.domains)
    found |= {"data_use_percent": asked.data_use_percent, "domains": dict(asked.domains)}
    return found | {"texts": {key: texts_hash(paths) for key, paths in files.items()}}


@dataclass(frozen=True)
class Opened:
    """The course of this process; ``every`` are the rows of all processes."""

    course: Course[StreamedModel]
    every: Rows
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of all processes."""
        return self.every.tokens

    @property
    def rows(self) -> int:
        """Of all processes."""
        return len(self.every.ids)

    @property
    def model(self) -> StreamedModel:
        """The model."""
        return self.course.model


@contextmanager
def opened(
    asked: Calibration, share: Share, keep: bool = True, open_model: Callable[[Path], StreamedModel] = open_dense
) -> Iterator[Opened]:
    """The course; the model is closed at the end. ``keep``: tokens may be written to the cache. ``open_model``: where
    it is not dense.

    Raises:
        UserError: see ``Calibration.check``, ``open_dense``, ``read_domains``; fewer rows than processes.
    """
    asked.check()
    number = share.local if share.size > 1 and asked.device_target != CPU else asked.device_id
    device = DeviceSpec(asked.device_target, number)
    join_job(asked.engine, device)
    check_device(asked.engine, device)
    model = open_model(asked.model_path)
    try:
        rows, notes = _rows(asked, model, keep and share.rank == 0)
        if len(rows.ids) < share.size:
            raise UserError(f"{len(rows.ids)} rows for {share.size} processes: give more text, or start fewer")
        own = rows.share(share)
        course = Course(model, own, asked.engine, device, asked.batch_size, quiet=asked.quiet or share.rank > 0)
        yield Opened(course, rows, tuple(notes))
    finally:
        model.close()


def _rows(asked: Calibration, model: StreamedModel, keep: bool) -> tuple[Rows, list[str]]:
    tokenizer = open_tokenizer(model.folder)
    check_length(asked.block_size, tokenizer, model.spec.max_position_embeddings)
    if asked.text is not None:
        rows, notes = read_plain_text(asked.text, tokenizer, asked.block_size), list[str]()
    elif asked.conversations is not None:
        rows, notes = read_chats(asked.conversations, tokenizer, model.folder, asked.block_size)
    elif asked.train_data_path is not None:
        rows, notes = read_domains(
            asked.train_data_path,
            asked.train_data_cache_path,
            tokenizer,
            asked.block_size,
            asked.data_use_percent,
            asked.domains,
            asked.seed,
            keep,
        )
    rows = limited(rows, asked.max_tokens)
    check_vocabulary(rows, model.folder, model.spec.vocab_size)
    return rows, notes
