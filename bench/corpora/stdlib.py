"""The source files of the running Python's standard library; needs nothing."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from bench.corpora.base import Corpus, Source, Wanted

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


class Stdlib(Source):
    """Python, as another Python writes it: the hash says which version it was."""

    def read(self, wanted: Wanted) -> Corpus:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = (f for f in sorted(root.rglob("*.py")) if not SKIPPED.intersection(f.relative_to(root).parts))
        return self.deal({str(f.relative_to(root)): f.read_bytes() for f in files})
