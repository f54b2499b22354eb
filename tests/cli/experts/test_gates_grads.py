# SPDX-License-Identifier: Apache-2.0
"""``gates``, ``grads`` and the split of their scores, beside transformers and autograd; conversations with padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mindformers_ext.cli.experts import main
from mindformers_ext.data.chat_rows import read_chat_rows
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.jobs.experts.v2 import scores
from mindformers_ext.jobs.experts.v2.layer_tables import (
    GATE,
    GATES,
    INDICES,
    SCORES,
    LayerTable,
    read_table,
    write_table,
)
from mindformers_ext.surgery.experts.bounded import bounded_clusters
from mindformers_ext.surgery.experts.gradient_plus import plus_split
from tests.helpers.tiny_llama import HIDDEN, LAYERS, WIDTH, make_llama, sentences

LENGTH, EXPERTS = 40, 3
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_chats(path: Path, times: int = 1) -> Path:
    """Conversations of one or two answers, longer and shorter than a row; one in which nobody answers."""
    talks = []
    for number in range(9):
        texts = sentences(4, number)[: 2 if number % 2 else 4]
        who = ("human", "gpt")
        most = 60 if number % 3 else 6
        talks.append([{"from": who[place % 2], "value": text[:most]} for place, text in enumerate(texts)])
    talks.append([{"from": "human", "value": "the loss"}])
    path.write_text("".join(json.dumps({"conversations": talk}) + "\n" for talk in talks * times), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    make_llama(folder / "llama_tiny")
    settings = folder / "llama_tiny" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT}))
    write_chats(folder / "chats.jsonl")
    assert main(words("gates", folder, folder, *GATES_WORDS)) == 0
    return folder


GATES_WORDS = ("--num_experts", str(EXPERTS), "--balance_jitter_factor", "0.4", "--n_jobs", "2", "--format", "npz")


def words(stage: str, made: Path, out: Path, *more: object) -> list[str]:
    texts = () if "--conversations" in more else ("--conversations", made / "chats.jsonl")
    if stage == "grads":
        more = ("--gate_weights_file", made / "gate_weights.npz", *more)
    parts = ("--model_path", made / "llama_tiny", "--save_path", out, *texts, "--block_size", LENGTH, "--quiet")
    return [*map(str, (stage, *parts, *more))]


def rows_of(made: Path) -> list[tuple[list[int], list[bool]]]:
    """Ids and the marks of answers by transformers, turn after turn; those without an answer left out."""
    tokenizer = AutoTokenizer.from_pretrained(made / "llama_tiny")
    found = []
    for line in (made / "chats.jsonl").read_text().splitlines():
        ids, marks = [1], [False]
        for number, turn in enumerate(json.loads(line)["conversations"]):
            lead = tokenizer.encode(("[user]", "[assistant]")[number % 2], add_special_tokens=False)
            said = tokenizer.encode(turn["value"], add_special_tokens=False) + [2]
            ids += lead + said
            marks += [False] * len(lead) + [number % 2 == 1] * len(said)
        if any(marks[:LENGTH]):
            found.append((ids[:LENGTH], marks[:LENGTH]))
    return found


def test_rows_are_those_of_the_template_with_answers_marked(made: Path) -> None:
    tokenizer = open_tokenizer(made / "llama_tiny")
    found = [*read_chat_rows(made / "chats.jsonl", tokenizer, ChatTemplate(made / "llama_tiny"), LENGTH)]
    kept = [row for row in found if row.trained.any()]
    assert [(row.ids.tolist(), row.trained.tolist()) for row in kept] == rows_of(made)
    assert max(row.whole for row in found) > LENGTH > min(len(row.ids) for row in kept)


def judge(made: Path) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """What enters each layer's feed-forward, all tokens; and |h * dL/dh| of each token, L a row's mean loss."""
    model = LlamaForCausalLM.from_pretrained(made / "llama_tiny").double().eval()
    inputs: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hidden: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for layer, module in enumerate(model.model.layers):
        module.mlp.up_proj.register_forward_hook(lambda m, given, out, n=layer: inputs[n].append(given[0][0].detach()))

        def keep(module, given, out, n=layer):
            given[0].retain_grad()
            hidden[n].append(given[0])

        module.mlp.down_proj.register_forward_hook(keep)
    for ids, marks in rows_of(made):
        tensor = torch.tensor([ids])
        labels = torch.where(torch.tensor([marks]), tensor, -100)
        model(tensor, labels=labels).loss.backward()
    changes = [[(h * h.grad).abs()[0].detach().numpy() for h in parts] for parts in hidden]
    return [torch.cat(parts).numpy() for parts in inputs], changes


def test_gates_are_centres_of_what_enters_the_feed_forward(made: Path, tmp_path: Path) -> None:
    table = read_table(made / "gate_weights.npz", GATES)
    assert [*table.layers] == [*range(LAYERS)] and table.about["experts"] == EXPERTS
    inputs, _ = judge(made)
    for layer, x in enumerate(inputs):
        wanted = bounded_clusters(x.astype(np.float32), EXPERTS, 0.4, "l2", 114514, 2)
        np.testing.assert_allclose(table.layers[layer][GATE], wanted.centres, rtol=0, atol=1e-4)
    assert main(words("gates", made, tmp_path, "--num_experts", "5", "--method", "random")) == 0
    drawn = read_table(tmp_path / "gate_weights.pt", GATES)
    distances = np.abs(inputs[1][:, None] - drawn.layers[1][GATE][None]).max(2)
    assert (distances.min(0) < 1e-5).all() and len({*distances.argmin(0).tolist()}) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"gate_weights.pt", "gate_weights.pt.json"}


def test_scores_are_those_of_autograd(made: Path, tmp_path: Path) -> None:
    assert main(words("grads", made, tmp_path, "--batch_size", "3")) == 0
    gates = read_table(made / "gate_weights.npz", GATES)
    found = read_table(tmp_path / "importance_scores.pt", SCORES)
    assert found.about["gate_weights"] == gates.digest
    inputs, changes = judge(made)
    for layer in range(LAYERS):
        cluster = (inputs[layer] @ gates.layers[layer][GATE].T).argmax(1)
        change = np.concatenate(changes[layer])
        for number in range(EXPERTS):
            wanted = change[cluster == number].sum(0) / max((cluster == number).sum(), 1)
            np.testing.assert_allclose(found.layers[layer][str(number)], wanted, rtol=2e-4, atol=1e-5 * change.max())
    assert {path.name for path in tmp_path.iterdir()} == {"importance_scores.pt", "importance_scores.pt.json"}


def test_twice_the_texts_and_two_processes_give_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the two is killed behind its first layer, and goes on."""
    end = scores.ScoreSink.end

    def killed(sink: scores.ScoreSink, layer: int) -> None:
        end(sink, layer)
        if layer == LAYERS - 1:
            raise KeyboardInterrupt

    twice = write_chats(tmp_path / "twice.jsonl", 2)
    assert main(words("grads", made, tmp_path / "a", "--format", "npz")) == 0
    assert main(words("grads", made, tmp_path / "b", "--format", "npz", "--conversations", twice)) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        with monkeypatch.context() as patch:
            patch.setattr(scores.ScoreSink, "end", killed)
            assert main(words("grads", made, tmp_path / "c", "--format", "npz")) == 130
        assert main(words("grads", made, tmp_path / "c", "--format", "npz")) == 0
        if rank:  # started once more, it has nothing left to do
            monkeypatch.setattr(scores, "backward", None)
            assert main(words("grads", made, tmp_path / "c", "--format", "npz")) == 0
            monkeypatch.undo()
            monkeypatch.setenv("WORLD_SIZE", "2")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"importance_scores.npz"}
    assert "the last one writes the scores" in capsys.readouterr().out
    first, *others = (read_table(tmp_path / name / "importance_scores.npz", SCORES) for name in "abc")
    for other in others:
        for layer, rows in first.layers.items():
            for name, row in rows.items():
                np.testing.assert_allclose(other.layers[layer][name], row, rtol=1e-5, atol=1e-8)
    assert main(words("gates", made, tmp_path / "g")) == 2 and "made by one process" in capsys.readouterr().err


def test_scores_become_neurons_and_a_model(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = np.random.default_rng(0)
    gates = read_table(made / "gate_weights.npz", GATES)
    rows = {layer: draws.random((EXPERTS, WIDTH)).astype(np.float32) for layer in range(LAYERS)}
    layers = {layer: {str(n): row for n, row in enumerate(score)} for layer, score in rows.items()}
    path = tmp_path / "importance_scores.npz"
    write_table(path, LayerTable(SCORES, layers, {"gate_weights": gates.digest}))
    base = ("--model_path", made / "llama_tiny", "--save_path", tmp_path)
    split = ("split", "--method", "gradient", "--score_file_path", path, *base, "--expert_num_residual", 1)
    assert main([*map(str, split)]) == 0
    assert f"{LAYERS} layers of 3 experts of 24 neurons beside 24" in capsys.readouterr().out
    found = read_table(tmp_path / "neuron_indices.npz", INDICES)
    wanted = plus_split(rows[1], WIDTH // 4, 1)
    assert found.layers[1]["2"].tolist() == wanted.experts[2].tolist()
    assert found.layers[1]["residual"].tolist() == wanted.residual[0].tolist()
    moe = ("convert", "--style", "mixtral-residual", "--model_path", made / "llama_tiny", "--top_k", 1, "--quiet")
    files = ("--neuron_indices_file", tmp_path / "neuron_indices.npz", "--gate_weights_file")
    assert main([*map(str, (*moe, "--save_path", tmp_path / "moe", *files, made / "gate_weights.npz"))]) == 0
    other = LayerTable(GATES, {n: {GATE: np.ones((EXPERTS, HIDDEN), np.float32)} for n in range(LAYERS)})
    write_table(tmp_path / "other.json", other)
    assert main([*map(str, (*moe, "--save_path", tmp_path / "no", *files, tmp_path / "other.json"))]) == 2
    assert "was made from other gate weights" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*map(str, (*split, "--overwrite", "--num_experts", 4))]) == 2
    assert "has 3 clusters, --num_experts is 4" in capsys.readouterr().err
    assert main([*map(str, (*split, "--overwrite", "--kernel", "l2_norm"))]) == 2
    assert "--kernel (counts with another method, or scores in a folder)" in capsys.readouterr().err
    assert main([*map(str, (*split, "--overwrite", "--expert_size", 20))]) == 2
    assert "experts that share nothing use every neuron once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n', "no field 'conversations'"),
        ('{"conversations": [{"from": "robot", "value": "a"}]}\n', "'from' is 'robot'"),
        ('{"conversations": [{"from": "human", "value": "a"}]}\n', "holds no answer"),
    ],
)
def test_conversations_that_cannot_be_used(
    made: Path, tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.jsonl").write_text(content)
    for stage in ("gates", "grads"):
        assert main(words(stage, made, tmp_path / "out", "--conversations", tmp_path / "chats.jsonl")) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words("gates", made, tmp_path / "out", "--conversations", tmp_path / "none.jsonl")) == 2
    assert main(words("gates", made, tmp_path / "out", "--num_experts", "999")) == 2
    assert "tokens for 999 experts" in capsys.readouterr().err
