# SPDX-License-Identifier: Apache-2.0
"""``python tools/dataset_preprocess/llama/llama_preprocess.py``: text to MindRecord files of token rows."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import Command
from mindformers_ext.cli.preprocess_domains import DOMAIN_OPTIONS, add_domain_options, prepare, refuse_domain_options

if TYPE_CHECKING:
    from mindformers_ext.jobs.preprocess.preprocess import Summary

TYPES = ("wiki", "wikipedia", "qa", "text", "jsonl", "dpo", "domains", "mds")
EPILOG = """examples:
  WikiText for pretraining, rows of 2049 tokens:
    python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type wiki --input_glob wiki.train.tokens \\
        --model_file tokenizer.model --seq_length 2048 --output_file wiki2048.mindrecord
  conversations for finetuning (tools/dataset_preprocess/llama/alpaca_converter.py makes them from alpaca records):
    python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type qa --input_glob conversations.json \\
        --model_file tokenizer.model --config finetune.yaml --output_file alpaca2048.mindrecord
  JSON lines, several processes, rows of 2048 tokens for evaluation:
    python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type jsonl --field content \\
        --input_glob 'corpus/*.jsonl' --model_file Mixtral-8x7B-v0.1 --split eval --workers 8 \\
        --output_file eval.mindrecord
  a corpus by domain (a sub-folder each), for pruning and continued training with a mixture of domains:
    python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type domains --input_glob corpus \\
        --model_file Llama-2-7b --seq_length 4097 --eval_seq 500 --for_prune 0.4 --filter fluency duplicates=0.8 \\
        --output_file prepared
  on many machines that share a disk, the same command with one of (shards: the last command joins them):
    --ray HOST:PORT
    --shard $SLURM_ARRAY_TASK_ID/16     in: sbatch --array=0-15
    --shard join
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    _add_inputs(parser)
    _add_rows(parser)
    add_domain_options(parser)
    parser.add_argument(
        "--output_file",
        type=Path,
        required=True,
        help="file to write, best named X.mindrecord; domains and mds: the folder",
    )
    parser.add_argument("--file_partition", type=int, default=1, help="files to spread the rows over: X0, X1, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--summary", type=Path, help="where the counts go as JSON (default OUTPUT_FILE.summary.json)")
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="processes that tokenise (default: the cores, here %(default)s; fewer where the input is small)",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="tokenise on the machines of this Ray cluster instead; same files"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="tokenise the I-th of N parts only, I from 0 (a Slurm array's task), and leave them beside the output; "
        "--shard join, last, makes the same files of them as one command would",
    )


def _add_inputs(target: argparse.ArgumentParser) -> None:
    target.add_argument(
        "--dataset_type",
        default="wiki",
        help="wiki: WikiText's token files, cleaned; wikipedia: "
        "parquet; qa: conversations of FastChat's or OpenAI's form, loss on the answers only; dpo: pairs of a chosen "
        "and a rejected answer to a prompt; text: plain text; "
        "jsonl: JSON lines; all but parquet also as .gz; domains: a folder with a sub-folder (or file) per domain of "
        "JSON lines, .gz or parquet, into a folder of splits; mds: the same from folders of MDS shards "
        f"(one of {', '.join(TYPES)}; default wiki)",
    )
    target.add_argument("--input_glob", help="a file, a folder, or a glob pattern in quotes; domains: the folder")
    target.add_argument(
        "--field",
        help="jsonl: name of the text (default text); wikipedia: column (default the first); domains: name of the text "
        "or of the token ids (default the first there is of text, content, input_ids)",
    )
    target.add_argument("--document", help="text: what gets BOS and EOS: file, paragraph or line (default file)")
    target.add_argument(
        "--model_file",
        type=Path,
        required=True,
        help="tokenizer: a model's folder, its tokenizer.json or tokenizer.model (each stands for the folder), or a "
        "lone SentencePiece model",
    )
    target.add_argument(
        "--tokenizer",
        choices=["llama"],
        default="llama",
        help="as MindFormers' script has it; --model_file says what it is",
    )
    target.add_argument("--bos_id", type=int, help="token at a document's start (default: the tokenizer's)")
    target.add_argument("--eos_id", type=int, help="token at a document's end (default: the tokenizer's)")
    target.add_argument(
        "--pad_id",
        type=int,
        help="token that fills rows of qa (default: the tokenizer's; without one "
        "its unknown token, as MindFormers has it)",
    )


def _add_rows(target: argparse.ArgumentParser) -> None:
    target.add_argument(
        "--seq_length",
        type=int,
        help="positions of the network (default: --config's, else 2048); domains: tokens of a row, one more than a "
        "network that trains on it has positions",
    )
    target.add_argument("--split", default="train", help="train: rows of seq_length + 1 tokens; eval: of seq_length")
    target.add_argument(
        "--config",
        type=Path,
        help="MindFormers YAML of the run that will read the rows: vocabulary, special ids and length must agree",
    )
    target.add_argument("--repeat", type=int, help="go over the text this many times (default 1)")
    target.add_argument("--samples_num", type=int, help="wikipedia: at most this many rows (default 10000)")
    target.add_argument("--skip_masked", action="store_true", help="qa: leave out rows without any loss")
    target.add_argument(
        "--pack_strategy",
        help="qa: pack: several whole conversations to a row, with document_ids; pad: one to a row; conversations "
        "longer than a row are dropped (without it: one to a row, cut at its end)",
    )
    target.add_argument(
        "--chat",
        action="store_true",
        help="qa, dpo: in the words of the tokenizer's own chat template; records of qa may be alpaca's too (default: "
        "Vicuna's words)",
    )
    target.add_argument(
        "--max_prompt_length", type=int, help="dpo: tokens that the prompt of a longer pair keeps (default 128)"
    )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.preprocess.preprocess import encode_shard, preprocess
    from mindformers_ext.jobs.preprocess.request import FOLDERS, JOIN, PreprocessRequest

    options = vars(arguments)
    options.pop("tokenizer")
    own = {name: options.pop(name) for name in DOMAIN_OPTIONS}
    if options["dataset_type"] in FOLDERS:
        return prepare({**options, **own})
    refuse_domain_options(own, options["dataset_type"])
    started = time.monotonic()
    if options["shard"] not in (None, JOIN):
        done = encode_shard(PreprocessRequest(**options))
        print(f"{done.path}: {done.batches} batches encoded in {time.monotonic() - started:.1f} s; last, --shard join")
        return 0
    summary = preprocess(PreprocessRequest(**options))
    for line in report(summary, time.monotonic() - started):
        print(line)
    return 0


def report(summary: Summary, seconds: float) -> list[str]:
    """The summary as a person reads it; counts that are zero and matter only then are left out."""
    what = {"qa": "conversations", "dpo": "pairs"}.get(summary.dataset_type, "documents")
    names = summary.output_files
    lines = [
        f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''}: {summary.records} records of "
        f"{summary.row_length} tokens from {summary.documents} {what}, {summary.tokens} tokens, in {seconds:.1f} s "
        f"({summary.tokens / max(seconds, 1e-9):,.0f} tokens/s)",
        f"ids: bos {summary.bos_id}, eos {summary.eos_id}, pad {summary.pad_id}; "
        f"padding {summary.padding_share:.1%}, loss on {summary.loss_share:.1%} of the tokens",
    ]
    notes = {
        "dropped_tokens": "tokens at the end filled no row and were dropped",
        "truncated": f"records were longer than {summary.row_length} tokens and lost {summary.truncated_tokens} tokens",
        "masked": "records bear no loss: no answer, or it was cut off (--skip_masked leaves them out)",
        "masked_skipped": "records without any loss were left out",
        "too_long": f"conversations were longer than a row and were dropped, {summary.too_long_tokens} tokens",
        "no_question": "conversations without a human turn were left out",
        "unknown_tokens": "unknown tokens"
        + (" get no loss, because pad is the unknown token too" if summary.pad_id == summary.unk_id else ""),
    }
    lines += [f"{getattr(summary, name)} {text}" for name, text in notes.items() if getattr(summary, name)]
    if summary.samples_left_out:
        lines.append("--samples_num was reached; there may be more text")
    if "mindrecord" not in Path(names[0]).name:
        lines.append("note: run_mindformer.py reads files whose names end in .mindrecord")
    return lines


COMMAND = Command(
    prog="llama_preprocess.py",
    description="Turn text into MindRecord files of token rows. Text streams: no file needs to fit into memory. "
    "The rows are the same for any number of workers; files appear whole or not at all.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
