# SPDX-License-Identifier: Apache-2.0
"""``split``: which neurons of each feed-forward part make up which expert."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("--model_path", type=Path, required=True, help="Hugging Face folder of a dense LLaMA")
    parser.add_argument("--save_path", type=Path, required=True, help="the split's folder is made in here")
    parser.add_argument("--num_experts", type=int, default=8, help="experts per layer; default 8")


def run(words: argparse.Namespace) -> int:
    """Split, and say what was done."""
    raise NotImplementedError
