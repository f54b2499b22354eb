# SPDX-License-Identifier: Apache-2.0
"""Where a run continues after another split, or with adapters: files of the real format, no framework."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.cluster.build import BuildSpec
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.config.from_model import FirstTry, yaml_from_model
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.config.run import RunSpec, run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.jobs.run import checks
from mindformers_ext.jobs.run.keep import keep_config, keep_lora
from mindformers_ext.jobs.run.resume import settle_resume
from mindformers_ext.jobs.run.slices import merge_slices
from mindformers_ext.jobs.train.checkpoint_folder import Resumed
from mindformers_ext.jobs.train.train import counted_anew
from tests.helpers.sliced import cut, write_file, write_ranks, write_strategy
from tests.unit.jobs.test_checkpoints import MODEL

NETWORK = NetworkSpec(model=MODEL, seq_length=8, parallel=ParallelSpec(parallel_mode="data_parallel", device_num=2))
LORA = LoraSpec(rank=2, alpha=4, targets=".*wq|.*wo|lm_head")
COUNTERS = {"step_num": np.array([6]), "global_step": np.array([6], np.int32), "global_batch_size": np.array([4])}


def build(devices: int = 2, mode: str = "data_parallel", lora: LoraSpec | None = None, **words: Any) -> BuildSpec:
    parallel = ParallelSpec(parallel_mode=mode if devices > 1 else "stand_alone", device_num=devices, **words)
    return BuildSpec(network=replace(NETWORK, parallel=parallel), lora=lora)


def asked(folder: Path, devices: int = 2, load: Path | None = None, **words: Any) -> RunSpec:
    config = {"run_mode": "train", "resume_training": True, "output_dir": str(folder), "use_parallel": devices > 1}
    return run_spec_from_yaml(config | {"load_checkpoint": str(load or ""), **words})


def held(lora: LoraSpec | None = None) -> dict[str, np.ndarray]:
    """Weights, or adapters, with both moments."""
    rng = np.random.default_rng(0)
    placed = [item for item in placed_parameters(build(1).network, lora=lora) if item.trained]
    names = {f"{kind}{item.name}": item.whole for kind in ("", "adam_m.", "adam_v.") for item in placed}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}


@pytest.fixture
def slices(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """What two stages of two devices have saved: matrices cut, moments as their weights, counters on all ranks."""
    arrays, stages = held(), [dict[str, Any](), dict[str, Any]()]
    for name, array in arrays.items():
        cuts = array.ndim > 1 and array.shape[0] % 2 == 0
        row = {"matrix": [2], "tensor_map": [0 if cuts else -1] + [-1] * (array.ndim - 1)}
        stages["layers.0" not in name and "tok_embeddings" not in name][name] = row
    for stage, rows in enumerate(stages):
        write_strategy(tmp_path / "strategy" / f"ckpt_strategy_rank_{2 * stage}.ckpt", rows, stage)
    ranks = cut(read_strategy(tmp_path / "strategy"), arrays, COUNTERS)
    write_ranks(tmp_path / "checkpoint", ranks, name="tiny_rank_{}-1_6")
    write_ranks(tmp_path / "checkpoint", ranks[:3], name="tiny_rank_{}-1_9")  # killed before the last rank had written
    return tmp_path, arrays


def test_slices_are_merged_for_mindformers_with_all_state(slices: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = slices
    run, notes, merge = settle_resume(asked(folder), build())
    assert merge is not None and "the slices of 4 ranks are merged" in notes[-1]
    assert any("step 1_9 exists on 3 of 4 ranks" in note for note in notes)
    merge_slices(merge, NETWORK)
    for rank in range(2):  # MindFormers looks into a folder per rank
        found = Resumed(Path(run.load or "") / f"rank_{rank}" / str(run.resume).replace("_0-", f"_{rank}-"))
        assert found.step == 6 and found.rows == 4
        state = dict(found.weights()) | found.state()
        assert all(np.array_equal(state[name], array) for name, array in arrays.items())
        found.close()


def test_our_loop_reads_slices_as_they_are(slices: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = slices
    run, notes, merge = settle_resume(asked(folder, 1), build(1), own_loop=True)
    assert merge is None and run.strategies == folder / "strategy" and run.resume == "tiny_rank_0-1_6.ckpt"
    found = Resumed(folder / "checkpoint" / "rank_0" / str(run.resume), run.strategies)
    state = dict(found.weights()) | found.state()
    assert found.step == 6 and all(np.array_equal(state[name], array) for name, array in arrays.items())
    found.close()
    (folder / "strategy").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"the slices of 4 ranks, and .*strategy does not exist.*src_strategy"):
        settle_resume(asked(folder, 1), build(1), own_loop=True)
    settle_resume(asked(folder, 1, src_strategy_path_or_dir=str(folder / "elsewhere")), build(1), own_loop=True)


def test_another_split_of_a_cluster_is_refused_with_the_commands(slices: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = slices
    for words, reason in (
        ({"devices": 8, "data_parallel": 4, "pipeline_stage": 2}, "4 ranks have saved it, this run has 8"),
        ({"devices": 4, "data_parallel": 4}, "rank_0 lacks"),
        ({"devices": 4, "data_parallel": 1, "model_parallel": 2, "expert_parallel": 1, "pipeline_stage": 2}, " is "),
    ):
        with pytest.raises(UserError, match=f"another split .*{reason}.*auto_trans_ckpt.*transform_ckpt.py"):
            settle_resume(asked(folder), build(mode="semi_auto_parallel", **words))
    run, _, merge = settle_resume(asked(folder, auto_trans_ckpt=True), build(8, "semi_auto_parallel", data_parallel=8))
    assert run.auto_transform and merge is None


@pytest.mark.parametrize(("saved", "devices", "own"), [(1, 2, False), (2, 1, False), (2, 4, False), (2, 1, True)])
def test_whole_copies_serve_any_number_of_processes(tmp_path: Path, saved: int, devices: int, own: bool) -> None:
    write_ranks(tmp_path / "checkpoint", [held() | COUNTERS] * saved, name="tiny_rank_{}-1_6")
    write_ranks(tmp_path / "checkpoint", [held() | COUNTERS], name="tiny_rank_{}_1-1_9")  # one process went on
    run, _, merge = settle_resume(asked(tmp_path, devices), build(devices), own_loop=own)
    assert merge is None
    first = tmp_path / "checkpoint" / "rank_0" / "tiny_rank_0_1-1_9.ckpt"
    for rank in range(1 if own else devices):
        path = Path(run.load or "") / f"rank_{rank}" / str(run.resume).replace("whole_rank_0", f"whole_rank_{rank}")
        assert path.resolve() == first.resolve()


def test_a_file_is_continued_by_every_rank(tmp_path: Path) -> None:
    file = tmp_path / "any.ckpt"
    write_file(file, held() | COUNTERS)
    folder = tmp_path / "out" / "resumed" / "rank_0"
    folder.mkdir(parents=True)
    (folder / f".{os.getpid()}.whole_rank_0.ckpt").symlink_to("gone")  # of another machine's process, or a killed one
    (folder / "whole_rank_0.ckpt").symlink_to("gone")  # of the run before
    run, _, _ = settle_resume(asked(tmp_path / "out", load=file), build())
    links = [Path(run.load or "") / f"rank_{rank}" / f"whole_rank_{rank}.ckpt" for rank in range(2)]
    assert run.resume == links[0].name and all(link.resolve() == file.resolve() for link in links)
    assert not list(folder.glob("*.link"))
    other = replace(build(), network=replace(NETWORK, model=replace(MODEL, num_hidden_layers=1)))
    with pytest.raises(UserError, match="that the network does not have"):
        settle_resume(asked(tmp_path, load=file), other)


def test_steps_are_counted_in_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "any.ckpt"
    write_file(file, COUNTERS)
    found = Resumed(file)
    assert counted_anew(found, 4)[0] == 6
    first, state = counted_anew(found, 8)
    assert first == 3 and state["global_step"].tolist() == [3]
    with pytest.raises(UserError, match="6 steps of 4 rows are no whole number of steps of 16"):
        counted_anew(found, 16)
    found.close()


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """The folder of a run with adapters on a base."""
    write_file(tmp_path / "base.ckpt", {name: array for name, array in held().items() if not name.startswith("adam")})
    write_ranks(tmp_path / "out" / "checkpoint", [held(LORA) | COUNTERS], name="tiny_rank_{}-1_6")
    keep_lora(LORA, tmp_path / "out", RunSpec(mode="train", load=str(tmp_path / "base.ckpt")))
    return tmp_path / "out"


@pytest.mark.parametrize("names", ["nothing", "base", "checkpoint", "file"])
def test_adapters_find_their_base_whatever_the_command_names(adapted: Path, names: str) -> None:
    base, saved = adapted.parent / "base.ckpt", adapted / "checkpoint"
    load = {"base": base, "checkpoint": saved, "file": saved / "rank_0" / "tiny_rank_0-1_6.ckpt"}.get(names)
    run, _, merge = settle_resume(asked(adapted, 1, load), build(1, lora=LORA), own_loop=True)
    assert merge is None and Path(run.base or "").resolve() == base.resolve()
    assert Path(run.load or "").resolve() == (load if names == "file" else saved).resolve()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (replace(LORA, rank=4), "lora_rank=4, the run has 2: set it back"),
        (replace(LORA, alpha=8), "lora_alpha=8, the run has 4"),
        (replace(LORA, targets=".*wq"), "target_modules='.*wq', the run has"),
        (replace(LORA, exclude="lm_head"), "exclude_layers='lm_head', the run has None"),
    ],
)
def test_other_adapters_are_refused(adapted: Path, lora: LoraSpec, words: str) -> None:
    with pytest.raises(UserError) as error:
        settle_resume(asked(adapted, 1), build(1, lora=lora), own_loop=True)
    assert words in str(error.value)


def test_what_adapters_lack_is_said(adapted: Path) -> None:
    run, notes, _ = settle_resume(asked(adapted, 1), build(1, lora=replace(LORA, dropout=0.5)), own_loop=True)
    assert "lora_dropout goes from 0.01 to 0.5" in notes
    with pytest.raises(UserError, match="not built for adapters that are cut over devices.*parallel_mode 0"):
        settle_resume(asked(adapted), build(mode="semi_auto_parallel", lora=LORA))
    (adapted.parent / "base.ckpt").rename(adapted.parent / "moved.ckpt")
    with pytest.raises(UserError, match=r"lie on .*base.ckpt, which does not exist: give the base weights"):
        settle_resume(asked(adapted, 1), build(1, lora=LORA), own_loop=True)
    _, notes, _ = settle_resume(asked(adapted, 1, adapted.parent / "moved.ckpt"), build(1, lora=LORA), own_loop=True)
    assert any("from now on; the run began on" in note for note in notes)
    (adapted / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"(?s)its adapters are not those of pet_config.*\(2, 8\), not \(4, 8\)"):
        settle_resume(asked(adapted, 1, adapted.parent / "moved.ckpt"), build(1, lora=replace(LORA, rank=4)))


def test_first_weights_below_adapters_need_their_seed(adapted: Path) -> None:
    record = adapted / "adapter_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model_name_or_path": None}))
    keep_config({"run_mode": "train", "seed": 5}, adapted)
    run, notes, _ = settle_resume(asked(adapted, 1, seed=5), build(1, lora=LORA), own_loop=True)
    assert run.base is None and "adapters on the first weights of the seed" in notes
    saved = adapted / "checkpoint"
    for load in (None, saved, saved / "rank_0" / "tiny_rank_0-1_6.ckpt"):
        with pytest.raises(UserError, match="seed=6, the run had 5"):
            settle_resume(asked(adapted, 1, load, seed=6), build(1, lora=LORA), own_loop=True)
    (adapted / "run_config" / "train.yaml").unlink()
    _, notes, _ = settle_resume(asked(adapted, 1, seed=6), build(1, lora=LORA), own_loop=True)
    assert any("the seed of the former run is not known, 6 is used" in note for note in notes)


def test_a_run_that_saved_nothing_begins_on_its_base(tmp_path: Path) -> None:
    base = tmp_path / "base.ckpt"
    write_file(base, held())
    run, notes, _ = settle_resume(asked(tmp_path / "out", 1, base), build(1, lora=LORA), own_loop=True)
    assert (run.resume, run.load, run.base) == (False, str(base), None) and "starts from step 0" in notes[-1]


def test_a_model_that_was_cut_is_resumed_without_naming_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of different sizes need weights; a resume has them in the run's own folder."""
    monkeypatch.setattr(checks, "check_dataset", lambda *_: None)
    words = {"model_type": "llama_moe", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    words |= {"num_hidden_layers": 1, "num_experts": 3, "num_selects": 2, "vocab_size": 11}
    model = model_spec_from_hf({**words, "size_experts": [[2, 7, 3]]})
    config = yaml_from_model(model, FirstTry(job="train", load="", engine="pt", data=str(tmp_path), seq_length=8))
    config |= {"output_dir": str(tmp_path), "resume_training": True}
    with pytest.raises(UserError, match="size_experts without load_checkpoint"):
        checks.check_run(config, "test")  # nothing was saved yet
    arrays = {item.name: np.zeros(item.whole, np.float32) for item in placed_parameters(replace(NETWORK, model=model))}
    write_ranks(tmp_path / "checkpoint", [arrays | COUNTERS], name="tiny_rank_{}-1_6")
    assert checks.check_run(config, "test").run.load == str(tmp_path / "checkpoint")


@pytest.mark.parametrize("has_saved", [True, False])
def test_the_folder_that_a_run_began_with_is_no_checkpoint_of_it(tmp_path: Path, has_saved: bool) -> None:
    """A YAML keeps naming it: the run goes on in output_dir, or begins with it again."""
    model, output = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    if has_saved:
        write_ranks(output / "checkpoint", [held() | COUNTERS], name="tiny_rank_{}-1_6")
    run, notes, _ = settle_resume(asked(output, 1, model), build(1), own_loop=True)
    assert run.load == str(output / "checkpoint" if has_saved else model) and bool(run.resume) == has_saved
    assert any(
        "no whole checkpoint yet" in note or f"began with load_checkpoint {model} goes on" in note for note in notes
    )
