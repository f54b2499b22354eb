# SPDX-License-Identifier: Apache-2.0
"""Texts by domain to a prepared folder: blocks encoded into parts anywhere, parts packed here; both can be killed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.domains.documents import Block, block_bytes
from mindformers_ext.data.domains.manifest import Manifest, write_manifest
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.folder_lock import shared
from mindformers_ext.jobs.items.map_items import Place, Work, map_items
from mindformers_ext.jobs.preprocess.domains.blocks import BlockEncoder
from mindformers_ext.jobs.preprocess.domains.pack import pack
from mindformers_ext.jobs.preprocess.domains.request import CheckedDomains, DomainsRequest, check_domains
from mindformers_ext.jobs.preprocess.domains.survey import Survey

WORTH_KEEPING = 64 << 20  # bytes of finished parts that are kept when an input has to be mended


@dataclass(frozen=True)
class Prepared:
    """What a run has done. ``manifest`` None: a shard, which leaves its parts for the join.

    ``kept`` of the blocks were finished before; ``left_out`` are names in the input folder that are no domain.
    """

    manifest: Manifest | None
    parts: Path
    blocks: int
    done: int
    kept: int
    left_out: tuple[str, ...]


def prepare_domains(request: DomainsRequest) -> Prepared:
    """Write the prepared folder ``request.output_file``; with ``--shard i/n`` only this shard's parts.

    Finished parts are kept when the command is killed, and a rerun goes on with them; the folder appears whole or not
    at all, with the same bytes for any number of processes, machines and shards.

    Raises:
        UserError: an option, a record, a tokenizer or an output that does not fit; what and where is said.
    """
    checked = check_domains(request)
    mine = _own_blocks(checked)
    todo = [block for block in mine if not checked.setup.part_of(block).is_file()]
    if request.is_join and todo:
        raise UserError(
            f"{len(todo)} of {len(mine)} parts are not in '{request.parts}', the first of "
            f"'{todo[0].path}': run the shards that lack them with these options, or leave out --shard"
        )
    with _kept_parts(request):
        _encode(checked, todo)
        manifest = None if request.own_shard else _join(checked)
    return Prepared(manifest, request.parts, len(mine), len(todo), len(mine) - len(todo), checked.left_out)


def _own_blocks(checked: CheckedDomains) -> Sequence[Block]:
    shard = checked.request.own_shard
    return checked.blocks if shard is None else checked.blocks[shard[0] :: shard[1]]


@contextmanager
def _kept_parts(request: DomainsRequest) -> Iterator[None]:
    """The folder of parts, which goes when they are packed. An input that has to be mended leaves it only where it
    holds much, a shard always; what another process works with stays as well."""
    try:
        request.parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make '{request.parts}' ({error.strerror}): choose another --output_file") from error
    with shared(request.parts) as alone:
        try:
            yield
        except UserError as error:
            parts = list(request.parts.glob("*.part"))
            if request.shard is None and sum(path.stat().st_size for path in parts) < WORTH_KEEPING:
                _remove_parts(request.parts, alone())
                raise
            _remove_empty(request.parts)
            if request.shard is not None:
                raise
            told = f"{error}\n{len(parts)} finished parts wait in '{request.parts}' for the next run"
            raise UserError(told) from error
        if not request.own_shard:
            _remove_parts(request.parts, alone())


def _remove_parts(folder: Path, alone: bool) -> None:
    """Parts, finished or not, and the folder if nothing else is in it; unless others work with them."""
    if not alone:
        return
    for path in (*folder.glob("*.part"), *folder.glob(".*.part.*.text")):
        path.unlink(missing_ok=True)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _encode(checked: CheckedDomains, todo: Sequence[Block]) -> None:
    from tqdm import tqdm

    request = checked.request
    if not todo:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    advice = "use fewer --workers and run the same command again, which keeps the finished parts"
    work = Work("tokenising", BlockEncoder.encode, BlockEncoder, (checked.setup,), advice=advice)
    place = Place(min(request.workers, len(todo)), request.ray, fork=True)
    total = sum(map(block_bytes, todo))
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", mininterval=0.5, dynamic_ncols=True) as bar:
        for read in map_items(work, todo, place, ordered=False):
            bar.update(read)


def _join(checked: CheckedDomains) -> Manifest:
    from tqdm import tqdm

    request, seq_length = checked.request, checked.facts.seq_length
    changed = [block.path for block in checked.blocks if not checked.setup.part_of(block).is_file()]
    if changed:
        raise UserError(f"'{changed[0]}' has changed while it was read: run the same command again")
    with tqdm(unit=" documents", desc="looking through", mininterval=0.5, dynamic_ncols=True, delay=1) as bar:
        survey = Survey(checked.parts(), checked.likeness, bar.update)
    with (
        fresh_folder(request.output_file, request.overwrite) as folder,
        tqdm(unit=" rows", desc="packing", mininterval=0.5, dynamic_ncols=True, delay=1) as bar,
    ):
        packed = pack(survey, checked.amounts, seq_length, folder, bar.update)
        manifest = Manifest(
            checked.tokenizer,
            seq_length,
            checked.setup.seed,
            checked.setup.domains,
            packed.splits,
            packed.counts,
            request.output_file,
        )
        write_manifest(manifest, folder)
    return manifest
