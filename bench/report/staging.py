"""A report is built in a hidden folder and replaces the old one when it is complete."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.process.signals import Interrupts
from bench.records import make_folder, share_with_group
from bench.records.files import TEMPORARY, is_abandoned, remove, temporary_path


@contextmanager
def replacing_files(folder: Path, outdated: Sequence[str]) -> Iterator[Path]:
    """A new folder to fill, whose files replace those of `folder` at the end; old files that fit a pattern of
    `outdated` and were not written again are removed.

    Until then `folder` is unchanged, and it stays so if the building fails or is interrupted. Files in
    folders below are moved before those of the folder itself, which link to them, and outdated files are
    removed last: no page lacks a picture at any time. Raises interrupts.Stopped at a signal.
    """
    for path in folder.parent.glob(f".{folder.stem}-*{TEMPORARY}"):
        if is_abandoned(path):
            remove(path)
    new = temporary_path(folder, TEMPORARY)
    with Interrupts("the report") as interrupts:
        try:
            make_folder(new)
            yield new
            with interrupts.deferred():
                _take_over(new, folder, outdated)
        finally:
            remove(new)


def _take_over(new: Path, folder: Path, outdated: Sequence[str]) -> None:
    made = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    for place in (folder, *{(folder / name).parent for name in made}):
        make_folder(place)
    with _alone(folder):
        for name in sorted(made, key=lambda name: (-len(name.parts), name)):
            (new / name).replace(folder / name)
            share_with_group(folder / name)
        for pattern in outdated:
            for path in folder.glob(pattern):
                if path.relative_to(folder) not in made:
                    path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks out other processes that would write to the folder, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
