# SPDX-License-Identifier: Apache-2.0
"""MindFormers is imported without the libraries behind a few of its functions, and those functions still find them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT, environment

SCRIPT = """
import sys
import mindformers_ext.mf.run
from mindformers_ext.mf.lean import LATER
assert not {"torch", "scipy.stats", "pandas", *LATER} & set(sys.modules)
from mindformers.core.metric import metric
assert "".join(metric.jieba.cut("two words")) == "two words"
assert isinstance(metric.SmoothingFunction(), metric.SmoothingFunction)
assert "nltk.translate.bleu_score" in sys.modules and "tensorboardX" not in sys.modules
from mindformers_ext.mf.lean import without
with without("torch"):
    from tensorboardX import SummaryWriter
assert "torch" not in sys.modules
SummaryWriter(logdir=sys.argv[1]).add_scalar("loss", 1.0, 1)
import torch
with without("torch"):
    import torch.nn
"""


@pytest.mark.slow
def test_what_mindformers_rarely_needs_is_imported_when_it_is_called(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
