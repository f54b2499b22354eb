# SPDX-License-Identifier: Apache-2.0
"""Layers of a split solved here, in several processes, or on a Ray cluster: the same splits, in the order they end."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.dense_model import DenseModel, open_dense
from mindformers_ext.jobs.experts.process_pool import in_processes
from mindformers_ext.jobs.experts.split_methods import METHODS, SplitRequest
from mindformers_ext.surgery.experts.split import LayerSplit

Solved = tuple[int, LayerSplit, dict[str, Any], float]
CONNECTING = 5.0  # seconds


def solve_layer(request: SplitRequest, model: DenseModel, layer: int) -> Solved:
    """The split of one layer, figures about it, and the seconds it took."""
    started = time.monotonic()
    split, about = METHODS[request.method].solve(request, model, layer)
    return layer, split, about, time.monotonic() - started


def solve_here(request: SplitRequest, layers: Sequence[int]) -> Generator[Solved, None, None]:
    """One layer after the other in this process."""
    if not layers:
        return
    model = open_dense(request.model_path)
    try:
        for layer in layers:
            yield solve_layer(request, model, layer)
    finally:
        model.close()


# What a worker process holds between its layers.
_worker: dict[str, Any] = {}


def _start_worker(request: SplitRequest) -> None:
    _worker.update(request=request, model=open_dense(request.model_path))


def _work(layer: int) -> Solved:
    return solve_layer(_worker["request"], _worker["model"], layer)


def solve_in_processes(request: SplitRequest, layers: Sequence[int], workers: int) -> Generator[Solved, None, None]:
    """``workers`` processes that share the machine's cores.

    Raises:
        UserError: a process was killed.
    """
    return in_processes(_work, layers, workers, "split", _start_worker, (request,))


def _solve_alone(request: SplitRequest, layer: int) -> Solved:
    """On a machine of the cluster, which reads the model from the same path."""
    (found,) = solve_here(request, [layer])
    return found


def check_ray(address: str) -> None:
    """``UserError`` where Ray is not installed, or nobody listens at ``address``: Ray itself tries for minutes."""
    if find_spec("ray") is None:
        raise UserError("--ray needs Ray, which is not installed: pip install 'mindformers_ext[ray]'")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"nobody answers at the Ray address '{address}' ({error}): start the cluster, or correct --ray"
        ) from error


def solve_on_ray(request: SplitRequest, layers: Sequence[int], address: str) -> Generator[Solved, None, None]:
    """The machines of the Ray cluster at ``address``; each has this package and sees the model under the same path.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or a machine is lost.
    """
    import ray

    if not layers:
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # noqa: BLE001 Ray raises many kinds
        raise UserError(f"the Ray cluster at '{address}' does not answer ({_short(error)}): correct --ray") from error
    try:
        task = ray.remote(num_cpus=1)(_solve_alone)
        waiting = [task.remote(_absolute(request), layer) for layer in layers]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from error
                raise UserError(f"a machine of the Ray cluster failed ({_short(error)}): see its log") from error
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"a machine of the Ray cluster was lost ({_short(error)}): run the same command again, which keeps "
                    "the finished layers"
                ) from error
    finally:
        ray.shutdown()


def _absolute(request: SplitRequest) -> SplitRequest:
    """With paths that mean the same in another folder."""
    words = {field.name: getattr(request, field.name) for field in fields(request)}
    paths: dict[str, Any] = {name: word.absolute() for name, word in words.items() if isinstance(word, Path)}
    return replace(request, **paths)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[-200:]
