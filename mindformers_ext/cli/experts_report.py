# SPDX-License-Identifier: Apache-2.0
"""``report``: one page of figures about a mixture, measured on a text."""

from __future__ import annotations

import argparse
import sys

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_convert import add_gating, parts_of, quality_of
from mindformers_ext.cli.experts_effects import REPORT, check_effects
from mindformers_ext.cli.experts_flags import add_model

EFFECTS = REPORT


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "folder for report.html, report.json and the pictures")
    add_gating(parser)
    add_switch(parser, "--overwrite", text="replace an existing folder")
    add_switch(parser, "--quiet", text="no progress bar")


def run(words: argparse.Namespace) -> int:
    """Measure, write the page, and say what came out."""
    from mindformers_ext.jobs.experts.dense_model import model_name
    from mindformers_ext.jobs.experts.gate_files import GateFiles
    from mindformers_ext.jobs.experts.quality import measure
    from mindformers_ext.jobs.experts.report import MixtureFacts, check_place, verdict, write_report

    check_effects(words, sys.modules[__name__])
    check_place(words.save_path, words.overwrite)
    parts = parts_of(words)
    quality = quality_of(words, parts)
    ladder = measure(quality) if quality else None
    facts = MixtureFacts(
        model=model_name(words.model_path),
        splits=parts.splits,
        chosen=words.num_selects,
        gates=GateFiles(words.select_file_path, words.templates).figures() if parts.gates else (),
        ladder=ladder,
    )
    page = write_report(facts, words.save_path, words.overwrite)
    for line in ladder.lines() if ladder else ():
        print(f"  {line}")
    print(verdict(ladder) if ladder else "the loss was not measured: give --eval_text FILE")
    print(f"{page}: open it in a browser")
    return 0
