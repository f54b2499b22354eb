# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/shearing.py."""

import sys

from mindformers_ext.cli.start import start

if __name__ == "__main__":
    raise SystemExit(start("shearing", ["test_composer_hf_eq", *sys.argv[1:]]))
