# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py`` as a user runs it: mistakes, the same losses twice, stops and continuations."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.jobs.checkpoint.saved import saved_in
from tests.helpers.tiny_run import (
    ROOT,
    SEQ,
    STEPS,
    command,
    environment,
    make_job,
    rows_of,
    run_job,
    token_rows,
    write_rows,
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The YAML of a job that runs."""
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(job):
    """The job run to its end: output folder."""
    output = job.parent / "whole"
    result = run_job(job, "--output_dir", output, cwd=job.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    (output / "seen.txt").write_text(result.stdout + result.stderr)
    return output


def test_people_see_few_lines_and_the_log_holds_all(whole):
    seen = (whole / "seen.txt").read_text()
    lines = seen.splitlines()
    assert len(lines) <= 40 and "[WARNING]" not in seen and " - INFO - " not in seen
    log = whole / "log" / "rank_0" / "output.log"
    for text in (
        f"note: the whole log is {log} (--verbose shows it)",
        "importing MindFormers: done in ",
        "compiling the training step ...",
        "compiling the training step: done in ",
        f"step {STEPS}/{STEPS}  loss {losses(whole)[-1]:.4f}  aux ",
    ):
        assert [line for line in lines if line.startswith(text)], text
    assert log.read_text().count("per_step_time: ") >= STEPS  # as today


def losses(output):
    return [row["loss"] for row in rows_of(output)]


def refused(capsys, job, *arguments):
    """The one paragraph that the command prints before it ends with code 2."""
    try:
        code = main(["--config", str(job), *map(str, arguments)])
    except SystemExit as end:  # argparse
        code = end.code
    text = capsys.readouterr().err
    assert code == 2 and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--moe_config.expert_nmu", 4], ["unknown key 'expert_nmu'", "did you mean 'expert_num'"]),
        (["--epoch", 4], ["unknown option --epoch", "'--epochs'"]),
        (["--use_parallel", "True"], ["8*1*2*1 = 16", "device count 1"]),
        (["--train_data", "none.mindrecord"], ["none.mindrecord", "does not exist", "--train_data"]),
        (["--model.model_config.seq_length", 64], ["rows of 33 tokens", "needs 65", "seq_length to 32"]),
        (["--model.model_config.vocab_size", 300], ["400 pieces", "vocab_size is 300"]),
        (["--moe_config.num_experts_chosen", 5], ["num_experts_chosen=5 exceeds expert_num=4"]),
        (["--moe_config.capacity_factor", 5], ["capacity_factor=5.0 is out of range", "up to expert_num (4)"]),
        (["--moe_config.expert_num", -2], ["moe_config.expert_num=-2", "above 0"]),
        (["--device_target", "Ascend"], ["device_target is Ascend", "--device_target CPU"]),
        (["--load_checkpoint", "none.ckpt"], ["none.ckpt", "does not exist"]),
        (["--batch_size", 64], ["40 rows", "one step takes 64"]),
        (["--resume_training", "True", "--load_checkpoint", "."], ["nothing to resume from"]),
        (["--run_mode", "predict"], ["nothing to predict", "--predict_data"]),
        (["--recompute_config.select_recompute", "[attn]"], ["'attn' is no part of a layer", "attention, ffn_norm"]),
        (["--optimizer.beta1", 0.9], ["unknown key 'beta1'", "optimizer (AdamW)"]),
        (["--train_data", "a", "--train_dataset_dir", "b"], ["are one option"]),
    ],
)
def test_a_bad_input_is_one_clear_message(job, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(job.parent)
    text = refused(capsys, job, *arguments)
    for word in words:
        assert word in text


def test_an_unknown_key_in_the_file_is_named(job, capsys, tmp_path):
    text = job.read_text().replace("warmup_ratio", "warmup_rate")
    (tmp_path / "typo.yaml").write_text(text)
    message = refused(capsys, tmp_path / "typo.yaml")
    assert "typo.yaml" in message and "'warmup_rate'" in message and "did you mean 'warmup_ratio'" in message


def test_ids_without_an_embedding_are_refused(job, capsys, tmp_path):
    data = write_rows(tmp_path / "large.mindrecord", token_rows() + 350)
    text = refused(capsys, job, "--train_data", data)
    assert "model_config.vocab_size=400 has embeddings for 0 to 399" in text and "large.mindrecord" in text


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(whole, job, capsys):
    checkpoint = whole / "checkpoint"
    text = refused(capsys, job, "--load_checkpoint", checkpoint, "--model.model_config.hidden_size", 48)
    assert "model.layers.0.attention.wq.weight is (32, 32), the network has (48, 48)" in text
    text = refused(capsys, job, "--load_checkpoint", checkpoint, "--model.model_config.num_layers", 3)
    assert "weights missing: model.layers.2.attention_norm.weight" in text


def test_mistakes_and_help_cost_no_framework(job):
    script = (
        "import sys; from mindformers_ext.cli.run_mindformer import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "assert code == (0 if '--help' in sys.argv else 2), code\n"
        "assert not {'mindspore', 'mindformers', 'torch'} & set(sys.modules)\n"
    )

    def shown(*arguments):
        words = [sys.executable, "-c", script, "--config", str(job), *arguments]
        return subprocess.run(
            words, cwd=ROOT, check=True, env=environment(), capture_output=True, text=True, timeout=60
        ).stdout

    shown("--moe_config.capacity_factor", "9")
    help_text = shown("--help")
    assert "examples:" in help_text and "--resume_training" in help_text


@pytest.mark.long("two loops give the same bits in tests/cli/run/test_trainer_own.py")
@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses(whole, job):
    output = job.parent / "again"
    assert run_job(job, "--output_dir", output, cwd=job.parent).returncode == 0
    assert losses(output) == losses(whole) and len(losses(whole)) == STEPS
    assert run_job(job, "--output_dir", output, "--seed", 8, "--epochs", 1, cwd=job.parent).returncode == 0
    assert losses(output)[0] != losses(whole)[0]


def kill_while_writing(job, output, at_least):
    """Start the job and kill it while a checkpoint file is half written, after ``at_least`` whole ones."""
    process = subprocess.Popen(
        command(
            job,
            "--output_dir",
            output,
            "--callbacks.1.save_checkpoint_steps",
            1,
            "--callbacks.1.keep_checkpoint_max",
            30,
        ),
        cwd=job.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = output / "checkpoint" / "rank_0"
    deadline = time.time() + 240
    try:
        while process.poll() is None and time.time() < deadline:
            names = os.listdir(folder) if folder.is_dir() else []
            half = [name for name in names if name.endswith(".tmp")]
            if half and sum(name.endswith(".ckpt") for name in names) >= at_least:
                os.kill(process.pid, signal.SIGSTOP)  # hold it, and look whether the file is still the half one
                if (folder / half[0]).exists():
                    return half[0]
                os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    raise AssertionError("the job ended before it could be caught writing")


@pytest.mark.slow
@pytest.mark.turn("killed runs")
def test_killed_while_writing_a_checkpoint_it_continues_from_the_last_whole_one(whole, job):
    output = job.parent / "killed"
    half = kill_while_writing(job, output, at_least=4)
    before = saved_in(output / "checkpoint" / "rank_0")
    assert len(before) >= 4 and len(before) < STEPS
    result = run_job(job, "--output_dir", output, "--resume_training", "True", cwd=job.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{half} was being written when the run was stopped" in result.stderr
    assert f"resuming from {before[-1].path}, the newest whole checkpoint" in result.stderr
    rows, expected = rows_of(output), rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "lm_loss", "aux_loss", "learning_rate", "loss_scale", "global_norm"):
        np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in expected], rtol=0, atol=1e-6)
    assert not list((output / "checkpoint" / "rank_0").glob("*.tmp"))
    assert saved_in(output / "checkpoint" / "rank_0")[-1].label == "2_10"


@pytest.mark.slow
@pytest.mark.turn("runs")
def test_a_loss_that_is_not_a_number_stops_the_run(whole, job):
    output = job.parent / "broken"
    first = run_job(job, "--output_dir", output, "--epochs", 1, cwd=job.parent)
    assert first.returncode == 0
    good = saved_in(output / "checkpoint" / "rank_0")[-1].path
    result = run_job(
        job,
        "--output_dir",
        output,
        "--resume_training",
        "True",
        "--lr_schedule.learning_rate",
        "1e12",
        "--callbacks.1.save_checkpoint_steps",
        1,
        "--callbacks.1.keep_checkpoint_max",
        1,
        cwd=job.parent,
    )
    assert result.returncode == 2
    message = result.stderr[result.stderr.index("error: ") :]
    assert "Traceback" not in message and len(message.strip().splitlines()) == 1
    assert "step 12: the loss is nan" in message and f"The last good checkpoint is {good}" in message
    assert good.exists() and saved_in(output / "checkpoint" / "rank_0")[-1].path == good
    last = rows_of(output)[-1]
    assert last["step"] == 12 and last["loss"] is None
    assert math.isfinite(rows_of(output)[-2]["loss"])


@pytest.mark.slow
@pytest.mark.turn("runs")
def test_safetensors_are_saved_and_evaluated(job, tmp_path):
    text = job.read_text().replace("async_save: False", "async_save: False, checkpoint_format: safetensors")
    config = tmp_path / "job.yaml"
    config.write_text("load_ckpt_format: safetensors\n" + text)
    output = tmp_path / "out"
    assert run_job(config, "--output_dir", output, "--epochs", 1, cwd=tmp_path).returncode == 0
    resumed = run_job(config, "--output_dir", output, "--resume_training", "True", cwd=tmp_path)
    assert resumed.returncode == 2 and "from .ckpt only" in resumed.stderr
    result = run_job(
        config, "--run_mode", "eval", "--output_dir", output, "--load_checkpoint", output / "checkpoint", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "(loss " in result.stdout


@pytest.mark.slow
@pytest.mark.turn("runs")
def test_finetuning_starts_from_a_checkpoint_and_counts_labels(whole, job, tmp_path):
    rows = token_rows()
    labels = rows.copy()
    labels[:, : SEQ // 2] = -100
    data = write_rows(tmp_path / "labelled.mindrecord", rows, labels=labels)
    output = tmp_path / "finetuned"
    result = run_job(
        job,
        "--run_mode",
        "finetune",
        "--load_checkpoint",
        whole / "checkpoint",
        "--train_data",
        data,
        "--train_dataset.input_columns",
        "[input_ids, labels]",
        "--output_dir",
        output,
        "--epochs",
        1,
        "--do_eval",
        "True",
        "--options",
        "eval_step_interval=5",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = rows_of(output)
    assert len(found) == STEPS // 2
    assert found[0]["lm_loss"] == pytest.approx(rows_of(whole)[-1]["lm_loss"], abs=0.1)
    assert (result.stdout + result.stderr).count("Eval result:") >= 2
