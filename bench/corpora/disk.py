"""Files and folders of the user's, read so that nothing on a disk can hang the process or go unnoticed.

A fifo or a device blocks whoever opens it, a link may lead nowhere or in a circle: what is not a regular file
is refused by its kind before it is opened.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from bench.corpora.base import CorpusError

_KINDS: dict[str, Callable[[int], bool]] = {
    "a file": stat.S_ISREG,
    "a folder": stat.S_ISDIR,
    "a fifo": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def kind_of(path: Path, asked_by: str) -> str | None:
    """What a path leads to: a file, a folder, a fifo, a socket or a device; None where nothing is there.

    Raises CorpusError, which begins with `asked_by`, for a link that leads nowhere and for what the system
    does not let one look at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise CorpusError(f"{asked_by}: {path}: {error.strerror}") from None
        if path.is_symlink():
            raise CorpusError(f"{asked_by}: {path} is a link to nothing ({path.readlink()})") from None
        return None
    return next(name for name, holds in _KINDS.items() if holds(mode))


def open_file(path: Path, asked_by: str) -> BinaryIO:
    """A regular file, open for reading; nothing else is opened, so nothing blocks.

    Raises CorpusError that begins with who asked for it, such as data.path=books.
    """
    kind = kind_of(path, asked_by)
    if kind != "a file":
        raise CorpusError(f"{asked_by}: {path}: {f'is {kind}, not a file' if kind else 'no such file'}")
    try:
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise CorpusError(f"{asked_by}: {path}: {error.strerror}") from None


def read_file(path: Path, asked_by: str) -> bytes:
    """The content of a regular file. Raises CorpusError that begins with who asked for it."""
    with open_file(path, asked_by) as file:
        return read(file, asked_by)


def read(file: BinaryIO, asked_by: str, most: int = -1) -> bytes:
    """Up to `most` bytes of an open file, by default all the rest. Raises CorpusError."""
    try:
        return file.read(most)
    except OSError as error:
        raise CorpusError(f"{asked_by}: {file.name}: {error.strerror}") from None


def walk(folder: Path, asked_by: str, enter: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Everything below a folder that is no folder, in no order; of the folders, those that `enter` allows by
    name. Links to folders are not followed, so that a circle ends.

    Raises CorpusError for a folder that cannot be listed.
    """
    for place, names in _folders(folder, asked_by, enter):
        yield from (place / name for name in names)


def expand(pattern: str, asked_by: str) -> Iterator[Path]:
    """What a glob finds; a path may come twice. `**` stands for any folders but hidden ones and links.

    Raises CorpusError for a folder that `**` cannot list.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207  # Path.glob takes no absolute pattern
        return
    at = parts.index("**")
    after = "/".join(parts[at + 1 :]) or "*"
    for top in glob.glob("/".join([*parts[:at], ""]) or "./"):  # noqa: PTH207
        for place, _ in _folders(Path(top), asked_by, lambda name: not name.startswith(".")):
            yield from expand(f"{glob.escape(str(place))}/{after}", asked_by)


def _folders(folder: Path, asked_by: str, enter: Callable[[str], bool]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, with the names of what in each is no folder."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{asked_by}: {error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(enter, folders)
        yield Path(place), names
