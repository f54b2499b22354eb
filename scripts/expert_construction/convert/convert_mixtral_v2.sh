#!/usr/bin/env bash
#SBATCH --job-name=convert_mixtral_v2
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# A dense LLaMA becomes a vanilla MLP MoE of LLaMA-MoE v2 (by neurons in their order, or by a file of indices).
#   bash scripts/expert_construction/convert/convert_mixtral_v2.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

num_experts="${num_experts-8}" # number of experts in each MoE layer
top_k="${top_k-2}" # number of activate experts in each MoE layer
scale_factor="${scale_factor-4.0}" # hyper-parameter for balancing the experts; empty: experts / top_k
num_moe_contract_layers="${num_moe_contract_layers-0}" # number of MoE Contract Layers: dense layers at each end
model_path="${model_path-}" # path to the LLaMA checkpoint
save_path="${save_path-}" # folder to write
gate_weights_file="${gate_weights_file-}" # optional: router weights of get_gates/; empty: random
neuron_indices_file="${neuron_indices_file-}" # optional: neurons of split/; empty: in their order

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
required num_experts top_k num_moe_contract_layers model_path save_path
optional scale_factor gate_weights_file neuron_indices_file
build_experts convert --style mixtral "$@"
