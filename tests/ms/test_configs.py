# SPDX-License-Identifier: Apache-2.0
"""Every YAML of a run under configs/ and research/ is read, its keys are checked, and its network is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.core.rules import check_network
from mindformers_ext.core.yaml_file import load_yaml
from mindformers_ext.core.yaml_view import network_spec_from_yaml
from mindformers_ext.jobs.run_checks import RUN_MODES
from mindformers_ext.jobs.run_sections import check_sections

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("configs", "research") for path in sorted((ROOT / folder).rglob("*.yaml"))]
RUNS = [path for path in FILES if "model_config" in path.read_text(encoding="utf-8")]


def test_there_are_runs() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in RUNS}
    assert {f"configs/tiny/{name}.yaml" for name in ("mixtral_pretrain", "llama_pretrain", "finetune_mixtral")} <= names


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_its_network_is_built_and_has_a_loss(path: Path) -> None:
    import mindspore as ms

    from mindformers_ext.ms.models import build_causal_lm

    config = load_yaml(path)
    assert config["run_mode"] in RUN_MODES
    check_sections(config, "train")
    spec = network_spec_from_yaml(config)
    check_network(spec, config["run_mode"])
    heads = spec.model.num_attention_heads
    small = replace(spec.model, num_hidden_layers=1, hidden_size=8 * heads, intermediate_size=16, vocab_size=64)
    network = build_causal_lm(replace(spec, model=small, seq_length=8))
    ids = ms.Tensor(np.arange(4, 22).reshape(2, 9), ms.int32)
    labels = ms.Tensor(np.where(np.arange(18).reshape(2, 9) % 9 < 4, -100, ids.asnumpy()), ms.int32)
    loss = network.losses(ids, labels)[1].asnumpy()
    assert abs(loss - np.log(64)) < 1.0
