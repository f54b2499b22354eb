# SPDX-License-Identifier: Apache-2.0
"""``python run_mindformer.py``: train, finetune, evaluate and predict through MindFormers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ext.cli.command import Command
from mindformers_ext.cli.outcome import interruptible
from mindformers_ext.cli.run_flags import add_flags, apply_flags, read_arguments
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.inputs import find_inputs
from mindformers_ext.core.config.run import MINDSPORE, Runner, RunSpec, run_spec_from_yaml
from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.run.checks import CheckedRun

EXAMPLES = """\
examples:
  train a tiny Mixtral on a CPU:
    python run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml --train_data data/train.mindrecord
  continue it after a stop, from the newest whole checkpoint:
    python run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml --train_data data/train.mindrecord \\
        --resume_training True
  measure its perplexity:
    python run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml --run_mode eval \\
        --eval_data data/eval.mindrecord --load_checkpoint output/checkpoint
  on a text, with windows that overlap by half, and transformers' on the same tokens:
    python run_mindformer.py --config YAML --run_mode eval --eval_data notes.txt --eval_stride 64 \\
        --load_checkpoint HF_FOLDER --hf HF_FOLDER
  generate:
    python run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml --run_mode predict \\
        --load_checkpoint output/checkpoint --predict_data "Return a new" "The file"
  the prompts of a text file, eight at a time, sampled; the weights may be a Hugging Face folder:
    python run_mindformer.py --config YAML --run_mode predict --load_checkpoint HF_FOLDER \\
        --predict_data prompts.txt --predict_batch_size 8 --do_sample True --top_p 0.9 --max_new_tokens 100
  change any key of the file:
    ... --model.model_config.num_layers 8 --optimizer.betas "[0.9, 0.95]" --callbacks.1.save_checkpoint_steps 50

A key that does not exist is an error that names the nearest one. Exit code: 0 done, 2 a mistake in the input.
"""
ROOT = Path(__file__).resolve().parents[2]


def _options(target: argparse.ArgumentParser) -> None:
    """The command's options."""
    target.add_argument("--config", required=True, metavar="YAML", help="configuration file")
    add_flags(target)


def _run(arguments: argparse.Namespace) -> int:
    path, config = load_config(arguments.config)
    return carry_out(apply_flags(config, arguments), str(path), arguments)


def carry_out(config: Mapping[str, Any], where: str, arguments: argparse.Namespace) -> int:
    """Check ``config`` (from ``where``), to which the options are applied, and run it; returns the exit code."""
    with _alone(run_spec_from_yaml(config, where)):
        return _carry_out(config, where, arguments)


@contextmanager
def _alone(run: RunSpec) -> Iterator[None]:
    """What a run holds while it lasts: a training its folder, and Ctrl-C of a lone MindSpore process.

    Started with others, a process dies at once: the launcher ends them all.
    """
    from mindformers_ext.jobs.run.checks import launched
    from mindformers_ext.jobs.run.lock import is_first_rank, training_lock

    with ExitStack() as held:
        if run.trains and is_first_rank():
            held.enter_context(training_lock(Path(run.output_dir)))
        if run.trains and run.engine == MINDSPORE and not launched():
            held.enter_context(interruptible())
        yield


def _carry_out(config: Mapping[str, Any], where: str, arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.run.checks import check_run

    checked = check_run(config, where)
    _check_options(arguments, checked.run.runner)
    if checked.run.trains:
        from mindformers_ext.cli.training import training

        with training(checked.run, checked.notes, arguments.verbose):
            return RUNNERS[checked.run.runner](checked, arguments)
    for line in checked.notes:
        print(f"note: {line}", file=sys.stderr)
    if checked.run.runner in (Runner.OWN_EVALUATION, Runner.OWN_PREDICTION):
        from mindformers_ext.jobs.run.display import compilations

        with compilations(sys.stderr):
            return RUNNERS[checked.run.runner](checked, arguments)
    return RUNNERS[checked.run.runner](checked, arguments)


def _check_options(arguments: argparse.Namespace, runner: Runner) -> None:
    """Options that one runner alone obeys."""
    if runner is not Runner.OWN_EVALUATION and (arguments.hf or arguments.eval_stride is not None):
        raise UserError(
            "--hf and --eval_stride belong to --run_mode eval of our networks on one device: leave them out"
        )
    if runner is not Runner.OWN_PREDICTION and arguments.chat:
        raise UserError("--chat belongs to --run_mode predict of our networks: leave it out")


def _evaluate(checked: CheckedRun, arguments: argparse.Namespace) -> int:
    from mindformers_ext.cli.evaluate import evaluate

    return evaluate(checked.run, checked.build.network, arguments.eval_stride, arguments.hf)


def _predict(checked: CheckedRun, arguments: argparse.Namespace) -> int:
    from mindformers_ext.cli.predict import predict

    return predict(checked.run, checked.build.network, bool(arguments.chat))


def _own_loop(checked: CheckedRun, _: argparse.Namespace) -> int:
    from mindformers_ext.jobs.train.train import train

    train(checked.run, checked.config, checked.build.network, checked.notes)
    return 0


def _mindformers(checked: CheckedRun, _: argparse.Namespace) -> int:
    _prepare(checked.run)
    from mindformers_ext.jobs.run.display import current

    current().begin("importing MindFormers")
    from mindformers_ext.mf.run import run

    current().done()
    run(checked.config, checked)
    return 0


RUNNERS: dict[Runner, Callable[[CheckedRun, argparse.Namespace], int]] = {
    Runner.OWN_EVALUATION: _evaluate,
    Runner.OWN_PREDICTION: _predict,
    Runner.OWN_LOOP: _own_loop,
    Runner.MINDFORMERS: _mindformers,
}


def load_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The YAML called ``name`` and its content. A relative path counts from here, then from the repository, as
    MindFormers' own script has it; so do the files that a YAML of the repository names."""
    path = Path(name)
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        path = ROOT / path
    config = load_yaml(path)
    if path.resolve().is_relative_to(ROOT):
        find_inputs(config, ROOT)
    return path, config


def _prepare(run: RunSpec) -> None:
    """What must be set before MindFormers is imported: where its log goes, and where the user's classes are."""
    os.environ.setdefault("LOCAL_DEFAULT_PATH", run.output_dir)
    if run.register_path:
        if not Path(run.register_path).is_dir():
            raise UserError(
                f"--register_path {run.register_path} is not a folder: give the folder that holds your module"
            )
        os.environ["REGISTER_PATH"] = run.register_path
        sys.path.append(run.register_path)


COMMAND = Command(
    prog="run_mindformer.py",
    usage="run_mindformer.py --config YAML [options] [--section.key VALUE ...]",
    description="Train, finetune, evaluate or predict with a MindFormers YAML, on Ascend, GPU or CPU.",
    epilog=EXAMPLES,
    options=_options,
    read=read_arguments,
    run=_run,
    unwinds=False,
)
parser, main = COMMAND.parser, COMMAND.main
