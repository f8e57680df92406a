"""Files that are whole or not there, for many writers on a file system that several machines share.

A writer fills a temporary file of its own, in the folder where it is going, and renames it when all of it is
on the disk. So a reader, or a power cut, finds the old file or the new one and never a part; of two writers
of one file the later one's is there, whole. No locks, which such file systems often lack.

A folder that its group may write is one that people share: see `share`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

RECORDS_DIR = "records"
CURVES_DIR = "curves"
TEMPORARY, ASIDE = ".tmp", ".aside"
ABANDONED_SECONDS = 3600.0
"""A temporary that nobody has written to for so long is of a process that died, on whatever machine."""
_HIDDEN = re.compile(r"\..+-((?P<host>\w+)\.(?P<process>\d+)\.)?\w{8}\.(tmp|aside)")


def path_of(folder: Path, cell_id: str) -> Path:
    """Where a cell's record lives in the experiment's folder."""
    return folder / RECORDS_DIR / f"{cell_id}.json"


def parts_of(folder: Path) -> Path:
    """Where the parts lie: a folder of their own, listed in no time however many records there are."""
    return folder / RECORDS_DIR / "parts"


def curve_path_of(folder: Path, cell_id: str) -> Path:
    """Where a cell's training curve lies in the experiment's folder."""
    return folder / CURVES_DIR / f"{cell_id}.csv"


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """A file to write that takes the path's place when all of it is on the disk."""
    make_folder(path.parent)
    temporary = beside(path, TEMPORARY)
    try:
        with temporary.open("x+b") as file:
            share(temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Put a text in the path's place, whole."""
    with replacing(path) as file:
        file.write(text.encode())


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, and those above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):  # of another writer, meanwhile
        folder.mkdir()
        share(folder)
        _sync(folder.parent)


def share(path: Path) -> None:
    """Give the group of the folder above, where it may write there, the same rights to a new file or folder.

    The umask of one person would lock out the others, who have to replace, lock and read what is there.
    """
    above, own = path.parent.stat(), path.stat()
    if above.st_mode & stat.S_IWGRP and above.st_gid == own.st_gid:
        rights = 0o2070 if stat.S_ISDIR(own.st_mode) else 0o060
        path.chmod(stat.S_IMODE(own.st_mode | above.st_mode & rights))


def beside(path: Path, suffix: str) -> Path:
    """A name that no file has, in the path's folder: hidden, it says for which file and whose it is."""
    owner = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.stem}-{owner}{suffix}")


def unfinished(path: Path) -> list[Path]:
    """What processes that were killed as they wrote to the path left beside it."""
    return list(path.parent.glob(f".{path.stem}-*{TEMPORARY}"))


def abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file or folder is dead: it ran here and does not any more, or it has
    not touched the file for `ABANDONED_SECONDS`."""
    made = _HIDDEN.fullmatch(path.name)
    if not made:  # none of ours
        return False
    if made["host"] == _host() and not _runs(int(made["process"])):
        return True
    try:
        touched = max(one.stat().st_mtime for one in (path, *path.glob("*/")))
    except OSError:  # its writer is done, or it is none of our business
        return False
    return time.time() - touched > ABANDONED_SECONDS


def tidy(folder: Path) -> None:
    """Remove what writers that died left of files in an experiment's folder; what one still writes stays."""
    for path in (*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"*/.*{TEMPORARY}")):
        if abandoned(path):
            with suppress(OSError):  # somebody else's
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; it may be gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:40] or "unknown"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk too, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
