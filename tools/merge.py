# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/merge.py."""

from mindformers_ext.cli.merge import main

if __name__ == "__main__":
    raise SystemExit(main())
