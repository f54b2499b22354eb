#!/usr/bin/env bash
#SBATCH --job-name=split_gradient_get_grads_v2
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# Importance of each neuron on the tokens of each cluster. What comes out are scores, not indices:
# split_gradient_residual_v2.sh or split_gradient_v2.sh makes those of them.
#   bash scripts/expert_construction/split/split_gradient_get_grads_v2.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

gate_weights_file="${gate_weights_file-}" # router weights: gate_weights.pt of get_gates/hidden_clustering.sh
model_path="${model_path-}" # path to the LLaMA checkpoint
dataset_dir_or_path="${dataset_dir_or_path-}" # conversations: a .json or .jsonl file
save_path="${save_path-}" # folder in which importance_scores.pt is made
model_max_length="${model_max_length-4096}" # tokens of a row
max_tokens="${max_tokens-}" # optional: tokens at most; empty: all
device_target="${device_target-CPU}" # CPU, GPU or Ascend
engine="${engine-pt}" # pt (PyTorch) or ms (MindSpore)

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
required gate_weights_file model_path dataset_dir_or_path=conversations save_path model_max_length=block_size device_target engine
optional max_tokens
build_experts grads "$@"
