# SPDX-License-Identifier: Apache-2.0
"""Models by their name on the hub: from a cache laid out as huggingface_hub does it; nothing is fetched unasked."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from mindformers_ext.cli import convert, first, merge
from mindformers_ext.cli.tiny_model import main as tiny_model
from mindformers_ext.core.errors import UserError
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.jobs.checkpoint.hub import find_folder, from_hub, not_wanted

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    sizes = "--vocab_size 400 --hidden_size 16 --intermediate_size 24 --num_attention_heads 2 --num_local_experts 2"
    assert tiny_model(["--output_dir", str(folder), *sizes.split()]) == 0
    train_sentencepiece(standard_library_text(100_000), folder / "tokenizer.model", 400)
    return folder


@pytest.fixture
def cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``some/model`` with main and a tag; its files are links to blobs."""
    place = tmp_path / "hub/models--some--model"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (place / folder).mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, place / f"blobs/{number}")
        (place / f"snapshots/{COMMIT}" / file.name).symlink_to(f"../../blobs/{number}")
    for name in ("main", "v1"):
        (place / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.list_repo_files", refuse)
    return place / "snapshots" / COMMIT


def test_what_was_downloaded_before_is_found_by_its_name(cache, model, tmp_path, monkeypatch, capsys):
    for name in ("some/model", "some/model@v1", f"some/model@{COMMIT}"):
        assert from_hub(name) == find_folder(Path(name)) == cache
    monkeypatch.chdir(tmp_path)
    assert find_folder(Path("some/model.ckpt")) == Path("some/model.ckpt")
    (tmp_path / "hub/models--alone").symlink_to("models--some--model")
    assert find_folder(Path("alone")).samefile(cache)
    config = tmp_path / "merge.yaml"
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in (str(model), "some/model@v1")]
    config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert merge.main(["yaml", str(config), "merged"]) == 0
    assert Path("merged/tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    assert convert.main(["--input_path", "some/model", "--output_path", "out.safetensors"]) == 0
    assert first.PREDICT.main(["some/model", "The", "--max_new_tokens", "2", "--engine", "pt"]) == 0
    assert str(cache) in capsys.readouterr().err  # in the YAML that it stands for
    Path("some/model").mkdir(parents=True)  # a folder of that name goes first
    assert find_folder(Path("some/model")) == Path("some/model")


def test_what_was_not_says_what_to_type(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "merge.yaml"
    config.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": "other/model@v2"}]}))
    commands = (
        (merge.main, ["yaml", str(config), "merged"], "hf download other/model --revision v2"),
        (convert.main, ["--input_path", "other/model", "--output_path", "out.ckpt"], "hf download other/model)"),
        (first.PREDICT.main, ["other/model", "The"], "hf download other/model)"),
    )
    for main, words, text in commands:
        assert main(words) == 2
        message = capsys.readouterr().err
        assert text in message and "add --download" in message and "Traceback" not in message
    for name in ("a/../b", "a/b/c", "model", "a/b@../../x", "a--b/..c", ".model", "model--x"):
        with pytest.raises(UserError):
            from_hub(name)


def test_a_wrong_path_is_told_without_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindformers_ext.jobs.checkpoint.hub.PACKAGE", "not_installed_here")
    assert convert.main(["--input_path", "models/mistyped", "--output_path", "out.ckpt"]) == 2
    assert (
        "'models/mistyped' does not exist here" in (message := capsys.readouterr().err) and "check the path" in message
    )


def test_download_belongs_to_a_model_of_hugging_face(tmp_path, capsys):
    (tmp_path / "own.ckpt").write_bytes(b"x")
    own = str(tmp_path / "own.ckpt")
    for words in (["--reversed", "--input_path", own], ["--pre_ckpt_path", own], ["--input_path", own]):
        assert convert.main([*words, "--output_path", str(tmp_path / "out"), "--download"]) == 2
        assert "--download fetches a Hugging Face model" in capsys.readouterr().err


RELEASE = ["consolidated.safetensors", "params.json"]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["model-00001-of-00002.safetensors", "pytorch_model.bin", *RELEASE], ["pytorch_model.bin", RELEASE[0]]),
        (["pytorch_model.bin", "consolidated.00.pth"], ["consolidated.00.pth"]),
        (RELEASE, []),
        (["consolidated.00.pth", "params.json"], []),
        (["consolidated.00.pth", "adapter_model.safetensors", "training_args.bin"], []),
        (["model.safetensors", "original/consolidated.00.pth", "a.gguf"], ["original/consolidated.00.pth", "a.gguf"]),
    ],
)
def test_a_download_leaves_out_what_has_something_better(files, left):
    patterns = not_wanted(files)
    assert [name for name in files if any(fnmatch(name, pattern) for pattern in patterns)] == left


def test_only_download_fetches_and_leaves_out_what_is_not_read(cache, monkeypatch):
    asked = {}

    def fetch(**words: object) -> str:
        asked.update(words)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for files, pickles in ((["model.safetensors"], True), (["pytorch_model.bin"], False)):
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision, files=files: files)
        assert from_hub("other/model@v2", download=True) == cache
        assert (asked["repo_id"], asked["revision"]) == ("other/model", "v2") and "local_files_only" not in asked
        assert ("*.bin" in asked["ignore_patterns"]) is pickles and "original/*" in asked["ignore_patterns"]

    def fail(**_: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be fetched from the hub \(no route\): .*hf auth login"):
        from_hub("other/model", download=True)
    assert json.loads((cache / "config.json").read_text())
