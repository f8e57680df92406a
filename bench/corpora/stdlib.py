"""The source files of the running Python's standard library; needs nothing."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from bench.corpora.base import Corpus, Source, Wanted
from bench.corpora.disk import read_file, walk

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


class Stdlib(Source):
    """Python, as another Python writes it: the hash says which version it was."""

    def read(self, wanted: Wanted) -> Corpus:
        root = Path(sysconfig.get_paths()["stdlib"])
        asked_by = f"data={self.name}"
        found = walk(root, asked_by, enter=lambda name: name not in SKIPPED)
        files = sorted(file for file in found if file.suffix == ".py")
        return self.deal({str(file.relative_to(root)): read_file(file, asked_by) for file in files})
