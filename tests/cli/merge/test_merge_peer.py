# SPDX-License-Identifier: Apache-2.0
"""The same YAML files through mergekit 0.1.5 and through ours, tensor by tensor.

mergekit wants another transformers than this environment, so it lives in one of its own, made by the extra ``peer``.
MERGEKIT_PYTHON names its interpreter; without it these tests are skipped:

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install ".[peer]"
    MERGEKIT_PYTHON=peer/bin/python python -m pytest tests/cli/merge/test_merge_peer.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from mindformers_ext.jobs.checkpoint.fused import unfused
from tests.helpers.adapters import make_adapter
from tests.helpers.merge_models import family, make_model, tensors_of, tokenizer_json

PEER = os.environ.get("MERGEKIT_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python with mergekit==0.1.5; see this file"),
]
# One process of mergekit for all files: importing it takes ten seconds.
RUN_PEER = """
import sys
from click.testing import CliRunner
from mergekit.scripts import moe, run_yaml
for name in sys.argv[1:]:
    mixture = name.startswith("moe")
    dense = ["--no-write-model-card", "--lora-merge-cache", "cache"]  # a card asks the hub
    words = [name + ".yml", "peer_" + name, "--quiet"] + ([] if mixture else dense)
    result = CliRunner().invoke(moe.main if mixture else run_yaml.main, words)
    print(name, result.exit_code, repr(result.exception), result.output[-500:] if result.exit_code else "")
"""


def tuned(method, dtype, density=0.5, shared=None):
    own = {} if density is None else {"density": density}
    return {
        "models": [
            {"model": "base"},
            {"model": "ft1", "parameters": {"weight": 0.5} | own},
            {"model": "ft2", "parameters": {"weight": 0.3} | own},
        ],
        "merge_method": method,
        "base_model": "base",
        "dtype": dtype,
        "parameters": shared or {},
    }


def between(dtype, **more):
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    sources = [{"model": name, "layer_range": [0, 4]} for name in ("ft1", "base")]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": t},
        "dtype": dtype,
    }


def weighted(method, dtype, **more):
    parts = [{"model": "ft1", "parameters": {"weight": 0.3}}, {"model": "ft2", "parameters": {"weight": 0.55}}]
    return {"models": parts, "merge_method": method, "dtype": dtype} | more


def pair(method, dtype, shared=None):
    models = [{"model": name} for name in ("base", "ft1")]
    return {"models": models, "merge_method": method, "base_model": "base", "dtype": dtype, "parameters": shared or {}}


def moe(mode, **more):
    experts = [
        {"source_model": name, "positive_prompts": [f"w{20 * n + 3} w{20 * n + 4}", f"w{20 * n + 5}"]}
        for n, name in enumerate(("ft1", "ft2"))
    ]
    experts[1]["negative_prompts"] = ["w70 w71", "w72 w73 w74"]
    return {"base_model": "base", "gate_mode": mode, "dtype": "bfloat16", "experts": experts} | more


STACK = [{"sources": [{"model": "ft1", "layer_range": [0, 4]}]}, {"sources": [{"model": "ft2", "layer_range": [2, 4]}]}]
FLOAT = {"dtype": "float32"}
WHERE = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
HALF, SINGLE, BRAIN = "float16", "float32", "bfloat16"
# bits: every bit equal; ulp: one unit in the last place in at most 1 of 10^4 elements; float: 1e-6.
FILES = {
    **{f"linear_{d}": (weighted("linear", d), "bits") for d in (HALF, SINGLE, BRAIN)},
    **{f"arithmetic_{d}": (tuned("task_arithmetic", d, None, {"lambda": 0.9}), "bits") for d in (HALF, SINGLE, BRAIN)},
    "stack": ({"slices": STACK, "merge_method": "passthrough", "dtype": BRAIN}, "bits"),
    "scaled": (
        {
            "slices": STACK,
            "merge_method": "passthrough",
            "dtype": BRAIN,
            "parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]},
        },
        "bits",
    ),
    "slerp_bfloat16": (between(BRAIN), "ulp"),
    "slerp_float32": (between(SINGLE), "float"),
    **{
        f"ties_{name}": (tuned("ties", SINGLE, density, {"normalize": norm}), "float")
        for name, density, norm in (
            ("half", 0.5, True),
            ("all", 1, False),
            ("slope", [1, 0.7, 0.1], True),
            ("where", WHERE, True),
        )
    },
    "breadcrumbs": (tuned("breadcrumbs", SINGLE, 0.6, {"gamma": 0.05}), "float"),
    "breadcrumbs_ties": (tuned("breadcrumbs_ties", SINGLE, 0.6, {"gamma": 0.05}), "float"),
    "stock": (tuned("model_stock", SINGLE, None) | {"models": [{"model": n} for n in ("ft1", "ft2")]}, "float"),
    "stock_rows": (
        tuned("model_stock", SINGLE, None, {"filter_wise": True}) | {"models": [{"model": n} for n in ("ft1", "ft2")]},
        "float",
    ),
    "sce": (
        tuned("sce", SINGLE, None, {"select_topk": 0.4}) | {"models": [{"model": n} for n in ("ft1", "ft2")]},
        "float",
    ),
    "nuslerp": (weighted("nuslerp", SINGLE), "float"),
    "nuslerp_base": (weighted("nuslerp", SINGLE, base_model="base"), "float"),
    **{
        f"nuslerp_{row}": (
            weighted("nuslerp", SINGLE, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": row}),
            "float",
        )
        for row in (False, True)
    },
    "union": (
        weighted(
            "linear",
            SINGLE,
            tokenizer_source="union",
            base_model="base",
            models=[{"model": name, "parameters": {"weight": 1}} for name in ("base", "ft1", "words")],
        ),
        "float",
    ),
    "union_mean": (
        weighted(
            "linear",
            SINGLE,
            tokenizer_source="union",
            models=[{"model": name, "parameters": {"weight": 1}} for name in ("words", "ft1", "other")],
        ),
        "float",
    ),
    "words_of_one": (
        weighted(
            "linear",
            SINGLE,
            tokenizer_source="words",
            base_model="base",
            models=[{"model": name, "parameters": {"weight": 1}} for name in ("base", "words")],
        ),
        "float",
    ),
    "karcher": ({"models": [{"model": n} for n in ("ft1", "ft2", "base")], "merge_method": "karcher"} | FLOAT, "float"),
    "multislerp": (weighted("multislerp", SINGLE), "float"),
    "multislerp_base": (weighted("multislerp", SINGLE, base_model="base"), "float"),
    "nearswap": (pair("nearswap", SINGLE, {"t": 0.01}), "bits"),
    "nearswap_bfloat16": (pair("nearswap", BRAIN, {"t": 0.01}), "bits"),
    "arcee_fusion": (pair("arcee_fusion", SINGLE), "float"),
    **{
        f"{method}_{d}": (tuned(method, d, None, {"epsilon": 0.01}), "bits" if d == SINGLE else "ulp")
        for method in ("ram", "ramplus_tl")
        for d in (SINGLE, BRAIN)
    },
    "adapter": (weighted("linear", SINGLE, models=[{"model": "base+lora", "parameters": {"weight": 1}}]), "float"),
    "moe_cheap": (moe("cheap_embed"), "bits"),
    "moe_hidden": (moe("hidden"), "bits"),
    "moe_shared": (
        moe("cheap_embed", shared_experts=[{"source_model": "ft1", "positive_prompts": ["w60 w61"]}]),
        "bits",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every file merged by both, in one folder; the models are float32, so that magnitudes are distinct."""
    folder = tmp_path_factory.mktemp("peer")
    base, *_ = family(folder, dtype="float32")
    make_adapter(folder / "lora", tensors_of(base))
    for number, name in enumerate(("words", "other")):  # another order of tokens, and tokens that no other model has
        make_model(folder / name, near=base, seed=5 + number, dtype="float32")
        table = tokenizer_json(80)
        words = table["model"]["vocab"]
        words |= {"w5": 6, "w6": 5, "w70": 79, "w79": 70}
        words |= {f"{name}{i}": words.pop(f"w{i}") for i in range(40, 44 + number)}
        (folder / name / "tokenizer.json").write_text(json.dumps(table))
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name, (config, _) in FILES.items():
            Path(f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))
            command = "moe" if name.startswith("moe") else "yaml"
            assert main([command, f"{name}.yml", f"ours_{name}", "--quiet"]) == 0
        done = subprocess.run([str(PEER), "-c", RUN_PEER, *FILES], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        yield folder, done.stdout
    finally:
        os.chdir(before)


def read(folder):
    reader = unfused(SafetensorsDir(folder), "mixtral")
    result = {name: reader.read(name) for name in reader.infos}
    reader.close()
    return result


def by_token(folder, tensors):
    """Rows by their tokens: mergekit numbers the tokens that it adds by chance."""
    table = json.loads((folder / "tokenizer.json").read_text())
    words = {**table["model"]["vocab"], **{item["content"]: item["id"] for item in table["added_tokens"]}}
    order = [words[word] for word in sorted(words)]
    rows = {name: tensors[name][order] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return tensors | rows | {"words": np.array([len(words)], np.float32)}


@pytest.mark.parametrize("name", FILES)
def test_the_peer_writes_the_same(name, place):
    folder, log = place
    assert (folder / f"peer_{name}").is_dir(), log
    ours, theirs = read(folder / f"ours_{name}"), read(folder / f"peer_{name}")
    if name.startswith("union"):
        ours, theirs = by_token(folder / f"ours_{name}", ours), by_token(folder / f"peer_{name}", theirs)
    assert set(ours) == set(theirs)
    apart = total = 0
    for tensor, array in ours.items():
        other = theirs[tensor]
        if name == "ramplus_tl_bfloat16":  # mergekit leaves its float32 as it is, whatever dtype says
            other = other.astype(array.dtype)
        assert array.dtype == other.dtype and array.shape == other.shape, tensor
        if FILES[name][1] == "float":
            np.testing.assert_allclose(array, other, rtol=0, atol=1e-6, err_msg=tensor)
            continue
        bits = np.dtype(f"i{array.dtype.itemsize}")
        steps = np.abs(array.view(bits).astype(np.int64) - other.view(bits).astype(np.int64))
        assert steps.max(initial=0) <= (0 if FILES[name][1] == "bits" else 1), tensor
        apart, total = apart + int(np.count_nonzero(steps)), total + steps.size
    assert apart <= 1e-4 * total


def test_ties_of_bfloat16_differ_only_at_the_threshold(tmp_path):
    """Equal magnitudes at the threshold are common there; which of them stay is open in mergekit, the first in ours."""
    family(tmp_path)
    (tmp_path / "ties.yml").write_text(yaml.safe_dump(tuned("ties", BRAIN)))
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert main(["yaml", "ties.yml", "ours_ties", "--quiet"]) == 0
        subprocess.run([str(PEER), "-c", RUN_PEER, "ties"], check=True, capture_output=True)
    finally:
        os.chdir(before)
    ours, theirs, base = (tensors_of(tmp_path / name) for name in ("ours_ties", "peer_ties", "base"))
    tunes = [tensors_of(tmp_path / name) for name in ("ft1", "ft2")]
    for name, array in ours.items():
        edge = np.zeros(array.shape, bool)
        for tune in tunes:
            size = np.abs((tune[name] - base[name]).astype(np.float64))
            k = max(1, size.size // 2)
            edge |= size == np.sort(size.ravel())[::-1][k - 1]
        assert np.array_equal(array[~edge], theirs[name][~edge]), name


def test_old_and_new_rope_settings_of_the_peer(tmp_path):
    """A config.json written by transformers 5 lacks the top-level rope_theta; a merge of such a model has both."""
    base = make_model(tmp_path / "base", rope_theta=500000.0)
    config = {"slices": [{"sources": [{"model": str(base), "layer_range": [0, 2]}]}], "merge_method": "passthrough"}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    subprocess.run([str(PEER), "-c", RUN_PEER, "c"], cwd=tmp_path, check=True, capture_output=True)
    again = yaml.safe_load((tmp_path / "c.yml").read_text())
    again["slices"][0]["sources"][0]["model"] = str(tmp_path / "peer_c")
    (tmp_path / "again.yml").write_text(yaml.safe_dump(again))
    assert main(["yaml", str(tmp_path / "again.yml"), str(tmp_path / "again"), "--quiet"]) == 0
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500000.0
