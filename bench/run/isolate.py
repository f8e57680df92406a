"""One cell, one child process: limits of time and memory, a typed status, and figures that outlive a crash.

The parent blocks on pipes and on the child's end, so that it takes no core from the child.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from bench.config.spec import Cell
from bench.process import cgroups, forkserver, stderr_tail
from bench.process.stderr_tail import LastWords
from bench.run import memory_limit
from variants.safe_output import drop_failed_output

LONGEST_WAIT = 86_400.0
"""Seconds that the system is asked to wait at once; it counts milliseconds, in 32 bits."""
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "STATUS_ALLOC_FAILED")
"""Of a plain RuntimeError, or of a library that aborts the process: torch's allocator on the CPU, the
system's, C++'s, and CUDA's libraries."""


def run(cell: Cell, cell_id: str, code_sha256: str, stop: int | None = None) -> dict[str, Any]:
    """Run the cell in a child; returns the figures it told, with `status`, `reason` and `seconds_total`.

    A child that dies or is stopped keeps what it had told until then. It is stopped when its time is over, or
    when there is something to read from the file descriptor `stop`. What it said last on stderr is left in
    the experiment's folder, unless it is ok.
    """
    leftover = memory_limit.settle(cell.spec.device)
    memory = memory_limit.memory_bytes(cell.spec)
    kills = cgroups.oom_kills()
    figures: dict[str, Any] = {
        "device_leftover_bytes": leftover,
        "memory_limit_bytes": None if memory == memory_limit.UNLIMITED else memory,
    }
    begun = time.monotonic()
    limit = cell.spec.measure.limit_seconds
    words = LastWords()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = forkserver.context().Process(
        target=_child, args=(cell, cell_id, code_sha256, memory, theirs, words.theirs), daemon=True
    )
    child.start()
    theirs.close()
    words.theirs.close()
    try:
        end = _listen(ours, words, child, begun + limit, stop, figures)
        if end == "late":
            words.ask_where(child.pid)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        words.take()
        ours.close()
    if end == "late":
        figures |= {"status": "timeout"} | _why(f"still running after measure.limit_seconds={limit:g}", words)
    elif end == "stopped":
        figures |= {"status": "error", "reason": "stopped by a signal to the sweep before it ended"}
    elif "status" not in figures:
        figures |= _unsaid(child.exitcode, words, kills)
    told = figures.pop("traceback", "")
    if figures["status"] == "error":
        sys.stderr.write(told)
    stderr_tail.keep(cell.folder, cell_id, "" if figures["status"] == "ok" else words.text + told)
    words.ours.close()
    figures["seconds_total"] = time.monotonic() - begun
    return figures


def _listen(
    ours: Connection, words: LastWords, child: Any, deadline: float, stop: int | None, figures: dict[str, Any]
) -> Literal["ended", "late", "stopped"]:
    """Gather figures until the child ends, the deadline passes, or `stop` says so."""
    telling = True
    while True:
        pipes: list[Any] = [*([ours] if telling else []), *([words.ours] if words.more else [])]
        stops = [stop] if stop is not None and "status" not in figures else []
        left = max(0.0, deadline - time.monotonic())
        ready = wait([*pipes, *stops, child.sentinel], timeout=min(left, LONGEST_WAIT))
        if not ready:
            if left > LONGEST_WAIT:
                continue
            return "late"
        words.take()
        if ours in ready:
            try:
                figures |= ours.recv()
            except (EOFError, OSError):  # it ended, perhaps in the middle of a figure
                telling = False
        elif child.sentinel in ready:
            child.join()
            return "ended"
        elif stop in ready:
            return "stopped"


def _why(what: str, words: LastWords) -> dict[str, str]:
    line = words.line()
    return {"reason": f"{what}: {line}" if line else what}


def _unsaid(exitcode: int | None, words: LastWords, kills_before: int | None) -> dict[str, Any]:
    """How a child ended that did not say it: out of memory where there is evidence of that."""
    if exitcode is None or exitcode >= 0:
        return {"status": "error"} | _why(
            f"the cell's process ended with exit status {exitcode} and no result", words
        )
    name = signal.Signals(-exitcode).name
    what = f"the cell's process was killed by {name}"
    kills = cgroups.oom_kills()
    if name == "SIGKILL" and kills is not None and kills_before is not None and kills > kills_before:
        return {"status": "oom", "reason": f"{what}, and the kernel counts a kill for want of memory"}
    if name == "SIGABRT" and (said := next((sign for sign in NO_MEMORY if sign in words.text), None)):
        return {"status": "oom", "reason": f"{what} after {said}"}
    return {"status": "error"} | _why(what, words)


def _child(
    cell: Cell, cell_id: str, code_sha256: str, memory: int, theirs: Connection, stderr: Connection
) -> None:
    stderr_tail.speak_into(stderr)
    drop_failed_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it stops us
    # autograd's thread may begin with cuBLAS, which then makes the context current itself: of no consequence
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    theirs.send({"allocator": forkserver.allocator()})
    theirs.send(_outcome(cell, cell_id, code_sha256, memory, theirs))
    theirs.close()


def _end_with_parent() -> None:
    """End this process when its parent has, killed or not: nobody would take its figures, and the same cell
    may be running again. Blocks until then, and so takes nothing from what is measured."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(cell: Cell, cell_id: str, code_sha256: str, memory: int, theirs: Connection) -> dict[str, Any]:
    """How the cell ended, by the record's keys, and the `traceback` of what was not foreseen."""
    from bench.measure.gates import GateFailed
    from bench.measure.roofline import AboveRoofline
    from bench.run.cell import CellRun, DoesNotFit, Unsupported
    from bench.train.loop import Diverged

    try:
        memory_limit.hold(cell.spec, memory)
        CellRun(cell, cell_id, code_sha256, theirs.send, memory).run()
    except Unsupported as reason:
        return {"status": "unsupported", "reason": str(reason)}
    except DoesNotFit as reason:
        return {"status": "predicted_oom", "reason": str(reason)}
    except (GateFailed, AboveRoofline) as failure:
        return {"status": "error", "reason": str(failure)}
    except Diverged as failure:
        return {"status": "diverged", "reason": str(failure), "diverged_step": failure.step}
    except Exception as failure:
        first_line = (str(failure).strip().splitlines() or [""])[0]
        return {
            "status": "oom" if out_of_memory(failure) else "error",
            "reason": f"{type(failure).__name__}: {first_line}",
            "traceback": traceback.format_exc(),
        }
    return {"status": "ok", "reason": None}


def out_of_memory(failure: Exception) -> bool:
    """Whether an exception says that memory ran out; on the CPU torch raises a plain RuntimeError."""
    import torch

    if isinstance(failure, OSError):
        return failure.errno == errno.ENOMEM
    if isinstance(failure, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in NO_MEMORY)
