# SPDX-License-Identifier: Apache-2.0
"""``convert``: dense LLaMA, split and gates become a LLaMA-MoE folder; ``--reversed`` makes it dense again."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ext.cli.command import boolean
from mindformers_ext.cli.experts_flags import add_model, add_writing
from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.gating import Gating
    from mindformers_ext.jobs.experts.ladder import Gates, Ladder
    from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest
    from mindformers_ext.surgery.experts.split import LayerSplit

# what may come out, by the reference's word; the file's ``architectures`` and the head follow from it
PRESETS = ("moefication", "llama_moe")  # of jobs/experts/gating.py
CLASSES = ("LlamaMoEForCausalLM", "LlamaMoEModel", "LlamaMoEForSequenceClassification")


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "folder to write")
    add_gating(parser)
    add = parser.add_argument
    add("--convert_type", choices=CLASSES, default=CLASSES[0], help="only the first is written")
    add("--dtype", metavar="TYPE", help="type of the written weights; default: the stored one")
    add("--reversed", action="store_true", help="--model_path is the mixture, --save_path becomes the dense model")
    add("--to_mindspore", "--to-mindspore", type=Path, metavar="OUT.ckpt", help="also convert the result for MindSpore")
    add(
        "--out_shard_size",
        "--out-shard-size",
        default="5B",
        metavar="SIZE",
        help="bytes of one shard; default 5B (5e9)",
    )
    add_writing(parser)


def add_gating(parser: argparse.ArgumentParser) -> None:
    """Split, gates, how experts are chosen and weighed, and a text on which that is judged."""
    add = parser.add_argument
    add("--split_file_path", type=Path, help="folder that split has written")
    add("--select_file_path", type=Path, help="folder that select has written; without it gates are random")
    add("--num_experts", type=int, default=8, metavar="N", help="experts per layer; default %(default)s")
    add("--num_selects", type=int, default=2, metavar="K", help="experts that a token passes; default %(default)s")
    add(
        "--preset",
        choices=PRESETS,
        help="moefication: chosen experts are added up (default with fitted gates); llama_moe: weighed by their "
        "probabilities times N / K, to be trained on (default with random gates)",
    )
    add("--gate_type", choices=("mlp", "linear"), help="two matrices with tanh between, or one; default: as fitted")
    add("--use_random_gate", type=boolean, metavar="BOOL", help="random gates, whatever was fitted")
    add("--use_softmax", type=boolean, metavar="BOOL", help="instead of the preset's")
    add("--multiply_gate_scores", type=boolean, metavar="BOOL", help="instead of the preset's")
    add("--score_scale_factor", type=float, metavar="X", help="instead of the preset's")
    add("--score_scale_factor_file_path", type=Path, metavar="DIR", help="folder with score_scale_factors.txt")
    add("--seed", type=int, default=0, help="of random gates and choices; default %(default)s")
    add("--allow_pickle", action="store_true", help="read older split and gate files that hold numpy's numbers")
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
    report = (_reversed if words.reversed else _converted)(words)
    if not words.quiet:
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
    print(_summary(words.save_path, report))
    return 0


def _converted(words: argparse.Namespace) -> MergeReport:
    from mindformers_ext.jobs.experts.convert import MixtureRequest, convert

    splits, gates, gating = read_parts(words)
    request = MixtureRequest(
        model=words.model_path,
        splits=splits,
        gates=gates,
        gating=gating,
        output=_output(words),
        dtype=words.dtype,
        seed=words.seed,
    )
    report = convert(request, write=not words.dry_run)
    ladder = quality_of(words, splits, gates, gating) if not words.dry_run else None
    if ladder is None:
        print("quality: not measured; --eval_text FILE prints the loss beside the dense model's and simpler cuts'")
    else:
        print(f"loss per token over {ladder.tokens} tokens:", *ladder.lines(), sep="\n  ")
    return report


def read_parts(words: argparse.Namespace) -> tuple[dict[int, LayerSplit], Gates | None, Gating]:
    """Split and gates by layer, and how experts are chosen."""
    from mindformers_ext.jobs.experts.gate_files import read_gates
    from mindformers_ext.jobs.experts.splits import read_splits

    if words.split_file_path is None:
        raise UserError("--split_file_path is missing: give the folder that split has written")
    layers, width = _sizes(words.model_path)
    splits = read_splits(words.split_file_path, words.templates, layers, words.num_experts, words.allow_pickle, width)
    gates = None
    if words.select_file_path is not None and not words.use_random_gate:
        gates = read_gates(words.select_file_path, words.templates, layers, words.allow_pickle)
    return splits, gates, _gating(words, gates, layers)


def _sizes(model: Path) -> tuple[int, int]:
    """Layers and neurons that config.json tells."""
    from mindformers_ext.jobs.checkpoint.source import read_config

    config = read_config(model)
    return int(config.get("num_hidden_layers") or 0), int(config.get("intermediate_size") or 0)


def quality_of(
    words: argparse.Namespace, splits: dict[int, LayerSplit], gates: Gates | None, gating: Gating
) -> Ladder | None:
    """The loss of the mixture beside simpler choices, where a text is given."""
    if words.eval_text is None:
        return None
    from mindformers_ext.jobs.experts.calibration import Calibration
    from mindformers_ext.jobs.experts.quality import QualityRequest, measure

    texts = Calibration(
        model_path=words.model_path,
        text=words.eval_text,
        block_size=words.block_size,
        max_tokens=2 * words.eval_tokens,
        quiet=words.quiet,
    )
    return measure(QualityRequest(texts=texts, splits=splits, gates=gates, gating=gating, seed=words.seed))


def _gating(words: argparse.Namespace, gates: Gates | None, layers: int) -> Gating:
    from mindformers_ext.jobs.experts.gating import WEIGHTS, Gating, preset, read_factors

    if not 1 <= words.num_selects <= words.num_experts:
        raise UserError(f"--num_selects {words.num_selects} of {words.num_experts} experts: choose 1 to all of them")
    fields = preset(
        words.preset or ("llama_moe" if gates is None else "moefication"), words.num_experts, words.num_selects
    )
    if words.score_scale_factor_file_path is not None:
        fields["factors"] = _factor_file(words.score_scale_factor_file_path, layers)
    for name, field in (
        ("use_softmax", "softmax"),
        ("multiply_gate_scores", "multiply"),
        ("score_scale_factor", "factors"),
    ):
        value = getattr(words, name)
        if value is not None:
            fields[field] = value if field != "factors" else read_factors(value, layers)
    first = next(iter(gates.values())) if gates else {}
    fitted = next((kind for kind, names in WEIGHTS.items() if first and set(names) <= set(first)), "mlp")
    return Gating(chosen=words.num_selects, network=words.gate_type or fitted, **fields)


def _factor_file(folder: Path, layers: int) -> Any:
    """The factors of ``score_scale_factors.txt``, a list as Python and JSON write it."""
    from mindformers_ext.core.json_text import read_json
    from mindformers_ext.jobs.experts.gating import read_factors

    path = folder / "score_scale_factors.txt" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: give the folder that holds score_scale_factors.txt")
    return read_factors(read_json(path, "expected a list of numbers, one for each layer"), layers)


def _reversed(words: argparse.Namespace) -> MergeReport:
    from mindformers_ext.jobs.experts.reverse import DenseRequest, reverse
    from mindformers_ext.jobs.experts.splits import read_splits

    splits = None
    if words.split_file_path is not None:
        layers, width = _sizes(words.model_path)
        splits = read_splits(words.split_file_path, words.templates, layers, None, words.allow_pickle, width)
    request = DenseRequest(model=words.model_path, output=_output(words), splits=splits)
    return reverse(request, write=not words.dry_run)


def _output(words: argparse.Namespace) -> OutputRequest:
    from mindformers_ext.jobs.merge.output import OutputRequest
    from mindformers_ext.jobs.merge.shard_size import shard_bytes

    return OutputRequest(
        folder=words.save_path,
        shard_bytes=shard_bytes(words.out_shard_size),
        overwrite=words.overwrite,
        quiet=words.quiet,
        to_mindspore=words.to_mindspore,
    )


def _summary(folder: Path, report: MergeReport) -> str:
    size = (
        f"{folder}: {report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, {report.nbytes / 1e9:.3f} GB"
    )
    if report.seconds is None:
        return f"{size} to write, {report.free / 1e9:.1f} GB free; nothing was written"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return f"{size} in {report.seconds:.1f} s, peak memory {peak} MB"
