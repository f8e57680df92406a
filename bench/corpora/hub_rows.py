"""The rows of a data set of the hub, read with `datasets` or directly from Parquet files."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.corpora.base import CorpusError
from bench.corpora.disk import file_type

ROWS = 64
"""Rows read at a time. Reading one row at a time is six times slower for lines of text; a large batch may
hold many whole books in memory."""
COLUMN = "text"
Batches = Iterable[dict[str, Any]]
"""Batches of about `ROWS` rows: column → values."""


def tables(**source: Any) -> dict[str, Batches]:
    """Return the splits of a data set; `source` are the arguments of `datasets.load_dataset_builder`.

    `datasets` decides which files belong to which split. Parquet files are then read without `datasets`: it
    reads them in Arrow's threads, and a thread that still runs when Python exits aborts the process.
    """
    import datasets

    builder = datasets.load_dataset_builder(**source)
    files = {str(split): list(found) for split, found in (builder.config.data_files or {}).items()}
    if all(file.endswith(".parquet") for found in files.values() for file in found):
        return {split: _parquet(found) for split, found in files.items()}
    return {str(split): table.iter(ROWS) for split, table in builder.as_streaming_dataset().items()}


def _parquet(files: list[str]) -> Batches:
    """Read the rows of local or remote Parquet files in this thread."""
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
                # for the error message of `rows`, which lists the columns
                yield {name: [] for name in table.schema_arrow.names}
            for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
                yield batch.to_pydict()


_SPECIAL = re.compile(r"[^\w .,+=@~()&'^;-]")
"""Characters with a special meaning to fsspec or `datasets`, such as brackets, `*` and `::`."""


def link_with_safe_names(files: Iterable[Path], folder: Path, links: Path, where: str) -> None:
    """Create a folder of links to files below another folder, with special characters replaced in the names:
    `datasets` would interpret them as a pattern or an address."""
    links.mkdir()
    for file in sorted(files):
        if (kind := file_type(file, where)) != "a file":
            raise CorpusError(f"{where}: {file}: is {kind}, not a file")
        link = links.joinpath(*(_SPECIAL.sub("_", part) for part in file.relative_to(folder).parts))
        while link.is_symlink():  # two names may differ only in special characters
            link = link.with_name(f"{link.stem}_{link.suffix}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def rows(batches: Batches, where: str) -> Iterator[bytes]:
    """Yield the text of each row, in UTF-8. Raises CorpusError for a missing column, and for other types."""
    for batch in batches:
        if COLUMN not in batch:
            raise CorpusError(f"{where}: has no column {COLUMN}; there are {', '.join(batch)}")
        for text in batch[COLUMN]:
            if not isinstance(text, str | bytes):
                raise CorpusError(f"{where}: its column {COLUMN} holds {text!r}; expected text")
            yield text.encode() if isinstance(text, str) else text


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Disable the progress bars and log messages of the libraries; real problems raise exceptions."""
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
