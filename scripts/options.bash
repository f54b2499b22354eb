# SPDX-License-Identifier: Apache-2.0
# Read by scripts that have variables at their top: from variables to the options of a command, in the array "options".
options=()

# required NAME...: the option --NAME has the variable's value, which must not be empty; NAME=OPTION where it is called otherwise
required() {
    local item name
    for item in "$@"; do
        name=${item%%=*}
        if [ -z "${!name}" ]; then refuse "$name is empty: set it at the top of the script, or in the environment"; fi
        options+=("--${item##*=}" "${!name}")
    done
}

# optional NAME...: the same, and no option where the variable is empty
optional() {
    local item name
    for item in "$@"; do
        name=${item%%=*}
        if [ -n "${!name}" ]; then options+=("--${item##*=}" "${!name}"); fi
    done
}

# refuse TEXT: a user's mistake
refuse() {
    echo "error: $1" >&2
    exit 2
}
