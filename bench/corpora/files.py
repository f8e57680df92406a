"""A corpus of text files: a file, folder or glob that the user gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Source, in_words
from bench.corpora.disk import files_at, open_file, read
from bench.corpora.plain import HEAD_BYTES, MOST_UNDECODABLE, Other, not_text, nul_at
from bench.inputs.paths import user_path

ALLOWED = "allowed are text files, in UTF-8 or another encoding without NUL bytes"


class Files(Source):
    """Each file is one document. A file that is named must be text. In a folder or a glob, files that are not
    text, hidden files and `__pycache__` are skipped; the corpus says how many of each kind."""

    knobs = ("path", "max_undecodable")

    def read(self, options: CorpusOptions) -> Corpus:
        if not options.path:
            raise CorpusError(
                "data=files: data.path is missing; give a file, a folder or a glob ('books/*.txt')"
            )
        setting = f"data.path={options.path}"
        path = user_path("data.path", options.path)
        files, skipped = files_at(path, setting)
        most = MOST_UNDECODABLE if options.max_undecodable is None else options.max_undecodable
        documents: dict[str, bytes] = {}
        first = None
        for file in files:
            content, other = _content(file, setting, most)
            if other is None:
                documents[str(file)] = content
            else:
                skipped[other.kind] += 1
                first = first or f"{file} is not text but {other.description}"
        if not documents:
            alone = f"{first}; {ALLOWED}" if files == [path] else None
            raise CorpusError(f"{setting}: {alone or _nothing_left(skipped, first)}")
        return self.split_documents(documents, skipped)


def _content(file: Path, setting: str, most_undecodable: float) -> tuple[bytes, Other | None]:
    """Return the content of a file and None; or, for a file that is not text, b"" and what it is."""
    with open_file(file, setting) as opened:
        content = read(opened, setting, HEAD_BYTES)
        if other := not_text(content, most_undecodable):
            return b"", other
        content += read(opened, setting)
    nul = content.find(b"\0", HEAD_BYTES)
    return (content, None) if nul < 0 else (b"", nul_at(nul))


def _nothing_left(skipped: Counter[str], first: str | None) -> str:
    """The error message of a folder or glob without a text file."""
    return (
        f"none of its files is text (skipped: {in_words(skipped)}){f'; {first}' if first else ''}; {ALLOWED}"
    )
