#!/usr/bin/env bash
#SBATCH --job-name=split_gradient_residual_v2
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# Scores to neuron indices of a residual MLP MoE (Gradient Split Plus).
#   bash scripts/expert_construction/split/split_gradient_residual_v2.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

num_experts_moe="${num_experts_moe-7}" # routed experts, one for each cluster of the scores
num_experts_residual="${num_experts_residual-1}" # experts that every token passes
criterion="${criterion-max}" # max or min
share_neurons="${share_neurons-False}" # whether experts may hold the same neurons
expert_size="${expert_size-}" # optional: neurons of an expert; empty: all shared out
model_path="${model_path-}" # path to the LLaMA checkpoint
score_file="${score_file-}" # scores: importance_scores.pt of split_gradient_get_grads_v2.sh
save_path="${save_path-}" # folder in which neuron_indices.pt is made

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
required num_experts_moe=num_experts num_experts_residual criterion share_neurons model_path score_file=score_file_path save_path
optional expert_size
build_experts split --method gradient "$@"
