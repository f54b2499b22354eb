# SPDX-License-Identifier: Apache-2.0
# Read by pruning.sh and continue_pretraining.sh, which set "root" and their variables, in LLM-Shearing's words. Here are
# those of both. A variable of the environment goes before what stands in a file. PYTHON=/path/to/python chooses the
# interpreter. Words behind a script's name are options of run_mindformer.py. "ba" are batches, which are steps.
. "$root/scripts/options.bash"

data_local="${data_local-}" # folder that llama_preprocess.py --dataset_type domains has prepared
max_seq_len="${max_seq_len-4096}" # tokens; rows of the data hold one more
lr="${lr-1e-4}" # optimizer.lr: learning rate at its top
dynamic="${dynamic-True}" # False: the domains' proportions stay
set_names="${set_names-}" # domains, as [cc,github,book]; empty: the YAML's, of a pruning RedPajama's seven
proportion="${proportion-}" # at the start, as [0.7,0.2,0.1]; empty: the YAML's
update_type="${update_type-doremi}" # doremi or constant, or another rule of the README
target_loss="${target_loss-}" # of each domain, as [1.9,0.7,2.1]; empty: the YAML's, predicted for the target's size
autoresume="${autoresume-False}" # True: go on with the run in save_dir
gpus="${gpus-8}" # of this machine; to train on, the reference had 16 on two
nodes="${nodes-1}" master="${master-127.0.0.1}" port="${port-8118}" node_rank="${node_rank-${SLURM_NODEID-0}}" # of several
device_target="${device_target-GPU}" # GPU, or CPU to try it
engine="${engine-pt}"
log_dir="${log_dir-output/torchrun_log}"

# counted NAME: the number in "3200ba" (batches, which are steps), or in a plain "3200"
counted() {
    local value=${!1%ba}
    case $value in
        '' | *[!0-9]* | ??????????*) refuse "$1=${!1} is no number of steps: write 3200ba" ;;
    esac
    echo "$((10#$value))"
}

# train_mixture WORD...: train by $config_file with all that the variables say; the words go behind
train_mixture() {
    local steps rows together value
    for value in gpus nodes device_train_microbatch_size global_train_batch_size; do
        case ${!value} in
            '' | 0* | *[!0-9]* | ?????????*) refuse "$value=${!value} is no number above 0: write 1 to 99999999" ;;
        esac
    done
    rows=$((device_train_microbatch_size * gpus * nodes))
    if [ $((global_train_batch_size % rows)) -ne 0 ]; then
        refuse "global_train_batch_size=$global_train_batch_size is no multiple of $rows, the rows of $((gpus * nodes)) processes of device_train_microbatch_size=$device_train_microbatch_size"
    fi
    together=$((global_train_batch_size / rows))
    [ -f "$config_file" ] || refuse "config_file=$config_file is no file: choose from_model and to_model of research/sheared_llama, or give a YAML"
    options=(--config "$config_file")
    optional path=load_checkpoint data_local=train_data save_dir=output_dir autoresume=resume_training device_target engine
    required max_seq_len=model.model_config.seq_length device_train_microbatch_size=batch_size lr=lr_schedule.learning_rate
    options+=(--gradient_accumulation_steps "$together" --parallel_config.data_parallel "$((gpus * nodes))")
    if [ $((gpus * nodes)) -gt 1 ]; then options+=(--use_parallel True); else options+=(--use_parallel False); fi
    case $max_duration in
        *ep) options+=(--epochs "${max_duration%ep}" --train_dataset.data_loader.num_samples null) ;;
        *)
            steps=$(counted max_duration)
            options+=(--epochs 1 --train_dataset.data_loader.num_samples "$((steps * global_train_batch_size))")
            ;;
    esac
    value=$(counted save_interval)
    options+=(--callbacks.1.save_checkpoint_steps "$value")
    value=$(counted t_warmup)
    options+=(--lr_schedule.warmup_steps "$value")
    value=$(counted eval_interval)
    options+=(--train_dataset.data_loader.eval_interval "$value")
    case $dynamic in
        [Tt]rue) optional update_type=train_dataset.data_loader.update_type target_loss=train_dataset.data_loader.target_loss ;;
        [Ff]alse) options+=(--train_dataset.data_loader.update_type constant) ;;
        *) refuse "dynamic=$dynamic is neither True nor False" ;;
    esac
    optional set_names=train_dataset.data_loader.set_names proportion=train_dataset.data_loader.proportion
    exec bash "$root/scripts/torchrun_launcher.sh" "$(printf '%q ' run_mindformer.py "${options[@]}" "${more[@]}" "$@")" \
        "$((gpus * nodes))" "$gpus" "$master" "$port" "$node_rank" "$log_dir" True 300
}
