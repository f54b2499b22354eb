# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/show_record.py."""

from mindformers_ext.cli.show_record import main

if __name__ == "__main__":
    raise SystemExit(main())
