# SPDX-License-Identifier: Apache-2.0
"""The README's commands: the same in both languages, and each one run, here or by the test named for it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

PRUNE = "tests/pt/test_prune_run.py, with its own rows and few steps"
ONE_SHOT = "tests/pt/test_one_shot.py, on tiny models"
FINETUNE = "tests/cli/run/test_finetune.py, with its own records and tokenizer"

# Commands that another test, or the suite itself, runs.
RUN_ELSEWHERE = {
    "bash scripts/setup_env.sh": "scripts/test.sh, before the suite",
    "source .venv/bin/activate": "every command of this test has the environment's PATH",
    "bash scripts/quickstart.sh": "tests/cli/conftest.py, shortened",
    "bash scripts/test.sh": "the suite",
    "python tools/bench/moe_layer.py": "tests/cli/docs/test_bench.py, with fewer rounds",
    "python tools/bench/train_step.py": "tests/cli/docs/test_bench.py, with fewer rounds",
    "python tools/bench/compile_time.py": "tests/cli/docs/test_bench.py, with fewer layers",
    "python tools/bench/convert.py": "tests/cli/docs/test_bench.py, with a narrow layer",
    "python tools/bench/reshard.py": "tests/cli/docs/test_bench.py, with narrow layers",
    "python tools/bench/merge.py": "tests/cli/merge/test_merge_train.py, with narrow models",
    "python tools/merge.py yaml configs/merge/slerp_llama3.yaml merged --copy-tokenizer --allow-crimes "
    "--out-shard-size 1B --lazy-unpickle --trust-remote-code": "tests/cli/merge/test_merge.py, on tiny models",
    "python tools/bench/preprocess.py --model_file "
    "output/quickstart/data/tokenizer.model": "tests/cli/docs/test_bench.py, with little text",
    "python tools/dataset_preprocess/llama/alpaca_converter.py --data_path alpaca_data.json "
    "--output_path output/finetune/alpaca.json": FINETUNE,
    "python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type qa "
    "--config configs/tiny/finetune_mixtral.yaml --input_glob output/finetune/alpaca.json "
    "--model_file tokenizer.model --output_file output/finetune/alpaca.mindrecord": FINETUNE,
    "python run_mindformer.py --config configs/tiny/finetune_mixtral.yaml": FINETUNE,
    "python tools/bench/mixture.py": "tests/cli/docs/test_bench.py, with few rows",
    "python tools/dataset_preprocess/llama/llama_preprocess.py --dataset_type qa --pack_strategy pack "
    "--config configs/tiny/finetune_mixtral.yaml --input_glob output/finetune/alpaca.json "
    "--model_file tokenizer.model --output_file output/finetune/packed.mindrecord": FINETUNE,
    "python run_mindformer.py --config configs/tiny/finetune_mixtral.yaml --train_data "
    'output/finetune/packed.mindrecord --train_dataset.input_columns "[input_ids,labels,document_ids]"': FINETUNE,
    "python run_mindformer.py --config configs/tiny/llama_prune.yaml": PRUNE,
    "python tools/prune.py cut output/llama_prune --output output/llama_pruned --next_yaml "
    "output/llama_continue.yaml": PRUNE,
    "python tools/prune.py report output/llama_pruned": PRUNE,
    "python tools/build_experts.py upcycle output/try/llama_a output/try/upcycled --method drop --experts 4 "
    "--drop_ratio 0.5": "tests/cli/experts/test_upcycle.py, on a tiny model",
    "python convert_weight.py --model llama --format composer --input_path output/llama_pruned --output_path "
    "output/state_dict.pt": PRUNE,
    "python tools/prune.py shape output/try/llama_a output/try/narrow --method minitron --fewer_parameters 0.1 "
    "--refit least_squares --calibration README.md CHANGELOG.md --tokens 4096 --held_out_tokens 2048 "
    "--block_size 128": ONE_SHOT,
    "python tools/prune.py depth output/try/llama_a output/try/shallow --method bi --keep 1 --calibration README.md "
    "CHANGELOG.md --tokens 4096 --held_out_tokens 2048 --block_size 128": ONE_SHOT,
    'bash scripts/msrun_launcher.sh "run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml --use_parallel True '
    "--parallel.parallel_mode 0 --batch_size 8 --train_data output/quickstart/data/train.mindrecord --num_samples 160 "
    '--output_dir output/pair" 2 8118 output/msrun_log True 300': "tests/mf/test_distributed.py, with fewer steps",
    "python tools/bench/generate.py": "tests/cli/docs/test_bench.py, with a small model",
    "python tools/bench/cluster.py": "tests/cli/docs/test_bench.py, with few rows",
    "python tools/bench/gpu.py": "tests/cli/run/test_engine_pt.py, with toy shapes",
    'bash scripts/torchrun_launcher.sh "run_mindformer.py --config YAML --device_target GPU --use_parallel '
    'True" 8': "tests/cli/run/test_engine_pt.py, two processes on a CPU",
    "python tools/dryrun.py --config research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml "
    "--worker_num 16": "tests/cli/dryrun/test_dryrun.py, with narrow layers",
    "python tools/transform_ckpt.py --src_ckpt_strategy output/strategy/ --src_ckpt_dir output/checkpoint/ "
    "--dst_ckpt_dir target_checkpoint/ --prefix mixtral_": "tests/cli/checkpoint, with the seed's paths",
}


def commands(text: str) -> list[str]:
    """The commands of all bash blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def test_both_languages_give_the_same_commands(repo_root: Path) -> None:
    english, chinese = (commands((repo_root / name).read_text("utf-8")) for name in ("README.md", "README_CN.md"))
    assert english == chinese
    assert set(RUN_ELSEWHERE) <= set(english), "a command left the README: take it out of this table"


def test_every_named_file_exists(repo_root: Path) -> None:
    for command in commands((repo_root / "README.md").read_text("utf-8")):
        for word in shlex.split(command):
            if re.fullmatch(r"(scripts|tools|configs)/\S+|\w+\.py", word):
                assert (repo_root / word).is_file(), f"{word} in: {command}"


@pytest.mark.slow
def test_the_commands_run_in_their_order(repo_root: Path, tmp_path: Path, quickstart: tuple[Path, str]) -> None:
    """In a folder whose ``output`` holds a short quickstart's: the README's commands as written."""
    for name in os.listdir(repo_root):
        if name not in ("output", ".git"):
            (tmp_path / name).symlink_to(repo_root / name)
    environment = dict(os.environ, PATH=f"{repo_root / '.venv' / 'bin'}:{os.environ['PATH']}", GLOG_v="3")

    def run(command: str) -> None:
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"

    shutil.copytree(quickstart[0], tmp_path / "output" / "quickstart")
    for command in commands((repo_root / "README.md").read_text("utf-8")):
        if command not in RUN_ELSEWHERE:
            run(command)
    assert (tmp_path / "output/try/loss.png").stat().st_size > 20_000
