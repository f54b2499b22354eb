# SPDX-License-Identifier: Apache-2.0
"""The options of ``merge``, with the names and meanings that mergekit's users know; what means nothing here says so."""

from __future__ import annotations

import argparse

from mindformers_ext.core.errors import Problems, UserError

DEFAULT_SHARD = "5B"
# Options that change nothing here, and why; they are accepted so that old command lines go on working.
NO_EFFECT = {
    "lazy_unpickle": "weights are always read lazily, and .bin files never run code",
    "trust_remote_code": "no code of a model is ever run",
    "low_cpu_memory": "memory stays at a few chunks of rows anyway",
    "read_to_gpu": "chunks go to the device one by one",
    "multi_gpu": "one device is used",
    "clone_tensors": "every tensor is written on its own",
    "async_write": "the system writes in the background",
}


def switch(target: argparse.ArgumentParser, name: str, default: bool, text: str) -> None:
    """A flag with a ``--no-`` form."""
    names = [name] if "_" in name or "-" not in name[2:] else [name, "--" + name[2:].replace("-", "_")]
    target.add_argument(*names, action=argparse.BooleanOptionalAction, default=default, help=text)


def common() -> argparse.ArgumentParser:
    """What both commands know."""
    result = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    result.add_argument("config", metavar="CONFIG", help="YAML file")
    result.add_argument("out", metavar="OUT", help="folder to write")
    switch(result, "--copy-tokenizer", True, "copy the tokenizer's files of the base model")
    switch(
        result, "--allow-crimes", False, "allow models of different classes whose tensors have equal names and shapes"
    )
    result.add_argument(
        "--out-shard-size",
        default=DEFAULT_SHARD,
        metavar="SIZE",
        help="bytes of one shard: 5B and 5GB are 5e9, also K, M, MiB, GiB (default 5B)",
    )
    switch(result, "--unsafe-truncate-embeddings", False, "cut vocabularies of different length to the shortest")
    switch(result, "--strict", False, "refuse meaningless parameters and NaN instead of warning")
    switch(result, "--allow-overflow", False, "write what is too large for its type as infinite, and count it")
    switch(result, "--overwrite", False, "replace an existing output folder")
    switch(result, "--download", False, "fetch models named OWNER/NAME from the hub where they were not downloaded yet")
    switch(result, "--dry-run", False, "check everything and print the plan, write nothing")
    switch(result, "--write-model-card", True, "write README.md and a copy of the configuration")
    result.add_argument("--to-mindspore", metavar="OUT.ckpt", help="also convert the result to a MindSpore checkpoint")
    result.add_argument(
        "--report",
        metavar="FOLDER",
        help="also compare the models: cosines per tensor and layer, as "
        "a table and a picture; with --dry-run nothing else is written",
    )
    result.add_argument(
        "--random-seed", type=int, default=0, metavar="N", help="seed of random masks and gates (default 0)"
    )
    result.add_argument(
        "--lora-merge-dtype",
        metavar="TYPE",
        help="type of the tensors that an adapter (MODEL+ADAPTER in the YAML) touches (default: the model's)",
    )
    result.add_argument("--device", default=None, help="where the arithmetic runs: cpu (default) or cuda")
    switch(result, "--cuda", False, "the same as --device cuda")
    result.add_argument("--gpu-rich", action="store_true", help="the same as --device cuda")
    result.add_argument("-j", "--num-threads", type=int, default=None, metavar="N", help="threads of the arithmetic")
    switch(result, "--quiet", False, "no progress bar and no notes")
    result.add_argument("-v", "--verbose", action="count", default=0, help="print every tensor of the plan")
    _ignored(result)
    return result


def _ignored(result: argparse.ArgumentParser) -> None:
    for name, why in NO_EFFECT.items():
        switch(result, "--" + name.replace("_", "-"), False, f"accepted without effect: {why}")
    switch(result, "--safe-serialization", True, "always on; --no-safe-serialization is refused")
    result.add_argument(
        "--lora-merge-cache", metavar="DIR", help="accepted without effect: adapters are merged as read"
    )
    result.add_argument("--transformers-cache", metavar="DIR", help="accepted without effect: set HF_HOME instead")
    result.add_argument("--write-threads", type=int, metavar="N", help="accepted without effect")


def adapted_dtype(arguments: argparse.Namespace) -> str | None:
    """The type named by --lora-merge-dtype; an unknown one is a ``UserError``."""
    from mindformers_ext.jobs.merge.config import read_dtype

    problems = Problems("the options")
    found = read_dtype(arguments.lora_merge_dtype, "--lora-merge-dtype", problems)
    problems.raise_if_any()
    return found


def device_of(arguments: argparse.Namespace) -> str:
    """The device asked for; two different ones are a ``UserError``."""
    by_flag = "cuda" if arguments.cuda or arguments.gpu_rich else None
    if by_flag and arguments.device and arguments.device.split(":")[0] != "cuda":
        raise UserError(f"--cuda and --device {arguments.device} contradict each other: keep one")
    return str(arguments.device or by_flag or "cpu")


def check_flags(arguments: argparse.Namespace) -> list[str]:
    """Refuse what cannot be had; returns a note for each flag given without effect."""
    if not arguments.safe_serialization:
        raise UserError("--no-safe-serialization would write pickled .bin files: only safetensors are written")
    if arguments.num_threads is not None and arguments.num_threads < 1:
        raise UserError(f"--num-threads {arguments.num_threads}: give a whole number above 0")
    if arguments.write_threads is not None and arguments.write_threads < 1:
        raise UserError(f"--write-threads {arguments.write_threads}: give a whole number above 0")
    if not 0 <= arguments.random_seed < 2**63:
        raise UserError(f"--random-seed {arguments.random_seed}: give a whole number from 0 on")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(arguments, name, False):
            raise UserError(
                f"--{name.replace('_', '-')} is not available on CPU and NPU: leave it out, hidden "
                "states are computed layer by layer in bounded memory"
            )
    given = [name for name in NO_EFFECT if getattr(arguments, name)]
    return [
        f"--{name.replace('_', '-')} has no effect: {NO_EFFECT[name]}"
        for name in given
        if name not in ("lazy_unpickle", "trust_remote_code")
    ]
