# SPDX-License-Identifier: Apache-2.0
"""The commands of research/llama_moe_v2/README.md behind the conversion: run as written on a network that is small."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli import preprocess
from tests.cli.docs.test_readme import commands
from tests.helpers.chat import MARKS, VOCAB, chat_folder, small_talks
from tests.helpers.tiny_run import ROOT, environment, rows_of, run_job

README = ROOT / "research" / "llama_moe_v2" / "README.md"
SEQ = 127
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "dense_layers": "[0,3]",
    "num_layers": 4,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": VOCAB + len(MARKS),
    "seq_length": SEQ,
    "compute_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
ALONE = {
    "--use_parallel": "False",
    "--device_target": "CPU",
    "--engine": "pt",
    "--recompute_config.recompute": "False",
    "--runner_config.gradient_accumulation_steps": "1",
    "--runner_config.epochs": "8",
    "--lr_schedule.learning_rate": "1e-2",
    "--runner_config.batch_size": "4",
}


def finetuning() -> list[str]:
    return [line for line in commands(README.read_text("utf-8")) if "preprocess" in line or "run_mindformer" in line]


def inner(command: str) -> list[str]:
    """The words of run_mindformer.py inside a launcher's command."""
    found = re.search(r'"run_mindformer.py ([^"]*)"', command)
    assert found is not None
    return shlex.split(found[1])


def test_launchers_understand_the_commands(tmp_path: Path) -> None:
    for command in finetuning():
        if "launcher" not in command:
            continue
        settings = environment() | {"MSRUN_DRY_RUN": "1", "TORCHRUN_DRY_RUN": "1"}
        settings["PATH"] = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{settings['PATH']}"
        words = command.replace("scripts/", f"{ROOT}/scripts/")
        done = subprocess.run(
            ["bash", "-c", words], cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "run_mindformer.py" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_conversations_and_pairs_are_learnt_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tensors are tiny
    data = tmp_path / "data"
    chat_folder(data / "llama-3-8b-instruct")
    talks = [json.dumps(talk) for talk in small_talks()]
    (data / "openhermes2_5.jsonl").write_text("\n".join(talks) + "\n", encoding="utf-8")
    pairs = [{"prompt": f"is {n} even", "chosen": "yes, it is", "rejected": "I cannot say"} for n in range(32)]
    (data / "ultrafeedback.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    packing, _, sft, pairing, dpo = finetuning()
    for command in (packing, pairing):
        words = [word.replace("data/", f"{data}/", 1) for word in shlex.split(command)[2:]]
        words[words.index("--seq_length") + 1] = str(SEQ)
        assert preprocess.main(words) == 0
    found = []
    for command, load in ((sft, None), (dpo, tmp_path / "sft" / "checkpoint")):
        config, *words = inner(command)[1:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        options["--train_data"] = options["--train_data"].replace("data/", f"{data}/", 1)
        own = {"--output_dir": tmp_path / Path(config).name[:3], "--load_checkpoint": load or ""}
        sizes = [word for key, value in SIZES.items() for word in (f"--model.model_config.{key}", str(value))]
        options.pop("--auto_trans_ckpt", None)
        given = [str(word) for pair in (options | ALONE | own).items() for word in pair]
        done = run_job(ROOT / config, *given, *sizes, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found.append(rows_of(own["--output_dir"]))
    learnt, preferred = found
    assert learnt[-1]["lm_loss"] < 0.5 * learnt[0]["lm_loss"]
    assert preferred[0]["lm_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert preferred[-1]["accuracy"] == 1.0 and preferred[-1]["margin"] > 0.5
