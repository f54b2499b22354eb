# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids as a person reads them: the text, its special tokens, and which tokens bear loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.tokenizers import Tokenizer

SPECIAL_TEXTS = {"unk_id": "<unk>", "bos_id": "<s>", "eos_id": "</s>", "pad_id": "<pad>"}


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind: its text, whether it bears loss, whether it is a special token."""

    text: str
    loss: bool
    special: bool = False


@dataclass(frozen=True)
class ShownRecord:
    """A row to print, and its counts in tokens. ``padding`` is the run of the pad id at the end (an EOS that is also
    the pad id, but has a label, is no padding).

    ``changed`` counts loss-bearing labels that are not the row's own token; 0 in data for a causal model.
    """

    segments: tuple[Segment, ...]
    tokens: int
    padding: int
    loss: int
    unknown: int
    changed: int


def loss_mask(ids: Sequence[int], labels: Sequence[int] | None, pad_id: int, ignore_id: int) -> list[bool]:
    """Which tokens the network learns to predict, as its loss counts them.

    The token at place i is the target of place i - 1. It counts when the token before it is not the pad id and its
    label is not ``ignore_id``. The first token is nobody's target.
    """
    wanted = [True] * len(ids) if labels is None else [label != ignore_id for label in labels]
    return [place > 0 and wanted[place] and ids[place - 1] != pad_id for place in range(len(ids))]


def show(
    ids: Sequence[int], labels: Sequence[int] | None, tokenizer: Tokenizer, pad_id: int, ignore_id: int
) -> ShownRecord:
    """The row ``ids`` (and ``labels`` of the same length, where it has them) as text with marks.

    Args:
        ids: token ids, at least one.
        labels: what the loss compares with, or None where that is ``ids``.
        tokenizer: the one the row was made with.
        pad_id: the network's ``pad_token_id``; -1 where nothing counts as padding.
        ignore_id: the network's ``ignore_token_id``.

    Raises:
        UserError: an id that the tokenizer does not have, or labels of another length.
    """
    if labels is not None and len(labels) != len(ids):
        raise UserError(f"{len(ids)} input_ids but {len(labels)} labels: write the file again")
    size = tokenizer.vocab_size
    strangers = sorted({token for token in ids if not 0 <= token < size})
    if strangers:
        raise UserError(
            f"token id {strangers[-1] if strangers[-1] >= size else strangers[0]} is not in this tokenizer, which has "
            f"ids 0 to {size - 1}: give the tokenizer the file was made with (--model_file)"
        )
    mask = loss_mask(ids, labels, pad_id, ignore_id)
    filler = [token == pad_id and (labels is None or labels[at] == ignore_id) for at, token in enumerate(ids)]
    padding = next((count for count, fills in enumerate(reversed(filler)) if not fills), len(ids))
    body = len(ids) - padding
    special = {tokenizer.special_ids[name]: text for name, text in SPECIAL_TEXTS.items()}
    segments = [*_body(ids[:body], mask, special, tokenizer), *_padding(mask[body:])]
    return ShownRecord(
        segments=tuple(segments),
        tokens=len(ids),
        padding=padding,
        loss=sum(mask),
        unknown=sum(token == tokenizer.special_ids["unk_id"] for token in ids[:body]),
        changed=0 if labels is None else sum(m and a != b for m, a, b in zip(mask, ids, labels, strict=True)),
    )


def _body(
    ids: Sequence[int], mask: Sequence[bool], special: Mapping[int, str], tokenizer: Tokenizer
) -> Iterator[Segment]:
    """Segments of the part before the padding.

    A run's text is what it adds to the decoded text before it, counted from the last BOS or EOS: a tokenizer gives a
    run decoded alone without its leading blank.
    """
    ends = {tokenizer.special_ids["bos_id"], tokenizer.special_ids["eos_id"]}
    begin, before, place = 0, "", 0
    for (name, loss), group in groupby(range(len(ids)), key=lambda at: (special.get(ids[at], ""), mask[at])):
        count = len(list(group))
        place += count
        if name:
            yield Segment(name * count, loss, special=True)
        if ids[place - 1] in ends:
            begin, before = place, ""
            continue
        text = tokenizer.decode(ids[begin:place])
        if not name:
            yield Segment(text[len(before) :], loss)
        before = text


def _padding(mask: Sequence[bool]) -> Iterator[Segment]:
    for loss, group in groupby(mask):
        count = len(list(group))
        yield Segment(f"<pad>x{count}" if count > 1 else "<pad>", loss, special=True)
