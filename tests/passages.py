"""The scored parts of documents of bytes, as the task of text chooses them."""

from __future__ import annotations

from bench.corpora import Document
from bench.tasks.text import Passage, passages_of, scored_counts


def scored_passages(
    documents: tuple[Document, ...], *, seq_len: int, objective: str, max_tokens: int
) -> list[Passage]:
    taken = scored_counts([len(document) - 1 for document in documents], seq_len, max_tokens)
    texts = [document[: count + 1] for document, count in zip(documents, taken, strict=True)]
    return passages_of(texts, objective=objective)
