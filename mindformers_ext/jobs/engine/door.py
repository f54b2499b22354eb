# SPDX-License-Identifier: Apache-2.0
"""The one door from jobs to the engines: how a framework, or one of its parts, is opened.

A job names an engine by a word and sees numpy arrays only; which framework answers is decided here, when asked.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.run import ASCEND, CPU, DEVICES, ENGINES, GPU, MINDSPORE, PYTORCH
from mindformers_ext.core.config.train import TrainSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.jobs.engine.protocols import (
    Engine,
    LayerProbe,
    LayerStates,
    RecordStore,
    RecordWriter,
    Reference,
    TensorFile,
    Trainer,
)


def open_trainer(engine: str, spec: NetworkSpec, train: TrainSpec, device: DeviceSpec) -> Trainer:
    """A trainer of ``engine`` in this process of the job (``msrun`` or ``torchrun`` start several)."""
    if engine == MINDSPORE:
        from mindformers_ext.ms.engine import MindSporeEngine
        from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer

        mindspore = MindSporeEngine()
        mindspore.use(device)
        group = DataParallel(mindspore.rank, mindspore.count)
        return MindSporeTrainer(spec, train, group, fused=device.target != ASCEND)
    from mindformers_ext.pt.engine import PyTorchEngine
    from mindformers_ext.pt.sharded import open_ranks
    from mindformers_ext.pt.trainer import TorchTrainer

    torch = PyTorchEngine()
    ranks = open_ranks(spec.parallel, device.target)
    torch.use(DeviceSpec(device.target, ranks.device_id(device.number)))
    return TorchTrainer(spec, train, torch.device, ranks)


def open_engine(name: str) -> Engine:
    """The engine called ``name``: "ms" is MindSpore, "pt" PyTorch. Importing it takes seconds; do it once."""
    if name == MINDSPORE:
        os.environ.setdefault("GLOG_v", "3")  # errors only: its warnings about graphs stand in front of right results
        from mindformers_ext.ms.engine import MindSporeEngine

        return MindSporeEngine()
    if name == PYTORCH:
        from mindformers_ext.pt.engine import PyTorchEngine

        return PyTorchEngine()
    raise UserError(f"no engine called '{name}': choose one of {', '.join(ENGINES)}")


class _PlainRecords:
    """A ``RecordStore`` without MindSpore."""

    def write(self, path: Path, rows: Iterable[Mapping[str, np.ndarray]], fields: tuple[str, ...]) -> int:
        """Not possible."""
        raise UserError(
            f"{path} cannot be written: MindRecord files are written by MindSpore, which is not installed "
            "(pip install mindspore==2.9.0)"
        )

    def read(self, path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a file, in file order.

        Raises:
            UserError: no MindRecord, or one without these fields.
        """
        with closing(MindRecordFile(path)) as file:
            missing = [name for name in fields if name not in file.fields]
            if missing:
                raise UserError(
                    f"data set {path} has no column {', '.join(missing)}, it has {', '.join(file.fields)}: "
                    "correct input_columns, or write the data again"
                )
            for row in range(len(file)):
                yield dict(zip(fields, file.read(row, fields), strict=True))


def open_records(plain: bool = False) -> RecordStore:
    """MindRecord files, read and written by MindSpore; ``plain`` or where that is not installed, read alone."""
    if plain or importlib.util.find_spec("mindspore") is None:
        return _PlainRecords()
    from mindformers_ext.ms.mindrecord import MindRecordStore

    return MindRecordStore()


def open_record_writer(
    path: Path, fields: tuple[str, ...], shards: int, row_length: int, numbers: Mapping[str, str] | None = None
) -> RecordWriter:
    """MindRecord ``path``, or ``path0``, ``path1``, ... for several shards, none of which may exist.

    ``fields`` are int32 arrays, ``numbers`` ("int32" or "int64" by name) single values of each row.
    """
    from mindformers_ext.ms.mindrecord_writer import MindRecordWriter

    return MindRecordWriter(path, fields, shards, row_length, numbers)


def open_reference(
    folder: Path, weights: Iterable[tuple[str, np.ndarray]] | None = None, code: Path | None = None
) -> Reference:
    """Hugging Face transformers with the model folder at ``folder``, float32 on the CPU.

    Args:
        folder: no code in it is run.
        weights: instead of the folder's own files, float32 under the names that transformers 4 reads.
        code: a folder of ours with config.json and the code of a network that transformers lacks; wants ``weights``.
    """
    from mindformers_ext.pt.hf_reference import HuggingFaceReference

    return HuggingFaceReference(folder, weights, code)


def open_torch_file(path: Path) -> TensorFile:
    """A ``.bin`` or ``.pt`` file of torch.save; imports torch."""
    from mindformers_ext.pt.torch_file import TorchFile

    return TorchFile(path)


def open_layer_states(folder: Path, read: Callable[[str], np.ndarray]) -> LayerStates:
    """Hugging Face transformers on ``folder``'s config.json; ``read`` gives a tensor by name as bfloat16 bits."""
    from mindformers_ext.pt.hidden_states import HiddenStates

    return HiddenStates(folder, read)


def check_engine(
    problems: Problems, engine: str, device_target: str, device_id: int, engines: Sequence[str] = ENGINES
) -> None:
    """Add what does not fit of ``--engine``, ``--device_target`` and ``--device_id``. ``engines``: those that can do
    what is asked."""
    problems.one_of("--engine", engine, engines)
    problems.one_of("--device_target", device_target, DEVICES if MINDSPORE in engines else (CPU, GPU))
    if device_id < 0:
        problems.add(f"--device_id {device_id}", "devices count from 0")
    elif device_id and device_target == CPU:
        problems.add(f"--device_id {device_id} with --device_target {CPU}", "there is one CPU: leave it out")
    if engine == PYTORCH and device_target == ASCEND and MINDSPORE in engines:
        problems.add("--device_target Ascend on PyTorch", f"give --engine {MINDSPORE}")


def join_job(engine: str, device: DeviceSpec) -> None:
    """Take this process's place in msrun's job, where that has started it: its scheduler runs the same script, ends in
    here, and waits for the workers. Processes of torchrun need none of this as long as they send each other nothing.

    Raises:
        UserError: msrun, which starts MindSpore's jobs, and another engine.
    """
    if not os.environ.get("MS_ROLE"):
        return
    if engine != MINDSPORE:
        raise UserError("msrun starts jobs of MindSpore: give --engine ms, or start PyTorch's with torchrun")
    from mindformers_ext.ms.engine import MindSporeEngine

    MindSporeEngine().use(replace(device, together=True))


def check_device(engine: str, device: DeviceSpec) -> None:
    """Refuse (``UserError``) a device that PyTorch does not find, before anything is written."""
    if engine == PYTORCH and device.target != CPU:
        from mindformers_ext.pt.engine import PyTorchEngine

        PyTorchEngine().use(device)


def open_probe(engine: str, spec: NetworkSpec, device: DeviceSpec) -> LayerProbe:
    """A decoder that shows what it computes inside, layer by layer."""
    if engine == MINDSPORE:
        os.environ.setdefault("GLOG_v", "3")  # see open_engine
        from mindformers_ext.ms.engine import MindSporeEngine
        from mindformers_ext.ms.probe import MindSporeLayerProbe

        if not os.environ.get("MS_ROLE"):  # else join_job has
            MindSporeEngine().use(device)
        return MindSporeLayerProbe(spec)
    from mindformers_ext.pt.engine import PyTorchEngine
    from mindformers_ext.pt.probe import TorchLayerProbe

    torch = PyTorchEngine()
    if device.target != CPU:  # else freed memory would be kept (pt/ops/memory.py), which is for training
        torch.use(device)
    return TorchLayerProbe(spec, torch.device)


def write_numbers(path: Path, value: Any, overwrite: bool = False) -> None:
    """A file of torch.save that torch.load reads by its default; it appears whole or not at all. Imports torch.

    value: ints in a list or in lists, an array, or arrays by name.
    """
    from mindformers_ext.pt.number_file import write_numbers as write

    with fresh_file(path, overwrite) as partial:
        write(partial, value)


def read_numbers(path: Path, allow_pickle: bool = False) -> Any:
    """The numbers in such a file: ints in lists, arrays. ``allow_pickle``: also an older one with numpy's numbers.

    Raises:
        UserError: not such a file, damaged, or holding anything else. No code of a file is run.
    """
    from mindformers_ext.pt.number_file import read_numbers as read

    return read(path, allow_pickle)


def write_tables(path: Path, value: Any, overwrite: bool = False) -> None:
    """The same of dictionaries of numbers in dictionaries, keys being names or whole numbers. Imports torch."""
    from mindformers_ext.pt.number_tables import write_tables as write

    with fresh_file(path, overwrite) as partial:
        write(partial, value)


def read_tables(path: Path) -> Any:
    """What such a file holds; errors as ``read_numbers``."""
    from mindformers_ext.pt.number_tables import read_tables as read

    return read(path)
