# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a merge: chosen or united, and the models' embeddings rearranged for it where they must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.merge.embeddings import Member, RebuiltRows, plan_rows
from mindformers_ext.jobs.merge.models import Model
from mindformers_ext.jobs.merge.vocab import (
    Vocabulary,
    identity,
    limited,
    read_vocabulary,
    united,
    with_texts,
    write_vocabulary,
)
from mindformers_ext.jobs.merge.vocab_config import BASE, UNION, VocabularyWish
from mindformers_ext.surgery.merge.architectures import TensorRow


@dataclass(frozen=True)
class Tokenizers:
    """What comes of a wish: the models to merge, the one whose tokenizer files are copied, and what is new.

    ``vocabulary`` None: the copied files are right as they are; ``rows`` None: embeddings stay as they are.
    """

    models: Mapping[str, Model]
    donor: Model
    vocabulary: Vocabulary | None = None
    rows: int | None = None
    notes: tuple[str, ...] = ()


def choose_tokenizer(
    wish: VocabularyWish | None, models: Mapping[str, Model], base: Model, has_base: bool
) -> Tokenizers:
    """What ``wish`` means for these models. ``has_base``: ``base`` is the configuration's, not just the first model.

    Raises:
        UserError: a model that is not among them, a tokenizer that is missing or does not fit its embedding.
    """
    if wish is None:
        return Tokenizers(models, base)
    strange = [name for name in wish.models() if name not in models]
    if strange:
        raise UserError(
            f"tokenizer source '{strange[0]}' is none of the models: choose base, union or " + ", ".join(models)
        )
    donor = base if wish.source in (BASE, UNION) else models[wish.source]
    if _all_alike(models) and not wish.tokens and wish.multiple == 1 and not wish.trim:
        return Tokenizers(models, donor)
    return _rebuilt(wish, models, base, donor, has_base)


def _all_alike(models: Mapping[str, Model]) -> bool:
    """One tokenizer and embeddings of one length: nothing has to move."""
    first, *others = [(identity(model.folder), _rows_of(model)) for model in models.values()]
    return first[0] is not None and all(other == first for other in others)


def _vocab_rows(model: Model) -> list[TensorRow]:
    return [row for row in (*model.architecture.pre, *model.architecture.post) if row.vocab]


def _rows_of(model: Model) -> int:
    """How many rows the embedding has; 0 where it is missing, which the plan reports."""
    info = model.reader.infos.get(_vocab_rows(model)[0].name)
    return info.shape[0] if info else 0


def _rebuilt(
    wish: VocabularyWish, models: Mapping[str, Model], base: Model, donor: Model, has_base: bool
) -> Tokenizers:
    members = [_member(model) for model in models.values()]
    by_name = {member.name: member for member in members}
    start = by_name[donor.name].vocabulary
    if wish.source == UNION:
        vocabulary = united(start, [member.vocabulary for member in members if member.name != donor.name])
    else:
        vocabulary = start
    vocabulary = with_texts(vocabulary, wish.tokens)
    least = max(vocabulary.ids.values(), default=-1) + 1
    size = least if wish.trim else max(least, by_name[donor.name].rows)
    size = -(-size // wish.multiple) * wish.multiple
    place = list(models).index(base.name) if has_base else None
    plans, own = plan_rows(vocabulary, size, members, place, wish)
    readers = [RebuiltRows(number, members, plan, own) for number, plan in enumerate(plans)]
    rebuilt = {
        name: replace(model, reader=reader) for (name, model), reader in zip(models.items(), readers, strict=True)
    }
    new = len(vocabulary.ids) - len(start.ids)
    note = f"the vocabulary has {len(vocabulary.ids)} tokens in {size} rows, {new} more than that of '{donor.name}'"
    changed = vocabulary.table != read_vocabulary(donor.folder).table
    return Tokenizers(rebuilt, donor, vocabulary if changed else None, size, (note,))


def _member(model: Model) -> Member:
    rows = _rows_of(model)
    here = [row for row in _vocab_rows(model) if row.name in model.reader.infos]
    return Member(
        model.name,
        model.reader,
        limited(read_vocabulary(model.folder), rows, model.name),
        rows,
        tuple(row.name for row in here),
        {row.name: row.tied for row in _vocab_rows(model) if row.tied},
    )


def write_tokenizer(chosen: Tokenizers, folder: Path) -> None:
    """Replace the copied tokenizer by a new one, where there is one."""
    if chosen.vocabulary:
        write_vocabulary(chosen.vocabulary, folder)
