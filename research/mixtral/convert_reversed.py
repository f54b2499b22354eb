# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/convert_reversed.py."""

from mindformers_ext.cli.convert_reversed import main

if __name__ == "__main__":
    raise SystemExit(main())
