"""WikiText-103: good and featured articles of Wikipedia (Merity 2016, arXiv:1609.07843)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise

from bench.corpora.base import sha256
from bench.corpora.hub import HubSource

TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
"""Of the authors' file wiki.test.raw (1,290,590 bytes)."""
TEST_WORDS = 245_569
"""Tokens of the test split by table 1 of the paper:
241,211 words and one end-of-line for each of 4,358 lines."""

BLANK = b" \n"
HEADING = re.compile(rb" = (?!= ).*(?<! =) = \n")
"""` = Title = `; sections are ` = = Section = = `, ` = = = Subsection = = = `, …"""


class WikiText103(HubSource):
    """Each document is one article of the untokenized files (`raw`); the documents, concatenated, are those
    files.

    Each row is one line. An article begins at a top-level heading with a blank line above and below. A line
    of an article's text may look like a heading, but never stands between two blank lines.
    """

    repository = "Salesforce/wikitext"
    config = "wikitext-103-raw-v1"
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"

    def documents(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        article: list[bytes] = []
        above = BLANK
        for line, below in pairwise(chain(map(_line, rows), [BLANK])):
            begins = HEADING.fullmatch(line) and above == below == BLANK
            if begins and any(before != BLANK for before in article):
                yield b"".join(article)
                article = []
            article.append(line)
            above = line
        yield b"".join(article)

    def published_test_words(self, test: Sequence[bytes]) -> int | None:
        return TEST_WORDS if sha256(b"".join(test)) == TEST_SHA256 else None


def _line(row: bytes) -> bytes:
    """Restore the line of the file: rows of blank lines are empty, and some readers remove the line end."""
    return (row.rstrip(b"\n") or b" ") + b"\n"
