"""The source files of the running Python's standard library; needs no download."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from bench.corpora.base import Corpus, CorpusOptions, Source
from bench.corpora.disk import read_file, walk

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


class Stdlib(Source):
    """The library depends on the Python version; the corpus hash identifies it."""

    def read(self, options: CorpusOptions) -> Corpus:
        root = Path(sysconfig.get_paths()["stdlib"])
        setting = f"data={self.name}"
        paths = walk(root, setting, enter=lambda name: name not in SKIPPED)
        files = sorted(file for file in paths if file.suffix == ".py")
        return self.split_documents({str(file.relative_to(root)): read_file(file, setting) for file in files})
