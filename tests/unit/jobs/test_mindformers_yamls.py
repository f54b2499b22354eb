# SPDX-License-Identifier: Apache-2.0
"""Every public YAML of MindFormers that describes a LLaMA or a Mixtral is accepted, or refused for what it deserves.

The table of their keys is made by tests/helpers/mindformers_yamls.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.checks import check_run, check_words
from tests.helpers.mindformers_yamls import TABLE, configurations

FILES = list(configurations())
SENTENCES = {  # of a refusal, by verdict
    "typo": "='Flase' is not True or False: correct it",
    "quantised": "asks for a quantised network: weights of 8 or 4 bits are neither read, converted nor computed with",
    "broken": "unknown key 'beta1' in optimizer|the section optimizer is missing",
}
LLAMA = ("configs/llama", "configs/codellama", "research/llama3")


def judged(row: dict[str, Any], config: dict[str, Any]) -> str:
    """``ours`` or ``theirs`` where the file is accepted, else the first broken rule."""
    if config.get("run_mode") == "predict" and config.get("use_parallel"):
        config = {**config, "load_checkpoint": "given"}  # a path in every file, which the table leaves out
    try:
        run = run_spec_from_yaml(config)
        check_words(config, run, row["devices"], row["name"])
    except UserError as error:
        return str(error)
    return "theirs" if run.family is None else "ours"


def label(row: dict[str, Any]) -> str:
    return f"{row['name']} of {', '.join(row['releases'])} ({row['sha256'][:8]})"


def test_the_table_is_small_and_holds_every_release() -> None:
    assert TABLE.stat().st_size < 300_000
    assert {release for row, _ in FILES for release in row["releases"]} >= {f"1.{minor}" for minor in range(1, 8)}


def test_every_mixtral_file_is_accepted() -> None:
    found = {label(row): judged(row, config) for row, config in FILES if row["name"].startswith("research/mixtral/")}
    assert len(found) >= 26
    assert {name: verdict for name, verdict in found.items() if verdict != "ours"} == {}


def test_every_dense_file_has_its_verdict() -> None:
    wrong, accepted = {}, 0
    for row, config in FILES:
        found, wanted = judged(row, config), row["verdict"]
        accepted += found == wanted and row["name"].startswith(LLAMA)
        sentence = SENTENCES.get(wanted)
        if found != wanted if sentence is None else not re.search(sentence, found):
            wrong[label(row)] = found
    assert wrong == {}
    assert accepted >= 98  # of 115, the others quantised or misspelt


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"model.model_config.extend_method": "NTK", "model.model_config.scaling_factor": 4.0}, ""),
        ({"model.model_config.embedding_init_type": "float32", "model.model_config.residual_dtype": "float32"}, ""),
        ({"model.model_config.qkv_concat": True}, ""),
        ({"model.model_config.pet_config": {"pet_type": "ptuning2", "pre_seq_len": 16}}, ""),
        ({"recompute_config.select_recompute": ["feed_forward.w1.matmul"]}, ""),
        ({"parallel_config.context_parallel": 2}, ""),
        ({"model.model_config.rotary_emb_base": 10000}, "model_config.rotary_emb_base is not known here"),
        ({"my_own_key": 3}, "my_own_key is not known here"),
        ({"runner_wrapper.enable_check_overflow": False}, "every step looks for an overflow"),
    ],
)
def test_a_network_of_mindformers_own_is_not_judged(change: dict[str, Any], note: str) -> None:
    row, config = dense(change)
    devices = row["devices"] * config["parallel_config"].get("context_parallel", 1)
    run = run_spec_from_yaml(config)
    _, build, notes = check_words(config, run, devices, "job.yaml")
    assert run.family is None and build.network.model.num_hidden_layers == 32
    assert note in "\n".join(notes) and (note or not notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_config.data_parallel": 3}, "is not the device count 8: the nearest choice is data_parallel=8"),
        ({"model.model_config.num_layers": "32"}, "num_layers='32' is not a whole number"),
        ({"parallel_config.data_paralel": 8}, "did you mean 'data_parallel'"),
        ({"use_parallel": "Flase"}, "use_parallel='Flase' is not True or False"),
        ({"model.model_config.quant_config": {"quant_method": "rtn"}}, "quant_config asks for a quantised network"),
        ({"optimizer.beta3": 0.9}, "unknown key 'beta3' in optimizer"),
        ({"model.model_config.type": "MixtralConfig"}, "do not belong together: write MixtralConfig and Mixtral"),
    ],
)
def test_its_sizes_and_sections_are(change: dict[str, Any], message: str) -> None:
    _, config = dense(change)
    with pytest.raises(UserError, match=re.escape(message)):
        check_words(config, run_spec_from_yaml(config), 8, "job.yaml")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "ChatGLM2Config", "num_heads": [4, 8], "padded_vocab_size": 65024, "seq_length": 192},
        {"compute_dtype": "bfloat16"},  # the rest stands in a config.json
    ],
)
@pytest.mark.parametrize("mode", [1, "MANUAL_PARALLEL"])
def test_networks_of_other_shapes_pass(model: dict[str, Any], mode: int | str) -> None:
    _, config = dense({"model.model_config": model, "parallel.parallel_mode": mode})
    config["moe_config"] = {"expert_num": 8, "routing_policy": "TopkRouterV1", "shared_expert_num": 2}
    config["model"]["arch"] = {"type": "ChatGLM2ForConditionalGeneration"}
    run = run_spec_from_yaml(config)
    _, build, notes = check_words(config, run, 8, "job.yaml")
    assert run.family is None and build.network.seq_length == model.get("seq_length", 2048)


def test_weights_of_another_layout_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libascendcl.so").touch()  # all that is looked for
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    for name in ("MS_ROLE", "RANK_ID", "RANK_TABLE_FILE"):
        monkeypatch.delenv(name, raising=False)
    save_file({"model.layers.0.attention.w_qkv.weight": np.zeros((6, 2), np.float32)}, tmp_path / "own.safetensors")
    _, config = dense({"run_mode": "eval", "use_parallel": False, "eval_dataset": {"data_loader": {"type": "Own"}}})
    config |= {"load_checkpoint": str(tmp_path / "own.safetensors"), "load_ckpt_format": "safetensors", "metric": []}
    config |= {"output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="does not fit the network"):
        check_run(config, "job.yaml")
    config["model"]["model_config"]["qkv_concat"] = True
    assert check_run(config, "job.yaml").run.load == config["load_checkpoint"]


def test_our_own_network_is_judged_by_every_rule() -> None:
    _, config = dense({"model.model_config.qkv_concat": True, "context.device_target": "CPU"})
    with pytest.raises(UserError, match="qkv_concat=True is not built yet"):
        check_words(config, run_spec_from_yaml(config), 8, "job.yaml")


def dense(change: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """LLaMA-2 7B's file for 8 devices, changed at dotted keys."""
    row, config = next(
        (row, config)
        for row, config in configurations()
        if row["name"] == "configs/llama2/finetune_llama2_7b.yaml" and row["devices"] == 8
    )
    for path, value in change.items():
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return row, config
