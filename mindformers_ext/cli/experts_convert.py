# SPDX-License-Identifier: Apache-2.0
"""``convert``: dense LLaMA, split and gates become a LLaMA-MoE folder; ``--reversed`` makes it dense again.

With ``--style`` the folder is a LLaMA-MoE v2 (``cli.experts_styles``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli import experts_styles
from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import CONVERT, check_effects
from mindformers_ext.cli.experts_flags import add_model, add_model_output, add_writing, tell_report
from mindformers_ext.cli.model_folder import output_of
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA_MOE

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.parts import Parts
    from mindformers_ext.jobs.experts.quality import QualityRequest
    from mindformers_ext.jobs.merge.output import MergeReport

EFFECTS = CONVERT
EXPERTS = 8  # of a layer where nobody says
PRESETS = ("moefication", LLAMA_MOE.name)  # of jobs/experts/gating.py
# what may come out, by the reference's word; transformers leaves out or adds the head of what is written
CLASSES = (
    LLAMA_MOE.hf_class,
    *(LLAMA_MOE.hf_class.replace("ForCausalLM", end) for end in ("Model", "ForSequenceClassification")),
)

# what --reversed knows
BACK = (
    *("model_path", "save_path", "templates", "split_file_path", "allow_pickle", "reversed", "to_mindspore"),
    *("out_shard_size", "overwrite", "dry_run", "quiet"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "folder to write")
    experts_styles.add_options(parser)
    add_gating(parser)
    add = parser.add_argument
    add("--convert_type", choices=CLASSES, default=CLASSES[0], help="only the first is written")
    add("--dtype", metavar="TYPE", help="type of the written weights; default: the stored one")
    add_switch(parser, "--reversed", text="--model_path is the mixture, --save_path becomes the dense model")
    add_model_output(parser)
    add_writing(parser)


def add_gating(parser: argparse.ArgumentParser) -> None:
    """Split, gates, how experts are chosen and weighed, and a text on which that is judged."""
    add = parser.add_argument
    add("--split_file_path", type=Path, help="folder that split has written")
    add("--select_file_path", type=Path, help="folder that select has written; without it gates are random")
    add("--num_experts", type=int, metavar="N", help=f"experts per layer; default {EXPERTS}, with --style as split")
    add("--num_selects", type=int, default=2, metavar="K", help="experts that a token passes; default %(default)s")
    add(
        "--preset",
        choices=PRESETS,
        help="moefication: chosen experts are added up (default with fitted gates); llama_moe: weighed by their "
        "probabilities times N / K, to be trained on (default with random gates)",
    )
    add("--gate_type", choices=("mlp", "linear"), help="two matrices with tanh between, or one; default: as fitted")
    add_switch(parser, "--use_random_gate", text="random gates, whatever was fitted")
    for name in ("--use_softmax", "--multiply_gate_scores"):
        add_switch(parser, name, text="instead of the preset's", default=None)
    add("--score_scale_factor", type=float, metavar="X", help="instead of the preset's")
    add("--score_scale_factor_file_path", type=Path, metavar="DIR", help="folder with score_scale_factors.txt")
    add("--seed", type=int, default=0, help="of random gates and choices; default %(default)s")
    add_switch(parser, "--allow_pickle", text="read older split and gate files that hold numpy's numbers")
    add("--eval_text", type=Path, metavar="FILE", help="measure the loss on this text: dense, gate, static cut, ...")
    add("--eval_tokens", type=int, default=32768, metavar="N", help="tokens that judge; default %(default)s")
    add("--block_size", type=int, default=512, metavar="N", help="tokens of a row of it; default %(default)s")


def run(words: argparse.Namespace) -> int:
    """Convert, and say what was done."""
    if words.convert_type != CLASSES[0]:
        raise UserError(
            f"--convert_type {words.convert_type}: the folder holds a {CLASSES[0]}; load it as {words.convert_type} in "
            "transformers, which leaves out or adds the head"
        )
    if not words.reversed:
        check_effects(words, sys.modules[__name__])
    if words.style is not None and not words.reversed:
        report = experts_styles.converted(words, output_of(words, words.save_path))
    else:
        report = (_reversed if words.reversed else _converted)(words)
    tell_report(words.save_path, report, words.quiet)
    return 0


def _converted(words: argparse.Namespace) -> MergeReport:
    from mindformers_ext.jobs.experts.convert import MixtureRequest, convert

    parts = parts_of(words)
    request = MixtureRequest(
        model=words.model_path,
        splits=parts.splits,
        gates=parts.gates,
        gating=parts.gating,
        output=output_of(words, words.save_path),
        dtype=words.dtype,
        seed=words.seed,
    )
    quality = quality_of(words, parts)
    report = convert(request, write=not words.dry_run)
    if quality is None:
        print("quality: not measured; --eval_text FILE prints the loss beside the dense model's and simpler cuts'")
    elif not words.dry_run:
        from mindformers_ext.jobs.experts.quality import measure

        ladder = measure(quality)
        print(f"loss per token over {ladder.tokens} tokens:", *ladder.lines(), sep="\n  ")
    return report


def parts_of(words: argparse.Namespace) -> Parts:
    """Split, gates and gating in the words of ``add_gating``."""
    from mindformers_ext.jobs.experts.parts import PartsRequest, read_parts

    return read_parts(
        PartsRequest(
            model=words.model_path,
            split=words.split_file_path,
            gates=None if words.use_random_gate else words.select_file_path,
            templates=words.templates,
            experts=EXPERTS if words.num_experts is None else words.num_experts,
            chosen=words.num_selects,
            preset=words.preset,
            network=words.gate_type,
            factors=words.score_scale_factor_file_path,
            own={
                "softmax": words.use_softmax,
                "multiply": words.multiply_gate_scores,
                "factors": words.score_scale_factor,
            },
            allow_pickle=words.allow_pickle,
        )
    )


def quality_of(words: argparse.Namespace, parts: Parts) -> QualityRequest | None:
    """The loss of the mixture beside simpler choices is asked for where a text is given; checked.

    Raises:
        UserError: the text cannot be used, or there is too little memory or disk.
    """
    if words.eval_text is None:
        return None
    from mindformers_ext.jobs.experts.calibration import Calibration
    from mindformers_ext.jobs.experts.quality import QualityRequest, check_quality

    if words.eval_tokens < 1:
        raise UserError(f"--eval_tokens {words.eval_tokens}: give a whole number above 0")
    texts = Calibration(
        model_path=words.model_path,
        text=words.eval_text,
        block_size=words.block_size,
        max_tokens=2 * words.eval_tokens,
        quiet=words.quiet,
    )
    request = QualityRequest(
        texts=texts,
        splits=parts.splits,
        gates=parts.gates,
        gating=parts.gating,
        beside=words.save_path,
        seed=words.seed,
    )
    check_quality(request)
    return request


def _check_reversed(words: argparse.Namespace) -> None:
    """Options that say how a mixture is made mean nothing on the way back.

    Raises:
        UserError: some are given.
    """
    parser = argparse.ArgumentParser(add_help=False)
    configure(parser)
    given = [
        f"--{action.dest}"
        for action in parser._actions
        if action.dest not in BACK and getattr(words, action.dest) != action.default
    ]
    if given:
        raise UserError(f"{', '.join(given)} mean nothing with --reversed: leave them out")


def _reversed(words: argparse.Namespace) -> MergeReport:
    _check_reversed(words)
    from mindformers_ext.jobs.experts.parts import read_own_splits
    from mindformers_ext.jobs.experts.reverse import DenseRequest, reverse

    splits = read_own_splits(words.model_path, words.split_file_path, words.templates, words.allow_pickle)
    request = DenseRequest(model=words.model_path, output=output_of(words, words.save_path), splits=splits)
    return reverse(request, write=not words.dry_run)
