#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole job on any machine with two cores: text -> tiny Mixtral -> train -> predict -> back to Hugging Face -> compare.
# Every command is printed before it runs and can be copied. Results: output/quickstart/report.md. Safe to run again:
# .venv stays, and everything in the output folder is made anew.
#   bash scripts/quickstart.sh [--steps N] [--output DIR] [--max_bytes N] [--max_loss_ratio R]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/tiny/mixtral_pretrain.yaml
python=.venv/bin/python
steps=300            # training steps
output=output/quickstart
max_bytes=3000000    # text collected for the data set
max_loss_ratio=0.75  # mean loss of the last 20 steps over that of the first 20
prompt="This module"

usage() { sed -n '3,6s/^# \{0,1\}//p' scripts/quickstart.sh; }
fail() { echo "quickstart: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --steps | --output | --max_bytes | --max_loss_ratio)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown option '$1'; known are --steps, --output, --max_bytes, --max_loss_ratio" ;;
    esac
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || fail "--steps $steps is not a whole number above 0"

total=8 number=0
trap 'code=$?; [ $code = 0 ] || echo "quickstart: FAILED in step $number (exit $code), see the messages above" >&2' EXIT

title() {
    number=$((number + 1))
    printf '\n== %d/%d %s [%d s since the start]\n' $number $total "$*" $SECONDS
}

run() { # prints the command so that it can be copied, and runs it
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

kept() { # kept FILE COMMAND...: as run, and the output is also kept in FILE
    local file=$1
    shift
    printf '+'
    printf ' %q' "$@"
    printf ' | tee %q\n' "$file"
    "$@" | tee "$file"
}

if [ -e "$output" ] && [ ! -e "$output/.quickstart" ] && [ -n "$(ls -A "$output")" ]; then
    fail "$output exists and was not made by this script: choose another --output"
fi

title "environment (.venv; seconds when it is there already)"
run bash scripts/setup_env.sh
run rm -rf "$output"
mkdir -p "$output"
touch "$output/.quickstart"  # what the next run may remove
export GLOG_v=3 HF_HUB_OFFLINE=1  # MindSpore: errors only; transformers: nothing is downloaded

title "data: text of Python's standard library, a tokenizer trained on it, MindRecord files"
run $python tools/make_tiny_corpus.py --config $config --output_dir "$output/data" --max_bytes "$max_bytes"
for split in train eval; do  # rows of seq_length + 1 tokens for both: evaluation takes them too, and predicts one more
    run $python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type jsonl --config $config \
        --input_glob "$output/data/$split.jsonl" --model_file "$output/data/tokenizer.model" \
        --output_file "$output/data/$split.mindrecord"
done
run $python tools/show_record.py "$output/data/train.mindrecord" --model_file "$output/data/tokenizer.model" --n 1
batch=$(awk '$1 == "batch_size:" {print $2; exit}' $config)
rows=$($python -c 'import json, sys; print(json.load(open(sys.argv[1]))["records"])' \
    "$output/data/train.mindrecord.summary.json")
[ $((steps * batch)) -le "$rows" ] || fail "the data has $rows rows: give at most --steps $((rows / batch)), or more --max_bytes"

title "a tiny Hugging Face Mixtral with random weights, of the sizes in $config"
run $python tools/make_tiny_model.py --config $config --tokenizer "$output/data/tokenizer.model" --output_dir "$output/hf_start"

title "Hugging Face -> MindSpore"
run $python convert_weight.py --model mixtral --input_path "$output/hf_start" --output_path "$output/start.ckpt" --dtype fp32

title "train for $steps steps, from the converted weights"
run $python run_mindformer.py --config $config --load_checkpoint "$output/start.ckpt" \
    --train_data "$output/data/train.mindrecord" --num_samples $((steps * batch)) --output_dir "$output" \
    --callbacks.0.per_print_times 10
trained=$(ls -t "$output"/checkpoint/rank_0/*.ckpt | head -n 1)

title "predict"
run $python run_mindformer.py --config $config --run_mode predict --load_checkpoint "$trained" \
    --predict_data "$prompt" --processor.tokenizer.vocab_file "$output/data/tokenizer.model" \
    --model.model_config.repetition_penalty 1.3 --output_dir "$output"

title "MindSpore -> Hugging Face, and compare every logit"
run $python convert_weight.py --model mixtral --reversed --input_path "$trained" --config "$output/hf_start" \
    --output_path "$output/hf_trained" --dtype fp32
kept "$output/parity.txt" $python tools/check_parity.py --hf "$output/hf_trained" --ckpt "$trained" \
    --text "$prompt" --text "The file is opened for reading, and its name is returned as a string."

title "pictures and report"
run $python tools/plot_run.py "$output"
run $python tools/report_run.py "$output" --parity "$output/parity.txt" --sample "$output/text_generation_result.txt" \
    --max_loss_ratio "$max_loss_ratio"

printf '\nDone in %d s: %s/report.md, loss.png, expert_load.png\n' $SECONDS "$output"
tail -n 1 "$output/parity.txt"
