"""PG-19: books of Project Gutenberg from before 1919 (Rae 2019, arXiv:1911.05507)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.corpora.hub import HubSource

TEST_BOOKS, TEST_WORDS = 100, 6_966_499
"""From table 2 of the paper, and from the authors' repository."""


class PG19(HubSource):
    """Each document is one book, in the data set's order:
    28,602 for training (11 GB), 50 for validation, 100 for test."""

    repository = "emozilla/pg19"
    revision = "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"
    max_bytes = 100_000_000

    def published_test_words(self, test: Sequence[bytes]) -> int | None:
        return TEST_WORDS if len(test) == TEST_BOOKS else None
