# SPDX-License-Identifier: Apache-2.0
"""``select``: fit the gates that choose experts, from features or while the model runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import SELECT, check_effects
from mindformers_ext.cli.experts_flags import add_calibration, add_layers, add_model, add_writing, calibration, layers

EFFECTS = SELECT


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "MODEL-8Expert-Select-MLP is made in here")
    parser.add_argument("--split_file_path", type=Path, required=True, help="folder that split wrote")
    parser.add_argument("--hidden_features_path", type=Path, help="folder that features wrote")
    add_switch(parser, "--stream", text="no features: fit while the model runs, from a sample of tokens in memory")
    parser.add_argument("--reservoir", type=int, default=1 << 16, help="tokens of that sample; default %(default)s")
    parser.add_argument(
        "--select_criterion",
        help="plain, positive, l1_norm or l2_norm: what of an expert's answers counts; output_norm: the length of what "
        "it adds; default l2_norm, of --gate ridge output_norm, which it is fitted to",
    )
    parser.add_argument("--num_experts", type=int, default=8, help="experts per layer; default %(default)s")
    parser.add_argument("--num_selects", type=int, default=2, help="experts a token passes; default %(default)s")
    add_layers(parser)
    _fit_options(parser)
    add_calibration(parser, required=False)
    add_writing(parser)


def _fit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the gate")
    group.add_argument(
        "--gate", default="mlp", help="mlp (two layers), linear, or ridge (closed form, no training); default mlp"
    )
    group.add_argument("--mlp_init_criterion", default="ridge", help="ridge, weight or random; default %(default)s")
    add_switch(group, "--use_softmax", text="train towards the softmax of the scores instead of the best k")
    group.add_argument("--lr", type=float, default=1e-2, help="AdamW's rate; default %(default)s")
    group.add_argument("--epochs", type=int, default=100, help="at most; default %(default)s")
    group.add_argument("--patience", type=int, default=15, help="epochs without gain; default %(default)s")
    group.add_argument("--gate_batch_size", type=int, default=1024, help="tokens a step; default %(default)s")
    group.add_argument("--balance_loss_lambda", type=float, default=0.0, help="factor; default %(default)s")
    add_switch(group, "--add_noise", text="noisy logits in training")
    group.add_argument("--ridge_lambda", type=float, default=0.01, help="damping of ridge; default %(default)s")
    group.add_argument(
        "--ridge_target", default="chosen", help="what ridge predicts: chosen (the best k) or norm; default %(default)s"
    )
    group.add_argument("--workers", type=int, help="processes, a layer each; default: by the layers and processors")
    add_switch(group, "--allow_pickle", text="read older files with numpy's numbers (nothing of them is run)")


def run(words: argparse.Namespace) -> int:
    """Fit the gates, and say what came out."""
    from mindformers_ext.jobs.experts.select import MOST, SelectRequest, select

    check_effects(words, sys.modules[__name__])
    request = SelectRequest(
        model_path=words.model_path,
        split_path=words.split_file_path,
        save_path=words.save_path,
        features=words.hidden_features_path,
        calibration=calibration(words) if words.stream else None,
        template=words.templates,
        criterion=words.select_criterion or ("output_norm" if words.gate == "ridge" else "l2_norm"),
        experts=words.num_experts,
        selects=words.num_selects,
        layers=layers(words),
        gate=words.gate,
        init=words.mlp_init_criterion,
        softmax=words.use_softmax,
        lr=words.lr,
        epochs=words.epochs,
        batch=words.gate_batch_size,
        patience=words.patience,
        balance=words.balance_loss_lambda,
        noise=words.add_noise,
        percent=1.0 if words.stream or words.data_use_percent is None else words.data_use_percent,
        damping=words.ridge_lambda,
        ridge_target=words.ridge_target,
        reservoir=words.reservoir,
        limit=MOST if words.max_tokens is None else words.max_tokens,
        workers=words.workers,
        seed=words.seed,
        allow_pickle=words.allow_pickle,
        overwrite=words.overwrite,
        quiet=words.quiet,
        dry_run=words.dry_run,
    )
    report = select(request, lambda line: print(line, flush=True))
    for note in report.notes:
        print(f"note: {note}")
    for one in report.figures:
        near, chance = one["baselines"]["similarity"]["recall"], one["baselines"]["random"]["recall"]
        print(
            f"layer {one['layer']}: recall@{words.num_selects} {one['recall']:.3f} (similarity {near:.3f}, random "
            f"{chance:.3f}), captured {one['captured']:.3f} of {one['oracle']:.3f}, load CV {one['load_cv']:.3f}"
        )
    if words.dry_run:
        print(f"{len(report.layers)} layers to fit; nothing was written")
    else:
        print(f"{report.folder}: {len(report.layers)} gates fitted, {len(report.figures)} there")
    return 0
