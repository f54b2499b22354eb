#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up what is missing, then ruff, mypy and pytest; stops at the first that fails. Arguments go to pytest:
#   bash scripts/test.sh -m "not slow"
# --all (first): also the tests marked long or turn, and every rank of every dry run. As many processes as there are cores, at
# most 8, share the tests; "-n 0" runs them in one. The 30 slowest tests are listed at the end.
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
words=(-n auto --maxprocesses 8 --no-loadscope-reorder --durations=30)  # in the order of tests/conftest.py
if [ "${1:-}" = --all ]; then shift; words+=(--all); fi
printf '+ %s\n' "$python -m pytest ${words[*]} $*"
exec $python -m pytest "${words[@]}" "$@"
