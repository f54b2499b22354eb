# SPDX-License-Identifier: Apache-2.0
"""The dry run's parts that need no compiler of MindSpore: graphs as text, libraries, traffic, results, failures."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from mindformers_ext.core.byte_sizes import read_size, size_text
from mindformers_ext.core.cluster.traffic import sent_bytes
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.elf import read_library
from mindformers_ext.formats.graph_text import Collective, GraphTensor, read_graph, unplanned_operators
from mindformers_ext.jobs.dryrun.facts import RankFacts, parameter_facts, purpose, rank_facts_from_json, traffic_facts
from mindformers_ext.jobs.dryrun.page import page
from mindformers_ext.jobs.dryrun.plan import asked_ranks, plan_dry_run
from mindformers_ext.jobs.dryrun.ranks import error_text
from mindformers_ext.jobs.dryrun.report import DryRunReport, group_text, moved_text, report_text
from mindformers_ext.jobs.dryrun.stubs import Stubs, c_source, pause_source
from tests.helpers.specs import PRETRAIN_YAML

# The form of MindSpore 2.9's graphs, shortened: the entry calls the layer twice.
GRAPH = """\
# IR entry: @step
# Params:
%para1_model.w1.weight: <Ref[Tensor[Float32]], (1, 4, 2)>
%para2_accu_grads.model.w1.weight: <Ref[Tensor[Float32]], (1, 4, 2)>
%para3_adam_m.model.w1.weight: <Ref[Tensor[Float32]], (1, 4, 2)>
%para4_global_step: <Ref[Tensor[Int32]], (1)>

subgraph @step() {
  %0(x) = call @layer(%para1)
      : (<Tensor[Float16], (4, 2)>) -> (<Tensor[Float16], (4, 2)>)
  %1(y) = call @layer(%0)
      : (<Tensor[Float16], (4, 2)>) -> (<Tensor[Float16], (4, 2)>)
  Return(%1)
}

subgraph @layer() {
  %0(a) = AlltoAll(%x) {instance name: redistribution_op_1} primitive_attrs: {group: "2-1", group_rank_ids: (0, 4)}
      : (<Tensor[Float16], (4, 2)>) -> (<Tensor[Float16], (4, 2)>)
      # Fullname with scope: (Default/network-Net/layers-CellList/0-MoELayer/AlltoAll-op0)
  %1(b) = MatMul(%0, %w)
      : (<Tensor[Float16], (4, 2)>, <Tensor[Float16], (2, 8)>) -> (<Tensor[Float16], (4, 8)>)
      # Fullname with scope: (Default/network-Net/MatMul-op0)
  %2(c) = Send(%1) primitive_attrs: {sr_tag: I64(0), dest_rank: I64(8), group: "hccl"}
      : (<Tensor[Float16], (4, 8)>) -> (<Tensor[Float16], (1)>)
      # Fullname with scope: (Default/Send-op0)
  Return(%1)
}
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "20_validate_0001.ir"
    path.write_text(GRAPH, encoding="utf-8")
    return path


def test_graph(graph: Path) -> None:
    facts = read_graph(graph)
    assert facts.parameters["model.w1.weight"] == GraphTensor("Float32", (1, 4, 2))
    exchange, message = facts.collectives
    assert (exchange.kind, exchange.times, exchange.payload, exchange.ranks) == ("AlltoAll", 2, 16, (0, 4))
    assert (message.kind, message.ranks) == ("Send", (8,))
    assert facts.matmul_flops == 2 * (2 * 4 * 2 * 8)


# Rows that go where the load sends them, and come back; numbers of one kind share a list, those of another do not.
BY_LOAD = """\
# IR entry: @step
subgraph @step() {
  %0(x) = AlltoAllV(%para1_x, %para2_sent, %para3_received) {instance name: move} primitive_attrs: {group: "a", \
block_size: I64(64), group_rank_ids: (0, 4)}
      : (<Tensor[Float16], (8192)>, <Tensor[Int64], (2)>, <Tensor[Int64], (2)>) -> (<Tensor[Float16], (-1)>)
      : (S:[8192], S:[2], S:[2]) -> (S:[s1<[1,inf]>])
      # Fullname with scope: (Default/0-Layer/cell-ExchangedProducts/spread-MovedRows/AlltoAllV-op0)
  %1(ids) = AlltoAllV(%para4_ids, %para2_sent, %para3_received) primitive_attrs: {block_size: I64(1), \
group_rank_ids: (0, 4)}
      : (<Tensor[Float32], (128)>, <Tensor[Int64], (2)>, <Tensor[Int64], (2)>) -> (<Tensor[Float32], (-1)>)
      # Fullname with scope: (Default/AlltoAllV-op0)
  %2(on) = AlltoAllV(%0, %5, %6) primitive_attrs: {block_size: I64(64), group_rank_ids: (0, 1)}
      : (<Tensor[Float16], (-1)>, <Tensor[Int64], (2)>, <Tensor[Int64], (2)>) -> (<Tensor[Float16], (-1)>)
      # Fullname with scope: (Default/AlltoAllV-op0)
  %3(y) = AlltoAllV(%2, %para3_received, %para2_sent) primitive_attrs: {block_size: I64(64), group_rank_ids: (0, 4)}
      : (<Tensor[Float16], (-1)>, <Tensor[Int64], (2)>, <Tensor[Int64], (2)>) -> (<Tensor[Float16], (-1)>)
      # Fullname with scope: (Default/AlltoAllV-op0)
  %4(z) = AllReduce(%3) primitive_attrs: {group_rank_ids: (0, 1)}
      : (<Tensor[Float16], (128, 64)>) -> (<Tensor[Float16], (128, 64)>)
      : (S:[128, 64]) -> (S:[128, 64])
      # Fullname with scope: (Default/0-Layer/cell-ExchangedProducts/AllReduce-op0)
  Return(%4)
}
"""


def test_rows_that_follow_the_load_are_counted_where_a_graph_tells_their_number(tmp_path: Path) -> None:
    path = tmp_path / "x.ir"
    path.write_text(BY_LOAD, encoding="utf-8")
    rows = traffic_facts(read_graph(path).collectives)
    assert [(row.kind, row.purpose, row.ranks, row.count, row.payload) for row in rows] == [
        ("AllReduce", "partial sums", (0, 1), 1, 128 * 64 * 2),
        ("AlltoAllV", "experts", (0, 1), 1, 0),
        ("AlltoAllV", "experts", (0, 4), 3, 2 * 8192 * 2 + 128 * 4),
    ]
    assert moved_text(rows[1]) == ("by load", "by load") and moved_text(rows[2]) == ("33.28 kB", "16.64 kB")


def test_parameters_by_kind(graph: Path) -> None:
    whole = {
        "model.w1.weight": (8, 4, 2),
        "accu_grads.model.w1.weight": (8, 4, 2),
        "adam_m.model.w1.weight": (8, 4, 2),
        "global_step": (1,),
        "model.other_stage.weight": (3,),
    }
    facts = parameter_facts(read_graph(graph), whole, ["model.w1.weight"])
    assert [(fact.kind, fact.local) for fact in facts] == [
        ("weight", (1, 4, 2)),
        ("gradient", (1, 4, 2)),
        ("optimizer", (1, 4, 2)),
        ("other", (1,)),
    ]
    assert facts[0].whole == (8, 4, 2) and facts[0].nbytes == 32
    frozen = parameter_facts(read_graph(graph), whole, ["model.lora_a"])
    assert frozen[0].kind == "weight"


def test_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.ir").write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="holds no graph"):
        read_graph(tmp_path / "x.ir")


def test_operators_without_a_strategy(tmp_path: Path) -> None:
    lines = [
        "subgraph @g() {",
        "  %1(a) = Add(%0) primitive_attrs: {gen_strategy: ((8, 1), (8, 1))}",
        "      : ()",
        "      # Fullname with scope: (Default/net/Add-op0)",
        "  %2(b) = Mul(%1) {in_strategy: ((8, 1))} {gen_strategy: ((8, 1))}",
    ]
    path = tmp_path / "step_parallel_end_0001.ir"
    path.write_text("\n".join(lines), encoding="utf-8")
    (found,) = unplanned_operators(path)
    assert (found.kind, found.scope) == ("Add", "Default/net/Add-op0")


@pytest.mark.parametrize(
    "kind, instance, scope, expected",
    [
        ("AlltoAll", "redistribution_op_1", "", "experts"),
        ("AllGather", "parallel_optimizer_allgather", "", "weights"),
        ("ReduceScatter", "grad_parallel_optimizer_allgather", "", "gradients"),
        ("AllReduce", "grad_mirror_MirrorMicroStepOperator", "", "gradients"),
        ("AllReduce", "PARALLEL_GLOBALNORM_IN_STAGES", "", "norm"),
        ("ReduceScatter", "123ReduceScatter11", "tok_embeddings-TokenEmbedding/ReduceScatter-op0", "embedding"),
        ("AllGather", "grad123", "wo-Linear/Grad_ReduceScatter/AllGather-op0", "partial sums"),
        ("AllReduce", "allreduce", "Default/AllReduce-op0", "other"),
        ("Send", "", "", "pipeline"),
    ],
)
def test_what_a_collective_is_for(kind: str, instance: str, scope: str, expected: str) -> None:
    tensor = GraphTensor("Float16", (4, 2))
    assert purpose(Collective(kind, tensor, tensor, "", (0, 1), instance, "", scope, "g")) == expected


def test_traffic_adds_up(graph: Path) -> None:
    rows = traffic_facts(read_graph(graph).collectives)
    assert [(row.kind, row.purpose, row.count, row.payload, row.sent) for row in rows] == [
        ("AlltoAll", "experts", 2, 32, 16),
        ("Send", "pipeline", 2, 128, 128),
    ]


def test_bytes_by_ring() -> None:
    assert sent_bytes("AllReduce", 800, 8) == 1400 and sent_bytes("AllGather", 800, 8) == 700
    assert sent_bytes("Receive", 800, 2) == 0 and sent_bytes("AllReduce", 800, 1) == 0
    with pytest.raises(ValueError, match="no collective"):
        sent_bytes("Add", 8, 2)


def test_facts_to_json_and_back(graph: Path, tmp_path: Path) -> None:
    facts = RankFacts(rank=3, stage=0, batch=((4, 65),), traffic=traffic_facts(read_graph(graph).collectives))
    (tmp_path / "result.json").write_text(json.dumps(facts.to_json()), encoding="utf-8")
    assert rank_facts_from_json(tmp_path / "result.json") == facts
    assert facts.compiles and not replace(facts, error="no").compiles


def test_asked_ranks() -> None:
    assert asked_ranks("stages", 16, 4) == (0, 4, 8, 12) and asked_ranks("8, 0,8", 16, 2) == (0, 8)
    assert read_size("1.5GB", "--memory") == 1_500_000_000


def test_the_last_exception_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("INFO fine\nTraceback ...\nRuntimeError: first\nmore\nValueError: For 'X', wrong\n\n---\nstack\n")
    assert error_text(log, 1) == "ValueError: For 'X', wrong"
    log.write_text("started\n")
    assert error_text(log, -9) == "the compiling process ended with signal SIGKILL: started"


def test_words() -> None:
    assert group_text((0, 8)) == "0,8" and group_text(range(0, 16, 2)) == "0-14 by 2" and group_text(range(8)) == "0-7"
    assert size_text(999) == "999 B" and size_text(1_500_000) == "1.50 MB"


def test_stand_ins_are_real_libraries(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    for name, text in (("all", c_source(["aclInit", "_ZN2ge5GraphC1Ev"])), ("pause", pause_source(["waits"]))):
        (tmp_path / f"{name}.c").write_text(text, encoding="ascii")
        subprocess.run(
            [
                compiler,
                "-shared",
                "-fPIC",
                "-nostdlib",
                "-o",
                str(tmp_path / f"lib{name}.so"),
                str(tmp_path / f"{name}.c"),
            ],
            check=True,
        )
    assert {"aclInit", "_ZN2ge5GraphC1Ev"} <= read_library(tmp_path / "liball.so").defined
    assert ctypes.CDLL(str(tmp_path / "liball.so")).aclInit() == 0
    pause = read_library(tmp_path / "libpause.so")
    assert "waits" in pause.defined and "usleep" in pause.undefined


def test_the_environment_of_a_compiling_process(tmp_path: Path) -> None:
    (tmp_path / "pause").mkdir()
    (tmp_path / "pause" / "libpause.so").touch()
    found = Stubs(tmp_path, tmp_path / "mindspore").environment(3, 16, {"LD_LIBRARY_PATH": "mine"})
    assert (found["RANK_ID"], found["RANK_SIZE"], found["MS_SIMULATION_LEVEL"]) == ("3", "16", "0")
    assert found["LD_LIBRARY_PATH"].endswith("mine") and found["LD_PRELOAD"].endswith("libpause.so")


def test_a_symbol_that_c_cannot_write() -> None:
    with pytest.raises(UserError, match="cannot be written in C"):
        c_source(['bad"name'])


def test_report_and_page(tmp_path: Path, graph: Path) -> None:
    """Both tell what is held and sent, which rank fails, and what a dry run cannot show; the page is well formed."""
    traffic = traffic_facts(read_graph(graph).collectives)
    plan = plan_dry_run(yaml.safe_load(PRETRAIN_YAML), "job<1>.yaml", 16, "stages", tmp_path)
    good = RankFacts(rank=0, stage=0, traffic=traffic, matmul_flops=10**12)
    bad = RankFacts(rank=8, stage=1, error="ValueError: <X> is wrong")
    made = (("command", "python dryrun.py 'a<b'"), ("versions", "mindspore 2.9.0"), ("date", "2026-01-01"))
    report = DryRunReport("job<1>.yaml", plan, (good, bad), native=(good,), made=made)
    html, text = page(report), report_text(report)
    tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag != "meta":
                tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert tags.pop() == tag

    Checker().feed(html)
    assert not tags and "job&lt;1&gt;.yaml" in html and "&lt;X&gt; is wrong" in html
    for words in (html, text):
        assert "23.36 GB" in words  # optimizer states of stage 1, by arithmetic
        assert "nothing was computed" in words and "AlltoAll" in words and "throws it away" in words
    assert "a&lt;b" in html and "mindspore 2.9.0" in html and "2026-01-01" in html
    stage = plan.memory[0]
    assert plan.limit == read_size(plan.config["context"]["max_device_memory"], "x")
    most = max(plan.limit, stage.activations + stage.gathered)
    assert f"width:{100 * stage.activations / most:.2f}%" in html  # in the bar of rank 0, which holds no parameter
    assert f"left:calc({100 * plan.limit / most:.2f}%" in html and f"{size_text(plan.limit)}</span>" in html
    assert "rank 8 does not compile" in text and "1 of the 2 ranks asked for did not compile" in html
