# SPDX-License-Identifier: Apache-2.0
"""Two processes, data parallel through launcher and Trainer, equal one process with the whole batch.

They start from a whole file, from the slices of a cluster (``auto_trans_ckpt``), and from what they saved themselves.
"""

import json
import os
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.strategy import read_strategy
from tests.helpers.cluster import (
    MASTER,
    end,
    free_port,
    launch,
    launch_environment,
    namespaces_missing,
    start,
    two_machines,
    wait_for,
    workers,
)
from tests.helpers.sliced import cut, write_ranks, write_strategy
from tests.helpers.tiny_run import BATCH, ROWS, SEQ, STEPS, command, make_job, rows_of, token_rows

pytestmark = pytest.mark.slow

FIXED = (
    "--train_dataset.data_loader.shuffle False --runner_wrapper.scale_sense 1.0 --optimizer.weight_decay 0 "
    "--runner_wrapper.max_grad_norm 0.5"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A job run to its end by two processes from given weights: output folder, metrics, command."""
    folder = tmp_path_factory.mktemp("pair")
    job = SimpleNamespace(folder=folder, yaml=make_job(folder), start=folder / "start.ckpt")
    write_start(job)
    job.command = (
        f"run_mindformer.py --config {job.yaml} --use_parallel True --parallel.parallel_mode 0 --batch_size "
        f"{BATCH // 2} {FIXED} --callbacks.1.save_checkpoint_steps 2 --callbacks.2.type "
        "MoEDropRateCallback"
    )
    job.fresh = f"{job.command} --load_checkpoint {job.start}"
    job.from_slices = (
        f"{job.command} --load_checkpoint slices --auto_trans_ckpt True --src_strategy_path_or_dir strategy"
    )
    text = launch(f"{job.fresh} --output_dir whole", 2, free_port(), "log", "True", 120, cwd=folder)
    assert text.startswith("0\n"), text[-3000:]
    job.text, job.rows = text, rows_of(folder / "whole")
    return job


def write_start(job):
    """Random weights for all runs."""
    import mindspore as ms

    from mindformers_ext.ms.causal_lm import build_causal_lm

    ms.set_seed(3)
    ms.save_checkpoint(build_causal_lm(network_spec_from_yaml(load_yaml(job.yaml))), str(job.start))


def trained_alone(job, rates):
    """One network on one device, on batches of both ranks' rows with two routing groups, as the two processes have.

    MindRecord gives rank r the rows r, r + 2, ...; the groups hold the rows of one rank each. Returns a row per step:
    losses, norm, and the load of each expert over the layers.
    """
    import mindspore as ms

    from mindformers_ext.ms.causal_lm import build_causal_lm
    from mindformers_ext.ms.optim import FusedAdamW
    from mindformers_ext.ms.step import LossNetwork, TrainStepCell

    ms.set_context(mode=ms.GRAPH_MODE)
    spec = network_spec_from_yaml(load_yaml(job.yaml))
    network = build_causal_lm(replace(spec, parallel=replace(spec.parallel, data_parallel=2)))
    assert ms.load_param_into_net(network, ms.load_checkpoint(str(job.start)))[0] == []
    network.set_train(True)
    optimizer = FusedAdamW(network.trainable_params(), ms.Tensor(rates, ms.float32), betas=(0.9, 0.95))
    step = TrainStepCell(LossNetwork(network), optimizer, max_grad_norm=0.5)
    rows, found = token_rows(), []
    for number in range(len(rates)):
        batch = rows[number * BATCH % ROWS :][:BATCH]
        outputs = step(ms.Tensor(np.concatenate([batch[0::2], batch[1::2]])))
        found.append([float(outputs[place]) for place in (0, 5, 6, 4)] + outputs[7].asnumpy().sum(0).tolist())
    return found


def slice_weights(job):
    """The start weights as a cluster saves them: experts and queries cut over two ranks, and its strategy file."""
    import mindspore as ms

    arrays = {name: value.asnumpy() for name, value in ms.load_checkpoint(str(job.start)).items()}
    cuts = {name: array.ndim == 3 or "attention.wq" in name for name, array in arrays.items()}
    rows = {
        name: {"matrix": [2], "tensor_map": [0 if cuts[name] else -1] + [-1] * (array.ndim - 1)}
        for name, array in arrays.items()
    }
    strategy = write_strategy(job.folder / "strategy" / "ckpt_strategy_rank_0.ckpt", rows)
    write_ranks(job.folder / "slices", cut(read_strategy(strategy), arrays))


def test_two_processes_equal_one_with_the_whole_batch(pair):
    rates = [row["learning_rate"] for row in pair.rows]
    expected = trained_alone(pair, rates)
    assert len(expected) == len(pair.rows) == STEPS == 20
    for row, (loss, lm_loss, aux_loss, norm, *load) in zip(pair.rows, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["lm_loss"] == pytest.approx(lm_loss, abs=1e-5)
        assert row["aux_loss"] == pytest.approx(aux_loss, abs=1e-6) and row["aux_loss"] > 0.09
        assert row["global_norm"] == pytest.approx(norm, abs=1e-4)
        assert np.array(row["expert_load"]).sum(0).tolist() == load
    assert max(row["global_norm"] for row in pair.rows) > 0.5  # clipped


def test_one_process_speaks_and_each_has_its_log(pair):
    lines = pair.text.splitlines()
    assert len(lines) <= 40 and sum(line.startswith(f"step {STEPS}/{STEPS}  loss ") for line in lines) == 1
    assert not any("per_step_time" in line or line.startswith(("[", "train| ")) for line in lines)
    for rank in range(2):
        assert (pair.folder / "log" / f"worker_{rank}.log").read_text().count("per_step_time: ") == STEPS


def test_every_rank_reports_the_whole_job(pair):
    from mindformers_ext.jobs.train.hooks import load_lines

    other = (pair.folder / "whole" / "metrics" / "rank_1.jsonl").read_text().splitlines()
    for row, line in zip(pair.rows, other, strict=True):
        second = json.loads(line)
        assert all(row[name] == second[name] for name in ("loss", "aux_loss", "global_norm", "expert_load", "dropped"))
        assert (np.array(row["expert_load"]).sum(axis=1) == 2 * BATCH * SEQ).all()  # of both ranks
    shown = [
        line.partition("layer: ")[2]
        for line in (pair.folder / "log" / "worker_1.log").read_text().splitlines()
        if "of an even load" in line
    ]
    expected = [
        line for row in pair.rows for line in load_lines(np.array(row["expert_load"]), np.array(row["dropped"]))
    ]
    assert [f"layer: {line}" for line in shown] == expected


def test_ranks_hold_the_same_weights(pair):
    import mindspore as ms

    held = [
        ms.load_checkpoint(str(next((pair.folder / "whole" / "checkpoint" / f"rank_{rank}").glob("*-2_10.ckpt"))))
        for rank in range(2)
    ]
    assert set(held[0]) == set(held[1]) and len(held[0]) > 60
    for name, value in held[0].items():
        np.testing.assert_array_equal(value.asnumpy(), held[1][name].asnumpy(), err_msg=name)


@pytest.mark.turn("same figures")
def test_our_own_loop_gives_the_same_bits(pair):
    """Rows, reduced gradients and figures; the first rank's checkpoint, which alone is written, holds the same."""
    text = launch(
        f"{pair.fresh} --trainer own --output_dir own", 2, free_port(), "log_own", "True", 120, cwd=pair.folder
    )
    assert text.startswith("0\n"), text[-3000:]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows_of(folder)]
        for folder in (pair.folder / "own", pair.folder / "whole")
    ]
    assert len(timeless[0]) == STEPS and timeless[0] == timeless[1]
    last = [max((pair.folder / name / "checkpoint" / "rank_0").glob("*-2_10.ckpt")) for name in ("own", "whole")]
    ours, theirs = map(CkptFile, last)
    assert list(ours.infos) == list(theirs.infos)
    assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in ours.infos)


@pytest.mark.turn("killed runs")
def test_a_killed_rank_ends_the_job_and_it_resumes_exactly(pair):
    output = pair.folder / "killed"
    slice_weights(pair)
    process = start(
        f"{pair.from_slices} --output_dir killed",
        2,
        free_port(),
        "log_killed",
        "True",
        120,
        cwd=pair.folder,
        log=pair.folder / "out",
    )
    try:
        wait_for(lambda: list((output / "checkpoint" / "rank_1").glob("*-1_6.ckpt")), 120, "step 6")
        os.kill(workers("--output_dir killed".replace(" ", "\0"))[1], signal.SIGKILL)
        assert process.wait(120) == 1
    finally:
        end(process)
    text = (pair.folder / "out").read_text()
    assert (output / "transformed_checkpoint" / "slices" / "rank_0" / "checkpoint_0.ckpt").is_file()
    assert "Worker 1 was ended by signal SIGKILL" in text and "log_killed/worker_1.log" in text
    assert len(rows_of(output)) < STEPS
    text = launch(
        f"{pair.command} --output_dir killed --resume_training True",
        2,
        free_port(),
        "log_resumed",
        "True",
        120,
        cwd=pair.folder,
    )
    assert text.startswith("0\n"), text[-3000:]
    resumed = rows_of(output)
    assert [row["step"] for row in resumed] == list(range(1, STEPS + 1))
    for row, expected in zip(resumed, pair.rows, strict=True):
        for name in ("loss", "lm_loss", "aux_loss", "global_norm", "learning_rate", "expert_load", "dropped"):
            assert row[name] == expected[name], (row["step"], name)


@pytest.mark.turn("same figures")
def test_two_machines_give_the_same(pair):
    reason = namespaces_missing()
    if reason:
        pytest.skip(reason)
    port = free_port()
    with two_machines() as names:
        whole = f"{pair.fresh} --auto_trans_ckpt True --output_dir nodes"  # nothing to transform, which is said
        nodes = [
            start(
                whole,
                2,
                1,
                MASTER,
                port,
                rank,
                f"log_node{rank}",
                "True",
                120,
                cwd=pair.folder,
                log=pair.folder / f"out{rank}",
                namespace=name,
            )
            for rank, name in enumerate(names)
        ]
        try:
            codes = [node.wait(200) for node in nodes]
        finally:
            for node in nodes:
                end(node)
    assert codes == [0, 0], (pair.folder / "out0").read_text()[-3000:]
    assert "holds whole weights" in (pair.folder / "log_node1" / "worker_1.log").read_text()
    assert not (pair.folder / "log_node1" / "scheduler.log").exists()
    for row, expected in zip(rows_of(pair.folder / "nodes"), pair.rows, strict=True):
        assert row["loss"] == expected["loss"] and row["expert_load"] == expected["expert_load"]


def test_use_parallel_in_a_lone_process_is_said_and_runs(pair):
    result = subprocess.run(
        command(
            pair.yaml,
            "--use_parallel",
            "True",
            "--parallel.parallel_mode",
            0,
            "--num_samples",
            4,
            "--epochs",
            1,
            "--output_dir",
            "alone",
        ),
        cwd=pair.folder,
        env=launch_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "use_parallel becomes False: this process was started alone" in result.stderr
    assert len(rows_of(pair.folder / "alone")) == 1 and ROWS == 40
