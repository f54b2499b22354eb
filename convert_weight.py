# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folder <-> MindSpore checkpoint; ``python convert_weight.py --help``."""

import sys

from mindformers_ext.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
