# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/plot_run.py."""

from mindformers_ext.cli.plot_run import main

if __name__ == "__main__":
    raise SystemExit(main())
