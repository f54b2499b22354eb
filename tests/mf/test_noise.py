# SPDX-License-Identifier: Apache-2.0
"""MindFormers' loop hands gates the keys of their noise: its steps are those of our own loop on PyTorch."""

from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.jobs.train.train import train
from mindformers_ext.mf.noise import noise_of
from mindformers_ext.mf.run import run
from tests.helpers.tiny_run import config_of, rows_of

WORDS = (
    "model.model_config.type=LlamaMoEConfig",
    "model.arch.type=LlamaMoEForCausalLM",
    "model.model_config.num_layers=1",
    "model.model_config.gate_balance_loss_weight=1.0",
    "moe_config.capacity_factor=4",
    "moe_config.aux_loss_factor=0",
    "runner_config.epochs=1",
    "runner_config.gradient_accumulation_steps=2",
    "runner_config.batch_size=2",
)
# with residual experts beside
RESIDUAL = (
    *WORDS[2:],
    "model.model_config.type=LlamaMoEResidualConfig",
    "model.arch.type=LlamaMoEResidualForCausalLM",
    "model.model_config.shared_expert_intermediate_size=24",
    "moe_config.shared_expert_num=2",
)


@pytest.mark.slow
@pytest.mark.turn("noise")
def test_both_loops_add_the_same_noise(job, tmp_path):
    run(config_of(job.yaml, *RESIDUAL, f"output_dir={tmp_path / 'theirs'}"))
    config = config_of(job.yaml, *RESIDUAL, "engine=pt", "loop=own", f"output_dir={tmp_path / 'ours'}")
    train(run_spec_from_yaml(config), config, network_spec_from_yaml(config))
    theirs, ours = rows_of(tmp_path / "theirs"), rows_of(tmp_path / "ours")
    assert len(theirs) == len(ours) == 10
    for name in ("lm_loss", "aux_loss"):
        found, wanted = ([row[name] for row in rows] for rows in (theirs, ours))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=name)
    assert min(row["aux_loss"] for row in ours) > 0


def test_a_process_has_the_noise_of_its_rows(job):
    spec = network_spec_from_yaml(config_of(job.yaml, *WORDS))

    def shares(**words):
        cut = replace(spec, parallel=ParallelSpec(device_num=8, **words))
        return [noise_of(cut, 7, rank).share for rank in range(8)]

    assert shares(data_parallel=2, model_parallel=2, pipeline_stage=2) == [0] * 8
    assert shares(data_parallel=2, model_parallel=2, pipeline_stage=2, full_batch=False) == [0, 0, 1, 1] * 2
    assert shares(parallel_mode="data_parallel", full_batch=True) == list(range(8))
