# SPDX-License-Identifier: Apache-2.0
"""This process among those of its job. Each works alone on its share of the rows: nothing is sent between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mindformers_ext.core.errors import UserError

# the variables of torchrun and torch.distributed.launch, and of msrun
LAUNCHERS = (("RANK", ("WORLD_SIZE",), "LOCAL_RANK"), ("RANK_ID", ("MS_WORKER_NUM", "RANK_SIZE"), "DEVICE_ID"))


@dataclass(frozen=True)
class Share:
    """Rank ``rank`` of ``size`` processes; ``local``: its number on this machine, of a device."""

    rank: int = 0
    size: int = 1
    local: int = 0


def own_share(environment: Mapping[str, str] = os.environ) -> Share:
    """This process's share; one process alone without a launcher.

    Raises:
        UserError: the launcher's variables contradict each other.
    """
    for rank, sizes, local in LAUNCHERS:
        size = next((environment[name] for name in sizes if environment.get(name)), "")
        number = environment.get(rank, "")
        if not size or not number:
            continue
        if not (number.isdecimal() and size.isdecimal() and int(number) < int(size)):
            raise UserError(f"{rank}={number} of {size} processes: start with scripts/torchrun_launcher.sh or msrun")
        place = environment.get(local, "")
        return Share(int(number), int(size), int(place) if place.isdecimal() else int(number))
    return Share()


def alone(what: str) -> Share:
    """The share of the only process; several are a ``UserError``. ``what``: "gates are made"."""
    share = own_share()
    if share.size > 1:
        raise UserError(f"{what} by one process, here are {share.size}: start it without a launcher")
    return share
