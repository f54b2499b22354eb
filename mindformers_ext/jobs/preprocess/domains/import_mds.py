# SPDX-License-Identifier: Apache-2.0
"""A corpus in MDS folders, as LLM-Shearing prepares it, into a prepared folder: the same rows, in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.domains.manifest import (
    NAME,
    NAMES,
    SPLITS,
    DomainCounts,
    DomainFiles,
    Manifest,
    write_manifest,
)
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.mds_file import INDEX, MdsFolder
from mindformers_ext.jobs.preprocess.domains.pack import DomainWriter
from mindformers_ext.jobs.preprocess.domains.prepare import Prepared
from mindformers_ext.jobs.preprocess.domains.request import SEED, DomainsRequest, check_output, tokenizer_facts
from mindformers_ext.jobs.preprocess.request import open_checked

MERGED = "eval_merge"  # the domains' eval rows once more, in one folder
COLUMNS = {"set": "str", "tokens": "bytes"}
Ids = npt.NDArray[np.int32]


def import_mds(request: DomainsRequest) -> Prepared:
    """Write the prepared folder from ``request.input_glob``, which has eval/, for_prune/ and for_ft/ with a folder of
    MDS shards per domain. Token ids are uint16 there, rows all of one length.

    Raises:
        UserError: no such folder, a damaged or compressed shard, a row of another length or domain, or an id beyond the
            vocabulary.
    """
    from tqdm import tqdm

    request.check()
    check_output(request)
    source = Path(request.input_glob or "")
    found, left = find_folders(source)
    domains = tuple(sorted({name for by_name in found.values() for name in by_name}))
    tokenizer, facts = open_checked(request)
    length = _row_length(found, request, facts.seq_length)
    total = sum(folder.samples for by_name in found.values() for folder in by_name.values())
    with (
        fresh_folder(request.output_file, request.overwrite) as place,
        DomainWriter(place, length) as writer,
        tqdm(total=total, unit=" rows", desc="importing", mininterval=0.5, dynamic_ncols=True, delay=1) as bar,
    ):
        splits: dict[str, dict[str, DomainFiles]] = {}
        for split in SPLITS:
            splits[split] = {}
            for number, name in enumerate(domains):
                folder = found.get(split, {}).get(name)
                rows = _rows(folder, name, length, facts.vocab_size) if folder else iter(())
                count = folder.samples if folder else 0
                splits[split][name] = writer.write(split, name, number, rows, count, bar.update)
        tokens = {name: sum(splits[split][name].rows for split in SPLITS) * length for name in domains}
        counts = {name: DomainCounts(tokens=tokens[name]) for name in domains}
        described = tokenizer_facts(request, tokenizer, facts)
        made = Manifest(described, length, SEED, domains, splits, counts, request.output_file)
        write_manifest(made, place)
    return Prepared(made, request.parts, total, total, 0, tuple(left))


def find_folders(source: Path) -> tuple[dict[str, dict[str, MdsFolder]], list[str]]:
    """By split and domain the MDS folders of ``source``, and what was left out.

    Raises:
        UserError: none at all, or one that cannot be read.
    """
    if not source.is_dir():
        raise UserError(f"'{source}' is not a folder: give one with eval/, for_prune/ and for_ft/ of MDS folders")
    found: dict[str, dict[str, MdsFolder]] = {}
    left = sorted(child.name for child in source.iterdir() if child.name not in SPLITS and child.name[0] != ".")
    for split in SPLITS:
        for child in sorted((source / split).iterdir()) if (source / split).is_dir() else ():
            if child.name == MERGED or not (child / INDEX).is_file():
                left.append(f"{split}/{child.name}")
                continue
            if not NAME.fullmatch(child.name):
                raise UserError(f"'{child}' cannot be a domain's name: {NAMES}")
            found.setdefault(split, {})[child.name] = MdsFolder(child, COLUMNS)
    if not any(folder.samples for by_name in found.values() for folder in by_name.values()):
        raise UserError(
            f"'{source}' has no rows in eval/DOMAIN/{INDEX}, for_prune/DOMAIN/{INDEX} or for_ft/DOMAIN/{INDEX}: give "
            "the folder above these splits"
        )
    return found, left


def _row_length(found: Mapping[str, Mapping[str, MdsFolder]], request: DomainsRequest, usual: int) -> int:
    """Tokens of the first row; --seq_length and --config must agree where they are given."""
    folders = (folder for by_name in found.values() for folder in by_name.values() if folder.samples)
    folder = next(folders)
    length = len(next(folder.read())["tokens"]) // 2
    if length < 1:
        raise UserError(f"the first row of '{folder.folder}' has no tokens: give another folder")
    asked = usual if request.seq_length or request.config else length
    if asked != length:
        raise UserError(f"the rows of '{folder.folder}' have {length} tokens, asked are {asked}: correct --seq_length")
    return length


def _rows(folder: MdsFolder, name: str, length: int, vocab_size: int) -> Iterator[Ids]:
    for number, sample in enumerate(folder.read()):
        where = f"'{folder.folder}', row {number}"
        if sample["set"] != name.encode():
            found = sample["set"][:60].decode(errors="replace")
            raise UserError(f"{where} is of the domain '{found}', its folder is '{name}': mend the folder's name")
        if len(sample["tokens"]) != 2 * length:
            raise UserError(f"{where} has {len(sample['tokens'])} bytes, not {2 * length}: rows have one length")
        ids = np.frombuffer(sample["tokens"], "<u2").astype(np.int32)
        if int(ids.max()) >= vocab_size:
            raise UserError(
                f"{where} holds the id {int(ids.max())}, the vocabulary has {vocab_size}: use the tokenizer the rows "
                "were made with"
            )
        yield ids[None]
