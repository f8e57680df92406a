"""Start of child processes from a fork server that has torch imported and does nothing else."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc settings that keep freed memory in the process. A step then reuses pages, as in a long training after
the first few seconds, instead of requesting new ones each time."""
_QUIET = {"KINETO_LOG_LEVEL": "99"}
"""Without this setting, torch's profiler writes lines about itself to stderr."""
_LONGEST_FOLDER = 70
"""Maximum length, in bytes, of a folder's path in which a multiprocessing
socket (33 bytes more) still has a valid path."""
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.utils.flop_counter",
    "bench.run.cell",
]


def _find_room_for_sockets() -> None:
    """Make multiprocessing create its sockets in /tmp if the path of the temporary folder is too long for a
    socket, as on some clusters. multiprocessing keeps its first choice."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = folder


def context() -> Any:
    """Return the multiprocessing context that starts child processes.

    CUDA cannot be used after a fork, so the preloaded modules must not initialise it. The server and its
    children block SIGHUP; the process that started them receives it and ends them.
    """
    _find_room_for_sockets()
    os.environ.update({k: v for k, v in {**_KEEP_MEMORY, **_QUIET}.items() if k not in os.environ})
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_PRELOAD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return forkserver


def allocator() -> str:
    """Return the memory allocator's settings in this process, for the record."""
    return ", ".join(f"{key}={os.environ.get(key, 'default')}" for key in _KEEP_MEMORY)


def run_in_child(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a child process that then ends; returns the function's result."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments).result()
