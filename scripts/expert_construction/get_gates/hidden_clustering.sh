#!/usr/bin/env bash
#SBATCH --job-name=hidden_clustering
#SBATCH --nodes=1
#SBATCH --ntasks=1
# SPDX-License-Identifier: Apache-2.0
# Router weights: centres of balanced clusters of what enters each layer's feed-forward part.
#   bash scripts/expert_construction/get_gates/hidden_clustering.sh  or, from the repository's folder, with sbatch
# A variable of the environment goes before what stands here. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

num_experts="${num_experts-7}" # number of experts in each MoE layer
balance_jitter_factor="${balance_jitter_factor-0.4}" # how much larger or smaller than the mean a cluster may be
distance_metric="${distance_metric-l2}" # l2 or cos
max_iter="${max_iter-100}" # passes of the clustering
random_state="${random_state-114514}" # of clusters and draws
n_jobs="${n_jobs-16}" # beginnings, of which the best is taken
model_path="${model_path-}" # path to the LLaMA checkpoint
dataset_dir_or_path="${dataset_dir_or_path-}" # conversations: a .json or .jsonl file
save_path="${save_path-}" # folder in which gate_weights.pt is made
model_max_length="${model_max_length-4096}" # tokens of a row
max_tokens="${max_tokens-}" # optional: tokens at most; empty: all
device_target="${device_target-CPU}" # CPU, GPU or Ascend
engine="${engine-pt}" # pt (PyTorch) or ms (MindSpore)

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)}
. "$root/scripts/expert_construction/stage.bash"
required num_experts balance_jitter_factor distance_metric max_iter random_state n_jobs model_path dataset_dir_or_path=conversations save_path \
    model_max_length=block_size device_target engine
optional max_tokens
build_experts gates --method clustering "$@"
