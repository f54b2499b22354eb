#!/usr/bin/env bash
#SBATCH --job-name=convert_mixtral_attn_moe
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# The heads of a converted MoE of LLaMA-MoE v2, or of a dense LLaMA, become experts (Attention MoE).
#   bash scripts/expert_construction/convert/convert_mixtral_attn_moe.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

top_k_attn="${top_k_attn-7}" # number of activate experts in each attention MoE layer
scale_factor_attn="${scale_factor_attn-4.0}" # hyper-parameter for balancing the experts; empty: experts / top_k_attn
model_path="${model_path-}" # path to the converted MoE checkpoint, or to a dense one
save_path="${save_path-}" # folder to write
folder_name="${folder_name-}" # optional: name of the folder that is made in save_path; empty: save_path itself
gate_weights_file="${gate_weights_file-}" # optional: attention's router weights; empty: random

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
if [ -n "$save_path" ]; then save_path="$save_path${folder_name:+/$folder_name}"; fi
required top_k_attn model_path save_path
optional scale_factor_attn gate_weights_file
build_experts convert --style attention "$@"
