# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/tiny_model.py."""

from mindformers_ext.cli.tiny_model import main

if __name__ == "__main__":
    raise SystemExit(main())
