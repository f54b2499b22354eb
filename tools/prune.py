# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/prune.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mindformers_ext.cli.start import start

if __name__ == "__main__":
    raise SystemExit(start("prune"))
