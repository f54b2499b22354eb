#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up what is missing, then ruff, mypy and pytest; stops at the first that fails. Arguments go to pytest:
#   bash scripts/test.sh -m "not slow"
# Two processes share the tests (tests/conftest.py says how); "-n 0" runs them in one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python

step() {
    printf '+ %s\n' "$*"
    "$@" || { code=$?; echo "test.sh: FAILED (exit $code): $*; later steps were not run" >&2; exit "$code"; }
}

step bash scripts/setup_env.sh
step $python -m ruff check .
step $python -m ruff format --check --quiet .
step $python -m mypy
printf '+ %s\n' "$python -m pytest -n 2 $*"
exec $python -m pytest -n 2 "$@"
