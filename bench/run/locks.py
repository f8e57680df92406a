"""Who measures what: one cell at a time on a device, and each cell by one sweep at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import records
from bench.config.spec import digest
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from bench.run import memory_limit

LOCKS = "LONGCTX_BENCH_LOCKS"
"""Environment variable: runs for which it differs do not wait for each other's devices. Tests set it."""
CLAIMS_FILE = ".claims"
POLL_SECONDS = 0.25
"""Whoever waits for a device looks so rarely that the cell which is measured there does not feel it."""
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def on_device(device: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have the device of this machine while inside; `waiting` is called where another run has it.

    An accelerator is known by what its driver calls it, whatever number CUDA_VISIBLE_DEVICES gives it in this
    process: runs on two of a machine's do not wait for each other.
    """
    uuid = memory_limit.device_uuid(device) if device != "cpu" else None
    name = f"longctx-bench-{digest([os.environ.get(LOCKS), uuid or device])}"  # names are short
    held = _take(name)
    if held is None:
        waiting()
        while (held := _take(name)) is None:
            time.sleep(POLL_SECONDS)
    with held:
        yield


def _take(name: str) -> socket.socket | None:
    """Take a name of this machine's until the socket is closed or the process ends; None where it is taken.

    It is no file: schedulers give each job a temporary folder of its own, or even a /tmp, and two jobs on one
    machine would not meet there. Linux keeps one set of such names for a network namespace (unix(7), abstract
    sockets): users and jobs share it, and containers do if they run on the host's network.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0{name}")
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return held


class Claims:
    """The cells of an experiment that this process has in hand, so that no other sweep measures them too.

    A cell is one byte of one empty file in the experiment's folder, locked as POSIX has it: between the
    machines that share a folder by NFS too, and let go by the system when the process ends, however it ends.
    One process may have one of these for a folder at a time: closing it gives up all that the process claims.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where this user may not lock the folder's cells."""
        path = folder / CLAIMS_FILE
        try:
            new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if new:
                records.share(path)
        except OSError as error:
            why = f"{error.strerror}; its owner may give your group the right to write it"
            raise ConfigError(f"results_dir: cannot lock {printable(path)}: {why}") from None
        self._warned = False

    def close(self) -> None:
        """Give up every claim."""
        os.close(self._handle)

    @contextmanager
    def of(self, cell_id: str, *, wait: bool) -> Iterator[bool]:
        """Claim a cell while inside; False where another process has it and is not to be waited for."""
        if not self._lock(cell_id, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            yield False
            return
        try:
            yield True
        finally:
            self._lock(cell_id, fcntl.LOCK_UN)

    def _lock(self, cell_id: str, operation: int) -> bool:
        byte = int(cell_id, 16) >> 2  # an offset is of 63 bits and a sign, an id of 64
        try:
            fcntl.lockf(self._handle, operation, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _CANNOT_LOCK:
                raise
            if not self._warned:
                print(f"no locks here ({error.strerror}): run one sweep at a time", file=sys.stderr)
            self._warned = True
        return True
