#!/usr/bin/env bash
#SBATCH --job-name=pruning
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# SPDX-License-Identifier: Apache-2.0
# Sheared-LLaMA's first stage: a dense model is pruned to a smaller shape while it trains. Then: tools/prune.py cut.
#   path=Llama-2-7b-hf data_local=prepared bash scripts/pruning.sh  or, from the repository's folder, with sbatch
# How variables are given, and those that both stages have: shearing.bash.
set -euo pipefail

from_model="${from_model-7b}" # the source model: 7b (LLaMA-2) or 8b (LLaMA-3)
to_model="${to_model-1.3b}" # the target: of 7b 2.7b, 1.3b or 370m, of 8b 1.6b
config_file="${config_file-}" # a YAML; empty: research/sheared_llama's for these two
path="${path-}" # the source model: Hugging Face folder, MindSpore or Composer (.pt) checkpoint
device_train_microbatch_size="${device_train_microbatch_size-4}" # sequences of a GPU at a time
global_train_batch_size="${global_train_batch_size-32}" # sequences of a step
max_duration="${max_duration-3200ba}" # steps, or epochs: 1ep
save_interval="${save_interval-400ba}" # steps between checkpoints; the reference keeps the last one alone (3200ba)
t_warmup="${t_warmup-320ba}" # steps with rising learning rate, a tenth
eval_interval="${eval_interval-50ba}" # steps between measurements of the domains' losses
pruning_modules="${pruning_modules-[head,intermediate,layer,hidden]}" # what has masks
lag_lr="${lag_lr-1.0}" # optimizer.lag_lr: learning rate of masks and multipliers
lagr_warmup="${lagr_warmup-640ba}" # lagrangian_warmup_steps: steps over which the target rises, a fifth
eval_target_model="${eval_target_model-False}" # losses are of exactly the target's shape
target_d_model="${target_d_model-}" # empty: the YAML's, as the following
target_n_heads="${target_n_heads-}"
target_n_layers="${target_n_layers-}"
target_intermediate_size="${target_intermediate_size-}"
save_dir="${save_dir-output/llama2_${from_model}_pruning_to_${to_model}}" # folder of checkpoints, metrics and logs

# sbatch runs a copy of this file: the repository is where the job was submitted
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
. "$root/scripts/shearing.bash"
case $from_model in
    7b) source=llama2_7b ;;
    8b) source=llama3_8b ;;
    *) source=$from_model ;;
esac
config_file=${config_file:-$root/research/sheared_llama/prune_${source}_to_${to_model//./_}.yaml}
required path data_local # before anything else; train_mixture makes options of them
options=()
l0=model.model_config.l0_module
warmup=$(counted lagr_warmup)
required pruning_modules=$l0.pruning_modules lag_lr=$l0.lag_lr warmup=$l0.lagrangian_warmup_steps eval_target_model=$l0.eval_target_model
optional target_d_model=$l0.target_model.d_model target_n_heads=$l0.target_model.n_heads
optional target_n_layers=$l0.target_model.n_layers target_intermediate_size=$l0.target_model.intermediate_size
more=("${options[@]}")
train_mixture "$@"
