# SPDX-License-Identifier: Apache-2.0
"""``python -m mindformers_ext``: the command ``mfext``, where it is not installed."""

from mindformers_ext.cli.start import mfext

if __name__ == "__main__":
    raise SystemExit(mfext())
