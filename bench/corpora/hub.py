"""Data sets of the Hugging Face hub: fetched once at a fixed commit, then read from the cache.

Rows are streamed, so that little more is downloaded than is taken. The same code reads a folder of the
user's with the data set's files in it (`data.path`): parquet, text, or whatever else `datasets` knows.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.corpora.base import SPLITS, Corpus, CorpusError, Document, Source, Text, Wanted, cache_dir
from bench.corpora.disk import kind_of, open_file, walk
from bench.inputs.paths import user_path

ANSWER_SECONDS = 5.0
"""How long the hub may take for its first answer; after that, `datasets` decides what is tried again."""
ROWS = 64
"""Read at a time: one by one takes six times as long for lines of text, many at once are many books."""
COLUMN = "text"
OFFLINE = "without the network take data=plays (fetched once), data=stdlib or data=files"


class Taken(NamedTuple):
    """Documents by split, and whether those for training are all there are."""

    train: Sequence[Text]
    validation: Sequence[Text]
    test: Sequence[Text]
    whole: bool


class HubSource(Source):
    """A data set with train, validation and test splits of its own, and rows with a column `text`."""

    knobs = ("path", "max_bytes")
    repository: str
    config: str | None = None
    revision: str
    """The commit, in full: a branch moves."""
    max_bytes: int | None = None
    """Most bytes of training documents where `data.max_bytes` does not say; None takes all."""

    def documents(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        """The documents that consecutive rows make up; a row each, unless a data set says otherwise."""
        return iter(rows)

    def published_test_words(self, test: Sequence[bytes]) -> int | None:
        """The authors' count of the words of the test split, if this is all of it."""
        return None

    def read(self, wanted: Wanted) -> Corpus:
        at_most = wanted.max_bytes or self.max_bytes
        return self._corpus(self._stream(at_most, wanted.path)) if wanted.path else self._cached(at_most)

    def fetch(self, wanted: Wanted) -> Path:
        """Stream the data set from the hub into the cache, unless as much of it lies there.

        Raises CorpusError, within seconds where the hub cannot be reached.
        """
        at_most = wanted.max_bytes or self.max_bytes
        try:
            self._cached(at_most)
        except CorpusError:
            self._reach()
            self._keep(self._stream(at_most, None))
        return self._cache

    @property
    def _cache(self) -> Path:
        return cache_dir() / f"{self.name}-{self.revision[:12]}.npz"

    def _corpus(self, taken: Taken) -> Corpus:
        return self.corpus(
            train=taken.train,
            validation=taken.validation,
            test=taken.test,
            published_test_words=self.published_test_words([bytes(text) for text in taken.test]),
        )

    def _keep(self, taken: Taken) -> None:
        """Put what was taken into the cache, whole or not at all."""
        corpus = self._corpus(taken)
        arrays = {}
        for split in SPLITS:
            documents = corpus.split(split)
            arrays[split] = np.concatenate(documents)
            arrays[f"{split}_lengths"] = np.array([*map(len, documents)])
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache.parent) as folder:
            file = Path(folder) / self._cache.name
            np.savez(file, allow_pickle=False, sha256=corpus.sha256, whole=taken.whole, **arrays)
            file.replace(self._cache)

    def _cached(self, at_most: int | None) -> Corpus:
        """The corpus with so many bytes of what was fetched for training.

        Raises CorpusError if that is missing, damaged or less.
        """
        data, more = f"data={self.name}", f" --max-bytes {at_most}" if at_most != self.max_bytes else ""
        remedy = f"run `python -m bench.corpora fetch {self.name}{more}`"
        if kind_of(self._cache, data) is None:
            raise CorpusError(f"{data}: not fetched yet; {remedy} once; {OFFLINE}")
        try:
            with open_file(self._cache, data) as file, np.load(file) as kept:
                train, validation, test = (_cut(kept[split], kept[f"{split}_lengths"]) for split in SPLITS)
                taken = Taken(train, validation, test, bool(kept["whole"]))
                expected = str(kept["sha256"])
        except CorpusError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CorpusError(f"{data}: {self._cache} is damaged ({_line(error)}); {remedy} again") from None
        corpus = self._corpus(taken)
        if corpus.sha256 != expected:
            raise CorpusError(
                f"{data}: {self._cache} has sha256 {corpus.sha256}, expected {expected}; {remedy} again"
            )
        have = sum(map(len, corpus.train))
        if not taken.whole and (at_most is None or at_most > have):
            asks = "all" if at_most is None else f"{at_most:,}"
            raise CorpusError(f"{data}: data.max_bytes asks for {asks} bytes, fetched are {have:,}; {remedy}")
        fewer, whole = up_to(at_most, corpus.train)
        return corpus if whole else self._corpus(taken._replace(train=fewer))

    def _reach(self) -> None:
        """Ask the hub for the commit, once: what comes after would try again for half a minute."""
        import huggingface_hub

        try:
            huggingface_hub.HfApi().dataset_info(
                self.repository, revision=self.revision, timeout=ANSWER_SECONDS
            )
        except Exception as error:  # of whatever HTTP library this version uses
            raise CorpusError(
                f"data={self.name}: cannot get {self.repository} from {huggingface_hub.constants.ENDPOINT} "
                f"({_line(error)}); {OFFLINE}"
            ) from error

    def _stream(self, at_most: int | None, folder: str | None) -> Taken:
        """The documents from the hub, or from a folder with the data set's files."""
        where = f"data.path={folder}" if folder else f"data={self.name}"
        with contextlib.ExitStack() as until_read:
            asked: dict[str, Any] = {
                "path": self.repository,
                "name": self.config,
                "revision": self.revision,
            }
            if folder:
                temporary = Path(until_read.enter_context(tempfile.TemporaryDirectory()))
                _link_plainly(self._folder(folder), temporary / "data", where)
                asked = {"path": str(temporary / "data"), "cache_dir": str(temporary / "cache")}
            try:
                until_read.enter_context(_quiet())
                tables = _tables(**asked)
                if missing := [split for split in SPLITS if split not in tables]:
                    raise CorpusError(
                        f"{where}: the {missing[0]} split is missing; there are {', '.join(tables)}"
                    )
                train, whole = up_to(at_most, self.documents(_rows(tables["train"], where)))
                validation = [*self.documents(_rows(tables["validation"], where))]
                test = [*self.documents(_rows(tables["test"], where))]
            except CorpusError:
                raise
            except Exception as error:  # a data library may fail in any way
                why = _line(error).replace(str(asked["path"]), folder or self.repository)
                raise CorpusError(f"{where}: cannot be read as {self.repository} ({why})") from error
        return Taken(train, validation, test, whole)

    def _folder(self, given: str) -> Path:
        """The folder with the files: the one given or, as on the hub, the configuration's in it."""
        folder = user_path("data.path", given)
        kind = kind_of(folder, f"data.path={given}")
        if kind != "a folder":
            found = f"is {kind}, not a folder" if kind else "no such folder"
            raise CorpusError(f"data.path={given}: {found}; give one with the files of {self.repository}")
        inside = folder / (self.config or "")
        return inside if kind_of(inside, f"data.path={given}") == "a folder" else folder


Batches = Iterable[dict[str, Any]]
"""Rows, `ROWS` or so at a time: column → values."""


def _tables(**asked: Any) -> dict[str, Batches]:
    """The splits that `datasets` finds.

    It decides which files are which split; those of Parquet are then read without it, because it reads them
    through Python's files in threads of Arrow's, and one that is left when Python ends aborts the process.
    """
    import datasets

    builder = datasets.load_dataset_builder(**asked)
    files = {str(split): list(found) for split, found in (builder.config.data_files or {}).items()}
    if all(file.endswith(".parquet") for found in files.values() for file in found):
        return {split: _parquet(found) for split, found in files.items()}
    return {str(split): table.iter(ROWS) for split, table in builder.as_streaming_dataset().items()}


def _parquet(files: list[str]) -> Batches:
    """The rows of Parquet files, on this machine or the hub's, read in this thread."""
    import huggingface_hub
    import pyarrow.parquet as pq

    for file in files:
        hub = file.startswith("hf://")
        with (
            huggingface_hub.HfFileSystem().open(file) if hub else Path(file).open("rb") as opened,
            pq.ParquetFile(opened, pre_buffer=False) as table,
        ):
            columns = [name for name in table.schema_arrow.names if name == COLUMN]
            if not columns:
                yield {name: [] for name in table.schema_arrow.names}  # which says what is there instead
            for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
                yield batch.to_pydict()


_ODD = re.compile(r"[^\w .,+=@~()&'^;-]")
"""Characters of names that mean something to fsspec or `datasets`, such as brackets, `*` and `::`."""


def _link_plainly(folder: Path, links: Path, where: str) -> None:
    """Make a folder of links to the files of another, under names without odd characters: `datasets` would
    read those as a pattern or an address."""
    links.mkdir()
    for file in sorted(walk(folder, where)):
        if (kind := kind_of(file, where)) != "a file":
            raise CorpusError(f"{where}: {file}: is {kind}, not a file")
        link = links.joinpath(*(_ODD.sub("_", part) for part in file.relative_to(folder).parts))
        while link.is_symlink():  # two names may differ in odd characters alone
            link = link.with_name(f"{link.stem}_{link.suffix}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def up_to(at_most: int | None, documents: Iterable[Text]) -> tuple[list[Text], bool]:
    """The first `at_most` bytes of documents, the last one cut to fit, and whether that is all there is."""
    if at_most is None:
        return [*documents], True
    taken: list[Text] = []
    for document in documents:
        if len(document) > at_most:
            return ([*taken, document[:at_most]] if at_most else taken), False
        taken.append(document)
        at_most -= len(document)
    return taken, True


def _rows(batches: Batches, where: str) -> Iterator[bytes]:
    for batch in batches:
        if COLUMN not in batch:
            raise CorpusError(f"{where}: has no column {COLUMN}; there are {', '.join(batch)}")
        for text in batch[COLUMN]:
            if not isinstance(text, str | bytes):
                raise CorpusError(f"{where}: its column {COLUMN} holds {text!r}; expected text")
            yield text.encode() if isinstance(text, str) else text


def _cut(text: Document, lengths: Any) -> list[Document]:
    ends = np.cumsum(lengths)
    if text.dtype != np.uint8 or ends[-1] != len(text):
        raise ValueError("its lengths do not add up")
    return np.split(text, ends[:-1])


def _line(error: Exception) -> str:
    """The first line of an error, after what kind it is."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and log lines of the libraries: what matters comes as an exception."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
