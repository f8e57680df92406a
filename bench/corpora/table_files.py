"""Tables of a user: JSON lines, Parquet, Arrow, CSV, and folders that `datasets` saved or downloaded.

Only local files are read. `datasets` decides by the names of files and folders which split a file belongs to,
and reads all formats except Parquet. No format is read that can contain code, such as pickles.
"""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.corpora.base import CorpusError, in_words
from bench.corpora.disk import file_type, files_at, read_file, walk
from bench.corpora.hub_rows import first_line, link_with_safe_names, without_output
from bench.corpora.splits import chosen
from bench.inputs.paths import user_path

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256
"""Rows read at a time."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMATS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".csv": "CSV",
    ".tsv": "CSV",
}
"""End of a file's name → format."""
METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
SAVED = ("state.json", "dataset_dict.json")
"""`save_to_disk` writes one of them."""
SNAPSHOTS = "snapshots"
"""Subfolder of a data set in the cache of the hub, with a folder for each downloaded commit."""
DOWNLOAD = "hf download {} --repo-type dataset --local-dir FOLDER"


class Tables(NamedTuple):
    """Files that contain one data set."""

    path: str
    """As the user gave it."""
    folder: Path | None
    """The folder that `save_to_disk` wrote; None for other files."""
    files: tuple[Path, ...]
    root: Path
    """A folder that contains all files."""
    skipped: Counter[str]
    """Other files, by kind."""


def format_of(file: Path) -> str | None:
    """Return the format of a table by its name, or None."""
    suffixes = file.suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1].lower()) if suffixes else None


def find(text: str, setting: str) -> Tables:
    """Return the tables at a file, folder or glob. Raises CorpusError if there are none, or several kinds."""
    path = user_path("data.path", text)
    kind = file_type(path, setting)
    if kind is None and path == Path(text) and text.count("/") == 1 and "*" not in text:
        raise CorpusError(
            f"{setting}: no such file, folder or glob; nothing is downloaded by a run: "
            f"`{DOWNLOAD.format(text)}` fetches a data set of the hub"
        )
    if kind == "a folder":
        path = _snapshot(path, setting)
        if any(file_type(path / name, setting) for name in SAVED):
            saved = tuple(sorted(walk(path, setting)))
            return Tables(text, path, saved, path, Counter())
    found, skipped = files_at(path, setting)
    tables = [file for file in found if format_of(file) and file.name not in METADATA]
    skipped.update(file.suffix or "without suffix" for file in found if file not in set(tables))
    formats = sorted({str(format_of(file)) for file in tables})
    if len(formats) > 1:
        raise CorpusError(f"{setting}: has {' and '.join(formats)} files; choose one kind by a glob")
    if not tables:
        other = f" (there are: {in_words(skipped)})" if skipped else ""
        raise CorpusError(f"{setting}: no table{other}; allowed are {', '.join(FORMATS)}, or save_to_disk")
    root = path if kind == "a folder" else tables[0].parent
    while not all(file.is_relative_to(root) for file in tables):
        root = root.parent
    return Tables(text, None, tuple(tables), root, skipped)


def _snapshot(folder: Path, setting: str) -> Path:
    """Return the folder of the downloaded commit if `folder` is a data set in the cache of the hub."""
    if file_type(folder / SNAPSHOTS, setting) != "a folder" or not folder.name.startswith("datasets--"):
        return folder
    commits = sorted(place.name for place in (folder / SNAPSHOTS).iterdir())
    main = folder / "refs" / "main"
    if file_type(main, setting) == "a file":
        commit = read_file(main, setting).decode(errors="replace").strip()
        if commit in commits:
            return folder / SNAPSHOTS / commit
    if len(commits) != 1:
        raise CorpusError(f"{setting}: has {len(commits)} commits in {SNAPSHOTS}/; give the folder of one")
    return folder / SNAPSHOTS / commits[0]


@contextlib.contextmanager
def columns(
    tables: Tables, field: str, split: str | None, setting: str
) -> Iterator[dict[str, Iterator[Any]]]:
    """Context: the values of one column by split, each some rows at a time, as arrays of pyarrow.

    Raises CorpusError for an unknown split or column, and for a file that cannot be read.
    """
    with contextlib.ExitStack() as until_read:
        place = Path(until_read.enter_context(tempfile.TemporaryDirectory()))
        until_read.enter_context(without_output())
        try:
            batches = _saved(tables) if tables.folder else _linked(tables, place, field, setting)
            names = chosen(list(batches), split, setting)
            yield {name: _column(batches[name], field, setting) for name in names}
        except CorpusError:
            raise
        except Exception as error:  # the libraries may raise any exception
            reason = first_line(error).replace(str(place / "data"), tables.path)
            raise CorpusError(f"{setting}: cannot be read ({reason})") from error


def _column(batches: Iterable[Any], field: str, setting: str) -> Iterator[Any]:
    for batch in batches:
        if field not in batch.column_names:
            raise CorpusError(f"{setting}: {_no_column(field, batch.column_names)}")
        yield batch.column(field)


def _no_column(field: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"data.field={field}: no such column; there are {', '.join(known) or 'none'}{hint}"


def _saved(tables: Tables) -> dict[str, Iterable[pa.Table]]:
    """Return the splits of a folder that `save_to_disk` wrote; they are memory-mapped."""
    import datasets

    saved = datasets.load_from_disk(str(tables.folder), keep_in_memory=False)
    by_split = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    return {str(name): one.with_format("arrow").iter(ROWS) for name, one in by_split.items()}


def _linked(
    tables: Tables, place: Path, field: str, setting: str
) -> dict[str, Iterable[pa.Table | pa.RecordBatch]]:
    """Return the splits of other files. `datasets` sees only them, under names without special characters."""
    import datasets

    links = place / "data"
    link_with_safe_names(tables.files, tables.root, links, setting)
    builder = datasets.load_dataset_builder(str(links), cache_dir=str(place / "cache"))
    files = {str(split): list(found) for split, found in (builder.config.data_files or {}).items()}
    if format_of(tables.files[0]) == "Parquet":
        return {split: _parquet(found, field) for split, found in files.items()}
    streams: dict[Any, Any] = builder.as_streaming_dataset()
    return {str(split): stream.with_format("arrow").iter(ROWS) for split, stream in streams.items()}


def _parquet(files: list[str], field: str) -> Iterator[pa.Table | pa.RecordBatch]:
    """Read in this thread: a thread of Arrow that still runs when Python exits aborts the process."""
    import pyarrow.parquet as pq

    for file in files:
        with Path(file).open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as table:
            yield table.schema_arrow.empty_table()  # for the error message of a missing column
            columns = [name for name in table.schema_arrow.names if name == field]
            yield from table.iter_batches(ROWS, columns=columns, use_threads=False)
