# SPDX-License-Identifier: Apache-2.0
"""Train, finetune, evaluate and predict through MindFormers; ``python run_mindformer.py --help``."""

import sys

from mindformers_ext.cli.run_mindformer import main

if __name__ == "__main__":
    sys.exit(main())
