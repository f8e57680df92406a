"""Locks: one cell at a time on a device, and one sweep at a time for each cell."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from bench import records
from bench.config.spec import digest
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from bench.run.devices import Device

LOCKS = "LONGCTX_BENCH_LOCKS"
"""Environment variable: runs with different values do not share device locks. Tests set it."""
LOCK_FILE = ".claims"
MOST = 100
"""Characters of a command that are shown."""
POLL_SECONDS = 0.25
"""Polling interval of a run that waits for a device; long enough not to disturb the cell that runs there."""
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def on_device(device: Device, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Lock a device of this machine inside the context; `waiting` is called repeatedly while another run
    holds the lock, with a description of its process, and may raise.

    An accelerator is identified by its UUID, independent of its index under CUDA_VISIBLE_DEVICES in this
    process. Runs on different accelerators of one machine do not wait for each other.
    """
    name = f"longctx-bench-{digest([os.environ.get(LOCKS), device.identity])}"  # names of sockets are short
    holder = None
    while (held := _bind(name)) is None:
        holder = holder or _holder(name)
        waiting(holder)
        time.sleep(POLL_SECONDS)
    with held:
        yield


def _bind(name: str) -> AbstractContextManager[Any] | None:
    """Bind an abstract socket name of this machine until the socket is closed or the process ends; None if it
    is in use. Only Linux has such names; other systems lock a file in the temporary folder.

    A lock file would not work: schedulers may give each job its own temporary folder, or even its own /tmp,
    so two jobs on one machine would not share the file. Linux has one set of abstract socket names per
    network namespace (unix(7)). Users and jobs share it; containers share it if they use the host's network.
    """
    if sys.platform != "linux":
        return _lock_file(Path(tempfile.gettempdir(), f"{name}.lock"))
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0{name}")
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return held


def _lock_file(path: Path) -> AbstractContextManager[Any] | None:
    """Lock a file until it is closed or the process ends; None if another process has locked it."""
    held = path.open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return None
    return held


def _holder(name: str) -> str:
    """Describe the process that has bound an abstract socket name, as far as this user may see it."""
    try:
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        target = next(f"socket:[{line[6]}]" for line in lines if line[7:] == [f"@{name}"])
        for link in Path("/proc").glob("[1-9]*/fd/*"):
            with suppress(OSError):  # another user's process, or one that has ended
                if str(link.readlink()) == target:
                    command = (link.parents[1] / "cmdline").read_bytes().decode(errors="replace")
                    words = printable(shlex.join(command.split("\0")[:-1]))
                    return f"process {link.parts[2]} ({words if len(words) <= MOST else words[:MOST] + '…'})"
    except (OSError, StopIteration):  # no such files, or the lock was released meanwhile
        pass
    return "another run"


class CellLocks:
    """Locks on the cells of an experiment, so that no two sweeps measure the same cell.

    Each cell corresponds to one byte of an empty file in the experiment's folder, which is locked with POSIX
    record locks. They also work between machines that share the folder over NFS, and the system releases them
    when the process ends for any reason. A process must have at most one instance per folder at a time,
    because closing the file releases all locks of the process.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if this user has no permission to lock the folder's cells."""
        path = folder / LOCK_FILE
        try:
            new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if new:
                records.share_with_group(path)
        except OSError as error:
            why = f"{error.strerror}; its owner may give your group the right to write it"
            raise ConfigError(f"results_dir: cannot lock {printable(path)}: {why}") from None
        self._warned = False

    def close(self) -> None:
        """Release all locks."""
        os.close(self._handle)

    @contextmanager
    def lock(self, cell_id: str) -> Iterator[bool]:
        """Lock a cell inside the context; yields False if another process holds the lock."""
        if not self._lock(cell_id, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield False
            return
        try:
            yield True
        finally:
            self._lock(cell_id, fcntl.LOCK_UN)

    def _lock(self, cell_id: str, operation: int) -> bool:
        byte = int(cell_id, 16) >> 2  # an offset has 63 bits and a sign, an id 64 bits
        try:
            fcntl.lockf(self._handle, operation, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _CANNOT_LOCK:
                raise
            if not self._warned:
                print(
                    f"no file locks here ({error.strerror}): run one sweep at a time",
                    file=sys.stderr,
                )
            self._warned = True
        return True
