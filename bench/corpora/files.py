"""A file, folder or glob of the user's."""

from __future__ import annotations

import glob
from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, Source, Wanted, read_file


class Files(Source):
    """Every file is a document, whatever its bytes."""

    knobs = ("path",)

    def read(self, wanted: Wanted) -> Corpus:
        path = wanted.path
        if not path:
            raise CorpusError(
                "data=files: data.path is missing; give a file, a folder or a glob ('books/*.txt')"
            )
        there = Path(path).expanduser()
        if there.is_dir():
            found = sorted(f for f in there.rglob("*") if f.is_file())
        elif there.is_file():
            found = [there]
        else:
            found = sorted(Path(f) for f in glob.glob(str(there), recursive=True) if Path(f).is_file())  # noqa: PTH207 (absolute globs)
        if not found:
            raise CorpusError(f"data.path={path}: no such file, folder or glob")
        return self.deal({str(file): read_file(file, f"data.path={path}") for file in found})
