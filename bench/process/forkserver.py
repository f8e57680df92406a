"""How child processes start: from a server that has torch loaded and does nothing else."""

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
"""glibc settings under which freed memory stays with the process: a step then reuses pages, as it does
after the first few seconds of any long training, instead of paying for fresh ones each time."""
_LONGEST_FOLDER = 70
"""Bytes of a folder's path in which a socket of multiprocessing's, 33 bytes more, still has a legal one."""
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.utils.flop_counter",
    "bench.run.cell",
]


def _find_room_for_sockets() -> None:
    """Where the temporary folder's path is too long for a socket in it, as some clusters' are, have
    multiprocessing take /tmp for its sockets; it keeps to its first choice."""
    given = tempfile.gettempdir()
    if len(os.fsencode(given)) <= _LONGEST_FOLDER:
        return
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = given


def context() -> Any:
    """What starts children.

    CUDA does not survive a fork, so importing what the server preloads must not initialise it. The server and
    its children do not hear that a terminal was closed: who started them does, and ends them.
    """
    _find_room_for_sockets()
    os.environ.update({k: v for k, v in _KEEP_MEMORY.items() if k not in os.environ})
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_PRELOAD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return forkserver


def allocator() -> str:
    """The memory allocator's settings in this process, for the record."""
    return ", ".join(f"{key}={os.environ.get(key, 'default')}" for key in _KEEP_MEMORY)


def ask(question: Callable[..., T], *arguments: Any) -> T:
    """The answer of a child process that ends when it has given it."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(question, *arguments).result()
