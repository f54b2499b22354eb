# SPDX-License-Identifier: Apache-2.0
"""Filters of documents: a score, and the range in which a document is kept. One table; another score is another row.

The scores of a text are rules of thumb that work for any language, with no model behind them. What a model says of a
text, or anything else, comes as a number in a field of the record (``field.NAME``).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mindformers_ext.core.errors import Problems

# Marks of advertising and of what surrounds a text on a web page. A line that holds one counts.
ADS = re.compile(
    r"click here|buy now|order now|add to (?:cart|basket)|sign up|log ?in|subscribe|newsletter|free shipping|% off\b"
    r"|limited time|best price|cookie|privacy policy|terms of (?:use|service)|all rights reserved|read more"
    r"|share (?:this|on)|follow us|unsubscribe|https?://|www\.|点击|购买|优惠|包邮|订阅|扫码|加微信|版权所有",
    re.IGNORECASE,
)
# Characters that running text seldom has: no letter, digit or blank, and no common punctuation.
ODD = re.compile(r"""_|[^\w\s.,;:!?'"()\-’‘“”–—、。，；：！？（）《》「」।…]""")


def fluency(text: str) -> float:
    """0 to 1: the share of characters that running text is made of (letters with their marks, digits, blanks, common
    punctuation), times the share of lines that do not repeat an earlier one."""
    odd = sum(not unicodedata.category(char).startswith("M") for char in ODD.findall(text))
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return (1 - odd / len(text)) * len(set(lines)) / len(lines) if lines else 0.0


def ads(text: str) -> float:
    """0 to 1: the share of lines (blank ones aside) with a mark of advertising or of a web page's frame."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(ADS.search(line) is not None for line in lines) / len(lines) if lines else 0.0


@dataclass(frozen=True)
class FilterKind:
    """A row of the table. ``score`` None: not of the text alone. ``default``: the range where none is given."""

    about: str
    score: Callable[[str], float] | None = None
    default: tuple[float, float] | None = None


FILTERS: Mapping[str, FilterKind] = {
    "characters": FilterKind("characters of the text", len, (200, math.inf)),
    "tokens": FilterKind("tokens of the document, BOS and EOS included", None, (32, math.inf)),
    "fluency": FilterKind("0 to 1, see fluency() in data/domains/filters.py", fluency, (0.75, math.inf)),
    "ads": FilterKind("0 to 1: share of lines with a mark of advertising", ads, (-math.inf, 0.25)),
    "duplicates": FilterKind("about which likeness (Jaccard, 0 to 1) makes a document a duplicate", None, (0.0, 0.8)),
}
FIELD, TOKENS, DUPLICATES, EMPTY = "field.", "tokens", "duplicates", "empty"


@dataclass(frozen=True)
class Filter:
    """``kind`` with a range; both ends are kept. ``domain`` None: in every domain."""

    kind: str
    low: float
    high: float
    domain: str | None = None

    def keeps(self, score: float) -> bool:
        """Whether a document of this score stays; one without a number does not."""
        return self.low <= score <= self.high

    @property
    def text_score(self) -> Callable[[str], float] | None:
        """The score, where the text alone is scored."""
        return FILTERS[self.kind].score if self.kind in FILTERS else None

    @property
    def field(self) -> str | None:
        """The record's field that holds the score, if one does."""
        return self.kind.removeprefix(FIELD) if self.kind.startswith(FIELD) else None


def read_filters(words: Sequence[str], domains: Sequence[str]) -> tuple[Filter, ...]:
    """The filters that ``words`` ask for: ``NAME``, or ``NAME=LOW:HIGH`` with an end left out where there is none; with
    ``DOMAIN/`` in front for one domain. Of duplicates ``duplicates=LIKENESS``.

    Raises:
        UserError: an unknown name or domain, no range, or an empty one; all are listed.
    """
    problems = Problems("--filter")
    found = [_filter(word, domains, problems) for word in words]
    kept = tuple(item for item in found if item is not None)
    for item in kept:
        same = [other for other in kept if (other.kind, other.domain) == (item.kind, item.domain)]
        if len(same) > 1:
            problems.add(f"{item.kind} is asked for {len(same)} times", "give it once, as NAME=LOW:HIGH")
            break
    problems.raise_if_any()
    return kept


def _filter(word: str, domains: Sequence[str], problems: Problems) -> Filter | None:
    place, _, text = word.partition("=")
    domain, slash, kind = place.rpartition("/")
    if kind not in FILTERS and not (kind.startswith(FIELD) and kind != FIELD):
        problems.add(f"'{word[:80]}'", f"choose one of {', '.join(FILTERS)} or field.NAME, as NAME=LOW:HIGH")
        return None
    if slash and domain not in domains:
        problems.add(f"'{word[:80]}' is for the domain '{domain[:60]}'", f"the domains are {', '.join(domains)}")
        return None
    if slash and kind == DUPLICATES:
        problems.add(f"'{word[:80]}'", "duplicates are looked for in all domains together: leave the domain out")
        return None
    default = FILTERS[kind].default if kind in FILTERS else None
    limits = _range(text, kind == DUPLICATES) if text else default
    if limits is None:
        wanted = "duplicates=0.8, from 0 to 1" if kind == DUPLICATES else f"{kind}=LOW:HIGH, LOW not above HIGH"
        problems.add(f"'{word[:80]}'", f"give {wanted}")
        return None
    return Filter(kind, *limits, domain=domain or None)


def _range(text: str, likeness: bool) -> tuple[float, float] | None:
    try:
        if likeness:
            value = float(text)
            return (0.0, value) if 0 < value <= 1 else None
        low, colon, high = text.partition(":")
        limits = float(low) if low else -math.inf, float(high) if high else math.inf
    except ValueError:
        return None
    return limits if colon and limits[0] <= limits[1] and (low or high) else None
