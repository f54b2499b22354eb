# SPDX-License-Identifier: Apache-2.0
"""llama_preprocess.py --ray: two nodes on this machine, one killed in the middle, write the bytes of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.cli.preprocess import main
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.jobs.items.ray_cluster import RayTeam

pytestmark = pytest.mark.slow
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines, conversations and a tokenizer."""
    result = tmp_path_factory.mktemp("ray")
    texts = list(standard_library_text(400_000))
    train_sentencepiece(texts, result / "tokenizer.model", 600)
    (result / "corpus").mkdir()
    for name, some in (("a", texts[::2]), ("b", texts[1::2])):
        (result / "corpus" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    talks = [
        {"conversations": [{"from": "human", "value": text[:99]}, {"from": "gpt", "value": text[99:300]}]}
        for text in texts
    ]
    (result / "talk.json").write_text(json.dumps(talks))
    return result


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """Start a cluster whose second node is killed when as many items are begun; its address."""
    pytest.importorskip("ray", reason="pip install 'mindformers_ext[ray]'")
    from ray.cluster_utils import Cluster

    clusters = []

    def start(items: int) -> str:
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        clusters.append(cluster)
        second = cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        plain, begun = RayTeam.submit, 0

        def submit(team: RayTeam, item: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun == items:
                cluster.remove_node(second, allow_graceful=False)
            return plain(team, item)

        monkeypatch.setattr(RayTeam, "submit", submit)
        return cluster.address

    yield start
    for cluster in clusters:
        assert not cluster.worker_nodes, "the node was to be killed: begin more items"
        cluster.shutdown()


def hashes(place: Path) -> dict[str, str]:
    files = sorted(path for path in place.rglob("*") if path.is_file() and "summary" not in path.name)
    return {str(path.relative_to(place)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["domains", "jsonl", "qa"])
def test_a_lost_node_costs_only_its_items(
    folder: Path,
    tmp_path: Path,
    kind: str,
    killed: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, size in (("SMALLEST", 9000), ("LARGEST", 9000)):
        monkeypatch.setattr(f"mindformers_ext.data.domains.documents.{name}", size)
    for name, size in (("BATCH_CHARACTERS", 5000), ("BATCH_CONVERSATIONS", 5)):
        monkeypatch.setattr(f"mindformers_ext.jobs.preprocess.batches.{name}", size)
    source = {"domains": folder / "corpus", "jsonl": folder / "corpus", "qa": folder / "talk.json"}[kind]
    words = ["--dataset_type", kind, "--input_glob", source, "--model_file", folder / "tokenizer.model"]
    words += ["--seq_length", 64, "--output_file"]

    def run(name: str, *more: object) -> dict[str, str]:
        (tmp_path / name).mkdir()
        assert main([str(word) for word in (*words, tmp_path / name / "x.mindrecord", *more)]) == 0
        return hashes(tmp_path / name)

    expected, address = run("here", "--workers", 1), killed(12)
    assert run("there", "--ray", address) == expected
    if kind != "qa":  # what is wrong with a record is told as if it had been read here
        wrong = ["--field", "title", "--ray", address, "--overwrite"]
        assert main([str(word) for word in (*words, tmp_path / "there" / "x.mindrecord", *wrong)]) == 2
        assert "record 1 (line 1): no field 'title'" in capsys.readouterr().err
