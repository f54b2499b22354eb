# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/check_parity.py."""

from mindformers_ext.cli.check_parity import main

if __name__ == "__main__":
    raise SystemExit(main())
