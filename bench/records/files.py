"""Atomic writing of files, for many writers on a file system that several machines may share.

A writer fills its own temporary file in the target folder, and renames it when all data is on the disk.
Therefore a reader, even after a power failure, finds either the old or the new file, never an incomplete one.
If two writers write one file, the later one wins. No locks are used, because shared file systems often lack
them.

Folders that are writable by their group are treated as shared between users: see `share_with_group`.
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
PROFILES_DIR = "profiles"
TEMPORARY, ASIDE = ".tmp", ".aside"
ABANDONED_SECONDS = 3600.0
"""A temporary file that has not been modified for this long belongs to a dead process, on any machine."""
_HIDDEN = re.compile(r"\..+-((?P<host>\w+)\.(?P<process>\d+)\.)?\w{8}\.(tmp|aside)")


def path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's record in the experiment's folder."""
    return folder / RECORDS_DIR / f"{cell_id}.json"


def parts_of(folder: Path) -> Path:
    """Return the folder of the parts.
    It is separate, so that it is fast to list regardless of the number of records."""
    return folder / RECORDS_DIR / "parts"


def curve_path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's training curve in the experiment's folder."""
    return folder / CURVES_DIR / f"{cell_id}.csv"


def profile_path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of the table of a cell's profile. The trace beside it has the suffix .json.gz."""
    return folder / PROFILES_DIR / f"{cell_id}.md"


@contextmanager
def atomic_writer(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file for writing, and rename it to `path` when all its data is on the disk."""
    make_folder(path.parent)
    temporary = temporary_path(path, TEMPORARY)
    try:
        with temporary.open("x+b") as file:
            share_with_group(temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a text to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(text.encode())


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they do not exist."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):  # another writer has just created it
        folder.mkdir()
        share_with_group(folder)
        _sync(folder.parent)


def share_with_group(path: Path) -> None:
    """Make a new file or folder writable by its group if the parent folder is writable by the same group.

    Otherwise the umask of one user would prevent the others from replacing, locking and reading the files.
    """
    above, own = path.parent.stat(), path.stat()
    if above.st_mode & stat.S_IWGRP and above.st_gid == own.st_gid:
        rights = 0o2070 if stat.S_ISDIR(own.st_mode) else 0o060
        path.chmod(stat.S_IMODE(own.st_mode | above.st_mode & rights))


def temporary_path(path: Path, suffix: str) -> Path:
    """Return an unused, hidden name in the path's folder;
    it contains the file's name and the owner's host and process."""
    owner = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.stem}-{owner}{suffix}")


def temporary_files_of(path: Path) -> list[Path]:
    """Return the temporary files of processes that were killed while they wrote to `path`."""
    return list(path.parent.glob(f".{path.stem}-*{TEMPORARY}"))


def is_abandoned(path: Path) -> bool:
    """Return whether the writer of a temporary file or folder is dead: it ran on this machine and has ended,
    or it has not modified the file for `ABANDONED_SECONDS`."""
    made = _HIDDEN.fullmatch(path.name)
    if not made:  # not one of our temporary files
        return False
    if made["host"] == _host() and not _runs(int(made["process"])):
        return True
    try:
        touched = max(one.stat().st_mtime for one in (path, *path.glob("*/")))
    except OSError:  # its writer has finished, or this user may not access it
        return False
    return time.time() - touched > ABANDONED_SECONDS


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of dead processes from an experiment's folder,
    but not those of running ones."""
    for path in (*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"*/.*{TEMPORARY}")):
        if is_abandoned(path):
            with suppress(OSError):  # it belongs to another user
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
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
    except PermissionError:  # a process of another user
        pass
    return True


def _sync(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the file system supports it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
