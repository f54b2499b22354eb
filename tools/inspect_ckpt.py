# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/inspect_ckpt.py."""

from mindformers_ext.cli.inspect_ckpt import main

if __name__ == "__main__":
    raise SystemExit(main())
