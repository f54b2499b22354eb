#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a script on several devices, on one machine or on several, with MindFormers' argument forms (1, 2, 6 or 9):
#   bash scripts/msrun_launcher.sh "run_mindformer.py --config FILE --use_parallel True" 8
# bash scripts/msrun_launcher.sh --help explains every argument. PYTHON=/path/to/python chooses the interpreter.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then python=$VIRTUAL_ENV/bin/python
    elif [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python
    else python=python3; fi
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m mindformers_ext.cli.start launch "$@"
