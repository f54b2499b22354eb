# SPDX-License-Identifier: Apache-2.0
"""MindFormers is imported without the libraries behind a few of its functions, and those functions still find them."""

from __future__ import annotations

import subprocess
import sys

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
"""


@pytest.mark.slow
def test_what_mindformers_rarely_needs_is_imported_when_it_is_called() -> None:
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
