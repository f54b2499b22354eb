# SPDX-License-Identifier: Apache-2.0
"""What a cut is measured on and judged by: rows of calibration text and of held-out text, an engine and a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np

from mindformers_ext.core.config.run import CPU, ENGINES, PYTORCH
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.jobs.engine.door import check_device, check_engine, join_job
from mindformers_ext.jobs.experts.dense_model import DenseModel, StreamedModel, open_dense
from mindformers_ext.jobs.experts.probe import Course, Model, Rows
from mindformers_ext.jobs.experts.text_domains import check_length, check_vocabulary, limited, read_plain_text

BLOCK = 1024  # tokens a row, where none are asked for and the model has as many positions


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is asked for. The first ``tokens`` of ``calibration`` are measured, in equal shares of its texts;
    ``held_out_tokens`` of ``held_out``, or without it of the rows behind those of the calibration texts, judge.
    ``block_size``: tokens a row; None: ``BLOCK``, or as many as the model has positions for. ``seed``: the rows of each
    calibration text are drawn in its order; None: they come as they stand."""

    calibration: tuple[Path, ...] = ()
    tokens: int = 16384
    held_out: tuple[Path, ...] = ()
    held_out_tokens: int = 8192
    block_size: int | None = None
    engine: str = PYTORCH
    device_target: str = CPU
    device_id: int = 0
    quiet: bool = False
    seed: int | None = None

    def collect(self, problems: Problems, engines: Sequence[str] = ENGINES) -> None:
        """Add what can be judged without reading anything. ``engines``: those that can do it."""
        kinds = (("calibration", self.calibration, "tokens"), ("held_out", self.held_out, "held_out_tokens"))
        for word, paths, option in kinds:
            for path in paths:
                if not path.is_file():
                    problems.add(f"--{word} '{path}' is no file", "give plain text files")
            number = getattr(self, option)
            problems.positive(f"--{option}", number)
            if 0 < number < len(paths):
                problems.add(f"--{option} {number} of {len(paths)} texts", "give more, each text has an equal share")
        if self.held_out and not self.calibration:
            problems.add("--held_out without --calibration", "give both")
        if self.block_size is not None:
            problems.positive("--block_size", self.block_size)
        check_engine(problems, self.engine, self.device_target, self.device_id, engines)

    def check(self) -> None:
        """``UserError`` lists what ``collect`` finds."""
        problems = Problems("options")
        self.collect(problems)
        problems.raise_if_any()


@dataclass(frozen=True)
class Ready(Generic[Model]):
    """An open model with the rows that it is measured on, and with those that judge."""

    measured: Course[Model]
    judged: Course[Model]

    @property
    def model(self) -> Model:
        """The model."""
        return self.measured.model

    def about(self) -> dict[str, Any]:
        """What decides the last bits of what is measured."""
        course = self.measured
        return {"rows": course.rows.digest(""), "engine": course.engine, "device_target": course.device.target}


@contextmanager
def ready(folder: Path, texts: Texts) -> Iterator[Ready[DenseModel]]:
    """The dense model and its rows; the model is closed at the end.

    Raises:
        UserError: see ``Texts.check``, ``open_dense`` and ``with_texts``.
    """
    texts.check()
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: give the Hugging Face folder of a dense LLaMA")
    model = open_dense(folder)
    try:
        yield with_texts(model, texts)
    finally:
        model.close()


def with_texts(model: Model, texts: Texts) -> Ready[Model]:
    """An open model and its rows; ``texts`` are checked, and of some text.

    Raises:
        UserError: too little text, or rows that are not the model's.
    """
    device = DeviceSpec(texts.device_target, texts.device_id)
    join_job(texts.engine, device)
    check_device(texts.engine, device)
    measured, judged = _rows(texts, model)
    course = Course(model, measured, texts.engine, device, len(measured.ids), quiet=texts.quiet)
    return Ready(course, replace(course, rows=judged, batch=len(judged.ids)))


def _rows(texts: Texts, model: StreamedModel) -> tuple[Rows, Rows]:
    """What is measured and what judges."""
    tokenizer, positions = open_tokenizer(model.folder), model.spec.max_position_embeddings
    length = texts.block_size or min(BLOCK, positions)
    check_length(length, tokenizer, positions)
    every = [_drawn(read_plain_text(path, tokenizer, length), texts.seed) for path in texts.calibration]
    measured = _shares(every, texts.calibration, texts.tokens, "--tokens")
    if texts.held_out:
        judging, paths = [read_plain_text(path, tokenizer, length) for path in texts.held_out], texts.held_out
    else:
        judging = [rows.at(slice(len(own.ids), None)) for rows, own in zip(every, measured, strict=True)]
        paths = texts.calibration
    behind = "" if texts.held_out else " behind those that are measured, without --held_out"
    judged = _shares(judging, paths, texts.held_out_tokens, "--held_out_tokens", behind)
    found = _together(measured), _together(judged)
    for rows in found:
        check_vocabulary(rows, model.folder, model.spec.vocab_size)
        if not rows.predicted:
            raise UserError("no row of text has two tokens: give more --tokens and --held_out_tokens, or --block_size")
    return found


def _drawn(rows: Rows, seed: int | None) -> Rows:
    """The rows in the order of ``seed``."""
    if seed is None:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows.ids))
    return replace(rows, ids=rows.ids[order], lengths=rows.lengths[order])


def _shares(texts: Sequence[Rows], paths: Sequence[Path], tokens: int, option: str, behind: str = "") -> list[Rows]:
    """The first tokens of every text, in shares that differ by one at most. ``behind``: where the rows are from."""
    shares = [tokens // len(texts) + (place < tokens % len(texts)) for place in range(len(texts))]
    for rows, path, share in zip(texts, paths, shares, strict=True):
        if rows.tokens < share:
            raise UserError(
                f"the text is too short: '{path}' gives {rows.tokens} tokens{behind}, its equal share of {option} "
                f"{tokens} is {share}: give more text, or a smaller {option}"
            )
    return [limited(rows, share) for rows, share in zip(texts, shares, strict=True)]


def _together(parts: Sequence[Rows]) -> Rows:
    return Rows(np.concatenate([rows.ids for rows in parts]), np.concatenate([rows.lengths for rows in parts]))
