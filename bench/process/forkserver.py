"""Start of child processes from a fork server that has torch imported and does nothing else."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.popen_forkserver
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
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


class _Popen(multiprocessing.popen_forkserver.Popen):
    """Starts a child that does not import the main module of this process. A script without `if __name__ ==
    "__main__"` would otherwise run again in each child, without end."""

    def _launch(self, process_obj: BaseProcess) -> None:
        with _starting:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                super()._launch(process_obj)  # type: ignore[misc]  # of BaseProcess.start
            finally:
                sys.modules["__main__"] = main


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


_starting = threading.Lock()
"""One process is started at a time, because that changes `sys.modules`."""


def context() -> Any:
    """Return the multiprocessing context that starts child processes. What a child calls must be in a module
    that it can import: not in `__main__`.

    CUDA cannot be used after a fork, so the preloaded modules must not initialise it. The server and its
    children block SIGHUP; the process that started them receives it and ends them.
    """
    _find_room_for_sockets()
    os.environ.update({k: v for k, v in {**_KEEP_MEMORY, **_QUIET}.items() if k not in os.environ})
    forkserver = _Context()
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
