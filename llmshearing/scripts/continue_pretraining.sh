#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# LLM-Shearing's path of scripts/continue_pretraining.sh, which has the variables.
exec bash "${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}/scripts/continue_pretraining.sh" "$@"
