# SPDX-License-Identifier: Apache-2.0
"""The options of run_mindformer.py: what each sets, and what is refused."""

import pytest

from mindformers_ext.cli.run_flags import FLAGS, apply_flags, read_arguments
from mindformers_ext.cli.run_mindformer import parser
from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.errors import UserError
from tests.helpers.tiny_run import YAML

# The flags of MindFormers r1.3.0, r1.5.0 and r1.7.0.
MINDFORMERS = """adapter_id auto_trans_ckpt batch_size config device_id device_target do_eval do_sample epochs
eval_dataset_dir gradient_accumulation_steps load_checkpoint modal_type mode num_samples only_save_strategy options
output_dir predict_batch_size predict_data profile register_path remote_save_url resume_training run_mode seed sink_mode
src_strategy_path_or_dir strategy_load_checkpoint train_dataset_dir transform_process_num trust_remote_code
use_parallel""".split()


def read(*argv):
    return apply_flags(parse_yaml(YAML, "test"), read_arguments(parser(), ["--config", "x.yaml", *argv]))


def at(config, path):
    for step in path.split("."):
        config = config[step]
    return config


def test_every_flag_of_mindformers_is_known():
    known = {name.removeprefix("--") for flag in FLAGS for name in flag.names} | {"config", "options"}
    assert set(MINDFORMERS) <= known


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--train_data", "a"], "train_dataset.data_loader.dataset_dir", "a"),
        (["--train_data", "a"], "train_dataset_task.dataset_config.data_loader.dataset_dir", "a"),
        (["--train_dataset_dir", "a"], "train_dataset.data_loader.dataset_dir", "a"),
        (["--eval_data", "b"], "eval_dataset.data_loader.dataset_dir", "b"),
        (["--use_parallel", "false"], "use_parallel", False),
        (["--use_parallel", "TRUE"], "use_parallel", True),
        (["--resume_training", "True"], "resume_training", True),
        (["--resume_training", "x-1_2.ckpt"], "resume_training", "x-1_2.ckpt"),
        (["--predict_data", r"a\nb"], "input_data", "a\nb"),
        (["--predict_data", "a", "b"], "input_data", ["a", "b"]),
        (["--device_target", "Ascend"], "context.device_target", "Ascend"),
        (["--mode", "1"], "context.mode", 1),
        (["--num_samples", "8"], "eval_dataset.data_loader.num_samples", 8),
        (["--epochs", "3", "--runner_config.epochs", "4"], "runner_config.epochs", 4),
        (["--options", "optimizer.eps=1e-6", "do_eval=True"], "optimizer.eps", 1e-6),
        (["--options", "do_eval=True"], "do_eval", True),
        (["--moe_config.capacity_factor=2"], "moe_config.capacity_factor", 2),
        (["--load_checkpoint", "123"], "load_checkpoint", "123"),
    ],
)
def test_a_flag_sets_its_key(argv, path, value):
    assert at(read(*argv), path) == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], "did you mean '--epochs'"),
        (["--moe_config.expert_nun", "3"], "did you mean 'expert_num'"),
        (["--moe_config.expert_num"], "has no value"),
        (["--options", "seed"], "has no value"),
        (["--modal_type", "image"], "text only"),
        (["stray"], "belongs to no option"),
    ],
)
def test_a_mistake_is_named(argv, words):
    with pytest.raises(UserError, match=words):
        read(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_parallel", "maybe"],
        ["--run_mode", "test"],
        ["--device_target", "TPU"],
        ["--train_data", "a", "--train_dataset_dir", "b"],
    ],
)
def test_a_wrong_value_ends_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2 and argv[0] in capsys.readouterr().err


def test_one_option_under_two_names_with_one_value_is_fine():
    assert at(read("--train_data", "a", "--train_dataset_dir", "a"), "train_dataset.data_loader.dataset_dir") == "a"
