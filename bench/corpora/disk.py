"""Safe reading of the user's files and folders: no file can block the process, and no error is ignored.

Opening a FIFO or a device can block, and a link may be broken or circular. Therefore the type of a path is
checked first, and only regular files are opened.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bench.corpora.base import CorpusError

CACHED_CODE = "__pycache__"
"""A folder of compiled Python."""
_KINDS: dict[str, Callable[[int], bool]] = {
    "a file": stat.S_ISREG,
    "a folder": stat.S_ISDIR,
    "a fifo": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def file_type(path: Path, setting: str) -> str | None:
    """Return the type of a path: a file, a folder, a fifo, a socket or a device; None if nothing exists
    there.

    Raises CorpusError, with a message that begins with `setting`, for a broken link and for a path that the
    system does not allow this user to inspect.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise CorpusError(f"{setting}: {path}: {error.strerror}") from None
        if path.is_symlink():
            raise CorpusError(f"{setting}: {path} is a broken link ({path.readlink()})") from None
        return None
    return next(name for name, holds in _KINDS.items() if holds(mode))


def open_file(path: Path, setting: str) -> BinaryIO:
    """Open a regular file for reading; any other type of file is an error, so that opening never blocks.

    Raises CorpusError, with a message that begins with `setting`, such as data.path=books.
    """
    kind = file_type(path, setting)
    if kind != "a file":
        raise CorpusError(f"{setting}: {path}: {f'is {kind}, not a file' if kind else 'no such file'}")
    try:
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise CorpusError(f"{setting}: {path}: {error.strerror}") from None


def read_file(path: Path, setting: str) -> bytes:
    """Return the content of a regular file.
    Raises CorpusError, with a message that begins with `setting`."""
    with open_file(path, setting) as file:
        return read(file, setting)


def read(file: BinaryIO, setting: str, max_bytes: int = -1) -> bytes:
    """Read up to `max_bytes` bytes of an open file; by default all remaining bytes. Raises CorpusError."""
    try:
        return file.read(max_bytes)
    except OSError as error:
        raise CorpusError(f"{setting}: {file.name}: {error.strerror}") from None


def walk(folder: Path, setting: str, enter: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Yield every path below a folder that is not a folder, in arbitrary order.

    Only subfolders whose names `enter` accepts are searched. Links to folders are not followed, so that a
    circular link cannot cause an infinite loop.

    Raises CorpusError for a folder that cannot be listed.
    """
    for place, names in _folders(folder, setting, enter):
        yield from (place / name for name in names)


def expand(pattern: str, setting: str) -> Iterator[Path]:
    """Yield the paths that a glob matches, possibly with duplicates. `**` matches any folders except hidden
    folders and links.

    Raises CorpusError for a folder that `**` cannot list.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207  # Path.glob takes no absolute pattern
        return
    at = parts.index("**")
    after = "/".join(parts[at + 1 :]) or "*"
    for top in glob.glob("/".join([*parts[:at], ""]) or "./"):  # noqa: PTH207
        for place, _ in _folders(Path(top), setting, lambda name: not name.startswith(".")):
            yield from expand(f"{glob.escape(str(place))}/{after}", setting)


def files_at(path: Path, setting: str) -> tuple[Sequence[Path], Counter[str]]:
    """Return the sorted files that a path or a glob names, and the number of skipped ones by kind.

    Below a folder, hidden files are skipped, and hidden folders and `__pycache__` as a whole, which count as
    one each. Raises CorpusError if the path names nothing.
    """
    skipped: Counter[str] = Counter()

    def enter(folder: str) -> bool:
        kind = "hidden" if folder.startswith(".") else CACHED_CODE if folder == CACHED_CODE else None
        skipped.update([kind] if kind else [])
        return kind is None

    kind = file_type(path, setting)
    if kind is None:
        found = {file for file in expand(str(path), setting) if file_type(file, setting) != "a folder"}
        cached = {file for file in found if CACHED_CODE in file.parts[:-1]}
        skipped.update([CACHED_CODE] * len(cached))
        files = found - cached
    elif kind == "a folder":
        found = {*walk(path, setting, enter)}
        files = {file for file in found if not file.name.startswith(".")}
        skipped.update(["hidden"] * len(found - files))
    else:
        return [path], skipped
    if not files and not skipped:
        raise CorpusError(nothing_found(setting, kind))
    return sorted(files), skipped


def nothing_found(setting: str, kind: str | None) -> str:
    """Return why there are no files, in words; takes the result of `file_type`."""
    return f"{setting}: {'an empty folder' if kind == 'a folder' else 'no such file, folder or glob'}"


def _folders(folder: Path, setting: str, enter: Callable[[str], bool]) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and every folder below it, each with the names of its entries that are not folders."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{setting}: {error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(enter, folders)
        yield Path(place), names
