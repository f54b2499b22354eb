# SPDX-License-Identifier: Apache-2.0
"""A YAML made from a model is read back to that model, runs by the ordinary words, and says little."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.dtype_keys import PLACES, name_dtypes
from mindformers_ext.core.config.file import dump_yaml, parse_yaml
from mindformers_ext.core.config.from_model import FirstTry, yaml_from_model
from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.config.inputs import find_inputs
from mindformers_ext.core.config.keys import MODEL
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.run import DEVICES, GPU, Runner, run_spec_from_yaml
from mindformers_ext.core.config.train import train_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import own_families
from mindformers_ext.core.layers import DTYPE_NAMES, DTYPE_WORDS, dtype_name
from tests.helpers.specs import family_specs

RUNNERS = {
    "train": Runner.OWN_LOOP,
    "eval": Runner.OWN_EVALUATION,
    "predict": Runner.OWN_PREDICTION,
    "chat": Runner.OWN_PREDICTION,
}


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(own_families()), st.sampled_from(sorted(RUNNERS)), st.sampled_from(DEVICES))
def test_what_is_written_is_read_back(data: st.DataObject, family: str, job: str, device: str) -> None:
    model = model_spec_from_hf(hf_config_from_spec(data.draw(family_specs(family))))
    asked = FirstTry(job=job, load="weights", tokenizer="weights", device=device, data="x.txt", prompts=("a", "b"))
    config = parse_yaml(dump_yaml(yaml_from_model(model, asked)), "made")
    read = network_spec_from_yaml(config)
    assert read.model == model
    assert read.seq_length <= model.max_position_embeddings
    run = run_spec_from_yaml(config)
    assert run.runner is RUNNERS[job] and run.family is model.family_row and run.load == "weights"
    if job == "train":
        spec, notes = train_spec_from_yaml(config, read.parallel, 10, 0.0, run.engine)
        assert spec.steps == 10 and spec.checkpoint and not notes
    if job == "predict":
        assert run.prompts == ("a", "b") and run.sampling and not run.sampling.do_sample


def test_types_are_those_of_the_device() -> None:
    model = model_spec_from_hf({"model_type": "llama", "num_hidden_layers": 1})
    for job, stored, expected in (
        ("predict", "bfloat16", ("bfloat16", "bfloat16")),
        ("train", "bfloat16", ("bfloat16", "float32")),
        ("train", "float16", ("float32", "float32")),
    ):
        asked = FirstTry(job=job, load="x", device=GPU, stored=stored)
        numerics = network_spec_from_yaml(yaml_from_model(model, asked)).numerics
        assert (numerics.compute_dtype, numerics.param_dtype) == expected
        numerics = network_spec_from_yaml(yaml_from_model(model, FirstTry(job=job, load="x", stored=stored))).numerics
        assert (numerics.compute_dtype, numerics.param_dtype) == ("float32", "float32")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("fp16", "float16"),
        ("half", "float16"),
        ("BF16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("float", "float32"),
    ],
)
def test_every_word_for_a_type_is_read(word: str, name: str) -> None:
    assert dtype_name(word) == name
    model = model_spec_from_hf({"model_type": "llama", "num_hidden_layers": 1})
    made = yaml_from_model(model, FirstTry(job="predict", load="x"))
    for key in ("compute_dtype", "param_init_type", "rotary_dtype"):
        config = apply_overrides(made, [(f"{MODEL}.{key}", word)])
        read = network_spec_from_yaml(config).numerics
        name_dtypes(config)
        assert config["model"]["model_config"][key] == name
        assert network_spec_from_yaml(config).numerics == read


def test_what_is_no_type_is_refused_with_all_words() -> None:
    model = model_spec_from_hf({"model_type": "llama", "num_hidden_layers": 1})
    config = yaml_from_model(model, FirstTry(job="predict", load="x"))
    config["model"]["model_config"]["compute_dtype"] = "fp15"
    name_dtypes(config)
    with pytest.raises(UserError) as caught:
        network_spec_from_yaml(config)
    assert all(word in str(caught.value) for word in (*DTYPE_NAMES, *DTYPE_WORDS))
    assert len(PLACES) == len(set(PLACES)) >= 8


def test_inputs_of_a_shipped_yaml_are_found_from_any_folder(tmp_path, monkeypatch) -> None:
    root, here = tmp_path / "root", tmp_path / "here"
    (root / "output").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("a.mindrecord", "b.mindrecord"):
        (root / "output" / name).touch()
    (here / "output").mkdir()
    (here / "output" / "b.mindrecord").touch()

    def found(name: str) -> str:
        loader = {"dataset_dir": name}
        config = {"train_dataset": {"data_loader": loader}, "processor": None, "load_checkpoint": ""}
        find_inputs(config, root)
        return loader["dataset_dir"]

    assert found("output/a.mindrecord") == str(root / "output" / "a.mindrecord")
    assert found("output/b.mindrecord") == "output/b.mindrecord"  # the caller's own goes first
    assert found("output/none.mindrecord") == "output/none.mindrecord"
