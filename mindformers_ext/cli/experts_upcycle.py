# SPDX-License-Identifier: Apache-2.0
"""``upcycle``: a dense model's feed-forward becomes experts to train; a mixture's experts become more of them."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import Effect, check_effects
from mindformers_ext.cli.experts_flags import add_writing, tell_report
from mindformers_ext.cli.model_folder import add_out_shard_size, output_of
from mindformers_ext.core.families import MIXTRAL, QWEN2_MOE, QWEN3_MOE

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.upcycle.request import UpcycleRequest

METHODS = ("copy", "granular", "drop", "expert")  # words of jobs/experts/upcycle/request.py, which loads numpy
SCALES = ("exact", "megatron")
ROUTERS = ("groups", "normal", "kmeans", "zeros")
FORMATS = (*(row.name for row in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)), "mindspore")

FROM_DENSE = Effect(lambda words: words.method != "expert", "--method copy, granular or drop")
FROM_MIXTURE = Effect(lambda words: words.method == "expert", "--method expert")
CUT = Effect(lambda words: words.method in ("granular", "drop"), "--method granular or drop")
DROPPED = Effect(lambda words: words.method == "drop", "--method drop")
DRAWN = Effect(
    lambda words: FROM_DENSE.when(words) and words.router in ("groups", "normal"), "--router groups or normal"
)
CLUSTERED = Effect(lambda words: FROM_DENSE.when(words) and words.router == "kmeans", "--router kmeans")
SEEDED = Effect(
    lambda words: words.method == "drop" or DRAWN.when(words) or bool(words.router_noise),
    "--method drop, --router groups or normal, or --router_noise",
)
FOLDER = Effect(lambda words: words.format != "mindspore", "a format of Hugging Face")
EFFECTS = {
    "granularity": CUT,
    **dict.fromkeys(("drop_ratio", "same_neurons"), DROPPED),
    **dict.fromkeys(("scale", "router", "moe_layer_freq", "norm_topk_prob"), FROM_DENSE),
    **{"router_std": DRAWN, "gate_weights_file": CLUSTERED, "router_noise": FROM_MIXTURE, "seed": SEEDED},
    "out_shard_size": FOLDER,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        type=Path,
        help="Hugging Face folder of a dense LLaMA, Mistral, Qwen2 or Qwen3; or of a mixture",
    )
    add("out", metavar="OUT", type=Path, help="folder to write; with --format mindspore a .ckpt or .safetensors file")
    add(
        "--method",
        choices=METHODS,
        required=True,
        help="copy: whole feed-forward parts; granular: cut into narrower experts; drop: neurons shuffled and partly "
        "redrawn; expert: a mixture's experts copied",
    )
    add("--experts", type=int, required=True, metavar="N", help="routed experts of a layer of what is written")
    add("--top_k", type=int, metavar="K", help="experts that a token passes; default two whole copies, or as before")
    add("--granularity", type=int, default=1, metavar="G", help="experts that one copy is cut into; default 1")
    add("--drop_ratio", type=float, default=0.5, metavar="R", help="share of neurons drawn anew; default %(default)s")
    add_switch(parser, "--same_neurons", text="redraw the same neurons of gate, up and down")
    add(
        "--scale",
        choices=SCALES,
        default=SCALES[0],
        help="exact: the function is kept; megatron: Megatron-LM's factors on gate, up and down; default %(default)s",
    )
    add(
        "--router",
        choices=ROUTERS,
        default=ROUTERS[0],
        help="groups: a drawn row for each copy, shared by its segments; normal: one for each expert; kmeans: centres "
        "of hidden states; zeros; default %(default)s",
    )
    add("--router_std", type=float, default=0.02, metavar="S", help="deviation of drawn rows; default %(default)s")
    add("--gate_weights_file", type=Path, metavar="FILE", help="what the stage gates wrote, for --router kmeans")
    add("--router_noise", type=float, default=0.0, metavar="S", help="of copied rows, relative; default none")
    add(
        "--moe_layer_freq",
        "--moe-layer-freq",
        metavar="N|LIST",
        help="which layers become mixtures, in Megatron-LM's words: 2, [0,1,1,1], ([0]+[1])*12; default all",
    )
    add_switch(parser, "--norm_topk_prob", text="whether the chosen weights sum to 1; default True", default=True)
    add("--format", choices=FORMATS, help="what is written; default the mixture that the model fits")
    add("--dtype", metavar="TYPE", help="type of the written weights; default: the model's")
    add("--seed", type=int, default=0, help="of every draw; default %(default)s")
    add_out_shard_size(parser)
    add_writing(parser)


def run(words: argparse.Namespace) -> int:
    """Upcycle, and say what was made and what comes next."""
    check_effects(words, sys.modules[__name__])
    from mindformers_ext.jobs.experts.upcycle.upcycle import upcycle

    made = upcycle(request_of(words), write=not words.dry_run)
    if words.dry_run:
        print(*(f"  {line}" for line in made.report.lines), sep="\n")
    tell_report(words.out, made.report, words.quiet)
    print(*made.facts, sep="\n")
    if not words.dry_run:
        print(f"next: mfext train {shlex.quote(str(words.out))} --data FILE")
    return 0


def request_of(words: argparse.Namespace) -> UpcycleRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.upcycle.request import UpcycleRequest

    return UpcycleRequest(
        model=words.model,
        output=output_of(words, words.out),
        method=words.method,
        experts=words.experts,
        top_k=words.top_k,
        granularity=words.granularity,
        drop_ratio=words.drop_ratio,
        same_neurons=words.same_neurons,
        scale=words.scale,
        router=words.router,
        router_std=words.router_std,
        gates=words.gate_weights_file,
        moe_layer_freq=words.moe_layer_freq,
        normalised=words.norm_topk_prob,
        router_noise=words.router_noise,
        form=words.format,
        dtype=words.dtype,
        seed=words.seed,
    )
