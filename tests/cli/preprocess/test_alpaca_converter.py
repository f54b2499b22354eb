# SPDX-License-Identifier: Apache-2.0
"""tools/dataset_preprocess/llama/alpaca_converter.py: the bytes that MindFormers r1.7 wrote, and clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from mindformers_ext.cli.alpaca_converter import main
from mindformers_ext.data.alpaca import json_list

RECORDS = [
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {
        "instruction": 'Say "hello"\tin {braces} \\ and é漢\U0001f600',
        "input": "",
        "output": "line one\nline two\u2028\x07",
    },
    {"instruction": "Blanks only.", "input": " \n", "output": ""},
    {"output": "no input field", "instruction": "{input}", "id": 7},
]
# Of the files that r1.7.0's own alpaca_converter.py wrote for RECORDS and for ../shared/data/alpaca_seed.json.
GOLDEN = "0c9e3894d7e35eed9fa3add7c50febecb13d235ffa971c54fc7f0c9996b993e4"
GOLDEN_SEED = "1974620e2e719702a2023d36890120fadd71d8e9bef822690788a6c435729c8f"


def as_list(path: Path) -> Path:
    path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")
    return path


def as_lines(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8")
    return path


def convert(data: Path, output: Path, *more: str) -> int:
    return main(["--data_path", str(data), "--output_path", str(output), *more])


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("write", [as_list, as_lines])
def test_the_bytes_are_those_of_r17(tmp_path: Path, capsys: pytest.CaptureFixture[str], write) -> None:
    output = tmp_path / "new" / "folder" / "out.json"
    assert convert(write(tmp_path / "in.json"), output) == 0
    assert digest(output) == GOLDEN
    assert [path.name for path in output.parent.iterdir()] == ["out.json"]
    said = capsys.readouterr()
    assert "4 conversations, 2 of them with an input" in said.out
    assert "1 records have an input of blanks only" in said.err
    assert "the field 'id' of 1 records is no alpaca field" in said.err


def test_the_seed_tasks(tmp_path: Path, repo_root: Path) -> None:
    data = repo_root.parent / "shared" / "data" / "alpaca_seed.json"
    if not data.is_file():
        pytest.skip("needs ../shared/data/alpaca_seed.json")
    assert convert(data, tmp_path / "out.json") == 0
    assert digest(tmp_path / "out.json") == GOLDEN_SEED


def test_the_command_in_an_ascii_locale(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-X", "utf8=0", "tools/dataset_preprocess/llama/alpaca_converter.py"]
    arguments = ["--data_path", str(as_lines(tmp_path / "in.jsonl")), "--output_path", str(tmp_path / "out.json")]
    environment = dict(os.environ, LC_ALL="C", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([*command, *arguments], cwd=repo_root, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out.json") == GOLDEN


def test_items_are_laid_out_as_json_dump_does() -> None:
    for items in ([], [{}], [1, "a\nb"], RECORDS, [[], {"a": {"b": [1, {"c": None}]}}]):
        assert "".join(json_list(items)) == json.dumps(items, ensure_ascii=False, indent=2)


BAD = [
    ('[{"instruction": "a", "output": "b"},\n\n {"instruction": "a"}]', r"record 2 \(line 3\): no field 'output'"),
    (
        '{"instruction": "a", "output": "b"}\n{"output": "b", "Input": ""}',
        r"record 2 \(line 2\): no field 'instruction'",
    ),
    ('[{"instruction": "a", "output": 7}]', "record 1 (line 1): 'output' is 7, not a string"),
    ('[{"instruction": "a", "input": "c", "output": null}]', "record 1 (line 1): 'output' is null; give it a text"),
    ('[{"instruction": "a", "output": "\\udc00"}]', "record 1 (line 1): 'output' holds half of a surrogate pair"),
    ('{"instruction": "a", "output": "b"}\n{"instruction": ', "line 2: not JSON"),
    ("", "is empty"),
    ("[]", "empty list"),
    ('["a"]', "line 1: found '\"', expected an object"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_leaves_an_older_output_as_it_was(tmp_path: Path, capsys, text: str, message: str) -> None:
    data, output = tmp_path / "in.json", tmp_path / "out.json"
    data.write_text(text, encoding="utf-8")
    output.write_text("older")
    assert convert(data, output, "--overwrite") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {data}") and message.replace("\\", "") in said and "Traceback" not in said
    assert output.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]


def test_an_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = as_list(tmp_path / "in.json"), tmp_path / "out.json"
    output.write_text("older")
    assert convert(data, output) == 2
    assert "exists: choose another path, or pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "older"
    assert convert(data, output, "--overwrite") == 0
    assert digest(output) == GOLDEN


def test_wrong_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = as_list(tmp_path / "in.json")
    for source, target, message in [
        (tmp_path / "none.json", tmp_path / "out.json", "none.json does not exist"),
        (tmp_path, tmp_path / "out.json", "is not a file"),
        (data, data, "is the input itself"),
        (data, tmp_path, "is a folder: give a file name"),
        (data, data / "out.json", "cannot write"),
    ]:
        assert convert(source, target, "--overwrite") == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_latin1_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "in.jsonl"
    data.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xe9", "output": "b"}\n')
    assert convert(data, tmp_path / "out.json") == 2
    assert f"{data}, line 2: not UTF-8" in capsys.readouterr().err


def test_killed_it_leaves_no_output_and_a_rerun_works(tmp_path: Path, repo_root: Path) -> None:
    data, output = tmp_path / "in.json", tmp_path / "out.json"
    data.write_text(json.dumps(RECORDS * 50_000), encoding="utf-8")
    command = [sys.executable, "tools/dataset_preprocess/llama/alpaca_converter.py", "--data_path", str(data)]
    with subprocess.Popen([*command, "--output_path", str(output)], cwd=repo_root, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not any(tmp_path.glob(".out.json.*.partial")):
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL and not output.exists()
    as_list(data)
    assert convert(data, output) == 0
    assert digest(output) == GOLDEN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]
