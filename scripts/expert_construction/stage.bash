# SPDX-License-Identifier: Apache-2.0
# Read by the scripts beside it, which set "root" and their variables: from variables to the options of build_experts.py.
. "$root/scripts/options.bash"

# build_experts STAGE WORD...: run the stage
build_experts() {
    local stage=$1
    shift
    exec "${PYTHON:-python}" "$root/tools/build_experts.py" "$stage" "${options[@]}" "$@"
}
