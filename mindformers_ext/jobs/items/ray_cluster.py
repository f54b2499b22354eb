# SPDX-License-Identifier: Apache-2.0
"""The machines of a Ray cluster that work on items. Each has this package, and sees files under the same paths."""

from __future__ import annotations

import pickle
import secrets
import signal
import socket
import threading
import time
from concurrent.futures import Future
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.items.map_items import Work

CONNECTING = 5.0  # seconds
RETRIES = 5  # times that an item is begun again after its machine was lost
PIECE = 1 << 16  # bytes; Ray sends up to 100,000 with a call
COUNTED = 5.0  # seconds for which the number of cores is believed


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


class RayTeam:
    """All cores of the cluster at ``address``; see ``jobs.items.window.Handing``."""

    def __init__(self, work: Work, address: str, ordered: bool) -> None:
        """Join the cluster and give it ``work``, once.

        Raises:
            UserError: the cluster does not answer.
        """
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # noqa: BLE001 Ray raises many kinds
            raise UserError(
                f"the Ray cluster at '{address}' does not answer ({_short(error)}): correct --ray"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own in its place
        self.work, self._ray, self._ordered = work, ray, ordered
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)
        self._given = secrets.token_hex(8), [ray.put(work)]  # in a list: a process gets it when it has none
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()
        self._cores, self._counted = 1, 0.0

    @property
    def size(self) -> int:
        """Cores of the machines that are there now."""
        if time.monotonic() - self._counted > COUNTED:
            self._cores = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self._counted = time.monotonic()
        return self._cores

    def submit(self, item: Any) -> Future[Any]:
        """Begin an item."""
        task = self._task.remote(*self._given, *_pieces(item))
        future = task.future()  # waiting inside Ray turns a signal into exit code 1
        if not self._ordered:
            future.add_done_callback(self._ended.put)
        return future

    def result(self, ticket: Future[Any]) -> Any:
        """The item's result; an item whose machine was lost was begun again."""
        errors = self._ray.exceptions
        try:
            return ticket.result()
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise UserError(f"a machine of the Ray cluster failed ({_short(error)}): see its log") from error
        except errors.RayError as error:
            raise UserError(
                f"machines of the Ray cluster were lost {RETRIES + 1} times over one item of {self.work.name} "
                f"({_short(error)}): see that they have enough memory, and run the same command again"
            ) from error

    def finished(self) -> Any:
        """The result of the item that is finished next."""
        return self.result(self._ended.get())

    def close(self) -> None:
        """Leave the cluster, which ends what this job still has there."""
        self._ray.shutdown()


# What a process of the cluster holds between its items, by the job's key.
_states: dict[str, Any] = {}


def _pieces(item: Any) -> list[bytes]:
    """An item in pieces that travel with the call. Ray would store what is larger, and as a call's needs are part of
    what Ray chooses a process by, every such item would wait for a process to be leased anew."""
    whole = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
    return [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]


def _do(key: str, given: list[Any], *pieces: bytes) -> Any:
    """On a machine of the cluster."""
    import ray

    if key not in _states:
        work = ray.get(given[0])
        _states[key] = work, work.start(*work.given)
    work, state = _states[key]
    return work.do(state, pickle.loads(b"".join(pieces)))  # noqa: S301 of this job, as what Ray itself pickles


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[-200:]
