# SPDX-License-Identifier: Apache-2.0
"""MindFormers' Trainer with our network: an older YAML trains, evaluates and predicts on the CPU."""

import json
import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file
from mindformers_ext.jobs.run.metrics import read_metrics
from mindformers_ext.mf.run import run
from mindformers_ext.ms.causal_lm import build_causal_lm
from tests.helpers.tiny_run import BATCH, SEQ, STEPS, config_of, rows_of, token_rows, write_rows

pytestmark = pytest.mark.slow


def newest(trained):
    return str(sorted(trained.checkpoints.glob("*-2_10.ckpt"))[0])


@pytest.fixture(scope="module")
def reference(trained):
    """Mean LM loss (natural log) of token rows by the trained weights, computed without MindFormers' metric."""
    config = config_of(trained.yaml, "moe_config.capacity_factor=0")
    network = build_causal_lm(network_spec_from_yaml(config))
    ms.load_param_into_net(network, ms.load_checkpoint(newest(trained)))
    network.set_train(False)

    def loss_of(rows, counted=None):
        logits = network(Tensor(rows[:, :SEQ])).asnumpy()[:, : rows.shape[1] - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        targets = rows[:, 1:]
        picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        weight = np.ones_like(picked) if counted is None else counted
        return -(picked * weight).sum() / weight.sum()

    return loss_of


def test_the_metrics_hold_every_step(trained):
    steps = [row["step"] for row in trained.rows]
    assert steps == list(range(1, STEPS + 1))
    assert trained.rows[-1]["lm_loss"] < 0.97 * trained.rows[0]["lm_loss"]
    for row in trained.rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + row["aux_loss"], abs=1e-5)
        load = np.array(row["expert_load"])
        assert load.shape == (2, 4) and (load.sum(axis=1) == 2 * BATCH * SEQ).all()
        capacity = math.ceil(2 * BATCH * SEQ * 0.9 / 4)
        lost = np.maximum(load - capacity, 0).sum(axis=1) / (2 * BATCH * SEQ)
        np.testing.assert_allclose(row["dropped"], lost, atol=1e-6)
    assert max(row["drop_rate"] for row in trained.rows) > 0.09  # capacity 0.9 drops at least a tenth
    rates = [row["learning_rate"] for row in trained.rows]
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-3, rel=0.02) and rates[-1] < 1e-4
    assert trained.rows[-1]["loss_scale"] > 65535  # the dynamic scale grew
    assert read_metrics(trained.output).has_experts


def test_tensorboard_and_checkpoints_are_written(trained):
    assert list((trained.output / "tensorboard").rglob("events.out.tfevents.*"))
    names = sorted(path.name for path in trained.checkpoints.glob("*.ckpt"))
    assert names == ["tiny_rank_0-2_10.ckpt", "tiny_rank_0-2_5.ckpt", "tiny_rank_0-2_8.ckpt"]
    assert not list(trained.checkpoints.glob("*.tmp"))
    held = ms.load_checkpoint(newest(trained))
    assert {"model.layers.1.feed_forward.ffn.w1.weight", "adam_m.lm_head.weight", "scale_sense"} <= set(held)


def test_the_log_names_what_the_upgrade_did(trained):
    log = "".join(path.read_text() for path in trained.folder.rglob("info.log"))
    for words in (
        "LlamaForCausalLM becomes MixtralForCausalLM",
        "PortableTrainOneStepCell",
        "lm_loss: ",
        "drop_rate: ",
        "tokens/s: ",
        "sink_mode becomes False",
    ):
        assert words in log


@pytest.mark.parametrize("width", [SEQ, SEQ + 1])
def test_eval_gives_the_loss_of_training(trained, reference, width):
    rows = token_rows(width, rows=8)
    data = write_rows(trained.folder / f"eval_{width}.mindrecord", rows)
    result = evaluated(trained, f"eval_dataset.data_loader.dataset_dir={data}")
    assert result == pytest.approx(reference(rows), abs=2e-5)


def test_eval_counts_only_labelled_tokens(trained, reference):
    rows = token_rows(rows=8)
    labels = rows.copy()
    labels[:, :20] = -100
    data = write_rows(trained.folder / "labelled.mindrecord", rows, labels=labels)
    result = evaluated(
        trained, f"eval_dataset.data_loader.dataset_dir={data}", "eval_dataset.input_columns=[input_ids, labels]"
    )
    assert result == pytest.approx(reference(rows, (labels[:, 1:] != -100).astype(float)), abs=2e-5)


def evaluated(trained, *options):
    """The loss that eval gives; batches of 8, so that one batch is all rows."""
    result = run(
        config_of(
            trained.yaml,
            "run_mode=eval",
            f"output_dir={trained.folder / 'eval'}",
            f"load_checkpoint={newest(trained)}",
            "runner_config.batch_size=8",
            *options,
        )
    )
    assert result == json.loads((trained.folder / "eval" / "eval.json").read_text())
    return result["PerplexityMetric"]["loss"]


def test_a_prompt_s_answer_does_not_depend_on_the_batch(trained, monkeypatch):
    monkeypatch.chdir(trained.folder)
    prompts = ["def main", "import numpy as np, and more words", "x"]

    def answers(data, batch):
        config = config_of(
            trained.yaml,
            "run_mode=predict",
            f"output_dir={trained.folder / 'predict'}",
            f"load_checkpoint={newest(trained)}",
            f"predict_batch_size={batch}",
        )
        return [text for item in run(config | {"input_data": data}) for text in item["text_generation_text"]]

    together = answers(prompts, 3)
    assert together == answers(prompts, 1)
    for text, prompt in zip(together, prompts, strict=True):
        assert text.startswith(prompt) and len(text) > len(prompt)
    assert (trained.folder / "predict" / "sample.txt").read_text() == "".join(f"{text}\n" for text in together)


def test_sampling_runs_where_mindspore_has_no_top_k(trained, monkeypatch):
    monkeypatch.chdir(trained.folder)
    config = config_of(
        trained.yaml,
        "run_mode=predict",
        f"output_dir={trained.folder / 'sampled'}",
        f"load_checkpoint={newest(trained)}",
        "model.model_config.do_sample=True",
        "model.model_config.top_k=3",
        "model.model_config.top_p=0.9",
    )
    (answer,) = run(config | {"input_data": ["import numpy"]})
    assert answer["text_generation_text"][0].startswith("import numpy")


def test_the_bias_moves_and_balances(job):
    output = job.folder / "biased"
    run(
        config_of(
            job.yaml,
            f"output_dir={output}",
            "moe_config.balance_via_topk_bias=True",
            "moe_config.topk_bias_update_rate=0.001",
            "moe_config.aux_loss_factor=0",
            "callbacks=[{type: MFLossMonitor}, {type: TopkBiasBalanceCallback}, {type: CheckpointMonitor, "
            "prefix: b, save_checkpoint_steps: 100}]",
            "runner_config.epochs=1",
        )
    )
    rows = rows_of(output)
    held = ms.load_checkpoint(str(checkpoint_file(output / "checkpoint")))
    for layer in range(2):
        expected = np.zeros(4)
        for row in rows:
            load = np.array(row["expert_load"][layer])
            expected += 0.001 * np.sign(load.sum() / 4 - load)
        bias = held[f"model.layers.{layer}.feed_forward.router.router.topk_bias"].asnumpy()
        np.testing.assert_allclose(bias, expected, atol=1e-6)
        assert np.abs(bias).max() > 0
    assert all(row["aux_loss"] == 0 for row in rows)  # aux_loss_factor 0 is accepted and off


def test_accumulation_sees_each_row_once(job):
    output = job.folder / "accumulated"
    run(
        config_of(
            job.yaml,
            f"output_dir={output}",
            "runner_config.gradient_accumulation_steps=2",
            "runner_config.epochs=1",
            "callbacks=[{type: MFLossMonitor}]",
            "optimizer={type: FP32StateAdamWeightDecay, beta1: 0.9, beta2: 0.95, eps: 1.e-8}",
        )
    )
    rows = rows_of(output)
    assert len(rows) == STEPS // 4
    assert all(np.sum(row["expert_load"]) == 2 * 2 * 2 * BATCH * SEQ for row in rows)
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
