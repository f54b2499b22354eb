#!/usr/bin/env bash
#SBATCH --job-name=convert_mixtral_residual_v2
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# A dense LLaMA becomes a residual MLP MoE of LLaMA-MoE v2 by the neurons of Gradient Split Plus
# (split/split_gradient_residual_v2.sh); the number of experts is that of the file.
#   bash scripts/expert_construction/convert/convert_mixtral_residual_v2.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

top_k="${top_k-1}" # number of activate experts in each MoE layer
scale_factor="${scale_factor-1.0}" # hyper-parameter for balancing the experts
num_moe_contract_layers="${num_moe_contract_layers-1}" # number of MoE Contract Layers: dense layers at each end
model_path="${model_path-}" # path to the LLaMA checkpoint
save_path="${save_path-}" # folder to write
gate_weights_file="${gate_weights_file-}" # router weights: gate_weights.pt of get_gates/hidden_clustering.sh
neuron_indices_file="${neuron_indices_file-}" # neurons: neuron_indices.pt of split/split_gradient_residual_v2.sh

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
required top_k scale_factor num_moe_contract_layers model_path save_path gate_weights_file neuron_indices_file
build_experts convert --style mixtral-residual "$@"
