# SPDX-License-Identifier: Apache-2.0
"""A dense model and the rows of text that it is measured and judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.run import ASCEND, CPU, DEVICES, ENGINES, MINDSPORE, PYTORCH
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.jobs.engine.door import join_job
from mindformers_ext.jobs.experts.dense_model import DenseModel, open_dense
from mindformers_ext.jobs.experts.probe import Course, Rows
from mindformers_ext.jobs.experts.text_domains import check_length, limited, padded, padding_of, read_plain_text


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is asked for. ``tokens`` of ``calibration`` are measured; ``held_out_tokens`` of ``held_out``, or without it
    of what follows in the calibration files, judge."""

    calibration: tuple[Path, ...]
    tokens: int = 16384
    held_out: tuple[Path, ...] = ()
    held_out_tokens: int = 8192
    block_size: int = 1024
    engine: str = PYTORCH
    device_target: str = CPU
    device_id: int = 0
    quiet: bool = False
    seed: int | None = None

    def check(self) -> None:
        """``UserError`` lists what can be judged without reading anything."""
        problems = Problems("options")
        for word, paths in (("--calibration", self.calibration), ("--held_out", self.held_out)):
            for path in paths:
                if not path.is_file():
                    problems.add(f"{word} '{path}' is no file", "give plain text files")
        for name in ("tokens", "held_out_tokens", "block_size"):
            problems.positive(f"--{name}", getattr(self, name))
        problems.one_of("--engine", self.engine, ENGINES)
        problems.one_of("--device_target", self.device_target, DEVICES)
        if self.device_id < 0:
            problems.add(f"--device_id {self.device_id}", "devices count from 0")
        if self.engine == PYTORCH and self.device_target == ASCEND:
            problems.add("--device_target Ascend on PyTorch", f"give --engine {MINDSPORE}")
        problems.raise_if_any()


@dataclass(frozen=True)
class Ready:
    """An open model, what it is measured on, and what judges it."""

    measured: Course
    judged: Course

    @property
    def model(self) -> DenseModel:
        """The model."""
        return self.measured.model

    def about(self) -> dict[str, Any]:
        """What decides the last bits of what is measured."""
        course = self.measured
        return {"rows": course.rows.digest(""), "engine": course.engine, "device_target": course.device.target}


@contextmanager
def ready(folder: Path, texts: Texts) -> Iterator[Ready]:
    """The model and its rows; the model is closed at the end.

    Raises:
        UserError: see ``Texts.check`` and ``open_dense``; a model that is none, or too little text.
    """
    texts.check()
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: give the Hugging Face folder of a dense LLaMA")
    device = DeviceSpec(texts.device_target, texts.device_id)
    join_job(texts.engine, device)
    model = open_dense(folder)
    try:
        measured, judged = _rows(texts, model)
        course = Course(model, measured, texts.engine, device, len(measured.ids), quiet=texts.quiet)
        yield Ready(course, replace(course, rows=judged, batch=len(judged.ids)))
    finally:
        model.close()


def _rows(texts: Texts, model: DenseModel) -> tuple[Rows, Rows]:
    tokenizer = open_tokenizer(model.folder)
    check_length(texts.block_size, tokenizer, model.spec.max_position_embeddings)

    def read(paths: Sequence[Path]) -> Rows:
        found = [read_plain_text(path, tokenizer, texts.block_size) for path in paths]
        rows = [row[:length] for part in found for row, length in zip(part.ids, part.lengths, strict=True)]
        return padded(rows, texts.block_size, padding_of(tokenizer))

    every = read(texts.calibration)
    if texts.seed is not None:
        order = np.random.default_rng(texts.seed).permutation(len(every.ids))
        every = replace(every, ids=every.ids[order], lengths=every.lengths[order])
    measured = limited(every, texts.tokens)
    _check_enough(measured, "--calibration", "--tokens", texts.tokens)
    behind = read(texts.held_out) if texts.held_out else every.at(slice(len(measured.ids), None))
    judged = limited(behind, texts.held_out_tokens)
    more = (
        "--held_out" if texts.held_out else f"--calibration beyond its {texts.tokens} --tokens (or a --held_out file)"
    )
    _check_enough(judged, more, "--held_out_tokens", texts.held_out_tokens)
    largest = max(int(rows.ids.max(initial=0)) for rows in (measured, judged))
    if largest >= model.spec.vocab_size:
        raise UserError(
            f"the tokenizer in '{model.folder}' gives the id {largest}, the embedding has {model.spec.vocab_size} "
            "rows: they belong to different models"
        )
    return measured, judged


def _check_enough(rows: Rows, words: str, option: str, asked: int) -> None:
    if rows.tokens < asked or not int(np.maximum(rows.lengths - 1, 0).sum()):
        raise UserError(
            f"the text is too short: {words} gives {rows.tokens} tokens, {option} asks for {asked}: give more text, or "
            f"a smaller {option}"
        )
