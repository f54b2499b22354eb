#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates .venv from requirements.lock and installs this project into it (editable). Nothing is done when .venv is already in step
# with requirements.lock and pyproject.toml. PYTHON=/path/to/python3.11 chooses the interpreter.
# With --next it makes .venv-next, the newest MindSpore without MindFormers: requirements.lock as requirements-next.lock changes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv locks=(requirements.lock)
case "$*" in
    "") ;;
    --next) venv=.venv-next locks+=(requirements-next.lock) ;;
    *) echo "setup_env: given '$*'; it takes nothing (makes .venv) or --next (makes .venv-next)." >&2; exit 2 ;;
esac
lock=$venv/requirements.lock  # all that is installed: the first of $locks as the second, if any, changes it
stamp=$venv/.setup_done   # written last: the environment is whole
busy=$venv/.setup_busy    # there while pip runs; left behind only by a run that was killed
min=3.10 max=3.12

want() {  # what the environment was made from, and where: an environment that was moved is made again
    { cat "${locks[@]}" pyproject.toml; pwd -P; } | sha256sum | cut -d' ' -f1
}

merged() {  # the first of the locks $@ without the packages that a later one names, then what the later ones install
    awk -v first="$1" '
        function name(line) { sub(/^#[a-z-]+ /, "", line); sub(/[=; ].*/, "", line); return tolower(line) }
        /^(# |$)/ { next }
        FILENAME != first { named[name($0)]; if ($0 !~ /^#without /) later = later $0 "\n"; next }
        { lines[++count] = $0 }
        END { for (i = 1; i <= count; i++) if (!(name(lines[i]) in named)) print lines[i]; printf "%s", later }' "$@"
}

fits() {  # python at $1 runs, has venv, and its version is between $min and $max
    command -v "$1" >/dev/null && "$1" -c '
import sys, ensurepip, venv
low, high = (tuple(map(int, v.split("."))) for v in sys.argv[1:])
raise SystemExit(not low <= sys.version_info[:2] <= high)' "$min" "$max" 2>/dev/null
}

choose_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if fits "$PYTHON"; then echo "$PYTHON"; return; fi
        echo "setup_env: PYTHON=$PYTHON is not a Python $min to $max with the venv module." >&2
        return 1
    fi
    for candidate in python3.11 python3.10 python3.12 python3; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
    echo "setup_env: found no Python $min to $max with the venv module (MindSpore 2.9 has no wheels for others)." >&2
    echo "Looked for python3.11, python3.10, python3.12, python3. Install one (Debian, Ubuntu: apt-get install python3.11-venv)" >&2
    echo "or name one: PYTHON=/path/to/python3.11 bash scripts/setup_env.sh" >&2
    return 1
}

step() {  # prints the plain command, runs it
    printf '+ %s\n' "$*"
    "$@"
}

check_mindspore() {
    local message
    printf '+ %s\n' "$venv/bin/python -c 'import mindspore'"
    if message=$("$venv/bin/python" -c 'import mindspore' 2>&1); then return; fi
    printf '%s\n' "$message" | tail -n 5 >&2
    echo "setup_env: the packages are installed, but MindSpore does not import; its message stands above." >&2
    case $message in
        *libgomp*) echo "It misses the OpenMP library (Debian, Ubuntu: apt-get install libgomp1)." >&2 ;;
        *GLIBC*) echo "The C library of this system is too old for the MindSpore wheel: use a newer distribution." >&2 ;;
        *.so*) echo "A shared library named above is missing: install the system package that holds it." >&2 ;;
    esac
    return 1
}

[ "$(cat "$stamp" 2>/dev/null)" = "$(want)" ] && [ -x $venv/bin/python ] && exit 0

mkdir -p $venv
if command -v flock >/dev/null; then  # two runs at once: the second waits, then finds the work done
    exec 9>"$venv/.setup_lock"
    flock -n 9 || { echo "setup_env: another run is at work, waiting for it"; flock 9; }
    [ "$(cat "$stamp" 2>/dev/null)" = "$(want)" ] && exit 0
fi

clear=""
if [ -e $busy ]; then
    echo "setup_env: an earlier run was killed while installing; $venv is made anew"
    clear="--clear"
fi
touch $busy
killed=""
trap 'killed=yes; exit 130' INT TERM HUP
trap '[ -n "$killed" ] || rm -f $busy' EXIT  # a plain failure (no network, say) keeps what pip finished

if [ -n "$clear" ] || ! { fits $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(choose_python)
    step "$python" -m venv $clear $venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip="$venv/bin/python -m pip install --no-input"

rm -f $stamp
touch $busy  # again: --clear took it away

echo "setup_env: installing into $venv; the first time takes minutes"
merged "${locks[@]}" > "$lock"
torch=$(grep -E '^torch==' "$lock")
step $pip "$torch"
step $pip -r "$lock"
for package in $(sed -n 's/^#no-deps //p' "$lock"); do
    step $pip --no-deps "$package"  # its own list of dependencies does not build
done
for package in $(sed -n 's/^#if-missing //p' "$lock"); do
    "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${package%%==*}') is None)" && continue
    step $pip --no-deps "$package" || echo "setup_env: no $package for this machine; the tests that need it are skipped"
done
step $pip --no-deps --no-build-isolation -e .
step "$venv/bin/python" -m compileall -q mindformers_ext tools  # or each start compiles, where nothing may write bytecode later
check_mindspore
want > $stamp.new
mv $stamp.new $stamp
echo "setup_env: done, $("$venv/bin/python" --version) in $venv"
[ $venv = .venv ] || echo "setup_env: the networks' tests on it: $venv/bin/python -m pytest tests/ms tests/parity"
