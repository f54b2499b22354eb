# SPDX-License-Identifier: Apache-2.0
"""Every measurement imports this before anything else: it ends the process with 2 where something is not set up."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mindformers_ext.cli.start import NOT_SET_UP, is_not_set_up

NEEDED = {"compile_time.py": ("mindspore",), "gpu.py": ("torch",)}  # beside what every command needs

if is_not_set_up(NEEDED.get(Path(sys.argv[0]).name, ())):
    raise SystemExit(NOT_SET_UP)
