"""Data sets of the Hugging Face hub: fetched once at a fixed commit, then read from the cache.

Rows are streamed, so that only slightly more is downloaded than is used. The same code reads a local folder
that contains the data set's files (`data.path`): Parquet, text, or any other format that `datasets` supports.
"""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.corpora.base import SPLITS, Corpus, CorpusError, CorpusOptions, Document, Source, Text, cache_dir
from bench.corpora.disk import file_type, open_file, walk
from bench.corpora.hub_rows import first_line, link_with_safe_names, rows, tables, without_output
from bench.inputs.paths import user_path

ANSWER_SECONDS = 5.0
"""Timeout of the first request to the hub. Later requests use the retry policy of `datasets`."""
OFFLINE = "without the network, use data=plays (fetched once), data=stdlib or data=files"


class HubSplits(NamedTuple):
    """Documents by split, and `whole`: whether the training documents are complete."""

    train: Sequence[Text]
    validation: Sequence[Text]
    test: Sequence[Text]
    whole: bool


class HubSource(Source):
    """A data set that defines its own train, validation and test splits and has a column `text`."""

    knobs = ("path", "max_bytes")
    repository: str
    config: str | None = None
    revision: str
    """The full commit hash, because a branch changes over time."""
    max_bytes: int | None = None
    """Maximum number of training bytes if `data.max_bytes` is not set; None takes all."""

    def documents(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        """Group consecutive rows into documents. By default each row is one document."""
        return iter(rows)

    def published_test_words(self, test: Sequence[bytes]) -> int | None:
        """Return the authors' word count of the test split, if `test` is the complete split, else None."""
        return None

    def read(self, options: CorpusOptions) -> Corpus:
        at_most = options.max_bytes or self.max_bytes
        return self._corpus(self._stream(at_most, options.path)) if options.path else self._cached(at_most)

    def fetch(self, options: CorpusOptions) -> Path:
        """Stream the data set from the hub into the cache, unless the cache already holds enough of it.

        Raises CorpusError; within seconds if the hub cannot be reached.
        """
        at_most = options.max_bytes or self.max_bytes
        try:
            self._cached(at_most)
        except CorpusError:
            self._check_reachable()
            self._store(self._stream(at_most, None))
        return self._cache

    @property
    def _cache(self) -> Path:
        return cache_dir() / f"{self.name}-{self.revision[:12]}.npz"

    def _corpus(self, splits: HubSplits) -> Corpus:
        return self.corpus(
            train=splits.train,
            validation=splits.validation,
            test=splits.test,
            published_test_words=self.published_test_words([bytes(text) for text in splits.test]),
        )

    def _store(self, splits: HubSplits) -> None:
        """Write the documents to the cache atomically."""
        corpus = self._corpus(splits)
        arrays = {}
        for split in SPLITS:
            documents = corpus.split(split)
            arrays[split] = np.concatenate(documents)
            arrays[f"{split}_lengths"] = np.array([*map(len, documents)])
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache.parent) as folder:
            file = Path(folder) / self._cache.name
            np.savez(file, allow_pickle=False, sha256=corpus.sha256, whole=splits.whole, **arrays)
            file.replace(self._cache)

    def _cached(self, at_most: int | None) -> Corpus:
        """Return the cached corpus with at most `at_most` bytes of training documents.

        Raises CorpusError if the cached file is missing, damaged or too small.
        """
        data, more = f"data={self.name}", f" --max-bytes {at_most}" if at_most != self.max_bytes else ""
        remedy = f"run `python -m bench.corpora fetch {self.name}{more}`"
        if file_type(self._cache, data) is None:
            raise CorpusError(f"{data}: not fetched yet; {remedy} once; {OFFLINE}")
        try:
            with open_file(self._cache, data) as file, np.load(file) as arrays:
                train, validation, test = (
                    _split_at(arrays[split], arrays[f"{split}_lengths"]) for split in SPLITS
                )
                splits = HubSplits(train, validation, test, bool(arrays["whole"]))
                expected = str(arrays["sha256"])
        except CorpusError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CorpusError(
                f"{data}: {self._cache} is damaged ({first_line(error)}); {remedy} again"
            ) from None
        corpus = self._corpus(splits)
        if corpus.sha256 != expected:
            raise CorpusError(
                f"{data}: {self._cache} has sha256 {corpus.sha256}, expected {expected}; {remedy} again"
            )
        have = sum(map(len, corpus.train))
        if not splits.whole and (at_most is None or at_most > have):
            wanted = "all" if at_most is None else f"{at_most:,}"
            raise CorpusError(
                f"{data}: data.max_bytes asks for {wanted} bytes, but {have:,} were fetched; {remedy}"
            )
        fewer, whole = truncate_documents(at_most, corpus.train)
        return corpus if whole else self._corpus(splits._replace(train=fewer))

    def _check_reachable(self) -> None:
        """Request the commit from the hub once, because later requests would be retried for half a minute."""
        import huggingface_hub

        try:
            huggingface_hub.HfApi().dataset_info(
                self.repository, revision=self.revision, timeout=ANSWER_SECONDS
            )
        except Exception as error:  # the exception type depends on the HTTP library of this version
            raise CorpusError(
                f"data={self.name}: cannot get {self.repository} from {huggingface_hub.constants.ENDPOINT} "
                f"({first_line(error)}); {OFFLINE}"
            ) from error

    def _stream(self, at_most: int | None, folder: str | None) -> HubSplits:
        """Read the documents from the hub, or from a folder with the data set's files."""
        where = f"data.path={folder}" if folder else f"data={self.name}"
        with contextlib.ExitStack() as until_read:
            source: dict[str, Any] = {
                "path": self.repository,
                "name": self.config,
                "revision": self.revision,
            }
            if folder:
                temporary = Path(until_read.enter_context(tempfile.TemporaryDirectory()))
                files = self._folder(folder)
                link_with_safe_names(walk(files, where), files, temporary / "data", where)
                source = {"path": str(temporary / "data"), "cache_dir": str(temporary / "cache")}
            try:
                until_read.enter_context(without_output())
                splits = tables(**source)
                if missing := [split for split in SPLITS if split not in splits]:
                    raise CorpusError(
                        f"{where}: the {missing[0]} split is missing; there are {', '.join(splits)}"
                    )
                train, whole = truncate_documents(at_most, self.documents(rows(splits["train"], where)))
                validation = [*self.documents(rows(splits["validation"], where))]
                test = [*self.documents(rows(splits["test"], where))]
            except CorpusError:
                raise
            except Exception as error:  # the libraries may raise any exception
                why = first_line(error).replace(str(source["path"]), folder or self.repository)
                raise CorpusError(f"{where}: cannot be read as {self.repository} ({why})") from error
        return HubSplits(train, validation, test, whole)

    def _folder(self, path: str) -> Path:
        """Return the folder with the files:
        `path` itself or, as on the hub, its subfolder of the configuration."""
        folder = user_path("data.path", path)
        kind = file_type(folder, f"data.path={path}")
        if kind != "a folder":
            problem = f"is {kind}, not a folder" if kind else "no such folder"
            raise CorpusError(f"data.path={path}: {problem}; give one with the files of {self.repository}")
        inside = folder / (self.config or "")
        return inside if file_type(inside, f"data.path={path}") == "a folder" else folder


def truncate_documents(at_most: int | None, documents: Iterable[Text]) -> tuple[list[Text], bool]:
    """Return the first `at_most` bytes of the documents, and whether these are all of them; the last document
    is truncated to fit."""
    if at_most is None:
        return [*documents], True
    result: list[Text] = []
    for document in documents:
        if len(document) > at_most:
            return ([*result, document[:at_most]] if at_most else result), False
        result.append(document)
        at_most -= len(document)
    return result, True


def _split_at(text: Document, lengths: Any) -> list[Document]:
    ends = np.cumsum(lengths)
    if text.dtype != np.uint8 or ends[-1] != len(text):
        raise ValueError("its lengths do not add up")
    return np.split(text, ends[:-1])
