# SPDX-License-Identifier: Apache-2.0
"""llama_preprocess.py's options and report for a corpus by domain (``--dataset_type domains`` and ``mds``)."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.preprocess.domains.prepare import Prepared

DOMAIN_OPTIONS = (
    *("domains", "filter", "proportion", "eval_seq", "eval_share", "for_prune", "for_prune_share"),
    *("for_ft", "for_ft_share", "seed"),
)


def add_domain_options(parser: argparse.ArgumentParser) -> None:
    """The options that only domains (and their import from MDS) have."""
    group = parser.add_argument_group("domains")
    group.add_argument(
        "--domains",
        nargs="+",
        default=(),
        metavar="NAME=PATH",
        help="the domains in this order, instead of the sub-folders of --input_glob",
    )
    group.add_argument(
        "--filter",
        nargs="+",
        default=(),
        metavar="NAME=LOW:HIGH",
        help="keep documents whose score is in the range: characters, tokens, fluency, ads (both 0 to 1), field.NAME "
        "(a number in the record); DOMAIN/ in front for one domain; duplicates=0.8: of near duplicates the "
        "first. A name alone stands for "
        "characters=200:, tokens=32:, fluency=0.75:, ads=:0.25, duplicates=0.8",
    )
    group.add_argument("--eval_seq", type=int, help="rows of each domain for evaluation (default 2)")
    group.add_argument("--for_prune", type=float, help="1e9 tokens of all domains for pruning (default 0)")
    group.add_argument(
        "--for_ft", type=float, help="1e9 tokens of all domains for training (default: all that is left)"
    )
    for name in ("eval", "for_prune", "for_ft"):
        group.add_argument(f"--{name}_share", type=float, help="instead a share of the documents, 0 to 1")
    group.add_argument(
        "--proportion",
        nargs="+",
        default=(),
        metavar="NAME=SHARE",
        help="how --for_prune and --for_ft are shared out (default: equally)",
    )
    group.add_argument("--seed", type=int, help="which documents fall into which split (default 42)")


def refuse_domain_options(given: dict[str, Any], dataset_type: str) -> None:
    """A ``UserError`` where an option of domains is given for something else."""
    named = [f"--{name}" for name, value in given.items() if value not in (None, ())]
    if named:
        raise UserError(f"{', '.join(named)} has no effect on {dataset_type}: leave it out; it is for domains")


def prepare(options: dict[str, Any]) -> int:
    """Prepare the folder and say what was done."""
    from mindformers_ext.jobs.preprocess.domains.import_mds import import_mds
    from mindformers_ext.jobs.preprocess.domains.prepare import prepare_domains
    from mindformers_ext.jobs.preprocess.domains.request import DomainsRequest

    started = time.monotonic()
    request = DomainsRequest(**options)
    done = import_mds(request) if request.dataset_type == "mds" else prepare_domains(request)
    for line in report(done, time.monotonic() - started):
        print(line)
    return 0


def report(done: Prepared, seconds: float) -> list[str]:
    """What was done, as a person reads it."""
    notes = [f"note: left out, no domain: {', '.join(done.left_out)}"] if done.left_out else []
    if done.kept:
        notes.append(f"{done.kept} of {done.blocks} parts were there from an earlier run")
    if done.manifest is None:
        return [f"{done.parts}: {done.done} parts encoded in {seconds:.1f} s; last, run --shard join", *notes]
    made = done.manifest
    tokens = sum(count.tokens for count in made.counts.values())
    size = f"{len(made.domains)} domains, rows of {made.seq_length} tokens, {tokens} tokens"
    lines = [f"{made.folder}: {size} in {seconds:.1f} s"]
    head = ("domain", *made.splits, "dropped", "unused", "filtered")
    table = [head]
    for name in made.domains:
        count = made.counts[name]
        rows = (str(domains[name].rows) for domains in made.splits.values())
        filtered = ", ".join(f"{kind} {number}" for kind, number in count.filtered.items()) or "-"
        table.append((name, *rows, str(count.dropped_tokens), str(count.unused_tokens), filtered))
    widths = [max(len(row[column]) for row in table) for column in range(len(head) - 1)]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *cells, row[-1]]))
    unused = sum(count.unused_documents for count in made.counts.values())
    if unused:
        notes.append(
            f"{unused} documents were not used: the splits were full (--for_ft, --for_ft_share), or another domain has "
            "a copy in another split"
        )
    for split, domains in made.splits.items():
        without = [name for name, found in domains.items() if not found.rows]
        if 0 < len(without) < len(domains):
            notes.append(f"no row in {split}: {', '.join(without)}; a mixture wants rows of every domain")
    empty = [name for name, domains in made.splits.items() if not sum(found.rows for found in domains.values())]
    if empty:
        notes.append(
            f"empty splits: {', '.join(empty)} (give --{empty[0]}{'_seq' * (empty[0] == 'eval')} or --{empty[0]}_share)"
        )
    return [
        *lines,
        "columns: rows of each split, then tokens that filled no row, tokens not used, documents filtered",
        *notes,
    ]
