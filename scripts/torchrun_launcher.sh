#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a script on several GPUs (or CPU processes) with torchrun, with the argument forms of msrun_launcher.sh (1, 2, 6 or 9):
#   bash scripts/torchrun_launcher.sh "run_mindformer.py --config FILE --device_target GPU --use_parallel True" 8
# bash scripts/torchrun_launcher.sh --help explains every argument. PYTHON=/path/to/python chooses the interpreter.
exec bash "$(dirname "${BASH_SOURCE[0]}")/msrun_launcher.sh" --torchrun "$@"
