# SPDX-License-Identifier: Apache-2.0
"""``tools/transform_ckpt.py`` as a user runs it: the seed's command, every flag, every mistake, and being killed."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_file import CheckpointMeta, open_checkpoint, read_meta, sidecar
from mindformers_ext.formats.rank_dirs import rank_files
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.weights.reshard import open_sliced
from tests.helpers.sliced import (
    DP4,
    DP8,
    PP2,
    PP4,
    assert_holds,
    cut,
    golden_arrays,
    same,
    write_file,
    write_ranks,
    write_strategy,
)
from tests.helpers.transform import TOOLS, holds, merge, run, shell, tree


@pytest.fixture
def ranks(saved, tmp_path):
    """A copy of the run that a test may spoil."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_command_as_the_seed_types_it(saved, tmp_path):
    folder, arrays = saved
    shutil.copytree(folder, tmp_path / "output")
    before = tree(tmp_path / "output")
    os.chmod(tmp_path / "output" / "strategy", 0o500)  # MindFormers' tool writes into it, ours need not
    path = str(tmp_path)
    result = shell(
        "--src_ckpt_strategy",
        f"{path}/output/strategy/",
        "--src_ckpt_dir",
        f"{path}/output/checkpoint/",
        "--dst_ckpt_dir",
        f"{path}/target_checkpoint/",
        "--prefix",
        "mixtral_",
    )
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "target_checkpoint") == ["rank_0/mixtral_0.ckpt"]
    holds(tmp_path / "target_checkpoint" / "rank_0" / "mixtral_0.ckpt", arrays)
    assert tree(tmp_path / "output") == before
    assert "not written, state that the source's strategy lists" in result.stdout and "MB/s" in result.stdout


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_round_trip_through_every_strategy(saved, tmp_path, kind):
    """Formats change on the way; what was 16 ranks is 16 equal ranks again at the end."""
    folder, arrays = saved
    other = {"ckpt": "safetensors", "safetensors": "ckpt"}[kind]
    anew = ["--dst_ckpt_strategy", PP4, "--output_format", kind, "--check_copies"]
    assert run(*merge(folder, tmp_path / "a", *anew)) == 0
    assert len(rank_files(tmp_path / "a")) == 16
    steps = (
        ("a", "b", PP4, DP8, other),
        ("b", "c", DP8, None, kind),
        ("c", "d", None, DP4, None),
        ("d", "e", DP4, PP2, "ckpt"),
    )
    for source, target, src, dst, form in steps:
        words = ["--src_checkpoint", tmp_path / source, "--dst_checkpoint_dir", tmp_path / target]
        words += ["--src_strategy", src or "None", "--dst_strategy", dst or ""]
        assert run(*words, *(["--output_format", form] if form else [])) == 0
    holds(tmp_path / "c" / "rank_0" / f"checkpoint_0.{kind}", arrays)
    assert len(rank_files(tmp_path / "d")) == 8 and rank_files(tmp_path / "d")[7].suffix == f".{kind}"
    for rank, path in rank_files(tmp_path / "e").items():
        before, after = open_checkpoint(rank_files(folder / "checkpoint")[rank]), open_checkpoint(path)
        assert before.infos.keys() == after.infos.keys()
        assert all(same(before.read(name), after.read(name)) for name in before.infos)
        before.close(), after.close()


def test_processes_and_shares_give_the_same_files(saved, tmp_path, capsys):
    folder, _ = saved
    anew = ["--dst_ckpt_strategy", DP8, "--prefix", "m_"]
    assert run(*merge(folder, tmp_path / "one", *anew)) == 0
    result = shell(
        *merge(
            folder,
            tmp_path / "many",
            *anew,
            "--transform_process_num",
            4,
            "--world_size",
            16,
            "--transform_by_rank",
            "True",
        )
    )
    assert result.returncode == 0, result.stderr
    for rank in (0, 8, 4):
        assert run(*merge(folder, tmp_path / "shares", *anew, "--process_num", 2, "--rank_id", rank)) == 0
    assert "rank 4 has nothing to do: ranks 0, 8 transform 8 each" in capsys.readouterr().err
    expected = tree(tmp_path / "one")
    assert len(expected) == 16 and tree(tmp_path / "many") == expected
    assert tree(tmp_path / "shares") == [*expected, "transform_succeed_rank_0.txt", "transform_succeed_rank_8.txt"]
    for name in expected:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "shares" / name).read_bytes()


def test_the_description_of_the_model_travels_along(saved, tmp_path, capsys):
    _, arrays = saved
    whole = tmp_path / "mixtral.ckpt"
    write_file(whole, arrays)
    meta = CheckpointMeta(config={"model_type": "mixtral"}, dtype="float32", source="somewhere")
    sidecar(whole).write_text(meta.to_text())
    assert run("--src_ckpt_dir", whole, "--dst_ckpt_strategy", PP2, "--dst_ckpt_dir", tmp_path / "cut") == 0
    assert (
        run(
            "--src_ckpt_dir",
            tmp_path / "cut",
            "--src_ckpt_strategy",
            PP2,
            "--dst_ckpt_dir",
            tmp_path / "back",
            "--output_format",
            "safetensors",
        )
        == 0
    )
    for path in (tmp_path / "cut/rank_9/checkpoint_9.ckpt", tmp_path / "back/rank_0/checkpoint_0.safetensors"):
        reader = open_checkpoint(path)
        got = read_meta(path, reader)
        assert got == replace(meta, hash=fingerprint(reader) if path.suffix == ".ckpt" else "")
        reader.close()
    first = tmp_path / "cut" / "rank_0" / "checkpoint_0.ckpt"
    sidecar(first).write_text(sidecar(tmp_path / "cut" / "rank_9" / "checkpoint_9.ckpt").read_text())
    assert run("--src_ckpt_dir", tmp_path / "cut", "--src_ckpt_strategy", PP2, "--dst_ckpt_dir", tmp_path / "no") == 2
    assert "describes another checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_dry_run_checks_and_writes_nothing(saved, tmp_path, capsys):
    folder, _ = saved
    assert run(*merge(folder, tmp_path / "out", "--dst_ckpt_strategy", PP4, "--dry_run")) == 0
    out = capsys.readouterr().out
    assert out.count("would write") == 16 and "rank_15/checkpoint_15.ckpt: " in out
    assert not (tmp_path / "out").exists()


def spoil(ranks, what):
    source, strategy = ranks / "checkpoint", ranks / "strategy"
    rank_5 = source / "rank_5" / "mixtral_rank_5-3_2.ckpt"
    if what == "a missing rank":
        shutil.rmtree(source / "rank_5")
    elif what == "the last ranks missing":
        shutil.rmtree(source / "rank_15")
    elif what == "an empty rank":
        rank_5.unlink()
    elif what == "two files":
        shutil.copy(rank_5, rank_5.with_name("mixtral_rank_5-4_2.ckpt"))
    elif what == "two formats":
        write_file(rank_5.with_suffix(".safetensors"), {"a": np.float32([1])})
        rank_5.unlink()
    elif what == "a cut file":
        os.truncate(rank_5, rank_5.stat().st_size - 1)
    elif what == "a file of another run":
        write_file(rank_5, {"model.norm_out.weight": np.zeros(32, np.float32)})
    elif what == "an empty strategy folder":
        for path in strategy.iterdir():
            path.unlink()
    elif what == "an empty strategy file":
        (strategy / "ckpt_strategy_rank_8.ckpt").write_bytes(b"")
    elif what == "a stage without strategy":
        (strategy / "ckpt_strategy_rank_8.ckpt").unlink()
    elif what == "the first stage without strategy":
        (strategy / "ckpt_strategy_rank_0.ckpt").unlink()
    elif what == "a checkpoint as strategy":
        shutil.copy(rank_5, strategy / "ckpt_strategy_rank_5.ckpt")
    elif what == "another run's strategy":
        shutil.rmtree(strategy)
        shutil.copytree(DP8, strategy)
    elif what == "no checkpoint":
        shutil.rmtree(source)
        source.mkdir()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a missing rank", "folder rank_5 is missing, rank_15 is there"),
        ("the last ranks missing", "15 ranks, the strategy describes 16; rank_15 is missing"),
        ("an empty rank", "rank_5 holds no checkpoint file"),
        ("two files", "rank_5 holds 2 checkpoint files: mixtral_rank_5-3_2.ckpt, mixtral_rank_5-4_2.ckpt"),
        ("two formats", "some ranks hold .ckpt and some .safetensors"),
        ("a cut file", "mixtral_rank_5-3_2.ckpt' is not a whole MindSpore checkpoint"),
        ("a file of another run", "'model.layers.0.attention.wq.weight' is missing in rank_5"),
        ("an empty strategy folder", "holds no strategy files"),
        ("an empty strategy file", "ckpt_strategy_rank_8.ckpt' has 0 bytes"),
        ("a stage without strategy", "16 ranks, the strategy describes 8"),
        ("the first stage without strategy", "stage 1 without stage 0"),
        ("a checkpoint as strategy", "ckpt_strategy_rank_5.ckpt' is not a strategy file"),
        ("another run's strategy", "is missing in rank_8"),
        ("no checkpoint", "holds neither rank folders"),
    ],
)
def test_a_source_that_is_not_whole_is_refused_before_any_write(ranks, tmp_path, capsys, what, text):
    spoil(ranks, what)
    assert run(*merge(ranks, tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--src_ckpt_dir", "{run}/checkpoint", "--dst_ckpt_dir", "{out}"], "16 ranks and no --src_ckpt_strategy"),
        (
            ["--src_ckpt_dir", "{run}/checkpoint", "--dst_ckpt_dir", "{out}", "--dst_ckpt_strategy", DP8],
            "16 ranks and no --src_ckpt_strategy",
        ),
        (["--src_ckpt_dir", "{run}/checkpoint/rank_0", "--dst_ckpt_dir", "{out}"], "nothing to transform"),
        (
            ["--src_ckpt_dir", "{run}/checkpoint/rank_0", "--src_ckpt_strategy", PP2, "--dst_ckpt_dir", "{out}"],
            "holds one rank, --src_ckpt_strategy describes 16",
        ),
        (["--src_ckpt_dir", "{run}/strategy", "--dst_ckpt_strategy", PP2, "--dst_ckpt_dir", "{out}"], "2 checkpoint"),
        (["--src_ckpt_dir", "{run}/nowhere", "--src_ckpt_strategy", PP2, "--dst_ckpt_dir", "{out}"], "does not exist"),
        (["--src_ckpt_dir", "{run}/checkpoint", "--src_ckpt_strategy", PP2], "are both needed"),
        (["{merge}", "--prefix", "a/b"], "must start a file name"),
        (["{merge}", "--world_size", "8"], "--world_size 8: the target has 1 ranks"),
        (["{merge}", "--transform_process_num", "0"], "--transform_process_num=0"),
        (["{merge}", "--dst_ckpt_strategy", DP8, "--transform_process_num", "3"], "16 is not a multiple of"),
        (["{merge}", "--dst_ckpt_strategy", DP8, "--rank_id", "16"], "the target has ranks 0 to 15"),
        (["{merge}", "--pick", "9_9"], "rank_0 holds no file that ends in '9_9'"),
        (["{merge}", "--output_format", "pt"], "invalid choice"),
        (["{merge}", "--dst_ckpt", "x"], "unrecognized arguments"),
    ],
)
def test_options_that_make_no_sense(saved, tmp_path, capsys, words, text):
    folder, out = saved[0], tmp_path / "out"
    words = [str(word).format(run=folder, out=out, merge="{merge}") for word in words]
    words = merge(folder, out, *words[1:]) if words[0] == "{merge}" else words
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err, err
    assert not out.exists()


def test_targets_that_cannot_be_cut_so(tmp_path, capsys):
    arrays = {"model.layers.0.a.weight": np.zeros((6, 4), np.float32), "lm_head.weight": np.zeros(3, np.float32)}
    write_file(tmp_path / "whole.ckpt", arrays)
    target = write_strategy(
        tmp_path / "s.ckpt",
        {"model.layers.0.a.weight": dict(matrix=[4], tensor_map=[0, -1]), "model.b": dict(matrix=[4], tensor_map=[-1])},
    )
    words = ["--src_ckpt_dir", tmp_path / "whole.ckpt", "--dst_ckpt_strategy", target, "--dst_ckpt_dir", tmp_path / "o"]
    assert run(*words) == 2
    err = capsys.readouterr().err
    for text in (
        "1 tensors not in the target strategy: lm_head.weight",
        "1 tensors missing in the source: model.b",
        "'model.layers.0.a.weight': shape (6, 4) cannot be cut into (4, 1) parts",
    ):
        assert text in err
    assert not (tmp_path / "o").exists()


def test_copies_are_compared_when_asked_for(ranks, tmp_path, capsys):
    """Rank 4 holds the same part of the norms as rank 0; the first is taken, unless somebody asks."""
    path = ranks / "checkpoint" / "rank_4" / "mixtral_rank_4-3_2.ckpt"
    reader = open_checkpoint(path)
    held = {name: reader.read(name) for name in reader.infos}
    reader.close()
    held["model.layers.0.ffn_norm.weight"][3] += 1
    write_file(path, held)
    assert run(*merge(ranks, tmp_path / "unasked")) == 0
    capsys.readouterr()
    assert run(*merge(ranks, tmp_path / "out", "--check_copies")) == 2
    assert "'model.layers.0.ffn_norm.weight' differs between rank_0 and rank_4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_files_in_a_rank_folder_are_chosen_by_name(ranks, tmp_path, capsys):
    strategy = read_strategy(PP2)
    newer = golden_arrays(strategy.names(), seed=1)
    write_ranks(ranks / "checkpoint", cut(strategy, newer), name="mixtral_rank_{}-13_2")
    write_ranks(ranks / "checkpoint", cut(strategy, newer)[:7], name="mixtral_rank_{}-5_1")  # the run was stopped here
    assert run(*merge(ranks, tmp_path / "no")) == 2
    assert "choose with --pick last or --pick ENDING" in capsys.readouterr().err
    assert run(*merge(ranks, tmp_path / "last", "--pick", "last")) == 0
    holds(tmp_path / "last/rank_0/checkpoint_0.ckpt", newer)
    assert run(*merge(ranks, tmp_path / "named", "--pick", "3_2")) == 0
    holds(tmp_path / "named/rank_0/checkpoint_0.ckpt", golden_arrays(strategy.names()) | {"global_step": np.int32([7])})


def test_outputs_are_not_mixed_with_others(saved, tmp_path, capsys):
    folder, arrays = saved
    anew = ["--dst_ckpt_strategy", DP4, "--prefix", "m_"]
    out = tmp_path / "out"
    assert run(*merge(folder, out, *anew)) == 0
    first = {name: (out / name).stat().st_mtime_ns for name in tree(out)}

    def refused(text, *words):
        assert run(*words) == 2
        assert text in capsys.readouterr().err
        assert {name: (out / name).stat().st_mtime_ns for name in tree(out)} == first

    refused("rank_0/m_0.ckpt' exists", *merge(folder, out, *anew))
    refused("rank_0 holds m_0.ckpt", *merge(folder, out, "--dst_ckpt_strategy", DP4, "--overwrite"))
    refused("rank_1, 2, 3, 4, 5, 6, 7 is there: the target has 1 ranks", *merge(folder, out, "--prefix", "m_"))
    refused("is where the source lies", *merge(folder, folder / "checkpoint", *anew))
    assert run(*merge(folder, out, *anew, "--overwrite")) == 0
    reader = open_sliced(out, DP4)
    assert_holds(reader, arrays)
    reader.close()
    (tmp_path / "file").write_text("x")
    assert run(*merge(folder, tmp_path / "file")) == 2


def test_help_is_quick_and_loads_no_framework():
    script = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        "try:\n runpy.run_path('transform_ckpt.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "print([name for name in ('mindspore', 'torch', 'mindformers', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=TOOLS, capture_output=True, text=True, check=True)
    assert "--src_ckpt_strategy" in result.stdout and result.stdout.strip().endswith("[]")
