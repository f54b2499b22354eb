# SPDX-License-Identifier: Apache-2.0
"""Packed rows on the fused kernel of variable length, compiled for Ascend, and through MindFormers' own loop."""

import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.documents import MOST_DOCUMENTS
from mindformers_ext.data.documents import documents_of
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from mindformers_ext.ms.ops import ascend
from mindformers_ext.ms.ops.portable_documents import PackedAttentionOp
from tests.helpers.tiny_run import ROOT, SEQ, config_of, environment, rows_of, token_rows, write_rows
from tests.mf.test_ascend_ops import normal, switched, with_formula

COLUMNS = "train_dataset.input_columns=[input_ids, labels, document_ids]"
ALONE = ("parallel_config.data_parallel=1", "parallel_config.expert_parallel=1", "parallel_config.pipeline_stage=1")


@pytest.fixture(autouse=True)
def _graph_mode_again():
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def by_lengths(kernel, query, key, value, shift, drop, padding, hidden, prefix, ends, key_ends):
    """FlashAttentionScore in layout TND: rows of tokens, of which each group ends at ``ends``, sees itself alone."""
    assert (shift, drop, padding, prefix) == (None,) * 4 and hidden.shape == (2048, 2048)
    assert ends.dtype == ms.int64 and np.array_equal(ends.asnumpy(), key_ends.asnumpy())
    q, k, v = (x.asnumpy() for x in (query, key, value))
    T, H, _ = q.shape
    group = np.searchsorted(ends.asnumpy(), np.arange(T), side="right")
    assert ends.asnumpy()[-1] == T
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    seen = (group[:, None] == group[None]) & (distance >= 0)
    if kernel.sparse_mode == 4:
        seen &= distance <= kernel.pre_tokens
    k, v = (np.repeat(x, H // k.shape[1], 1) for x in (k, v))
    scores = np.where(seen[None], kernel.scale_value * np.einsum("thd,uhd->htu", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("htu,uhd->thd", weights / weights.sum(-1, keepdims=True), v)
    return None, None, None, Tensor(mixed.astype(np.float32))


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_of_variable_length_is_attention_within_documents(window):
    documents = Tensor(np.stack([documents_of([5, 9, 3], 20), documents_of([20], 20), documents_of([1] * 20, 20)]))
    q, k, v = normal(3, 20, 64), normal(3, 20, 32, seed=1), normal(3, 20, 32, seed=2)
    cell = with_formula(ascend.PackedFlashOp(4, 2, 16, 20, ms.float32, window), "attend", by_lengths)
    expected = PackedAttentionOp(4, 2, 16, 20, ms.float32, window)(q, k, v, documents)
    np.testing.assert_allclose(cell(q, k, v, documents).asnumpy(), expected.asnumpy(), atol=2e-6)


def test_a_row_of_as_many_documents_as_may_be_fits_the_kernel():
    documents = Tensor(documents_of([1] * MOST_DOCUMENTS, MOST_DOCUMENTS)[None])
    q = normal(1, MOST_DOCUMENTS, 16)
    cell = with_formula(ascend.PackedFlashOp(1, 1, 16, MOST_DOCUMENTS, ms.float32), "attend", by_lengths)
    np.testing.assert_allclose(cell(q, q, q, documents).asnumpy(), q.asnumpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.turn("packed rows")
def test_the_compiler_takes_attention_of_variable_length_on_a_cut_network(job):
    folder = job.folder / "packed"
    folder.mkdir()
    sizes = {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2, "pipeline_stage": 1, "micro_batch_num": 1}
    words = [f"parallel_config.{name}={size}" for name, size in sizes.items()]
    words += ["parallel_config.use_seq_parallel=True", "parallel_config.vocab_emb_dp=False"]
    config = switched(job.yaml, True, "use_parallel=True", "parallel.enable_alltoall=True", COLUMNS, *words)
    (folder / "packed.yaml").write_text(dump_yaml(config), encoding="utf-8")
    script = [sys.executable, str(ROOT / "tools" / "dryrun.py"), "--config", str(folder / "packed.yaml")]
    command = [*script, "--worker_num", "4", "--ranks", "0", "--out", str(folder / "out"), "--keep_graphs", "True"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((folder / "out" / "report.json").read_text())["ranks"][0]
    assert found["unplanned"] == [] and found["operators"]["FlashAttentionScoreGrad"] == 2
    assert found["operators"]["BatchMatMul"] == 3 * 3 * 2  # experts alone: none of attention


def packed_rows(folder):
    """Rows of three documents and padding, each of which bears loss behind its first token."""
    ids = token_rows(rows=16)
    documents = np.stack([documents_of([9, 12, 8], SEQ + 1)] * len(ids))
    ids[documents == 0] = 3
    first = np.diff(documents, axis=1, prepend=-1) != 0
    labels = np.where(first | (documents == 0), -100, ids).astype(np.int32)
    return write_rows(folder / "packed.mindrecord", ids, labels=labels, document_ids=documents)


@pytest.mark.slow
@pytest.mark.turn("packed rows")
def test_mindformers_loop_takes_the_steps_of_ours_on_packed_rows_and_leaves_frozen_gates(job, tmp_path, monkeypatch):
    from mindformers_ext.mf.run import run

    monkeypatch.chdir(tmp_path)
    data = packed_rows(tmp_path)
    words = ("runner_config.epochs=1", "runner_config.freeze_gate=True", "moe_config.capacity_factor=-1", COLUMNS)
    found = {}
    for trainer in ("mindformers", "own"):
        options = (f"train_dataset.data_loader.dataset_dir={data}", f"output_dir={tmp_path / trainer}")
        config = config_of(job.yaml, *words, *ALONE, *options, f"loop={trainer}")
        checked = check_run(config, "job.yaml")
        if trainer == "mindformers":
            run(checked.config, checked)
        else:
            train(checked.run, checked.config, checked.build.network)
        found[trainer] = rows_of(tmp_path / trainer)
    assert len(found["own"]) == 4
    for theirs, ours in zip(*found.values(), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    held = [ms.load_checkpoint(str(next((tmp_path / name).rglob("*_4.ckpt")))) for name in found]
    gates = [name for name in held[0] if ".router." in name and name.startswith("model.")]
    assert gates and not any(name.startswith("adam_m.") and ".router." in name for name in (*held[0], *held[1]))
    assert all(np.array_equal(held[0][name].asnumpy(), held[1][name].asnumpy()) for name in gates)
