# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/report_run.py."""

from mindformers_ext.cli.report_run import main

if __name__ == "__main__":
    raise SystemExit(main())
