# SPDX-License-Identifier: Apache-2.0
"""From conversations and pairs of answers to a run of our loop that learns them and continues."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.preferences import PAIR_COLUMNS
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.predict.evaluate import open_evaluation
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from tests.helpers.chat import small_talks
from tests.helpers.finetune import SEQ, Finetuning, finetuning
from tests.helpers.tiny_run import config_of, rows_of

PACKED = ("input_ids", "labels", "document_ids")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Finetuning:
    return finetuning(tmp_path_factory.mktemp("finetuning"))


def run(yaml: Path, output: Path, *options: str) -> list[dict]:
    torch.set_num_threads(1)
    config = config_of(yaml, "engine=pt", f"output_dir={output}", "callbacks.1.save_checkpoint_steps=1000", *options)
    checked = check_run(config, "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    return rows_of(output)


def columns_of(path: Path) -> dict[str, np.ndarray]:
    file = MindRecordFile(path)
    rows = [file.read(number, PACKED) for number in range(len(file))]
    file.close()
    return {name: np.stack(column) for name, column in zip(PACKED, zip(*rows, strict=True), strict=True)}


def test_packed_and_padded_rows_hold_the_same_documents_and_drop_the_same_long_ones(job: Finetuning) -> None:
    long = {"instruction": "say it", "input": "", "output": "a word " * 200}
    records = [*small_talks(9), long, *small_talks(4), {"messages": [{"role": "assistant", "content": "alone"}]}]
    found = {}
    for strategy in ("pack", "pad"):
        path, summary = job.rows(strategy, records, pack_strategy=strategy)
        assert (summary.too_long, summary.no_question, summary.documents) == (1, 1, 14)
        rows = columns_of(path)
        found[strategy] = [
            (rows["input_ids"][row][inside].tolist(), rows["labels"][row][inside].tolist())
            for row in range(summary.records)
            for number in range(1, rows["document_ids"][row].max() + 1)
            for inside in [rows["document_ids"][row] == number]
        ]
        assert summary.padding_tokens == int((rows["document_ids"] == 0).sum())
        assert summary.loss_tokens == int((rows["labels"][:, 1:] != -100).sum())
        packed = summary.records < 13
        assert packed == (strategy == "pack")
    assert found["pack"] == found["pad"] and len(found["pack"]) == 13


def test_shards_joined_are_the_file_of_one_command(job: Finetuning) -> None:
    from mindformers_ext.jobs.preprocess.preprocess import encode_shard
    from mindformers_ext.jobs.preprocess.request import PreprocessRequest

    whole, _ = job.rows("whole", small_talks(), pack_strategy="pack")
    words = {"dataset_type": "qa", "chat": True, "seq_length": SEQ, "pack_strategy": "pack"}
    output = job.folder / "joined.mindrecord"
    for number in range(2):
        encode_shard(
            PreprocessRequest(
                input_glob=str(job.folder / "whole.jsonl"),
                model_file=job.tokenizer,
                output_file=output,
                shard=f"{number}/2",
                **words,  # type: ignore[arg-type]
            )
        )
    job.rows("joined", small_talks(), pack_strategy="pack", shard="join", input_glob=str(job.folder / "whole.jsonl"))
    left, right = columns_of(whole), columns_of(output)
    assert all(np.array_equal(left[name], right[name]) for name in PACKED)


def test_conversations_are_learnt_packed_with_frozen_gates(job: Finetuning) -> None:
    path, summary = job.rows("learnt", small_talks(), pack_strategy="pack")
    assert summary.records >= 8
    epochs = 32 * 4 // summary.records
    rows = run(
        job.yaml(path, PACKED),
        job.folder / "learnt",
        f"runner_config.epochs={epochs}",
        "runner_config.freeze_gate=True",
        "lr_schedule.learning_rate=1e-2",
    )
    assert len(rows) <= 200  # of a step of 4 rows
    assert rows[-1]["lm_loss"] < 0.5 * rows[0]["lm_loss"]
    state = CkptFile(next((job.folder / "learnt").rglob("*.ckpt")))
    assert any(".router." in name for name in state.infos)
    assert not any(name.startswith("adam_m.") and ".router." in name for name in state.infos)


def pairs_of(count: int) -> list[dict]:
    return [
        {"prompt": f"is {n} even", "chosen": "yes, of course", "rejected": "I cannot say that"} for n in range(count)
    ]


def test_a_preferred_answer_is_learnt_and_a_stopped_run_goes_on_with_its_reference(job: Finetuning) -> None:
    path, summary = job.rows("pairs", pairs_of(16), dataset_type="dpo")
    assert summary.records == 16 and summary.truncated == 0
    yaml = job.yaml(path, PAIR_COLUMNS)
    words = ("runner_config.epochs=3", "callbacks.1.save_checkpoint_steps=6")
    rows = run(yaml, job.folder / "dpo", *words)
    assert len(rows) == 12 and rows[0]["lm_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["margin"] > rows[1]["margin"]
    shutil.copytree(job.folder / "dpo", job.folder / "again")
    (job.folder / "again" / "checkpoint" / "rank_0" / "tiny_rank_0-3_4.ckpt").unlink()
    again = run(yaml, job.folder / "again", *words, "resume_training=True")
    told = ("loss", "accuracy", "margin", "global_norm")
    assert [[row[name] for name in told] for row in again] == [[row[name] for name in told] for row in rows]


WRONG = {
    "beta without pairs": (PACKED, ("runner_config.dpo_beta=0.2",), "dpo_beta=0.2: rows are not pairs"),
    "pairs without our loop": (PAIR_COLUMNS, ("engine=ms",), "--trainer own"),
    "a beta of nothing": (PAIR_COLUMNS, ("runner_config.dpo_beta=0",), "dpo_beta=0 is not a number above 0"),
    "nothing to train": (
        PACKED,
        ("runner_config.freeze_gate=True", "runner_config.train_gate_only=True"),
        "leave nothing to train: give one",
    ),
    "gates of a dense model": (PACKED, ("runner_config.freeze_gate=True", "moe_config.expert_num=1"), "has no gates"),
}


@pytest.fixture(scope="module")
def written(job: Finetuning) -> tuple[Path, Path]:
    """Packed rows, and pairs."""
    packed, _ = job.rows("right", small_talks(), pack_strategy="pack")
    return packed, job.rows("right_pairs", pairs_of(4), dataset_type="dpo")[0]


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_built(
    job: Finetuning, written: tuple[Path, Path], case: str
) -> None:
    columns, options, message = WRONG[case]
    path = written[columns == PAIR_COLUMNS]
    with pytest.raises(UserError, match=message):
        run(
            job.yaml(path, columns),
            job.folder / "never",
            *options,
        )
    assert not (job.folder / "never").exists()


def test_packed_rows_are_not_evaluated_as_if_they_were_one_text(job: Finetuning, written: tuple[Path, Path]) -> None:
    words = ("run_mode=eval", "eval_dataset.input_columns=[input_ids, labels, document_ids]")
    data = f"eval_dataset.data_loader.dataset_dir={written[0]}"
    checked = check_run(config_of(job.yaml(written[0], PACKED), "engine=pt", *words, data), "test")
    with pytest.raises(UserError, match="rows of one document each"):
        open_evaluation(checked.run, checked.build.network)
