# SPDX-License-Identifier: Apache-2.0
"""``scripts/msrun_launcher.sh``: its argument forms, its refusals, and every form started for real on the CPU."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mindformers_ext.cli.launch import main
from mindformers_ext.jobs.launch.arguments import find_script, read_launch, split_command
from tests.helpers.cluster import (
    MASTER,
    SUM_SCRIPT,
    default_port,
    end,
    free_port,
    launch,
    launch_environment,
    launcher,
    namespaces_missing,
    start,
    two_machines,
    wait_for,
)
from tests.helpers.cluster import workers as running_workers
from tests.helpers.tiny_run import ROOT

SHOW_SCRIPT = """
import os, sys
if os.environ.get("MS_ROLE") != "MS_SCHED":
    print("rank", os.environ.get("RANK_ID"), "of", os.environ.get("MS_WORKER_NUM"), sys.argv[1:], flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the scripts that the jobs run."""
    (tmp_path / "sum.py").write_text(SUM_SCRIPT)
    (tmp_path / "show.py").write_text(SHOW_SCRIPT)
    return tmp_path


def form(*arguments):
    launched = read_launch(["run_mindformer.py", *arguments], {})
    return (
        launched.workers,
        launched.local_workers,
        launched.master_addr,
        launched.port,
        launched.node_rank,
        str(launched.log_dir),
        launched.join,
        launched.timeout,
    )


def test_the_four_forms():
    assert form() == (8, 8, "127.0.0.1", 8118, 0, "output/msrun_log", False, 7200)
    assert form("4") == (4, 4, "127.0.0.1", 8118, 0, "output/msrun_log", False, 7200)
    assert form("8", "8200", "logs", "True", "300") == (8, 8, "127.0.0.1", 8200, 0, "logs", True, 300)
    assert form("16", "8", "192.168.1.1", "8118", "1", "output/msrun_log", "False", "300") == (
        16,
        8,
        "192.168.1.1",
        8118,
        1,
        "output/msrun_log",
        False,
        300,
    )
    launched = read_launch(["run_mindformer.py", "16", "8", "192.168.1.1", "8118", "1", "l", "False", "300"], {})
    assert launched.nodes == 2 and list(launched.ranks) == list(range(8, 16))
    assert read_launch(["run_mindformer.py"], {"MF_LOG_SUFFIX": "a"}).log_dir.name == "msrun_log_a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8", "8118"], ["3 arguments were given", "1, 2, 6 or 9 are allowed", "2: 8", "COMMAND WORKERS PORT LOG_DIR"]),
        (["8", "8118", "log", "False"], ["5 arguments were given"]),
        (["16", "8", "127.0.0.1", "8118", "0", "log", "False"], ["8 arguments were given", "MASTER_ADDR PORT"]),
    ],
)
def test_a_wrong_count_is_explained(capsys, arguments, words):
    assert main(["run_mindformer.py", *arguments]) == 1
    text = capsys.readouterr().err
    assert all(word in text for word in words) and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], ["WORKERS='x' is not a whole number"]),
        (["0"], ["WORKERS=0", "above 0"]),
        (["8", "80", "log", "False", "300"], ["PORT=80 is out of range", "1024 to 65535"]),
        (["8", "log", "8118", "False", "300"], ["PORT='log' is not a whole number", "WORKERS, PORT, LOG_DIR"]),
        (["8", "8118", "log", "Yes", "300"], ["JOIN='Yes'", "True, False"]),
        (["8", "8118", "log", "True", "0"], ["TIMEOUT=0"]),
        (["16", "5", "127.0.0.1", "8118", "0", "l", "True", "9"], ["WORKERS=16 is not a multiple of LOCAL_WORKERS=5"]),
        (["8", "16", "127.0.0.1", "8118", "0", "l", "True", "9"], ["LOCAL_WORKERS=16 exceeds WORKERS=8"]),
        (["16", "8", "127.0.0.1", "8118", "2", "l", "True", "9"], ["NODE_RANK=2", "ranks 0 to 1"]),
        (["16", "8", "192.0.2.1", "8118", "0", "l", "True", "9"], ["192.0.2.1 is not an address of this machine"]),
        (["16", "8", "127.0.0.1", "8118", "1", "l", "True", "9"], ["the master has NODE_RANK 0"]),
        (["16", "8", "no such host", "8118", "1", "l", "True", "9"], ["MASTER_ADDR=no such host is no address"]),
    ],
)
def test_a_wrong_value_is_explained(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["run_mindformer.py", *arguments]) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("none.py --a", ["none.py of COMMAND does not exist"]),
        ("", ["COMMAND is empty"]),
        ("run_mindformer.py 'a", ["close every quote"]),
        ("run_mindformer.py > log", ["> outside quotes needs a shell"]),
        ("run_mindformer.py $(date)", ["$( outside quotes"]),
        ("run_mindformer.py; rm x", ["; outside quotes"]),
    ],
)
def test_a_wrong_command_is_explained(capsys, command, words):
    assert main([command, "2"]) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text


def test_quotes_reach_the_script_as_written():
    assert split_command('a.py --p "I love Beijing, because"') == ["a.py", "--p", "I love Beijing, because"]
    assert split_command('a.py \'x; $(y) "z"\' "it\'s | \\"q\\"" b\\ c') == [
        "a.py",
        'x; $(y) "z"',
        'it\'s | "q"',
        "b c",
    ]
    assert split_command("a.py \\\n  --b 1 \\\n--c 'd\\\ne'") == ["a.py", "--b", "1", "--c", "d\\\ne"]
    assert split_command("a.py --x '' --y=\"[0.9, 0.95]\"") == ["a.py", "--x", "", "--y=[0.9, 0.95]"]


def test_a_script_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_script("run_mindformer.py").is_file() and find_script("none.py") is None


def test_the_dry_run_shows_the_command_of_the_seed(tmp_path):
    text = launch(
        'run_mindformer.py --run_mode predict --predict_data "I love Beijing, because"',
        16,
        8,
        "192.168.1.1",
        8118,
        1,
        "output/msrun_log",
        "False",
        300,
        cwd=tmp_path,
        MSRUN_DRY_RUN="1",
        MSRUN_BIND_CORE="True",
    )
    for word in (
        "--bind_core=True --worker_num=16 --local_worker_num=8 --master_addr=192.168.1.1 --node_rank=1 "
        "--master_port=8118 --log_dir=output/msrun_log",
        "--cluster_time_out=300",
        "--predict_data 'I love Beijing, because'",
    ):
        assert word in text
    assert not (tmp_path / "output").exists()


def test_a_taken_port_is_refused_at_once(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = launch("sum.py 1", 2, port, "log", "True", 60, cwd=folder)
    assert text.startswith("2\n") and f"port {port} of 127.0.0.1 is taken" in text and "another PORT" in text
    assert not (folder / "log").exists()


@pytest.fixture
def port_8118():
    with default_port(), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8118))
        except OSError:
            pytest.skip("the default port 8118 is in use on this machine")
        probe.close()
        yield


def test_form_1_starts_eight_workers_in_the_background(folder, port_8118):
    text = launch("show.py 'a b' c", cwd=folder)
    logs = folder / "output" / "msrun_log"
    assert text.startswith("0\n") and str(logs / "launcher.log") in text
    wait_for(lambda: "the job ended with exit code 0" in (logs / "launcher.log").read_text(), 60, "the job's end")
    for rank in range(8):
        assert (logs / f"worker_{rank}.log").read_text() == f"rank {rank} of 8 ['a b', 'c']\n"


def test_one_worker_really_runs(folder):
    text = launch("show.py x", 1, free_port(), "log", "True", 60, cwd=folder)
    assert text.startswith("0\n") and "rank None of None ['x']" in text
    assert (folder / "log" / "worker_0.log").read_text() == "rank None of None ['x']\n"


def test_a_failing_single_worker_fails_the_launcher(folder):
    (folder / "wrong.py").write_text("raise SystemExit('error: a wrong key')")
    text = launch("wrong.py", 1, free_port(), "log", "True", 60, cwd=folder)
    assert text.startswith("1\n") and "Worker 0 ended with exit code 1. Its log: log/worker_0.log" in text


@pytest.mark.slow
@pytest.mark.turn("same figures")
def test_form_2_and_form_9_on_one_machine(folder, port_8118):
    assert launch("sum.py 2", 2, cwd=folder).startswith("0\n")  # in the background, default port
    text = launch('sum.py 2 "q r"', 2, 2, "127.0.0.1", free_port(), 0, "log9", "True", 60, cwd=folder)
    assert text.startswith("0\n"), text
    for rank in range(2):
        log = (folder / "log9" / f"worker_{rank}.log").read_text()
        assert f"rank {rank} of 2 step 1 sum 3 ['q r']" in log
    background = folder / "output" / "msrun_log" / "launcher.log"
    wait_for(lambda: "exit code 0" in background.read_text(), 60, "the background job's end")
    assert "rank 1 of 2 step 1 sum 3" in (background.parent / "worker_1.log").read_text()


@pytest.mark.slow
@pytest.mark.turn("launchers")
def test_form_6_names_the_log_of_a_killed_worker(folder):
    process = start("sum.py 100000", 2, free_port(), "log", "True", 60, cwd=folder, log=folder / "out")
    try:
        wait_for(lambda: "step 3" in (folder / "out").read_text(), 60, "steps")
        os.kill(running_workers("sum.py")[1], signal.SIGKILL)
        assert process.wait(90) == 1
    finally:
        end(process)
    text = (folder / "out").read_text()
    assert "Worker 1 was ended by signal SIGKILL" in text and "Its log: log/worker_1.log" in text
    assert not running_workers("sum.py")


@pytest.mark.slow
@pytest.mark.turn("launchers")
def test_stopping_the_launcher_stops_every_worker(folder):
    process = start("sum.py 100000", 2, free_port(), "log", "True", 60, cwd=folder, log=folder / "out")
    try:
        wait_for(lambda: "step 1" in (folder / "out").read_text(), 60, "steps")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        end(process)
    assert not running_workers("sum.py")
    assert not subprocess.run(["pgrep", "-f", f"{folder}.*sum.py"], capture_output=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.turn("launchers")
def test_an_unreachable_master_is_reported_within_the_timeout(folder):
    missing = namespaces_missing()
    if missing:
        pytest.skip(missing)
    with two_machines() as (_, second):  # nobody starts the launcher on the first one
        text = launch("sum.py 1", 2, 1, MASTER, free_port(), 1, "log", "True", 8, cwd=folder, namespace=second)
    assert text.startswith("1\n"), text
    assert f"The master {MASTER}:" in text and "did not answer" in text and "within 8 s" in text
    assert "Its log: log/worker_1.log" in text and not running_workers("sum.py")


def test_help_loads_no_framework(tmp_path):
    words = {"cwd": tmp_path, "env": launch_environment(), "capture_output": True, "text": True, "check": True}
    text = subprocess.run(launcher("--help"), **words).stdout
    assert "LOCAL_WORKERS" in text and "exit code" in text
    script = (
        "import sys; from mindformers_ext.cli.launch import main\n"
        "assert main(['--help']) == 0 and not {'mindspore', 'mindformers', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    words["env"] |= {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], **words).stdout == text
