"""enwik8: the first 10⁸ bytes of an English Wikipedia dump of 2006, markup included."""

from __future__ import annotations

from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, Source, Wanted, cache_dir, sha256
from bench.corpora.disk import kind_of, read_file
from bench.inputs.paths import user_path

ADDRESS = "https://mattmahoney.net/dc/enwik8.zip"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
"""Of the unpacked file; the same wherever it is published, from compression benchmarks to model cards."""
TRAIN_SHARE, VALIDATION_SHARE = 0.90, 0.05


class Enwik8(Source):
    """The unpacked file, put into the cache or named by `data.path`.

    Its first 90 % of bytes are for training, the next 5 % for validation, the last 5 % for the test, each
    one document: the usual split (Al-Rfou 2018, arXiv:1808.04444).
    """

    knobs = ("path",)

    def fetch(self, wanted: Wanted) -> Path:
        """What to do by hand. Raises CorpusError, always: it is not downloaded for you."""
        raise CorpusError(f"data=enwik8: is not downloaded for you; {self._remedy()}")

    def read(self, wanted: Wanted) -> Corpus:
        if wanted.path:
            path, asked_by = user_path("data.path", wanted.path), f"data.path={wanted.path}"
        else:
            path, asked_by = cache_dir() / "enwik8", "data=enwik8"
        if kind_of(path, asked_by) is None:
            raise CorpusError(f"{asked_by}: there is no file {path}; {self._remedy()}")
        content = read_file(path, asked_by)
        found = sha256(content)
        if found != SHA256:
            raise CorpusError(
                f"{asked_by}: {path} has {len(content):,} bytes and sha256 {found}, expected {SHA256}; "
                f"{self._remedy()}"
            )
        cuts = [round(len(content) * share) for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE)]
        return self.corpus(
            train=[content[: cuts[0]]],
            validation=[content[cuts[0] : cuts[1]]],
            test=[content[cuts[1] :]],
        )

    def _remedy(self) -> str:
        return f"unpack {ADDRESS} and put its file at {cache_dir() / 'enwik8'}, or give data.path"
