"""A file, folder or glob of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, Source, Wanted
from bench.corpora.disk import expand, kind_of, open_file, read, walk
from bench.corpora.plain import HEAD_BYTES, not_text, nul_at
from bench.inputs.paths import user_path

ALLOWED = "allowed are text files, in UTF-8 or another encoding without NUL bytes"


class Files(Source):
    """Every file is a document of its bytes. All must be text: one that is not among a thousand would be
    trained on unseen, or left out unseen."""

    knobs = ("path",)

    def read(self, wanted: Wanted) -> Corpus:
        if not wanted.path:
            raise CorpusError(
                "data=files: data.path is missing; give a file, a folder or a glob ('books/*.txt')"
            )
        asked_by = f"data.path={wanted.path}"
        files = _found(user_path("data.path", wanted.path), asked_by)
        documents: dict[str, bytes] = {}
        others: dict[Path, str] = {}
        for file in files:
            content, other = _content(file, asked_by)
            if other is None:
                documents[str(file)] = content
            else:
                others[file] = other
        if others:
            raise CorpusError(f"{asked_by}: {_refusal(others, files)}")
        return self.deal(documents)


def _found(path: Path, asked_by: str) -> Sequence[Path]:
    """The files that a path or a glob stands for, in order. Raises CorpusError where there are none."""
    kind = kind_of(path, asked_by)
    if kind is None:
        found = {file for file in expand(str(path), asked_by) if kind_of(file, asked_by) != "a folder"}
    else:
        found = {*walk(path, asked_by)} if kind == "a folder" else {path}
    if not found:
        raise CorpusError(f"{asked_by}: no such file, folder or glob")
    return sorted(found)


def _content(file: Path, asked_by: str) -> tuple[bytes, str | None]:
    """The content of a file and None; or, where it is not text, nothing and what it looks like."""
    with open_file(file, asked_by) as opened:
        content = read(opened, asked_by, HEAD_BYTES)
        if other := not_text(content):
            return b"", other
        content += read(opened, asked_by)
    nul = content.find(b"\0", HEAD_BYTES)
    return (content, None) if nul < 0 else (b"", nul_at(nul))


def _refusal(others: dict[Path, str], files: Sequence[Path]) -> str:
    """Of the files that are not text, and those that were found."""
    first, looks = next(iter(others.items()))
    if len(files) == 1:
        return f"{first} is not text but {looks}; {ALLOWED}"
    return (
        f"{len(others):,} of {len(files):,} files are not text, first {first}: {looks}; {ALLOWED}; "
        "a glob such as 'books/**/*.txt' takes some of a folder's files"
    )
