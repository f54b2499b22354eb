# SPDX-License-Identifier: Apache-2.0
"""``split``: which neurons of each feed-forward part make up which expert.

Where the scores are one file, as ``grads`` writes it, they become neuron indices of a LLaMA-MoE v2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import Effect, check_effects
from mindformers_ext.cli.experts_flags import add_layers, add_model, add_writing, layers
from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.run_split import SplitPlan, SplitReport
    from mindformers_ext.jobs.experts.split_methods import SplitRequest
    from mindformers_ext.jobs.experts.v2.splits import PlusRequest

TABLES = (".pt", ".npz", ".json")  # of jobs/experts/v2/layer_tables.py, which loads numpy
UNLIKE = (  # options of other splits, which a file of scores leaves nothing to say to
    *("templates", "specify_layer", "seed", "workers", "ray", "allow_pickle", "metric", "starts", "init_labels"),
    *("hidden_features_path", "threshold", "kernel", "accumulate_level", "importance_type", "exact"),
    "visualization_path",
)
EFFECTS = dict.fromkeys(UNLIKE, Effect(lambda words: not is_plus(words), "another method, or scores in a folder"))
METHODS = ("clustering", "random", "graph", "gradient")  # rows of jobs/experts/split_methods.py, which loads numpy
OWN = (  # options that go into the request as they are
    *("method", "num_experts", "seed", "workers", "ray", "overwrite", "allow_pickle", "metric", "starts"),
    *("init_labels", "hidden_features_path", "threshold", "score_file_path", "expert_size", "expert_num_residual"),
    *("criterion", "kernel", "accumulate_level", "importance_type", "share_neurons", "exact", "visualization_path"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "the split's folder is made in here")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default %(default)s")
    parser.add_argument(
        *("--num_experts", "--expert_num", "--expert_num_moe"),
        dest="num_experts",
        type=int,
        metavar="E",
        help="experts per layer; default 8, with gradient one per data cluster",
    )
    add_layers(parser)
    parser.add_argument("--seed", type=int, default=0, help="of every draw; default %(default)s")
    parser.add_argument(
        *("--workers", "--cpu_threads"),
        dest="workers",
        type=int,
        metavar="N",
        help="layers that are solved at once, each in a process; default as many as cores and memory allow",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="solve the layers on the machines of this Ray cluster")
    _add_methods(parser)
    text = "read files with numpy's numbers, as the reference wrote them; no code of a file is run"
    add_switch(parser, "--allow_pickle", text=text)
    add_writing(parser)


def _add_methods(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("clustering")
    text = "l2 or cos (clustering; default l2); plain, l1_norm or l2_norm (graph; default l1_norm)"
    cluster.add_argument("--metric", help=text)
    cluster.add_argument(
        "--starts", type=int, metavar="N", help="random beginnings, of which the best end is taken; 10"
    )
    cluster.add_argument("--init_labels", type=Path, metavar="DIR", help="begin with this split instead")
    graph = parser.add_argument_group("graph")
    graph.add_argument("--hidden_features_path", type=Path, metavar="DIR", help="what the stage features wrote")
    graph.add_argument("--threshold", type=float, help="what a shard adds to an edge at most; 1")
    gradient = parser.add_argument_group("gradient")
    text = "importance, a folder per data cluster; or what grads wrote, for a LLaMA-MoE v2"
    gradient.add_argument("--score_file_path", type=Path, metavar="DIR|FILE", help=text)
    gradient.add_argument("--expert_size", type=int, help="neurons per expert; default all of them shared out")
    names = ("--expert_num_residual", "--num_experts_residual")
    gradient.add_argument(*names, type=int, metavar="R", help="experts that every token passes; 0")
    gradient.add_argument("--format", help="of a LLaMA-MoE v2's neurons: pt, npz or json; default as the scores")
    gradient.add_argument("--criterion", help="max or min; default max")
    gradient.add_argument("--kernel", help="plain, l1_norm or l2_norm, which the scores were made with; l1_norm")
    gradient.add_argument("--accumulate_level", help="sample or total, likewise; sample")
    gradient.add_argument("--importance_type", help="feature_change or feature_grad, likewise; feature_change")
    for name, text in (
        ("--share_neurons", "experts may hold the same neurons"),
        ("--exact", "the best assignment instead of the greedy one"),
    ):
        add_switch(gradient, name, text=text, default=None)
    gradient.add_argument("--visualization_path", type=Path, metavar="DIR", help="tables and pictures of the overlap")


def run(words: argparse.Namespace) -> int:
    """Split, or show the plan, and say what was done."""
    from mindformers_ext.jobs.experts.run_split import plan_split, run_split

    if is_plus(words):
        return _run_plus(words)
    if words.format is not None:
        raise UserError("--format counts with --method gradient and a file of scores alone: leave it out")
    request = request_of(words)
    plan = plan_split(request)
    if words.dry_run:
        print(_planned(plan))
        return 0
    if plan.kept:
        print(f"note: {len(plan.kept)} layers are finished and kept", file=sys.stderr)
    print(_done(run_split(request, plan, words.quiet)))
    return 0


def is_plus(words: argparse.Namespace) -> bool:
    """Whether a LLaMA-MoE v2 is split: by scores that are one file."""
    return words.method == "gradient" and words.score_file_path is not None and words.score_file_path.suffix in TABLES


def plus_request_of(words: argparse.Namespace) -> PlusRequest:
    """What the options ask for by a file of scores; others that are given are a ``UserError``."""
    from mindformers_ext.jobs.experts.v2.splits import PlusRequest

    check_effects(words, sys.modules[__name__])
    return PlusRequest(
        model=words.model_path,
        scores=words.score_file_path,
        save_path=words.save_path,
        experts=words.num_experts,
        residual=words.expert_num_residual or 0,
        size=words.expert_size,
        share=bool(words.share_neurons),
        criterion=words.criterion or "max",
        fmt=words.format or words.score_file_path.suffix[1:],
        overwrite=words.overwrite,
        dry_run=words.dry_run,
    )


def _run_plus(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.experts.v2.splits import write_split

    request = plus_request_of(words)
    table = write_split(request, lambda line: print(line, file=sys.stderr))
    first = next(iter(table.layers.values()))
    sizes = {name: array.size for name, array in first.items()}
    always = sizes.pop("residual", 0)
    beside = f" beside {always} that every token passes" if always else ""
    what = f"{len(table.layers)} layers of {len(sizes)} experts of {sizes['0']} neurons{beside}"
    print(f"{request.path}: {what}" + ("; nothing was written" if words.dry_run else ""))
    return 0


def request_of(words: argparse.Namespace) -> SplitRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.split_methods import SplitRequest

    return SplitRequest(
        model_path=words.model_path,
        save_path=words.save_path,
        template=words.templates,
        layers=layers(words),
        **{name: getattr(words, name) for name in OWN},
    )


def _planned(plan: SplitPlan) -> str:
    needs = f", {plan.workers} processes of about {plan.layer_bytes / 1e9:.2f} GB" if plan.layer_bytes else ""
    return (
        f"{plan.folder}: {len(plan.todo)} layers to split, {len(plan.kept)} finished{needs}, at most "
        f"{plan.disk_bytes / 1e9:.3f} GB of disk; "
        f"{plan.settings['num_experts']} experts of {plan.settings['intermediate_size']} neurons; nothing was written"
    )


def _done(report: SplitReport) -> str:
    plan = report.plan
    figures = [
        f"{name} {sum(about[name] for about in report.about.values()) / len(report.about):.6g}"
        for name in ("inertia", "cut", "score")
        if report.about and all(name in about for about in report.about.values())
    ]
    mean = f", mean {', '.join(figures)}" if figures else ""
    return (
        f"{plan.folder}: {len(report.about)} layers split into {plan.settings['num_experts']} experts in "
        f"{report.seconds:.1f} s{mean}"
    )
