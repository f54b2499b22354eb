# SPDX-License-Identifier: Apache-2.0
"""A training job small enough for tests: a YAML as users have them, data, a tokenizer, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.overrides import apply_overrides

ROOT = Path(__file__).resolve().parents[2]
SEQ, VOCAB, ROWS, BATCH = 32, 400, 40, 4
STEPS = 2 * ROWS // BATCH  # two epochs

# The words of the r1.3 to r1.7 files: LlamaConfig with experts, MindFormers' own step, callbacks and dead keys.
YAML = f"""
seed: 7
output_dir: ./output
run_mode: train
use_parallel: False
load_checkpoint: ''
resume_training: False
auto_trans_ckpt: False
trainer: {{type: CausalLanguageModelingTrainer, model_name: mixtral-8x7b}}
runner_config: {{epochs: 2, batch_size: {BATCH}, sink_mode: True, sink_size: 1}}
context: {{mode: 0, device_target: CPU, max_call_depth: 10000, enable_graph_kernel: False}}
parallel: {{parallel_mode: 1, full_batch: True}}
parallel_config: {{data_parallel: 8, expert_parallel: 8, pipeline_stage: 2, micro_batch_num: 16, vocab_emb_dp: True}}
micro_batch_interleave_num: 1
moe_config: {{expert_num: 4, num_experts_chosen: 2, capacity_factor: 0.9, aux_loss_factor: 0.05,
  routing_policy: TopkRouterV2, enable_sdrop: True}}
model:
  model_config: {{type: LlamaConfig, batch_size: 1, seq_length: {SEQ}, hidden_size: 32, num_layers: 2, num_heads: 4,
    n_kv_heads: 2, vocab_size: {VOCAB}, intermediate_size: 64, rms_norm_eps: 1.0e-5, bos_token_id: 1, eos_token_id: 2,
    pad_token_id: 3, compute_dtype: float32, layernorm_compute_type: float32, softmax_compute_type: float32,
    rotary_dtype: float32, param_init_type: float32, use_past: False, max_decode_length: {SEQ}, do_sample: False,
    top_k: 1, top_p: 1, repetition_penalty: 1, extend_method: "None", use_flash_attention: True, offset: 0,
    checkpoint_name_or_path: ""}}
  arch: {{type: LlamaForCausalLM}}
processor:
  type: LlamaProcessor
  return_tensors: ms
  tokenizer: {{type: LlamaTokenizer, vocab_file: '', unk_token: <unk>, bos_token: <s>, eos_token: </s>,
    pad_token: <pad>}}
optimizer: {{type: AdamW, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}}
lr_schedule: {{type: CosineWithWarmUpLR, learning_rate: 1.0e-3, lr_end: 1.0e-5, warmup_ratio: 0.1, total_steps: -1}}
runner_wrapper:
  type: MFTrainOneStepCell
  use_clip_grad: True
  scale_sense: {{type: DynamicLossScaleUpdateCell, loss_scale_value: 65535, scale_factor: 2, scale_window: 4}}
callbacks:
  - {{type: MFLossMonitor}}
  - {{type: CheckpointMonitor, prefix: tiny, save_checkpoint_steps: 3, keep_checkpoint_max: 3, async_save: False}}
  - {{type: ObsMonitor}}
metric: {{type: PerplexityMetric}}
train_dataset: &train_dataset
  data_loader: {{type: MindDataset, dataset_dir: '', shuffle: True}}
  input_columns: ["input_ids"]
  num_parallel_workers: 1
  python_multiprocessing: False
  drop_remainder: True
  batch_size: {BATCH}
train_dataset_task: {{type: CausalLanguageModelDataset, dataset_config: *train_dataset}}
eval_dataset: &eval_dataset
  data_loader: {{type: MindDataset, dataset_dir: '', shuffle: False}}
  input_columns: ["input_ids"]
  num_parallel_workers: 1
  python_multiprocessing: False
  drop_remainder: False
eval_dataset_task: {{type: CausalLanguageModelDataset, dataset_config: *eval_dataset}}
eval_callbacks: [{{type: ObsMonitor}}]
auto_tune: False
filepath_prefix: './autotune'
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256
"""


def token_rows(width: int = SEQ + 1, rows: int = ROWS, low: int = 5, high: int = 190) -> np.ndarray:
    """Rows that a network can learn: each token is the one before plus 1 to 3."""
    steps = np.random.default_rng(0).integers(1, 4, (rows, width))
    return (np.cumsum(steps, axis=1) % (high - low) + low).astype(np.int32)


def write_rows(path: Path, rows: np.ndarray, **more: np.ndarray) -> Path:
    """A MindRecord file of ``rows`` and further columns."""
    from mindformers_ext.ms.mindrecord import write_mindrecord

    columns = {"input_ids": rows, **more}
    write_mindrecord(path, [{k: v[i] for k, v in columns.items()} for i in range(len(rows))], tuple(columns))
    return path


def make_job(folder: Path) -> Path:
    """Data, tokenizer and YAML in ``folder``; returns the YAML's path."""
    from mindformers_ext.data.tokenizers import train_sentencepiece

    data = write_rows(folder / "train.mindrecord", token_rows())
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "mindformers_ext" / "core").glob("*.py"))]
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        train_sentencepiece(sources, tokenizer, VOCAB)
    text = YAML.replace("dataset_dir: ''", f"dataset_dir: {data}").replace("vocab_file: ''", f"vocab_file: {tokenizer}")
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def config_of(path: Path, *options: str) -> dict:
    """The YAML's content with ``key=value`` options set."""
    return apply_overrides(load_yaml(path), [tuple(option.split("=", 1)) for option in options])


def command(config: Path, *arguments: object) -> list[str]:
    """The command line of ``run_mindformer.py``."""
    return [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(config), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Without what other runs may have left; MindSpore silent."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCAL_DEFAULT_PATH", "RUN_MODE", "MS_SIMULATION_LEVEL", "REGISTER_PATH")
    }
    return kept | {"GLOG_v": "3"}


def run_job(config: Path, *arguments: object, cwd: Path, timeout: int = 280) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    return subprocess.run(
        command(config, *arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def rows_of(output: Path) -> list[dict]:
    """The metrics of a run, as written."""
    text = (output / "metrics" / "rank_0.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
