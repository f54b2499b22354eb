# SPDX-License-Identifier: Apache-2.0
"""Inputs whose structure is right and whose values are others of their kind: what lies behind the first checks reads
them. Beside ``fuzz_formats``, where structures break."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.core.config.file import load_yaml
from tests.helpers.merge_models import family
from tests.helpers.spoil import other_word

GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parameters of each model, and of all
    "linear": ({"weight": [0.2, 0.8]}, {"normalize": True}),
    "task_arithmetic": ({"weight": [{"filter": "mlp", "value": [0.5, 1.0]}, {"value": 0.3}]}, {"lambda": 0.7}),
    "ties": ({"weight": 0.5, "density": [0.4, 0.9]}, {"normalize": True}),
    "dare_ties": ({"weight": 0.5, "density": 0.5}, {"lambda": 1.0}),
    "dare_linear": ({"weight": 0.5, "density": 0.5}, {"normalize": False}),
    "della": ({"weight": 0.5, "density": 0.5, "epsilon": 0.1}, {"lambda": 1.0}),
    "breadcrumbs": ({"weight": 0.5, "density": 0.9, "gamma": 0.01}, {"normalize": False}),
    "sce": ({}, {"select_topk": 0.5}),
    "nuslerp": ({"weight": 0.5}, {"nuslerp_flatten": True}),
}
METHODS = "slerp model_stock karcher " + " ".join(GIVEN)
PARAMETERS = "weight density t gamma epsilon lambda normalize select_topk nuslerp_flatten int8_mask filter value scale"
MERGE_WORDS = [
    *METHODS.split(),
    *"passthrough multislerp nearswap arcee_fusion breadcrumbs_ties della_linear ram ramplus_tl".split(),
    *PARAMETERS.split(),
    *"base_model models slices sources layer_range parameters dtype out_dtype tokenizer_source".split(),
    *"chat_template auto chatml union base float16 bfloat16 float32 float64 merge_method model self_attn mlp".split(),
]
MOE_WORDS = [
    *"hidden cheap_embed random uniform_random hidden_last hidden_avg base_model experts shared_experts".split(),
    *"positive_prompts negative_prompts source_model residual_scale gate_mode dtype experts_per_token".split(),
    *"architecture mixtral qwen qwen3 deepseek num_segments noise_scale positive float16 bfloat16".split(),
]
JOB_WORDS = [
    *"LlamaConfig MixtralConfig AdamW Adam FusedAdamW CosineWithWarmUpLR ConstantWarmUpLR LinearWithWarmUpLR".split(),
    *"TopkRouterV2 TopkRouter MFTrainOneStepCell MFPipelineWithLossScaleCell train finetune eval predict".split(),
    *"float16 bfloat16 float32 CPU GPU Ascend num_layers num_heads n_kv_heads multiple_of ffn_dim_multiplier".split(),
    *"seq_length batch_size capacity_factor expert_num num_experts_chosen NTK YARN LLAMA3 PI extend_method".split(),
    *"data_parallel model_parallel expert_parallel pipeline_stage micro_batch_num recompute warmup_steps".split(),
]


def recipes(folder: Path) -> list[dict[str, Any]]:
    """A whole recipe of every method."""
    names = [str(folder / name) for name in ("ft1", "ft2")]
    given: dict[str, Any] = {"base_model": str(folder / "base"), "dtype": "float32"}
    made = []
    for method, (each, shared) in GIVEN.items():
        models = [{"model": name, "parameters": each} if each else {"model": name} for name in names]
        made.append({"merge_method": method, "models": models, "parameters": shared or {"normalize": True}})
        made[-1] |= {"dtype": "float32"} if method in ("linear", "karcher") else given
    ranges = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in names]
    made.append({"merge_method": "passthrough", "slices": ranges, "dtype": "float32"})
    made.append(
        {**made[0], "base_model": names[0], "tokenizer": {"source": "union", "tokens": {"w5": {"source": names[0]}}}}
    )
    return made


def mixtures(folder: Path) -> list[dict[str, Any]]:
    """Mixtures whose gates come from words and from chance."""
    experts = [
        {"source_model": str(folder / name), "positive_prompts": [f"w3 w{n + 4}"]}
        for n, name in enumerate(("ft1", "ft2"))
    ]
    base = {"base_model": str(folder / "base"), "dtype": "float32", "experts": experts, "experts_per_token": 2}
    return [{**base, "gate_mode": mode} for mode in ("cheap_embed", "random", "uniform_random")]


def write_whole(folder: Path) -> None:
    """The whole inputs: models, recipes and mixtures."""
    family(folder / "dense", count=2, layers=2, dtype="float32")
    (folder / "recipes.json").write_text(json.dumps(recipes(folder / "dense")))
    (folder / "mixtures.json").write_text(json.dumps(mixtures(folder / "dense")))


def one_of(file: str, words: list[str]) -> Callable[[Path, random.Random], None]:
    """Spoil one of the inputs that ``file`` lists; it stands in one.yaml then."""

    def spoil(folder: Path, rng: random.Random) -> None:
        _write(folder / "one.yaml", rng.choice(json.loads((folder / file).read_text())), words, rng)

    return spoil


def job(folder: Path, rng: random.Random) -> None:
    """Spoil the YAML of a run."""
    _write(folder / "job.yaml", load_yaml(folder / "job.yaml"), JOB_WORDS, rng)


def _write(path: Path, value: Any, words: list[str], rng: random.Random) -> None:
    value = other_word(value, words, rng)
    path.write_text(yaml.safe_dump(copy.deepcopy(value)))


def launch_words(folder: Path, rng: random.Random) -> None:
    """A launch in one of the forms, its values others of their kind."""
    forms = [
        ["run_mindformer.py --config x"],
        ["run_mindformer.py --config x", "2"],
        ["run_mindformer.py --config x", "2", "8118", "logs", "True", "60"],
        ["run_mindformer.py --config 'a b' --x 1", "16", "8", "10.0.0.1", "8118", "1", "logs", "False", "7200"],
    ]
    words = rng.choice(forms)
    place = rng.randrange(len(words))
    old = words[place]
    if old.isdecimal():
        words[place] = rng.choice(["1", "2", "4", "8", "16", "64", "0", "-1", "60", "65535", "65536", "8 "])
    elif old in ("True", "False"):
        words[place] = rng.choice(["true", "False", "TRUE", "1", "yes"])
    else:
        words[place] = rng.choice(["out put", "localhost", "10.0.0.300", "::1", "a.py --x 'y z'", "run.py", "../logs"])
    (folder / "words.json").write_text(json.dumps(words))


def merge(kind: str) -> Callable[[Path, Path], int]:
    """Merge as one.yaml says."""

    def read(folder: Path, out: Path) -> int:
        from mindformers_ext.cli.merge import main

        return main([kind, str(folder / "one.yaml"), str(out / "merged"), "--quiet"])

    return read


def check(folder: Path, out: Path) -> None:
    """Judge a run, and what its own loop would do."""
    from mindformers_ext.core.config.train import train_spec_from_yaml
    from mindformers_ext.jobs.run.checks import check_run

    config = load_yaml(folder / "job.yaml")
    found = check_run(config, "job.yaml")
    if found.run.trains:
        train_spec_from_yaml(found.config, found.build.network.parallel, 10, 0.0, found.run.engine)


def warm(folder: Path, out: Path) -> None:
    """Import what reading needs: frameworks are no memory of an input."""
    check(folder, out)
    for kind, file in (("yaml", "recipes.json"), ("moe", "mixtures.json")):
        first = json.loads((folder / file).read_text())[0]
        out.mkdir()
        (out / "one.yaml").write_text(yaml.safe_dump(first))
        assert merge(kind)(out, out) == 0
        shutil.rmtree(out)


def launch(folder: Path, out: Path) -> None:
    """Read a launch and make the commands of both launchers."""
    from mindformers_ext.jobs.launch.arguments import check_master, read_launch
    from mindformers_ext.jobs.launch.msrun import msrun_command
    from mindformers_ext.jobs.launch.torchrun import torchrun_command

    found = read_launch(json.loads((folder / "words.json").read_text()), {})
    for command in (msrun_command, torchrun_command):
        assert all(isinstance(word, str) for word in command(found, {}))
    check_master(found, "msrun_launcher.sh")
