# SPDX-License-Identifier: Apache-2.0
"""What travels beside the weights, by conversion and by merging; one file of weights; words for types."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli import convert, merge
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model
from tests.helpers.fuzz_weights import SPEC as MIXTURE

SPEC = replace(MIXTURE, moe=None)
BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "tekken.json": "{}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with everything beside it."""
    out = tmp_path / "hf"
    make_tiny_model(TinyModelRequest(output_dir=out, spec=SPEC))
    for name, text in BESIDE.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    return out


def run(*words: object) -> int:
    return convert.main([*map(str, words)])


def beside(path: Path) -> dict[str, str]:
    return {name: (path / name).read_text() for name in BESIDE if (path / name).is_file()}


def test_they_come_back_with_the_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input_path", folder, "--output_path", tmp_path / "m.ckpt") == 0
    back = ["--reversed", "--input_path", tmp_path / "m.ckpt", "--output_path", tmp_path / "back"]
    assert run(*back, "--config", folder) == 0
    assert beside(tmp_path / "back") == BESIDE
    assert "tokenizer" not in capsys.readouterr().err
    assert run(*back, "--config", folder, "--overwrite") == 0  # a folder of templates is no obstacle


def test_a_tokenizer_that_is_not_written_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--input_path", folder, "--output_path", tmp_path / "m.ckpt") == 0
    back = ["--reversed", "--input_path", tmp_path / "m.ckpt", "--output_path"]
    capsys.readouterr()
    assert run(*back, tmp_path / "a") == 0
    assert "no tokenizer was written" in capsys.readouterr().err
    assert run(*back, tmp_path / "b", "--config", folder / "config.json") == 0
    assert "no tokenizer was written" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    (folder / "tekken.json").unlink()
    assert run(*back, tmp_path / "c", "--config", folder) == 0
    assert "no tokenizer was written" in capsys.readouterr().err


def test_a_merge_takes_them_along(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    make_tiny_model(TinyModelRequest(output_dir=tmp_path / "other", spec=SPEC, seed=1))
    weights = {folder: 0.25, tmp_path / "other": 0.75}
    models = "".join(f"  - {{model: {name}, parameters: {{weight: {weight}}}}}\n" for name, weight in weights.items())
    config.write_text(f"merge_method: linear\nbase_model: {folder}\nmodels:\n{models}dtype: half\n")
    assert merge.main(["yaml", str(config), str(tmp_path / "out"), "--quiet"]) == 0
    assert beside(tmp_path / "out") == BESIDE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    assert merge.main(["yaml", str(config), str(tmp_path / "out"), "--quiet", "--overwrite"]) == 0


def test_a_link_that_leads_out_of_the_folder_is_no_companion(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "tekken.json").unlink()
    (folder / "tekken.json").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").symlink_to("tokenizer.json")  # inside: a file as any other
    assert run("--input_path", folder, "--output_path", tmp_path / "m.ckpt") == 0
    back = ["--reversed", "--input_path", tmp_path / "m.ckpt", "--output_path", tmp_path / "back"]
    assert run(*back, "--config", folder) == 0
    assert "not copied" in capsys.readouterr().err
    assert not (tmp_path / "back" / "tekken.json").exists() and (tmp_path / "back" / "vocab.json").is_file()


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    shutil.move(snapshot / "tokenizer.json", blobs / "4567")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    assert run("--input_path", snapshot, "--output_path", tmp_path / "m.ckpt") == 0
    back = ["--reversed", "--input_path", tmp_path / "m.ckpt", "--output_path", tmp_path / "back"]
    assert run(*back, "--config", snapshot) == 0
    assert beside(tmp_path / "back") == BESIDE


def arrays(path: Path) -> dict[str, np.ndarray]:
    reader = CkptFile(path)
    found = {name: np.asarray(reader.read(name)) for name in reader.infos}
    reader.close()
    return found


def test_one_file_of_weights_is_converted_with_the_configuration_beside_it(folder: Path, tmp_path: Path) -> None:
    assert run("--input_path", folder, "--output_path", tmp_path / "a.ckpt") == 0
    assert run("--input_path", folder / "model.safetensors", "--output_path", tmp_path / "b.ckpt") == 0
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    shutil.move(folder / "model.safetensors", tmp_path / "lone.safetensors")
    lone = ["--input_path", tmp_path / "lone.safetensors", "--output_path", tmp_path / "c.ckpt"]
    assert run(*lone) == 2
    assert run(*lone, "--config", folder) == 0
    assert (tmp_path / "c.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()
    # MindSpore's own file of this kind is still taken for what it is
    assert run("--input_path", folder / ".." / "a.ckpt", "--output_path", tmp_path / "d.safetensors") == 0
    assert run("--input_path", tmp_path / "d.safetensors", "--output_path", tmp_path / "e.ckpt") == 0
    assert all(
        np.array_equal(array, arrays(tmp_path / "a.ckpt")[n]) for n, array in arrays(tmp_path / "e.ckpt").items()
    )


def test_one_of_several_files_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input_path", folder, "--output_path", tmp_path / "a.ckpt") == 0
    words = ["--reversed", "--input_path", tmp_path / "a.ckpt", "--output_path", tmp_path / "cut"]
    assert run(*words, "--max_shard_size", "2KB") == 0
    part = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    assert run("--input_path", part, "--output_path", tmp_path / "b.ckpt") == 2
    assert "give their folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "kind"),
    [(("fp16", "half", "float16", "Half"), "float16"), (("bf16", "bfloat16", "torch.bfloat16"), "bfloat16")],
)
def test_every_word_for_a_type_gives_the_same_file(
    words: tuple[str, ...], kind: str, folder: Path, tmp_path: Path
) -> None:
    files = []
    for word in words:
        files.append(tmp_path / f"{word}.ckpt")
        assert run("--input_path", folder, "--output_path", files[-1], "--dtype", word) == 0
    assert len({path.read_bytes() for path in files}) == 1
    assert json.loads(Path(f"{files[0]}.json").read_text())["dtype"] == kind


def test_a_word_that_is_no_type_is_refused_with_all_that_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--input_path", folder, "--output_path", "x.ckpt", "--dtype", "fp8")
    assert ended.value.code == 2
    assert "bfloat16" in capsys.readouterr().err
