# SPDX-License-Identifier: Apache-2.0
"""WikiText's token format back to plain text, in a stream: the same characters as cleaning the whole file at once.

The rules, in this order, are those of MindFormers' ``wikitext_clean`` (r1.3 to r1.7): ``@-@`` and its like, blanks
before punctuation, blanks inside brackets and quotes, rows of ``=``. Its second rule, a pattern with stray slashes that
no text meets, is left out. Brackets and quotes pair over line ends and may stay open for the rest of the file; so how
many closing ones a file holds is counted first (``count_closers``), and each opening one knows whether it ever closes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from mindformers_ext.data.text_lines import chunks

BEFORE = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
PAIRS = ("()", "[]", "{}", '""', "''")
AFTER = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \xb0 ", "\xb0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


class _Stage(Protocol):
    def feed(self, text: str) -> str: ...

    def finish(self) -> str: ...


class _Replace:
    """``str.replace`` over a stream: the last characters wait, as they may begin a match."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.held = old, new, ""

    def feed(self, text: str) -> str:
        *whole, tail = (self.held + text).split(self.old)
        keep = max(len(tail) - len(self.old) + 1, 0)
        self.held = tail[keep:]
        return self.new.join([*whole, tail[:keep]])

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


class _Tighten:
    """Drops the white space just inside a pair of brackets or quotes, as ``re.sub(r"\\(\\s*([^)]*?)\\s*\\)")`` does.

    Brackets do not nest: the first opening one pairs with the next closing one.
    """

    def __init__(self, pair: str, closers: int) -> None:
        """``closers``: how many closing characters the whole stream holds."""
        self.open, self.close, self.left = pair[0], pair[1], closers
        self.inside = self.started = False
        self.held = ""  # white space inside a pair: dropped if the pair closes after it
        self.pattern = re.compile(f"{re.escape(self.open)}([^{re.escape(self.close)}]*){re.escape(self.close)}")

    def feed(self, text: str) -> str:
        self.left -= text.count(self.close)
        result = ""
        if self.inside:
            end = text.find(self.close)
            if end < 0:
                return self._inner(text)
            result = self._inner(text[:end]) + self.close
            self.inside, self.held = False, ""
            text = text[end + 1 :]
        start = self._dangling(text)
        if start < 0 or not self.left:  # all closed here, or the open one never closes
            return result + self._closed(text)
        self.inside, self.started = True, False
        return result + self._closed(text[:start]) + self.open + self._inner(text[start + 1 :])

    def finish(self) -> str:
        return ""

    def _dangling(self, text: str) -> int:
        """Where the opening character stands that nothing in ``text`` closes; -1 if there is none."""
        if self.open == self.close:
            return text.rfind(self.open) if text.count(self.open) % 2 else -1
        return text.find(self.open, text.rfind(self.close) + 1)

    def _closed(self, text: str) -> str:
        if self.open not in text:
            return text
        return self.pattern.sub(lambda match: self.open + match[1].strip() + self.close, text)

    def _inner(self, text: str) -> str:
        if not self.started:
            text = text.lstrip()
            self.started = bool(text)
        text = self.held + text
        body = text.rstrip()
        self.held = text[len(body) :]
        return body


def count_closers(path: Path) -> dict[str, int]:
    """How often each closing bracket and quote stands in the file, in one fast pass over its bytes."""
    counts = dict.fromkeys((pair[1] for pair in PAIRS), 0)
    for block in chunks(path):
        for closer in counts:
            counts[closer] += block.count(closer.encode())
    return counts


def clean_stream(chunks: Iterable[str], closers: Mapping[str, int]) -> Iterator[str]:
    """The cleaned text of the chunks, in chunks of other sizes; ``closers`` as ``count_closers`` gives them."""
    stages: list[_Stage] = [_Replace(*rule) for rule in BEFORE]
    stages += [_Tighten(pair, closers[pair[1]]) for pair in PAIRS]
    stages += [_Replace(*rule) for rule in AFTER]
    for chunk in chunks:
        for stage in stages:
            chunk = stage.feed(chunk)
        yield chunk
    for index, stage in enumerate(stages):
        chunk = stage.finish()
        for later in stages[index + 1 :]:
            chunk = later.feed(chunk)
        yield chunk


def clean(text: str) -> str:
    """A whole text cleaned at once."""
    return "".join(clean_stream([text], {pair[1]: text.count(pair[1]) for pair in PAIRS}))


def is_heading(paragraph: str) -> bool:
    """A paragraph that is not trained on: empty, or a title between ``=``."""
    return not paragraph or paragraph.lstrip().startswith("=")
