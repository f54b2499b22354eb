# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/alpaca_converter.py."""

from mindformers_ext.cli.alpaca_converter import main

if __name__ == "__main__":
    raise SystemExit(main())
