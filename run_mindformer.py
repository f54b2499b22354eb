# SPDX-License-Identifier: Apache-2.0
"""Train, finetune, evaluate and predict through MindFormers; ``python run_mindformer.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
from mindformers_ext.cli.start import start

if __name__ == "__main__":
    raise SystemExit(start("run_mindformer"))
