# SPDX-License-Identifier: Apache-2.0
"""What one-shot pruning refuses, with its own message, and that nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindformers_ext.cli.prune import main
from mindformers_ext.jobs.experts.texts import ready
from mindformers_ext.jobs.prune.one_shot.importance import measured
from tests.helpers.one_shot_runs import KINDS, make_place, texts, words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text."""
    return make_place(tmp_path_factory.mktemp("one_shot"))


CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
REFUSED = {
    "unknown method": (["--method", "wanda", "--target", "intermediate_size=8"], "wanda"),
    "above the source": (["--method", "minitron", "--target", "intermediate_size=41"], "above the model's 40"),
    "no such size": (["--method", "minitron", "--target", "d_model=8"], "d_model"),
    "nothing smaller": (["--method", "minitron", "--target", "hidden_size=24"], "those of the model itself"),
    "heads over groups": (["--method", "minitron", "--target", "num_attention_heads=3"], "no multiple of"),
    "more heads to a group": (
        ["--method", "minitron", "--target", "num_attention_heads=3", "num_key_value_heads=1"], "keep more key heads",
    ),
    "both sizes": (
        ["--method", "minitron", "--target", "hidden_size=8", "--fewer_parameters", "0.2"], "give one of the two",
    ),
    "share out of reach": (["--method", "minitron", "--fewer_parameters", "0.9"], "name more axes"),
    "flap of channels": (["--method", "flap", "--target", "hidden_size=8"], "flap knows neurons"),
    "bias and refit": (
        ["--method", "flap", "--target", "intermediate_size=8", "--bias", "--refit", "least_squares"], "give one",
    ),
    "bias of another": (["--method", "taylor", "--target", "intermediate_size=8", "--bias"], "belongs to flap"),
    "short text": (["--method", "minitron", "--target", "intermediate_size=8", "--tokens", "100000"], "too short"),
    "no held-out text": (
        ["--method", "minitron", "--target", "intermediate_size=8", "--held_out_tokens", "100000"], "too short",
    ),
    "another model's file": (
        ["--method", "minitron", "--target", "intermediate_size=8", "--importance", "OTHER"],
        "weights of another model",
    ),
    "a damaged file": (
        ["--method", "minitron", "--target", "intermediate_size=8", "--importance", "DAMAGED"], "holds no importance",
    ),
    "refit of nothing": (
        ["--method", "minitron", "--target", "hidden_size=8", "--refit", "least_squares"], "none of them goes",
    ),
    "axes of a target": (
        ["--method", "minitron", "--target", "hidden_size=8", "--axes", "hidden_size"],
        "--axes without --fewer_parameters",
    ),
    "no number": (["--method", "minitron", "--target", "hidden_size=8.0"], "'hidden_size=8.0' is no size"),
    "twice": (
        ["--method", "minitron", "--target", "hidden_size=8", "hidden_size=9"], "'hidden_size=9' beside hidden_size=8",
    ),
    "yaml over itself": (
        ["--method", "minitron", "--target", "hidden_size=8", "--next_yaml", "a.yaml", "--train_yaml", "./a.yaml"],
        "'a.yaml' is the --train_yaml",
    ),
    "yaml of a mixture": (
        ["--method", "minitron", "--target", "hidden_size=8", "--next_yaml", "a.yaml", "--train_yaml",
         str(CONFIGS / "mixtral_pretrain.yaml")], "--train_yaml is of a mixture of experts",
    ),
    "no GPU": (["--method", "minitron", "--target", "hidden_size=8", "--device_target", "GPU"], "sees no CUDA device"),
    "yaml alone": (["--method", "minitron", "--target", "hidden_size=8", "--next_yaml", "a.yaml"], "belong together"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    place: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more, message = REFUSED[name]
    other, damaged = place / "other.npz", place / "damaged.npz"
    if "OTHER" in more and not other.exists():
        with ready(place / "planted", texts(place / "text.txt")) as start:
            measured(start, other, KINDS[:1], False, lambda line: None)
    damaged.write_bytes(b"PK nothing")
    given = [str(other) if word == "OTHER" else str(damaged) if word == "DAMAGED" else word for word in more]
    before = {path: path.read_bytes() for path in (other, damaged) if path.exists()}
    assert main([*words(place, tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_mixture_and_a_wrong_depth_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixture").mkdir()
    config = json.loads((place / "model" / "config.json").read_text())
    for kind, message in (("mixtral", "mixture"), ("gpt2", "gpt2")):
        (tmp_path / "mixture" / "config.json").write_text(
            json.dumps({**config, "model_type": kind, "architectures": None})
        )
        more = ["--method", "bi", "--keep", "2", "--calibration", str(place / "text.txt")]
        assert main(["depth", str(tmp_path / "mixture"), str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    for keep in ("4", "0"):
        assert main([*words(place, tmp_path / "out", "depth"), "--method", "bi", "--keep", keep]) == 2
        assert "--keep" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"mixture"}
