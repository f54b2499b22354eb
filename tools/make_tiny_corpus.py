# SPDX-License-Identifier: Apache-2.0
"""See mindformers_ext/cli/tiny_corpus.py."""

from mindformers_ext.cli.tiny_corpus import main

if __name__ == "__main__":
    raise SystemExit(main())
