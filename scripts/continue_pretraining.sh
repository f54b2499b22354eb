#!/usr/bin/env bash
#SBATCH --job-name=continue_pretraining
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# SPDX-License-Identifier: Apache-2.0
# Sheared-LLaMA's second stage: the pruned model is trained on, without masks.
#   config_file=continue.yaml data_local=prepared bash scripts/continue_pretraining.sh  or, from the repository's folder, with sbatch
# continue.yaml is what tools/prune.py cut --next_yaml has written: it knows sizes, weights and the last proportions.
# How variables are given, and those that both stages have: shearing.bash.
set -euo pipefail

to_model="${to_model-1.3b}" # without config_file: 2.7b, 1.3b or 370m
config_file="${config_file-}" # a YAML; empty: research/sheared_llama's for this size
path="${path-}" # the pruned model: Hugging Face folder, MindSpore or Composer (.pt) checkpoint; empty: the YAML's
device_train_microbatch_size="${device_train_microbatch_size-16}" # sequences of a GPU at a time
global_train_batch_size="${global_train_batch_size-256}" # sequences of a step
max_duration="${max_duration-48000ba}" # steps, or epochs: 1ep
save_interval="${save_interval-3200ba}" # steps between checkpoints
t_warmup="${t_warmup-1440ba}" # steps with rising learning rate, 3 %
eval_interval="${eval_interval-400ba}" # steps between measurements of the domains' losses
save_dir="${save_dir-output/${to_model}_continue_pretraining}" # folder of checkpoints, metrics and logs

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
. "$root/scripts/shearing.bash"
if [ -z "$config_file" ]; then required path; fi
required data_local
config_file=${config_file:-$root/research/sheared_llama/continue_${to_model//./_}.yaml}
more=(--train_dataset.data_loader.split for_ft)
train_mixture "$@"
