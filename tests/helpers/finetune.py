# SPDX-License-Identifier: Apache-2.0
"""A job that is finetuned on small conversations: a tokenizer with a chat template, their rows, and a YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.jobs.preprocess.preprocess import Summary, preprocess
from mindformers_ext.jobs.preprocess.request import PreprocessRequest
from tests.helpers.chat import MARKS, VOCAB, chat_folder
from tests.helpers.tiny_run import YAML

SEQ = 127


@dataclass(frozen=True)
class Finetuning:
    """Where everything is."""

    folder: Path
    tokenizer: Path

    def rows(self, name: str, records: list[dict], **more: object) -> tuple[Path, Summary]:
        """The rows of ``records``, by the template of the tokenizer."""
        source, path = self.folder / f"{name}.jsonl", self.folder / f"{name}.mindrecord"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        words = {"dataset_type": "qa", "chat": True, "seq_length": SEQ, "model_file": self.tokenizer}
        words |= {"input_glob": str(source), **more}
        return path, preprocess(PreprocessRequest(output_file=path, **words))  # type: ignore[arg-type]

    def yaml(self, data: Path, columns: tuple[str, ...]) -> Path:
        """A YAML that reads ``data``."""
        text = YAML.replace("dataset_dir: ''", f"dataset_dir: {data}").replace("seq_length: 32", f"seq_length: {SEQ}")
        text = text.replace("vocab_size: 400", f"vocab_size: {VOCAB + len(MARKS)}")
        text = text.replace('input_columns: ["input_ids"]', f"input_columns: {json.dumps(columns)}", 1)
        text = text.replace("capacity_factor: 0.9", "capacity_factor: -1")
        path = data.with_suffix(".yaml")
        path.write_text(text, encoding="utf-8")
        return path


def finetuning(folder: Path) -> Finetuning:
    """With a tokenizer."""
    return Finetuning(folder, chat_folder(folder / "tokenizer"))
