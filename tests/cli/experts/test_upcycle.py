# SPDX-License-Identifier: Apache-2.0
"""``build_experts.py upcycle``: the dense model's logits in stock transformers, Megatron's error, draws, mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mindformers_ext.cli import experts_upcycle as stage
from mindformers_ext.cli.convert import main as convert
from mindformers_ext.cli.experts import main
from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
from mindformers_ext.jobs.experts.upcycle import request
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, LayerTable, write_table
from tests.helpers.merge_models import config_of, make_model, shapes_of, tensors_of, write_model

KINDS = ("llama", "qwen2", "qwen3", "mixtral")
WORDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
MLP, EXPERT = "model.layers.{}.mlp.{}.weight", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
WIDTH = 48
README_COMMAND = "python tools/build_experts.py upcycle output/try/llama_a output/try/upcycled"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three dense models and a mixture in float32; one in many small files, one of two bytes a number."""
    folder = tmp_path_factory.mktemp("dense")
    for kind in KINDS:
        make_model(folder / kind, kind, dtype="float32", layers=3)
    make_model(folder / "sharded", dtype="float32", layers=3, shard=12_000)
    make_model(folder / "half", layers=3)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def upcycle(model, out, *words):
    return main(["upcycle", str(model), str(out), "--quiet", *map(str, words)])


def logits_of(folder):
    """Of stock transformers, which must find every tensor that it looks for and no other."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20) * 3 % 80).logits.numpy()


SAME = {
    "two copies of four": ("llama", "mixtral", "--method copy --experts 4"),
    "all": ("llama", "mixtral", "--method copy --experts 3 --top_k 3 --router normal --router_std 0.5"),
    "segments": ("llama", "mixtral", "--method granular --experts 12 --granularity 4 --top_k 8 --router_std 0.5"),
    "shuffled": ("llama", "mixtral", "--method drop --experts 6 --granularity 2 --drop_ratio 0"),
    "alone": ("llama", "mixtral", "--method granular --experts 4 --granularity 4 --top_k 4"),
    "shared": ("qwen2", "qwen2_moe", "--method granular --experts 8 --granularity 2 --moe_layer_freq [0]+[1]*2"),
    "llama with dense layers": ("llama", "qwen2_moe", "--method copy --experts 4 --moe_layer_freq 2"),
    "heads with norms": ("qwen3", "qwen3_moe", "--method copy --experts 4 --moe_layer_freq ([1,0,1])"),
    "a softmax over all": (
        "qwen3",
        "qwen3_moe",
        "--method copy --experts 8 --top_k 2 --router zeros --norm_topk_prob False",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_stock_transformers_computes_the_dense_model(name, tmp_path, capsys):
    kind, family, options = SAME[name]
    assert upcycle(kind, tmp_path / "out", *options.split()) == 0
    assert "at the start: the dense model's function" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == family
    dense = logits_of(kind)
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(logits_of(tmp_path / "out"), dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "qwen3"])
def test_more_experts_of_a_mixture_compute_the_same(kind, tmp_path, capsys):
    """Different experts, a shared one and a dense layer in two of the three, weights that do not sum to 1 in two."""
    old = Path("mixtral")
    if kind != "mixtral":
        options = "--method drop --experts 4 --norm_topk_prob False --router_std 1 --moe_layer_freq [1,0,1]"
        old = tmp_path / "old"
        assert upcycle(kind, old, *options.split()) == 0
    assert upcycle(old, tmp_path / "new", "--method", "expert", "--experts", 12) == 0
    assert "6 chosen instead of 2\nat the start: the function of the old" in capsys.readouterr().out
    np.testing.assert_allclose(logits_of(tmp_path / "new"), logits_of(old), atol=1e-6, rtol=0)
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (old / "tokenizer.json").read_bytes()
    assert upcycle(old, tmp_path / "apart", *"--method expert --experts 8 --router_noise 0.01 --top_k 2".split()) == 0
    assert "not the old mixture's function, which takes --top_k 4" in capsys.readouterr().out
    gates = [name for name in tensors_of(old) if re.search(r"(mlp|moe)\.gate\.weight", name)]
    for name in gates:
        (rows, more), first = np.split(tensors_of(tmp_path / "apart")[name], 2), tensors_of(old)[name]
        size = np.sqrt(np.square(first).mean())
        assert np.array_equal(rows, first) and (more - first).std() == pytest.approx(0.01 * size, rel=0.3)
    assert len(gates) == (3 if kind == "mixtral" else 2)


def test_what_a_mixture_need_not_store_stays_behind(tmp_path):
    tensors = tensors_of(Path("mixtral"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_model(tmp_path / "old", tensors | extra, json.loads(Path("mixtral/config.json").read_text()))
    assert upcycle(tmp_path / "old", tmp_path / "new", "--method", "expert", "--experts", 8) == 0
    assert (
        tensors.keys() < tensors_of(tmp_path / "new").keys() and not extra.keys() & tensors_of(tmp_path / "new").keys()
    )


def silu(x):
    return x / (1 + np.exp(-x))


def routed(tensors, x, chosen):
    """The first layer's mixture for ``x`` as Qwen3-MoE computes it with norm_topk_prob false, in float64."""
    get = {name: array.astype(np.float64) for name, array in tensors.items() if ".mlp." in name}
    scores = x @ get["model.layers.0.mlp.gate.weight"].T
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    best = np.argsort(-scores, -1, kind="stable")[:, :chosen]
    result = np.zeros_like(x)
    for expert in range(scores.shape[1]):
        gate, up, down = (get[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] for name in WORDS_IN_ORDER)
        mine = (best == expert).any(-1, keepdims=True) * weights[:, expert : expert + 1]
        result += mine * ((silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return result


WORDS_IN_ORDER = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("copies", "granularity", "chosen", "error"), [(8, 1, 2, 9.2), (8, 2, 4, 12.3), (4, 4, 4, 14.5), (8, 8, 8, 16.9)]
)
def test_megatrons_scale_has_megatrons_error_and_exact_none(copies, granularity, chosen, error, tmp_path):
    """The spec's figures, whose random SwiGLU has values before silu of deviation 1.77; by an own routing in numpy."""
    random, settings = np.random.default_rng(0), config_of("qwen3", layers=1, hidden=64, ffn=256, torch_dtype="float32")
    tensors = {name: random.standard_normal(s).astype(np.float32) / 8 for name, s in shapes_of(settings).items()}
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1.77
    write_model(tmp_path / "dense", tensors, settings)
    x = random.standard_normal((512, 64))
    gate, up, down = (tensors[MLP.format(0, name)].astype(np.float64) for name in WORDS_IN_ORDER)
    dense = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    found = {}
    options = f"--experts {copies * granularity} --top_k {chosen} --router_std 1e-8 --norm_topk_prob False".split()
    options += ["--method", "copy"] if granularity == 1 else ["--method", "granular", "--granularity", granularity]
    for scale in ("exact", "megatron"):
        assert upcycle(tmp_path / "dense", tmp_path / scale, *options, "--scale", scale) == 0
        mixture = routed(tensors_of(tmp_path / scale), x, chosen)
        found[scale] = np.linalg.norm(mixture - dense) / np.linalg.norm(dense)
    assert found["exact"] < 1e-6 and 100 * found["megatron"] == pytest.approx(error, abs=0.3)


def matrices(tensors, layer, expert):
    """Gate, up and down of an expert, a neuron in each row."""
    found = (tensors[EXPERT.format(layer, expert, WORDS[name])] for name in WORDS_IN_ORDER)
    return [array.T if name == "down_proj" else array for name, array in zip(WORDS_IN_ORDER, found, strict=True)]


def test_shuffled_neurons_are_the_dense_ones_bit_by_bit(tmp_path):
    """Put back in order by their gate rows; every expert and layer has an order of its own. Two bytes a number."""
    assert upcycle("half", tmp_path / "out", *"--method drop --experts 3 --drop_ratio 0".split()) == 0
    got, dense = tensors_of(tmp_path / "out"), tensors_of(Path("half"))
    orders = []
    for layer in range(3):
        whole = [dense[MLP.format(layer, name)] for name in WORDS_IN_ORDER]
        whole[2] = whole[2].T
        for expert in range(3):
            mine = matrices(got, layer, expert)
            places = {row.tobytes(): place for place, row in enumerate(mine[0])}
            back = [places[row.tobytes()] for row in whole[0]]
            orders.append(tuple(back))
            assert all(a[back].tobytes() == b.tobytes() for a, b in zip(mine, whole, strict=True))
    assert len(set(orders)) == 9 and tuple(range(WIDTH)) not in orders


@pytest.mark.parametrize("same", [False, True])
def test_redrawn_neurons_have_the_mean_and_deviation_of_what_they_replace(same, tmp_path):
    """Half of them, the same of the three matrices or others; all else as with a ratio of 0. Of parts, in the whole."""
    words = ["--method", "drop", "--experts", 4, "--granularity", 2, "--seed", 5]
    assert upcycle("llama", tmp_path / "plain", *words, "--drop_ratio", 0) == 0
    assert upcycle("llama", tmp_path / "out", *words, "--same_neurons", same) == 0
    plain, got = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    for layer in range(3):
        for copy in range(2):
            before, after = (
                [
                    np.concatenate(parts)
                    for parts in zip(*(matrices(t, layer, 2 * copy + g) for g in (0, 1)), strict=True)
                ]
                for t in (plain, got)
            )
            changed = [(a != b).any(1) for a, b in zip(after, before, strict=True)]
            assert [int(rows.sum()) for rows in changed] == [WIDTH // 2] * 3
            assert all(np.array_equal(changed[0], rows) == same for rows in changed[1:])
            for rows, a, b in zip(changed, after, before, strict=True):
                count = b[rows].size
                assert abs(a[rows].mean() - b[rows].mean()) < 4 * b[rows].std() / count**0.5
                assert a[rows].std() == pytest.approx(b[rows].std(), rel=4 / (2 * count) ** 0.5)


def bytes_of(folder):
    return {name: array.tobytes() for name, array in tensors_of(folder).items()}


def test_a_seed_is_the_same_whatever_the_files_are_cut_into(tmp_path):
    words = ["--method", "drop", "--experts", 4, "--granularity", 2]
    assert upcycle("llama", tmp_path / "a", *words) == 0
    assert upcycle("sharded", tmp_path / "b", *words, "--out_shard_size", "20K") == 0
    assert upcycle("llama", tmp_path / "c", *words, "--seed", 1) == 0
    assert len(list(Path("sharded").glob("*.safetensors"))) > 3 < len(list((tmp_path / "b").glob("*.safetensors")))
    a, b, c = (bytes_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys()
    differ = {name for name in a if a[name] != c[name]}
    assert differ == {name for name in a if "block_sparse_moe" in name}


def test_rows_of_the_router(tmp_path):
    """Parts of a copy share a row; kmeans takes the rows of a file, repeated; zeros."""
    gate = "model.layers.{}.block_sparse_moe.gate.weight"
    granular = ["--method", "granular", "--experts", 8, "--granularity", 2]
    centres = np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float32)
    write_table(tmp_path / "gates.npz", LayerTable(GATES, {n: {GATE: rows} for n, rows in enumerate(centres)}))
    runs = {"groups": [], "normal": ["--router_std", 0.1], "kmeans": ["--gate_weights_file", tmp_path / "gates.npz"]}
    for router, more in runs.items():
        assert upcycle("llama", tmp_path / router, *granular, "--router", router, *more) == 0
    assert upcycle("llama", tmp_path / "zeros", *"--method copy --experts 4 --router zeros".split()) == 0
    found = {
        name: np.stack([tensors_of(tmp_path / name)[gate.format(n)] for n in range(3)]) for name in (*runs, "zeros")
    }
    assert np.array_equal(found["groups"][:, ::2], found["groups"][:, 1::2])
    assert found["groups"].std() == pytest.approx(0.02, rel=0.15)
    assert found["normal"].std() == pytest.approx(0.1, rel=0.15)
    assert len(np.unique(found["normal"].reshape(24, -1), axis=0)) == 24
    assert len(np.unique(found["groups"].reshape(24, -1), axis=0)) == 12
    assert np.array_equal(found["kmeans"], np.repeat(centres, 2, axis=1)) and not found["zeros"].any()


def test_a_mindspore_checkpoint_holds_the_same(tmp_path, capsys):
    words = "--method granular --experts 4 --granularity 2 --moe_layer_freq [0,1,1]".split()
    assert upcycle("llama", tmp_path / "hf", *words, "--format", "qwen2_moe") == 0
    assert upcycle("llama", tmp_path / "moe.ckpt", *words, "--format", "mindspore") == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["hf", "moe.ckpt", "moe.ckpt.json"]
    back = ["--reversed", "--input_path", tmp_path / "moe.ckpt", "--output_path", tmp_path / "back"]
    assert convert([str(word) for word in back]) == 0
    assert bytes_of(tmp_path / "hf") == bytes_of(tmp_path / "back")
    assert f"next: mfext train {tmp_path / 'moe.ckpt'} --data FILE" in capsys.readouterr().out


def test_what_lies_beside_and_what_is_said(tmp_path, capsys):
    dense = Path("llama")
    assert upcycle(dense.resolve(), tmp_path / "out", *"--method drop --experts 8 --dtype bfloat16".split()) == 0
    text = capsys.readouterr().out
    assert "8 experts (8 copies, each in 1 segment) in 3 of 3 layers, 2 chosen" in text
    assert "another function than the dense model's, as 0.5 of the neurons" in text and "optimizer states" in text
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "`llama`" in card and "method: drop" in card and str(dense.resolve().parent) not in card
    assert {array.dtype.name for array in tensors_of(tmp_path / "out").values()} == {"bfloat16"}
    sizes = {name: array.size for name, array in tensors_of(tmp_path / "out").items()}
    active = sum(size / (4 if ".experts." in name else 1) for name, size in sizes.items())
    assert f"a token passes {active / 1e6:.1f} M of {sum(sizes.values()) / 1e6:.1f} M" in text
    assert upcycle(dense, tmp_path / "none", *"--method copy --experts 4 --dry_run".split()) == 0
    assert "block_sparse_moe.gate.weight float32 [4, 32] = gate, groups" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_killed_under_way_it_leaves_nothing_that_looks_whole(model, tmp_path, monkeypatch):
    words = ["--experts", 8, "--method", "drop" if model == "llama" else "expert"]
    plain, count = SafetensorsDirWriter.add_parts, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*arguments)

    child = os.fork()
    if not child:
        monkeypatch.setattr(SafetensorsDirWriter, "add_parts", dies)
        upcycle(model, tmp_path / "out", *words)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    assert upcycle(model, tmp_path / "out", *words) == 0 and [item.name for item in tmp_path.iterdir()] == ["out"]


COPY = "--method copy --experts 4"
GRANULAR = "--method granular --experts 8 --granularity 4"
MISTAKES = {
    "no model": ("nothing", COPY, "'nothing' is no folder", "Hugging Face folder"),
    "one expert": ("llama", "--method copy --experts 1", "--experts 1", "at least two"),
    "no segments": ("llama", "--method granular --experts 4", "--granularity 1", "2 or more"),
    "not a multiple": (
        "llama",
        "--method granular --experts 6 --granularity 4",
        "--experts 6 is no multiple",
        "copies",
    ),
    "width": (
        "llama",
        "--method granular --experts 10 --granularity 5",
        "intermediate_size 48 is no",
        "another --granularity",
    ),
    "chosen": ("llama", f"{COPY} --top_k 5", "--top_k 5 of 4", "1 to all"),
    "part of a copy": ("llama", f"{GRANULAR} --top_k 6", "--top_k 6 is no multiple", "--router normal"),
    "ties": ("llama", f"{GRANULAR} --router zeros --top_k 4", "--router zeros with --granularity 4", "take groups"),
    "ratio": ("llama", "--method drop --experts 4 --drop_ratio 1.5", "--drop_ratio 1.5", "0 to 1"),
    "huge": ("llama", f"{COPY} --router_std 1e39", "--router_std 1e+39", "up to 1e+06"),
    "nan": ("llama", f"{COPY} --router_std nan", "--router_std nan", "above 0"),
    "seed": ("llama", f"{COPY} --seed -1", "--seed -1", "whole number"),
    "dtype": ("llama", f"{COPY} --dtype bf17", "dtype 'bf17' is unknown", "bf16"),
    "no effect": ("llama", f"{COPY} --drop_ratio 0.3 --granularity 2", "--granularity (counts with", "--drop_ratio"),
    "no centres": ("llama", f"{COPY} --router kmeans", "--router kmeans needs --gate_weights_file", "--num_experts 4"),
    "centres": ("llama", f"{COPY} --router kmeans --gate_weights_file few.npz", "layer 0: [3, 32]", "[4, 32]"),
    "others": ("llama", f"{COPY} --router kmeans --gate_weights_file others.npz", "made from other model", ""),
    "layers": ("llama", f"{COPY} --moe_layer_freq [0,1]", "is of 2 layers, the model has 3", "give N"),
    "no layers": ("llama", f"{COPY} --moe_layer_freq [0]*3", "leaves no layer", "give N"),
    "a bomb": ("llama", f"{COPY} --moe_layer_freq ([1]*2000)*9999", "more than 2000 layers", "give N"),
    "no code": ("llama", f"{COPY} --moe_layer_freq __import__('os')", "is not understood", "give N"),
    "dense mixtral": ("llama", f"{COPY} --format mixtral --moe_layer_freq 2", "leaves layers dense", "qwen2_moe"),
    "dense sum": ("llama", f"{COPY} --norm_topk_prob False", "--norm_topk_prob False", "always divides"),
    "format": ("qwen2", f"{COPY} --format mixtral", "--format mixtral: a qwen2 can become qwen2_moe", "biases"),
    "a mixture": ("mixtral", COPY, "is a mixtral: it is a mixture already", "--method expert"),
    "dense experts": ("llama", "--method expert --experts 8", "is a llama: --method expert takes a mixture", "Mixtral"),
    "same experts": ("mixtral", "--method expert --experts 6", "--experts 6: 'mixtral' has 4", "8, 12, 16"),
    "another family": ("mixtral", "--method expert --experts 8 --format qwen3_moe", "is a mixtral and stays one", ""),
    "noise": ("mixtral", "--method expert --experts 8 --router_noise -1", "--router_noise -1", "0 to 1e+06"),
    "loud": ("mixtral", "--method expert --experts 8 --router_noise 1e300", "--router_noise 1e+300", "0 to 1e+06"),
    "too many": ("llama", "--method copy --experts 1000000", "--experts 1000000 in 3 layers", "at most 200000"),
    "suffix": ("llama", f"{COPY} --format mindspore", "must end in .ckpt or .safetensors", ""),
    "window": ("window", COPY, "sliding_window=8", "null in a copy"),
    "lost": ("lost", COPY, "'model.layers.1.mlp.up_proj.weight' is missing", ""),
}


@pytest.fixture(scope="module")
def spoiled(place):
    make_model(place / "window", "mistral", layers=3, sliding_window=8)
    settings = config_of(layers=3)
    tensors = {
        name: np.ones(shape, np.float32) for name, shape in shapes_of(settings).items() if "1.mlp.up" not in name
    }
    write_model(place / "lost", tensors, settings)
    rows = {n: {GATE: np.ones((3, 32), np.float32)} for n in range(3)}
    write_table(place / "few.npz", LayerTable(GATES, rows))
    write_table(place / "others.npz", LayerTable(GATES, rows, {"model": "0" * 64}))


@pytest.mark.usefixtures("spoiled")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_nothing_written(name, tmp_path, capsys):
    model, options, found, advice = MISTAKES[name]
    assert upcycle(model, tmp_path / "out", *options.split()) == 2
    message = capsys.readouterr().err
    assert found in message and advice in message, message
    assert not any(tmp_path.iterdir())


def test_an_output_that_stands_is_not_replaced_unasked(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "moe.ckpt").write_text("mine")
    for out, *more in (("out",), ("moe.ckpt", "--format", "mindspore")):
        assert upcycle("llama", tmp_path / out, *COPY.split(), *more) == 2
        assert "exists: choose another path, or pass --overwrite" in capsys.readouterr().err
    assert upcycle("llama", "llama/more.safetensors", *COPY.split(), "--format", "mindspore") == 2
    assert "lies among the weights of the input" in capsys.readouterr().err
    assert (tmp_path / "moe.ckpt").read_text() == "mine" and (tmp_path / "out/config.json").read_text() == "{}"


def test_the_readmes_command(repo_root, tmp_path, monkeypatch):
    (line,) = [x for x in (repo_root / "README.md").read_text("utf-8").splitlines() if x.startswith(README_COMMAND)]
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "output/try/llama_a", layers=1)
    assert main(shlex.split(line)[2:]) == 0 and (tmp_path / "output/try/upcycled/model.safetensors").is_file()


def test_the_options_offer_what_the_job_knows():
    for name in ("METHODS", "SCALES", "ROUTERS", "FORMATS"):
        assert getattr(stage, name) == getattr(request, name)
