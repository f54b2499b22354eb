# SPDX-License-Identifier: Apache-2.0
"""LoRA: only adapters train, checkpoints hold only them, and merging gives the network with adapters."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ext.cli.merge_lora import main as merge
from mindformers_ext.core.config.lora import LORA_A, LORA_B, LoraSpec, lora_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.mf.run import run
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.lora import add_lora
from tests.helpers.tiny_run import config_of, rows_of, token_rows

PET = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ".*wq|.*wo|lm_head"}


def with_pet(config, **changes):
    config["model"]["model_config"]["pet_config"] = PET | changes
    return config


@pytest.fixture(scope="module")
def tuned(job):
    """The job finetuned with adapters from given base weights: output folder, base file, metrics."""
    folder = job.folder / "lora"
    folder.mkdir()
    base = folder / "base.ckpt"
    ms.set_seed(5)
    ms.save_checkpoint(network_of(job), str(base))
    config = config_of(
        job.yaml,
        f"output_dir={folder / 'out'}",
        "runner_config.epochs=2",
        f"load_checkpoint={base}",
        "lr_schedule.learning_rate=0.02",
        "callbacks.1.save_checkpoint_steps=5",
    )
    run(check_run(with_pet(config), "test").config)
    return base, folder / "out", rows_of(folder / "out")


def network_of(job):
    network = build_causal_lm(network_spec_from_yaml(config_of(job.yaml)))
    network.set_train(False)
    return network


@pytest.mark.slow
def test_the_loss_falls_with_adapters_alone(tuned):
    _, _, rows = tuned
    assert len(rows) == 20 and rows[-1]["lm_loss"] < 0.97 * rows[0]["lm_loss"]


@pytest.mark.slow
def test_a_checkpoint_holds_only_adapters_and_their_state(tuned):
    _, output, _ = tuned
    held = ms.load_checkpoint(str(output / "checkpoint" / "rank_0" / "tiny_rank_0-2_10.ckpt"))
    weights = {name for name in held if name.startswith(("model.", "lm_head"))}
    layers = [f"model.layers.{layer}.attention.{cell}" for layer in range(2) for cell in ("wq", "wo")]
    layers.append("lm_head")
    assert weights == {f"{layer}.{part}" for layer in layers for part in (LORA_A, LORA_B)}
    assert held[f"{layers[0]}.{LORA_A}"].shape == (4, 32) and np.abs(held[f"{layers[0]}.{LORA_B}"].asnumpy()).max() > 0
    moments = {name for name in held if name.startswith("adam_")}
    assert moments == {f"{kind}{name}" for kind in ("adam_m.", "adam_v.") for name in weights}
    words = json.loads((output / "adapter_config.json").read_text())
    assert (words["r"], words["lora_alpha"], words["target_modules"]) == (4, 8, PET["target_modules"])


@pytest.mark.slow
def test_a_stopped_run_continues_as_if_it_had_not_stopped(tuned, job):
    """Dropout included: the same figures, the same bits of adapters and moments."""
    base, output, rows = tuned
    again = job.folder / "lora" / "again"
    shutil.copytree(output, again)
    (again / "checkpoint" / "rank_0" / "tiny_rank_0-2_10.ckpt").unlink()
    config = config_of(
        job.yaml,
        f"output_dir={again}",
        "runner_config.epochs=2",
        f"load_checkpoint={base}",
        "lr_schedule.learning_rate=0.02",
        "resume_training=True",
    )
    checked = check_run(with_pet(config), "test")
    run(checked.config, checked)
    figures = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows_of(again)]
    assert figures == [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
    whole, last = (
        ms.load_checkpoint(str(next((folder / "checkpoint" / "rank_0").glob("*-2_10.ckpt"))))
        for folder in (output, again)
    )
    assert whole.keys() == last.keys() and len(whole) == 38
    assert all(np.array_equal(whole[name].asnumpy(), last[name].asnumpy()) for name in whole)


@pytest.mark.slow
def test_merged_weights_give_the_logits_of_base_and_adapters(tuned, job, capsys):
    base, output, _ = tuned
    merged = output / "merged.ckpt"
    assert merge(["--base", str(base), "--adapter", str(output / "checkpoint"), "--output", str(merged)]) == 0
    assert "adapters added to 5, factor 2" in capsys.readouterr().out
    ids = Tensor(token_rows(width=32, rows=2))

    def logits(lora, *files):
        network = network_of(job)
        if lora:
            add_lora(network, lora)
        for file in files:
            ms.load_param_into_net(network, ms.load_checkpoint(str(file)))
        network.set_train(False)
        return network(ids).asnumpy()

    spec = lora_from_yaml(with_pet(config_of(job.yaml)))
    adapter = output / "checkpoint" / "rank_0" / "tiny_rank_0-2_10.ckpt"
    both, one, bare = logits(spec, base, adapter), logits(None, merged), logits(None, base)
    np.testing.assert_allclose(one, both, atol=1e-5)
    assert np.abs(both - bare).max() > 1e-2
    np.testing.assert_array_equal(logits(spec, base), bare)  # B starts at zero


@pytest.mark.slow
def test_merging_refuses_what_does_not_fit(tuned, tmp_path, capsys):
    base, output, _ = tuned
    adapter = str(output / "checkpoint")
    for arguments, words in (
        (["--base", str(base), "--adapter", str(base), "--lora_scaling", "1"], "holds no LoRA adapters"),
        (["--base", str(base), "--adapter", str(tmp_path / "none")], "is no checkpoint"),
        (["--base", adapter + "/rank_0/tiny_rank_0-2_5.ckpt", "--adapter", adapter], "wq.weight is not in the base"),
    ):
        assert merge([*arguments, "--output", str(tmp_path / "x.ckpt")]) == 2
        assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rnk": 8}, "did you mean 'lora_rank'"),
        ({"pet_type": "slora"}, "pet_type='slora' is unknown"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is out of range"),
        ({"target_modules": None}, "target_modules=None is no text"),
        ({"target_modules": ".*(wq"}, "no regular expression"),
        ({"freeze_include": ["x"]}, "freeze_include=['x'] is not built"),
    ],
)
def test_a_wrong_pet_config_is_explained(job, changes, words):
    with pytest.raises(UserError) as error:
        lora_from_yaml(with_pet(config_of(job.yaml), **changes))
    assert words in str(error.value)


def test_layers_that_cannot_be_adapted_are_named(job):
    with pytest.raises(UserError, match=r"matches no layer.*model\.layers\.\*\.attention\.wk"):
        add_lora(network_of(job), LoraSpec(targets=".*wx"))
    with pytest.raises(UserError, match=r"matches model.layers.0.feed_forward.ffn.w1.*only linear layers"):
        add_lora(network_of(job), LoraSpec(targets=".*w1|.*wq"))


def test_what_is_not_built_is_said(job):
    with pytest.raises(UserError, match="merge the adapters into the base first"):
        check_run(with_pet(config_of(job.yaml, "run_mode=predict")), "test")
