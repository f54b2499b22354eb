# SPDX-License-Identifier: Apache-2.0
"""``merge.py moe``: what lies in the mixture, that transformers and the converter take it, every mistake."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.convert import main as convert
from mindformers_ext.cli.merge import main
from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from mindformers_ext.jobs.checkpoint.fused import unfused
from tests.helpers.merge_models import family, make_model, tensors_of

pytest.importorskip("torch", reason="gates are computed with torch")
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"
SHARED = {"source_model": "ft1", "positive_prompts": ["w60 w61"]}
DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, three experts trained from it, and models that do not fit."""
    folder = tmp_path_factory.mktemp("experts")
    family(folder, count=4, dtype="float32", rope_theta=500000.0)
    make_model(folder / "narrow", ffn=40)
    make_model(folder / "short", layers=3)
    make_model(folder / "phi", kind="phi3")
    make_model(folder / "qwen", kind="qwen2")
    make_model(folder / "biased", attention_bias=True)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def config(mode="cheap_embed", experts=("ft1", "ft2", "ft3", "ft4"), **more):
    """Experts whose prompts are words of their own."""
    items = [
        {"source_model": name, "positive_prompts": [f"w{10 * n + 3} w{10 * n + 4}", f"w{10 * n + 5}"]}
        for n, name in enumerate(experts)
    ]
    return {"base_model": "base", "gate_mode": mode, "dtype": "float32", "experts": items} | more


def assemble(settings, out, *flags):
    Path("moe.yml").write_text(yaml.safe_dump(settings))
    return main(["moe", "moe.yml", str(out), "--quiet", *map(str, flags)])


def test_everything_comes_from_where_it_should(tmp_path):
    assert assemble(config(), tmp_path / "out") == 0
    got, base = tensors_of(tmp_path / "out"), tensors_of(Path("base"))
    experts = [tensors_of(Path(f"ft{n}")) for n in (1, 2, 3, 4)]
    for layer in range(4):
        for e, tensors in enumerate(experts):
            for short, dense in DENSE.items():
                name = f"model.layers.{layer}.mlp.{dense}.weight"
                assert np.array_equal(got.pop(EXPERT.format(layer, e, short)), tensors[name])
        gate = got.pop(GATE.format(layer))
        np.testing.assert_allclose(np.linalg.norm(gate, axis=1), 1, rtol=1e-6)
    rest = {name for name in base if ".mlp." not in name}
    assert set(got) == rest and all(np.array_equal(got[name], base[name]) for name in rest)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["MixtralForCausalLM"] and written["num_local_experts"] == 4
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500000.0
    assert written["num_key_value_heads"] == 2 and written["sliding_window"] is None
    assert (tmp_path / "out/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    assert (tmp_path / "out/mergekit_moe_config.yml").is_file() and "experts" in (
        tmp_path / "out/README.md"
    ).read_text()


def test_the_recipe_of_the_tutorial(tmp_path, monkeypatch):
    """configs/merge/moe.yaml on small Mistrals whose tokenizer has the prompts' words."""
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).resolve().parents[3] / "configs/merge/moe.yaml"
    settings = yaml.safe_load(file.read_text())
    names = [expert["source_model"] for expert in settings["experts"]]
    prompts = [text for expert in settings["experts"] for text in expert["positive_prompts"]]
    spoken = {word: 3 + number for number, word in enumerate(sorted({*" ".join(prompts).split()}))}
    for number, name in enumerate(names):
        make_model(Path(name), "mistral", seed=number, near=Path(names[0]) if number else None)
        place = Path(name) / "tokenizer.json"
        tokenizer = json.loads(place.read_text())
        tokenizer["model"]["vocab"] = {"<unk>": 0, "<s>": 1, "</s>": 2} | spoken
        place.write_text(json.dumps(tokenizer))
    assert main(["moe", str(file), "out", "--quiet"]) == 0
    got = tensors_of(Path("out"))
    for e, name in enumerate(names):
        assert np.array_equal(
            got[EXPERT.format(1, e, "w1")], tensors_of(Path(name))["model.layers.1.mlp.gate_proj.weight"]
        )
    gate = got[GATE.format(1)].astype(np.float32)
    assert (
        np.linalg.matrix_rank(gate) == 4 and json.loads(Path("out/config.json").read_text())["num_experts_per_tok"] == 2
    )


def test_cheap_embeddings_route_a_prompt_to_its_expert(tmp_path):
    """The formula in float64, and the router's choice for the embeddings of each expert's own words."""
    settings = config()
    settings["experts"][1]["negative_prompts"] = ["w40"]
    assert assemble(settings, tmp_path / "out") == 0
    embedding = tensors_of(Path("base"))["model.embed_tokens.weight"].astype(float)

    def direction(*prompts):
        total = sum(embedding[[1, *words]].sum(0) for words in prompts)
        return total / np.linalg.norm(total)

    rows = np.stack([direction((10 * n + 3, 10 * n + 4), (10 * n + 5,)) for n in range(4)])
    rows[1] = rows[1] - direction((40,))
    rows[1] /= np.linalg.norm(rows[1])
    gates = [tensors_of(tmp_path / "out")[GATE.format(layer)] for layer in range(4)]
    for gate in gates:
        np.testing.assert_allclose(gate, rows, atol=1e-6)
    for n in range(4):
        state = embedding[[10 * n + 3, 10 * n + 4, 10 * n + 5]].sum(0)
        assert int(np.argmax(gates[0] @ state)) == n


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_gates_by_chance(mode, tmp_path):
    settings = config(mode)
    for item in settings["experts"]:
        del item["positive_prompts"]
    assert assemble(settings, tmp_path / "a", "--random-seed", 3) == 0
    assert assemble(settings, tmp_path / "b", "--random-seed", 3, "--out-shard-size", "30K") == 0
    assert assemble(settings, tmp_path / "c", "--random-seed", 4, "--gate-scale", 0.02) == 0
    a, b, c = (np.stack([tensors_of(tmp_path / f)[GATE.format(n)] for n in range(4)]) for f in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a * 0.02, c) and np.abs(c).max() < 0.1
    assert a.std() == pytest.approx(1 if mode == "random" else 1 / np.sqrt(3 * 32), rel=0.15)


def test_noise_and_residual_scale(tmp_path):
    settings = config()
    settings["experts"][0] |= {"noise_scale": 0.01, "residual_scale": 0.5}
    assert assemble(settings, tmp_path / "out") == 0
    got, source = tensors_of(tmp_path / "out"), tensors_of(Path("ft1"))
    for short, factor in (("w1", 1.0), ("w2", 0.5), ("w3", 1.0)):
        noise = got[EXPERT.format(2, 0, short)] / factor - source[f"model.layers.2.mlp.{DENSE[short]}.weight"]
        assert noise.std() == pytest.approx(0.01, rel=0.1)
    assert np.array_equal(
        got[EXPERT.format(2, 1, "w2")], tensors_of(Path("ft2"))["model.layers.2.mlp.down_proj.weight"]
    )


def test_the_fused_layout_holds_the_same(tmp_path):
    assert assemble(config(), tmp_path / "plain") == 0
    assert assemble(config(), tmp_path / "fused", "--moe-layout", "fused") == 0
    reader = unfused(SafetensorsDir(tmp_path / "fused"), "mixtral")
    plain = tensors_of(tmp_path / "plain")
    assert set(reader.infos) == set(plain)
    assert all(np.array_equal(reader.read(name), array) for name, array in plain.items())
    assert np.array_equal(reader.read(EXPERT.format(0, 1, "w3"), (slice(3, 5),)), plain[EXPERT.format(0, 1, "w3")][3:5])
    reader.close()
    both = {
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("plain", "fused")],
        "merge_method": "linear",
    }
    Path("both.yml").write_text(yaml.safe_dump(both))  # a dense merge reads both spellings
    assert main(["yaml", "both.yml", str(tmp_path / "both"), "--quiet"]) == 0
    assert all(np.array_equal(array, plain[name]) for name, array in tensors_of(tmp_path / "both").items())


def test_transformers_loads_it_and_equal_experts_are_the_dense_model(tmp_path):
    """No missing and no unexpected key, the base's rope_theta, and the base's logits when all experts are the base."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        return model.eval()

    same = config(experts=["base"] * 4)
    flag = "--i-understand-this-is-not-useful-without-training"
    assert assemble(same, tmp_path / "same", flag) == 0
    dense, mixture = load("base"), load(tmp_path / "same")
    assert mixture.config.rope_theta == 500000.0 and mixture.config.num_local_experts == 4
    ids = torch.arange(40).reshape(2, 20) * 3 % 80
    with torch.no_grad():
        np.testing.assert_allclose(mixture(ids).logits, dense(ids).logits, atol=1e-5)
    settings = config("hidden")
    settings["experts"][2]["negative_prompts"] = ["w70 w71 w72"]
    assert assemble(settings, tmp_path / "out") == 0
    load(tmp_path / "out")


def test_hidden_states_are_those_of_transformers(tmp_path):
    """Rows recomputed from transformers' own hidden states; the mixture reads one layer at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16).eval()
    for mode in ("hidden", "hidden_avg"):
        assert assemble(config(mode), tmp_path / mode) == 0
        gates = tensors_of(tmp_path / mode)
        for expert in range(4):
            states = []
            for words in ((10 * expert + 3, 10 * expert + 4), (10 * expert + 5,)):
                with torch.no_grad():  # one prompt at a time, no padding
                    out = model(torch.tensor([[1, *words]]), output_hidden_states=True).hidden_states[:-1]
                stacked = torch.stack(out).float()[:, 0]
                states.append(stacked[:, -1] if mode == "hidden" else stacked.mean(1))
            row = torch.stack(states).mean(0)
            row = row / row.norm(dim=-1, keepdim=True)
            for layer in range(4):
                np.testing.assert_allclose(gates[GATE.format(layer)][expert], row[layer], atol=0.02)


def test_the_converter_takes_it_and_gives_it_back(tmp_path):
    assert assemble(config(), tmp_path / "out", "--to-mindspore", tmp_path / "moe.ckpt") == 0
    words = ["--reversed", "--input_path", tmp_path / "moe.ckpt", "--output_path", tmp_path / "back"]
    assert convert([str(word) for word in words]) == 0
    there, back = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "back")
    assert set(there) == set(back) and all(np.array_equal(there[name], back[name]) for name in there)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_shared_expert_makes_a_qwen2_moe(kind, tmp_path, monkeypatch):
    """transformers loads every key; with equal experts of half the output each it is the dense model again."""
    import torch
    from transformers import AutoModelForCausalLM

    family(tmp_path, count=2, kind=kind, dtype="float32")
    monkeypatch.chdir(tmp_path)
    settings = config(experts=["ft1", "ft2"], shared_experts=[SHARED])
    assert assemble(settings, "out") == 0
    got, base = tensors_of(Path("out")), tensors_of(Path("base"))
    layer = "model.layers.2."
    bias = base.get(layer + "self_attn.k_proj.bias", np.zeros(16, np.float32))
    assert np.array_equal(got[layer + "self_attn.k_proj.bias"], bias)
    shared, second = (tensors_of(Path(name)) for name in ("ft1", "ft2"))
    assert np.array_equal(got[layer + "mlp.shared_expert.up_proj.weight"], shared[layer + "mlp.up_proj.weight"])
    assert np.array_equal(got[layer + "mlp.experts.1.down_proj.weight"], second[layer + "mlp.down_proj.weight"])
    assert [got[layer + f"mlp.{name}.weight"].shape[0] for name in ("gate", "shared_expert_gate")] == [2, 1]
    same = config("random", experts=["base", "base"], shared_experts=[{"source_model": "base"}])
    for item in (*same["experts"], *same["shared_experts"]):
        item["residual_scale"] = 2 / 3  # experts 2/3, shared sigmoid(0) * 2/3
    flags = ["--i-understand-this-is-not-useful-without-training", "--gate-scale", 0]
    assert assemble(same, "same", *flags) == 0
    ids = torch.arange(40).reshape(2, 20) * 3 % 80
    logits = {}
    for name in ("base", "same", "out"):
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        logits[name] = model.eval()(ids).logits.detach()
    np.testing.assert_allclose(logits["same"], logits["base"], atol=1e-5)


def test_dry_run_counts_parameters_of_a_mixture(tmp_path, capsys):
    """Base without feed-forward, plus experts, plus gates: not experts times the dense model."""
    Path("moe.yml").write_text(yaml.safe_dump(config()))
    assert main(["moe", "moe.yml", str(tmp_path / "out"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    base = tensors_of(Path("base"))
    rest = sum(array.size for name, array in base.items() if ".mlp." not in name)
    feed = sum(array.size for name, array in base.items() if ".mlp." in name)
    assert f"{(rest + 4 * feed + 4 * 4 * 32) / 1e6:.1f} M parameters" in text and not (tmp_path / "out").exists()
    assert "block_sparse_moe.gate.weight float32 [4, 32] = gate, cheap_embed" in text


def _without_prompts(settings):
    del settings["experts"][1]["positive_prompts"]


def _equal_prompts(settings):
    for item in settings["experts"]:
        item["positive_prompts"] = ["w3"]


def _set(**words):
    return lambda settings: settings.update(words)


def _models(*names):
    return lambda settings: settings.update(config(experts=names))


MISTAKES = {
    "mode": (_set(gate_mode="hiden"), "gate_mode='hiden' is unknown", "cheap_embed"),
    "key": (_set(expert=[]), "unknown key 'expert'", "did you mean 'experts'"),
    "no prompts": (_without_prompts, "experts[1] has no positive_prompts", "random needs none"),
    "equal prompts": (_equal_prompts, "all experts have the same prompts", ""),
    "one expert": (_models("ft1"), "experts lists 1 models", "at least two"),
    "one model": (_models("ft1", "ft1"), "all experts are the same model", "--i-understand"),
    "width": (_models("ft1", "narrow"), "mlp.gate_proj.weight' of 'narrow' is [40, 32]", "sizes of the base"),
    "layers": (_models("ft1", "short"), "'short' has 3 layers, the base 4", ""),
    "shared": (_set(shared_experts=[SHARED], architecture="mixtral"), "shared_experts are given", "no shared expert"),
    "shared without prompts": (_set(shared_experts=[{"source_model": "ft1"}]), "shared_experts[0] has no", "random"),
    "two shared": (_set(shared_experts=[SHARED, SHARED]), "shared_experts lists 2 models", "one shared expert"),
    "none shared": (_set(architecture="Qwen MoE"), "architecture 'Qwen MoE' without shared_experts", "needs one"),
    "kinds": (_set(shared_experts=[SHARED | {"source_model": "qwen"}]), "the models are llama, qwen2", "one kind"),
    "deepseek": (_set(architecture="DeepSeek MoE"), "architecture 'DeepSeek MoE' is not built", "choose mixtral"),
    "unknown architecture": (_set(architecture="gpt"), "architecture 'gpt' is unknown", "choose mixtral"),
    "llama and phi": (_models("ft1", "phi"), "'phi' is a Phi3ForCausalLM", "two fine-tuned Llama-3-8B"),
    "qwen": (_models("ft1", "qwen"), "'qwen' is a Qwen2ForCausalLM: its attention has biases", ""),
    "biases": (_models("ft1", "biased"), "'biased' has attention_bias", "they would be lost"),
    "too many chosen": (_set(experts_per_token=5), "experts_per_token is 5 with 4 experts", ""),
    "none chosen": (_set(experts_per_token=0), "experts_per_token=0", "above 0"),
    "dtype": (_set(dtype="bf17"), "dtype='bf17' is unknown", "bfloat16"),
    "no base": (_set(base_model=None), "base_model is None", ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, tmp_path, capsys):
    change, found, advice = MISTAKES[name]
    settings = copy.deepcopy(config())
    change(settings)
    assert assemble(settings, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert found in message and advice in message, message
    assert not any(tmp_path.iterdir())


def test_flags_that_cannot_be_had(tmp_path, capsys):
    for flag, found in (
        ("--load-in-4bit", "not available on CPU"),
        ("--cuda", "only copies"),
        ("--gate-scale=nan", "finite"),
    ):
        assert assemble(config(), tmp_path / "out", flag) == 2
        assert found in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_prompts_that_are_alike_are_noted(tmp_path, capsys):
    settings = config(experts=["ft1", "ft2"])
    settings["experts"][1]["positive_prompts"] = [*settings["experts"][0]["positive_prompts"], "w3"]
    Path("moe.yml").write_text(yaml.safe_dump(settings))
    assert main(["moe", "moe.yml", str(tmp_path / "out")]) == 0
    assert "hard to tell apart in 4 of 4 layers" in capsys.readouterr().err
