# SPDX-License-Identifier: Apache-2.0
"""``--run_mode eval`` of our networks: perplexity on text or MindRecord, and transformers' on the same tokens.

Perplexity is the exponential of the mean of -log p(token | the tokens before it in its window), over the tokens that
count. Both engines give logits; everything after them is one function here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.core.config.run import PERPLEXITY, RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.packing import check_ids
from mindformers_ext.data.readers import Cutting, read_jsonl, read_text
from mindformers_ext.data.text_lines import suffix_of
from mindformers_ext.data.tokenizers import Tokenizer, encode_glued, puts_blank
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.checkpoint.judge import open_judge
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.engine.door import open_records
from mindformers_ext.jobs.predict.network import asked_weights, check_same_model, open_network
from mindformers_ext.jobs.predict.predict import open_own_tokenizer
from mindformers_ext.jobs.run.dataset import check_dataset, dataset_files
from mindformers_ext.jobs.run.display import current

RESULT = "eval.json"
TOKENS_AT_ONCE = 2048  # of all rows that a network sees together
JSON, MINDRECORD = (".jsonl", ".json"), "mindrecord"
Logits = Callable[[np.ndarray], np.ndarray]  # ids (B, S) -> (B, S, V)


class Window(NamedTuple):
    """Tokens (up to window + 1 of them) and which of tokens[1:] count."""

    tokens: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Perplexity:
    """What one network scored. ``loss``: mean in nats."""

    loss: float
    tokens: int
    windows: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinity where that is no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass
class Evaluation:
    """A checked job: the data as windows, and the networks that score it. Nothing is loaded yet but headers."""

    asked: RunSpec
    spec: NetworkSpec
    what: str
    stride: int
    windows: Callable[[], Iterator[Window]]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def window(self) -> int:
        """Tokens that a network sees at once."""
        return self.spec.seq_length

    def run(self) -> Perplexity:
        """Our network's perplexity."""
        weights, note = asked_weights(self.asked, self.spec.model)
        self.notes.append(note)
        network = open_network(self.asked.engine, self.asked.device, self.spec, weights, self.window)
        if self.asked.compiles:
            current().begin("compiling the network")  # with the first windows
        return score(network.logits, self.windows(), self.window)

    def reference(self) -> Perplexity:
        """transformers' perplexity on the same tokens, with the weights of ``folder``. Call after ``run``: where both
        are in one process MindSpore has to come first."""
        assert self.folder is not None
        return score(open_judge(self.folder).logits, self.windows(), self.window)


def open_evaluation(
    run: RunSpec, spec: NetworkSpec, stride: int | None = None, folder: Path | None = None
) -> Evaluation:
    """The job of a checked run; the window is ``seq_length``.

    Args:
        stride: tokens from one window of a text to the next; the default is the window, so that no token is context
            twice. MindRecord's rows stand for themselves and take none.
        folder: a Hugging Face folder for transformers.

    Raises:
        UserError: no data, data that does not fit, a wrong stride, or a folder of another model.
    """
    if folder is not None:
        check_same_model(spec.model, read_config(folder), folder)
    named = run.data.named if run.data else ()
    if len(named) == 1 and named[0].is_file() and MINDRECORD not in named[0].name:
        tokenizer = open_own_tokenizer(run, spec.model)[0]
        return _of_text(run, spec, named[0], tokenizer, spec.seq_length if stride is None else stride, folder)
    if stride is not None:
        raise UserError("--eval_stride belongs to text: a row of MindRecord is a window of its own; leave it out")
    check_dataset(run, spec)
    data = run.data
    assert data is not None
    files = dataset_files(data)

    def windows() -> Iterator[Window]:
        return _row_windows(files, data.columns, spec.model, data.limit)

    what = f"{', '.join(map(str, files[:3]))}{' ...' if len(files) > 3 else ''}"
    return Evaluation(run, spec, f"rows of {what}", spec.seq_length, windows, folder)


def _of_text(
    run: RunSpec, spec: NetworkSpec, path: Path, tokenizer: Tokenizer, stride: int, folder: Path | None
) -> Evaluation:
    if not 1 <= stride <= spec.seq_length:
        raise UserError(
            f"--eval_stride {stride}: give 1 to {spec.seq_length}, the window (model_config.seq_length); "
            "with more, tokens between two windows would not count"
        )

    def windows() -> Iterator[Window]:
        for tokens in documents(path, tokenizer):
            check_ids(tokens.tolist(), spec.model.vocab_size, str(path))
            yield from text_windows(tokens, spec.seq_length, stride)

    if next(windows(), None) is None:
        raise UserError(f"--eval_data {path} holds no token to predict: give a text of two tokens or more")
    return Evaluation(run, spec, f"text of {path}", stride, windows, folder)


def documents(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids of each text: the whole file, or the "text" of each JSON record, framed as the tokenizer does it."""
    cutting = Cutting(blank=puts_blank(tokenizer))
    if suffix_of(path) in JSON:
        fragments = read_jsonl(path, "text", cutting, advice="evaluation reads the field 'text': rename the other one")
    else:
        fragments = read_text(path, "file", cutting)
    before, after = tokenizer.frame
    parts: list[Any] = []
    for item in fragments:
        if item.first:
            parts = [before]
        parts.append(encode_glued(tokenizer, [item.text])[0] if item.glued else tokenizer.encode_batch([item.text])[0])
        if item.last:
            parts.append(after)
            yield np.concatenate([np.asarray(part, np.int32) for part in parts])


def text_windows(tokens: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """Windows of one text: each token but the first counts once, in the first window that predicts it."""
    done = 1  # tokens before this one have been counted, or cannot be
    for start in range(0, max(len(tokens) - 1, 0), stride):
        part = tokens[start : start + window + 1]
        counted = np.arange(start + 1, start + len(part)) >= done
        yield Window(part, counted)
        done = start + len(part)
        if done == len(tokens):
            return


def _row_windows(files: list[Path], columns: tuple[str, ...], model: ModelSpec, limit: int | None) -> Iterator[Window]:
    """Rows as they are; what counts is what counts in training: no padding, no ignored label."""
    left = limit
    for path in files:
        for row in open_records().read(path, columns):
            if left == 0:
                return
            left = None if left is None else left - 1
            tokens = row[columns[0]]
            labels = row.get("labels", tokens)
            yield Window(tokens, (tokens[:-1] != model.pad_token_id) & (labels[1:] != model.ignore_token_id))


def score(logits: Logits, windows: Iterator[Window], length: int) -> Perplexity:
    """Perplexity of a network over ``windows``, in batches of one shape (rows, ``length``).

    Raises:
        UserError: no token counts.
    """
    started = time.perf_counter()
    rows = max(1, TOKENS_AT_ONCE // length)
    total, tokens, count = 0.0, 0, 0
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        count += 1
        if len(batch) == rows:
            total, tokens, batch = total + _nats(logits, batch, rows, length), tokens + _counted(batch), []
    if batch:
        total, tokens = total + _nats(logits, batch, rows, length), tokens + _counted(batch)
    if not tokens:
        raise UserError("no token of the data counts: all are padding, or have an ignored label")
    return Perplexity(total / tokens, tokens, count, time.perf_counter() - started)


def _counted(batch: list[Window]) -> int:
    return sum(int(window.counted.sum()) for window in batch)


def _nats(logits: Logits, batch: list[Window], rows: int, length: int) -> float:
    """Sum of -log p over the counted tokens of a batch; rows are padded behind, which changes nothing before."""
    ids = np.zeros((rows, length), np.int32)
    for place, window in enumerate(batch):
        inputs = window.tokens[:-1]
        ids[place, : len(inputs)] = inputs
    found = logits(ids)
    current().done(", the first windows included")
    total = 0.0
    for place, window in enumerate(batch):
        where = np.flatnonzero(window.counted)
        scores = found[place, where].astype(np.float64)
        best = scores.max(-1, keepdims=True)
        rest = np.log(np.exp(scores - best).sum(-1)) + best[:, 0]
        total += float((rest - scores[np.arange(len(where)), window.tokens[1:][where]]).sum())
    return total


def write_results(evaluation: Evaluation, ours: Perplexity, reference: Perplexity | None) -> Path:
    """Write eval.json into ``output_dir``: MindFormers' own result first, then how it was taken."""
    path = Path(evaluation.asked.output_dir) / RESULT
    content = {
        PERPLEXITY: {"loss": ours.loss, "PPL": ours.perplexity},
        "data": evaluation.what,
        "window": evaluation.window,
        "stride": evaluation.stride,
        **asdict(ours),
    }
    if reference:
        content["transformers"] = {**asdict(reference), "PPL": reference.perplexity, "folder": str(evaluation.folder)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh_file(path, overwrite=True) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
