"""Runs one cell in a child process, with limits of time and memory, a typed status, and figures that survive
a crash.

The parent blocks on pipes and on the end of the child, so that it takes no CPU time from the child.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from bench.config.spec import Cell
from bench.process import cgroups, compiler, forkserver, stderr_tail
from bench.process.memory_errors import NO_MEMORY, out_of_memory
from bench.process.stderr_tail import StderrTail
from bench.run import memory_limit
from bench.run.devices import CPU, Device
from variants.safe_output import drop_failed_output

LONGEST_WAIT = 86_400.0
"""Maximum seconds of one wait, because the system counts milliseconds in 32 bits."""

STOPPED = "stopped by a signal to the sweep before it ended"
"""The reason in the record of a cell that a signal stopped."""


_process_table = threading.Lock()
"""One thread at a time starts or reaps a child: starting one also polls all others of this process, and two
threads that poll the same child at the same time may lose its exit status."""


def run(
    cell: Cell, cell_id: str, code_sha256: str, stop: int | None = None, device: Device = CPU
) -> dict[str, Any]:
    """Run the cell in a child process on a device; returns its figures, with `status`, `reason` and
    `seconds_total`.

    If the child dies or is stopped, the figures that it reported before are kept. It is stopped at its time
    limit, or when the file descriptor `stop` becomes readable. The end of its stderr is stored in the
    experiment's folder, unless the status is ok.
    """
    with compiler.cache_folder(needed=cell.spec.is_compiled) as compiler_files:
        return _run(cell, cell_id, code_sha256, stop, device, compiler_files)


def _run(
    cell: Cell,
    cell_id: str,
    code_sha256: str,
    stop: int | None,
    device: Device,
    compiler_files: Path | None,
) -> dict[str, Any]:
    leftover = memory_limit.await_release(device)
    memory = memory_limit.memory_bytes(cell.spec, device)
    kills = cgroups.oom_kills()
    figures: dict[str, Any] = {
        "device_leftover_bytes": leftover,
        "memory_limit_bytes": None if memory == memory_limit.UNLIMITED else memory,
    }
    begun = time.monotonic()
    limit = cell.spec.measure.limit_seconds
    tail = StderrTail()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = forkserver.context().Process(
        target=_child,
        args=(cell, cell_id, code_sha256, device, memory, theirs, tail.writer, compiler_files),
        daemon=True,
    )
    with _process_table:
        child.start()
    theirs.close()
    tail.writer.close()
    try:
        end = _collect(ours, tail, child, begun + limit, stop, figures)
        if end == "late":
            tail.request_stacks(child.pid)
    finally:
        with _process_table:
            if child.is_alive():
                child.kill()
            child.join()
        tail.forward()
        ours.close()
    if end == "late":
        figures |= {"status": "timeout"} | _reason(
            f"still running after measure.limit_seconds={limit:g}", tail
        )
    elif end == "stopped":
        figures |= {"status": "error", "reason": STOPPED}
    elif "status" not in figures:
        figures |= _status_of_exit(child.exitcode, tail, kills)
    stack = figures.pop("traceback", "")
    if figures["status"] == "error":
        sys.stderr.write(stack)
    stderr_tail.store(cell.folder, cell_id, "" if figures["status"] == "ok" else tail.text + stack)
    tail.reader.close()
    figures["seconds_total"] = time.monotonic() - begun
    return figures


def _collect(
    ours: Connection, tail: StderrTail, child: Any, deadline: float, stop: int | None, figures: dict[str, Any]
) -> Literal["ended", "late", "stopped"]:
    """Collect figures until the child ends, the deadline passes, or `stop` becomes readable."""
    reporting = True
    while True:
        pipes: list[Any] = [*([ours] if reporting else []), *([tail.reader] if tail.is_open else [])]
        stops = [stop] if stop is not None and "status" not in figures else []
        left = max(0.0, deadline - time.monotonic())
        ready = wait([*pipes, *stops, child.sentinel], timeout=min(left, LONGEST_WAIT))
        if not ready:
            if left > LONGEST_WAIT:
                continue
            return "late"
        tail.forward()
        if ours in ready:
            try:
                figures |= ours.recv()
            except (EOFError, OSError):  # it ended, perhaps while it reported a figure
                reporting = False
        elif child.sentinel in ready:
            return "ended"
        elif stop in ready:
            return "stopped"


def _reason(event: str, tail: StderrTail) -> dict[str, str]:
    line = tail.key_line()
    return {"reason": f"{event}: {line}" if line else event}


def _status_of_exit(exitcode: int | None, tail: StderrTail, kills_before: int | None) -> dict[str, Any]:
    """Return the status of a child that ended without reporting one: `oom` if there is evidence of it."""
    if exitcode is None or exitcode >= 0:
        return {"status": "error"} | _reason(
            f"the cell's process ended with exit status {exitcode} and no result", tail
        )
    name = signal.Signals(-exitcode).name
    event = f"the cell's process was killed by {name}"
    kills = cgroups.oom_kills()
    if name == "SIGKILL" and kills is not None and kills_before is not None and kills > kills_before:
        return {"status": "oom", "reason": f"{event}, and the kernel counts an out-of-memory kill"}
    if name == "SIGABRT" and (message := next((sign for sign in NO_MEMORY if sign in tail.text), None)):
        return {"status": "oom", "reason": f"{event} after {message}"}
    return {"status": "error"} | _reason(event, tail)


def _child(
    cell: Cell,
    cell_id: str,
    code_sha256: str,
    device: Device,
    memory: int,
    theirs: Connection,
    stderr: Connection,
    compiler_files: Path | None,
) -> None:
    gc.freeze()  # a collection would visit all objects of torch, in pages that are shared until then
    device.select()
    if compiler_files is not None:
        compiler.use_cache_folder(compiler_files)
    stderr_tail.redirect_stderr(stderr)
    drop_failed_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops this process
    # harmless: if autograd's thread first calls cuBLAS, cuBLAS sets the context itself
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    theirs.send({"allocator": forkserver.allocator()})
    theirs.send(_outcome(cell, cell_id, code_sha256, memory, theirs))
    theirs.close()


def _end_with_parent() -> None:
    """End this process when its parent ends for any reason: its figures would be lost, and another process
    may already run the same cell. This function blocks until then, so it does not affect the measurement."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(cell: Cell, cell_id: str, code_sha256: str, memory: int, theirs: Connection) -> dict[str, Any]:
    """Run the cell; returns its status and reason by record key,
    and the `traceback` of an unexpected exception."""
    from bench.measure.gate_failed import GateFailed
    from bench.measure.roofline import AboveRoofline
    from bench.run.cell import CellRun
    from bench.scenarios.plan import DoesNotFit
    from bench.scenarios.support import Unsupported
    from bench.train.loop import Diverged

    try:
        if (free := memory_limit.after_context(cell.spec, memory)) != memory:
            memory = free
            theirs.send({"memory_limit_bytes": memory})
        memory_limit.enforce(cell.spec, memory)
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
