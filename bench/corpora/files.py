"""A corpus of text files: a file, folder or glob that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Source
from bench.corpora.disk import expand, file_type, open_file, read, walk
from bench.corpora.plain import HEAD_BYTES, not_text, nul_at
from bench.inputs.paths import user_path

ALLOWED = "allowed are text files, in UTF-8 or another encoding without NUL bytes"


class Files(Source):
    """Each file is one document. Every file must be text: otherwise a single binary file among a thousand
    would be used or skipped without anyone noticing."""

    knobs = ("path",)

    def read(self, options: CorpusOptions) -> Corpus:
        if not options.path:
            raise CorpusError(
                "data=files: data.path is missing; give a file, a folder or a glob ('books/*.txt')"
            )
        setting = f"data.path={options.path}"
        files = _files_at(user_path("data.path", options.path), setting)
        documents: dict[str, bytes] = {}
        others: dict[Path, str] = {}
        for file in files:
            content, other = _content(file, setting)
            if other is None:
                documents[str(file)] = content
            else:
                others[file] = other
        if others:
            raise CorpusError(f"{setting}: {_refusal(others, files)}")
        return self.split_documents(documents)


def _files_at(path: Path, setting: str) -> Sequence[Path]:
    """Return the sorted files that a path or a glob names. Raises CorpusError if there are none."""
    kind = file_type(path, setting)
    if kind is None:
        files = {file for file in expand(str(path), setting) if file_type(file, setting) != "a folder"}
    else:
        files = {*walk(path, setting)} if kind == "a folder" else {path}
    if not files:
        raise CorpusError(f"{setting}: no such file, folder or glob")
    return sorted(files)


def _content(file: Path, setting: str) -> tuple[bytes, str | None]:
    """Return the content of a file and None; or, for a file that is not text, b"" and its apparent type."""
    with open_file(file, setting) as opened:
        content = read(opened, setting, HEAD_BYTES)
        if other := not_text(content):
            return b"", other
        content += read(opened, setting)
    nul = content.find(b"\0", HEAD_BYTES)
    return (content, None) if nul < 0 else (b"", nul_at(nul))


def _refusal(others: dict[Path, str], files: Sequence[Path]) -> str:
    """The error message, from the files that are not text and all files that were found."""
    first, looks = next(iter(others.items()))
    if len(files) == 1:
        return f"{first} is not text but {looks}; {ALLOWED}"
    return (
        f"{len(others):,} of {len(files):,} files are not text, first {first}: {looks}; {ALLOWED}; "
        "a glob such as 'books/**/*.txt' selects some of a folder's files"
    )
