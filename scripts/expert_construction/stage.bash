# SPDX-License-Identifier: Apache-2.0
# Read by the scripts beside it, which set "root" and their variables: from variables to the options of build_experts.py.
options=()

# required NAME...: the option --NAME has the variable's value, which must not be empty; NAME=OPTION where it is called otherwise
required() {
    local item name
    for item in "$@"; do
        name=${item%%=*}
        if [ -z "${!name}" ]; then echo "error: $name is empty: set it at the top of the script, or in the environment" >&2; exit 2; fi
        options+=("--${item##*=}" "${!name}")
    done
}

# optional NAME...: the same, and no option where the variable is empty
optional() {
    local name
    for name in "$@"; do
        if [ -n "${!name}" ]; then options+=("--$name" "${!name}"); fi
    done
}

# build_experts STAGE WORD...: run the stage
build_experts() {
    local stage=$1
    shift
    exec "${PYTHON:-python}" "$root/tools/build_experts.py" "$stage" "${options[@]}" "$@"
}
