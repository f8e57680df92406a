"""One cell, one child process: a wall-clock limit, a typed status, and figures that outlive a crash.

The parent blocks on a pipe and on the child's end, so that it takes no core from the child.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from bench.config import Cell

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
    "bench.cell",
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
    """How children start: from a server that has torch loaded and does nothing else.

    CUDA does not survive a fork, so importing what the server preloads must not initialise it.
    """
    _find_room_for_sockets()
    os.environ.update({k: v for k, v in _KEEP_MEMORY.items() if k not in os.environ})
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_PRELOAD)
    return forkserver


def allocator() -> str:
    """The memory allocator's settings in this process, for the record."""
    return ", ".join(f"{key}={os.environ.get(key, 'default')}" for key in _KEEP_MEMORY)


def run(cell: Cell, cell_id: str, stop: int | None = None) -> dict[str, Any]:
    """Run the cell in a child; returns the figures it told, with `status`, `reason` and `seconds_total`.

    A child that dies or is stopped keeps what it had told until then. It is stopped when its time is over, or
    when there is something to read from the file descriptor `stop`.
    """
    begun = time.monotonic()
    limit = cell.spec.measure.limit_seconds
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = context().Process(target=_child, args=(cell, cell_id, theirs), daemon=True)
    child.start()
    theirs.close()
    figures: dict[str, Any] = {}
    try:
        end = _listen(ours, child, begun + limit, stop, figures)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        ours.close()
    if end == "late":
        figures |= {"status": "timeout", "reason": f"still running after measure.limit_seconds={limit:g}"}
    elif end == "stopped":
        figures |= {"status": "error", "reason": "stopped by a signal to the sweep"}
    elif "status" not in figures:
        figures |= {"status": "error", "reason": _last_words(child.exitcode)}
    figures["seconds_total"] = time.monotonic() - begun
    return figures


def _listen(
    ours: Connection, child: Any, deadline: float, stop: int | None, figures: dict[str, Any]
) -> Literal["ended", "late", "stopped"]:
    """Gather figures until the child ends, the deadline passes, or `stop` says so."""
    stops = [] if stop is None else [stop]
    while True:
        ready = wait([ours, child.sentinel, *stops], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return "late"
        if ours in ready:
            try:
                figures |= ours.recv()
            except EOFError:
                child.join(timeout=max(0.0, deadline - time.monotonic()))
                return "late" if child.exitcode is None else "ended"
        elif child.sentinel in ready and not ours.poll():
            return "ended"
        elif "status" not in figures:
            return "stopped"
        else:  # all is told but the end
            stops = []


def _last_words(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the cell's process was killed by {signal.Signals(-exitcode).name}"
    return f"the cell's process ended with exit status {exitcode} and no result"


def _child(cell: Cell, cell_id: str, theirs: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it stops us
    # autograd's thread may begin with cuBLAS, which then makes the context current itself: of no consequence
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    theirs.send({"allocator": allocator()})
    theirs.send(_outcome(cell, cell_id, theirs))
    theirs.close()


def _end_with_parent() -> None:
    """End this process when its parent has, killed or not: nobody would take its figures, and the same cell
    may be running again. Blocks until then, and so takes nothing from what is measured."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(cell: Cell, cell_id: str, theirs: Connection) -> dict[str, Any]:
    from bench.cell import CellRun, DoesNotFit, Unsupported
    from bench.gates import GateFailed
    from bench.measure.roofline import AboveRoofline
    from bench.train import Diverged

    try:
        CellRun(cell, cell_id, theirs.send).run()
    except Unsupported as reason:
        return {"status": "unsupported", "reason": str(reason)}
    except DoesNotFit as reason:
        return {"status": "predicted_oom", "reason": str(reason)}
    except (GateFailed, AboveRoofline) as failure:
        return {"status": "error", "reason": str(failure)}
    except Diverged as failure:
        return {"status": "diverged", "reason": str(failure), "diverged_step": failure.step}
    except Exception as failure:
        status = "oom" if out_of_memory(failure) else "error"
        if status == "error":
            traceback.print_exc(file=sys.stderr)
        first_line = (str(failure).strip().splitlines() or [""])[0]
        return {"status": status, "reason": f"{type(failure).__name__}: {first_line}"}
    return {"status": "ok", "reason": None}


def out_of_memory(failure: Exception) -> bool:
    """Whether an exception says that memory ran out; on the CPU torch raises a plain RuntimeError."""
    import torch

    if isinstance(failure, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(failure, RuntimeError) and "can't allocate memory" in str(failure)
