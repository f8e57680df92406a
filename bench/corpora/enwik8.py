"""enwik8: the first 10⁸ bytes of an English Wikipedia dump of 2006, including markup."""

from __future__ import annotations

from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Source, cache_dir, sha256
from bench.corpora.disk import file_type, read_file
from bench.inputs.paths import user_path

ADDRESS = "https://mattmahoney.net/dc/enwik8.zip"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
"""Of the unpacked file. Every publication of the file, such as compression benchmarks, gives this hash."""
TRAIN_SHARE, VALIDATION_SHARE = 0.90, 0.05


class Enwik8(Source):
    """The unpacked file, either in the cache or at `data.path`.

    The first 90 % of the bytes are the training split, the next 5 % validation and the last 5 % test. Each
    split is one document. This is the usual split (Al-Rfou 2018, arXiv:1808.04444).
    """

    knobs = ("path",)

    def fetch(self, options: CorpusOptions) -> Path:
        """Always raises CorpusError, which explains the manual download:
        this corpus is not fetched automatically."""
        raise CorpusError(f"data=enwik8: is not downloaded automatically; {self._remedy()}")

    def read(self, options: CorpusOptions) -> Corpus:
        if options.path:
            path, setting = user_path("data.path", options.path), f"data.path={options.path}"
        else:
            path, setting = cache_dir() / "enwik8", "data=enwik8"
        if file_type(path, setting) is None:
            raise CorpusError(f"{setting}: there is no file {path}; {self._remedy()}")
        content = read_file(path, setting)
        actual = sha256(content)
        if actual != SHA256:
            raise CorpusError(
                f"{setting}: {path} has {len(content):,} bytes and sha256 {actual}, expected {SHA256}; "
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
